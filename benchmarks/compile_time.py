"""How much longer does a training step take to compile when the model is wrapped?

The step is the demo's: a byte-level transformer under AdamW (`examples/byte_lm.py`). Its peers are
the same model without mpjax: plain Flax for `float32`, and Flax layers with `dtype=jnp.bfloat16`
for `mixed_bfloat16`. Wrapped and plain are compiled in turns, in one process, with JAX's caches
cleared before each; a first round, which pays for imports and other firsts, is thrown away.

One JSON row per case, medians in seconds over the rounds: `trace_lower` (Python to StableHLO, where
mpjax runs), `compile` (XLA, which sees only what mpjax left), `total`, and `cpu`, the processor
seconds in it, which other programs on the machine disturb less; each for `wrapped` and `plain`,
and their ratios. The target is a ratio of the totals of at most 1.3.

    python benchmarks/compile_time.py [--api linen|nnx] [--rounds 5]
"""

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import mpjax as mp
from _suite import Rows, output_folder, parser
from _timing import compile_once

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
demo = importlib.import_module("byte_lm")
models = importlib.import_module("byte_lm_models")
runs = importlib.import_module("byte_lm_runs")

TARGET = 1.3
ROUNDS = 5
PLAIN_DTYPE = {"float32": None, "mixed_bfloat16": jnp.bfloat16}
SETTINGS = demo.Settings()
TOKENS = jax.ShapeDtypeStruct((SETTINGS.batch, SETTINGS.shape.context), jnp.int32)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--api", choices=("linen", "nnx"), help="one of the two (default: both)")
    options = arguments.parse_args()
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    jax.config.update("jax_enable_compilation_cache", False)
    written = Rows("compile_time", output_folder(options, whole=options.api is None))
    for api in (options.api,) if options.api else ("linen", "nnx"):
        for policy in PLAIN_DTYPE:
            row = measure(api, policy, rounds)
            print(json.dumps(row), flush=True)
            written.add(row)


def measure(api: str, policy: str, rounds: int) -> dict[str, Any]:
    """Compiles the wrapped and the plain step `rounds` times, in turns; returns the JSON row."""
    prepare = {"linen": linen_step, "nnx": nnx_step}[api]
    lower = {"wrapped": prepare(policy, None), "plain": prepare(None, PLAIN_DTYPE[policy])}
    times: dict[str, list[dict[str, float]]] = {"wrapped": [], "plain": []}
    for turn in range(rounds + 1):
        names = ("wrapped", "plain") if turn % 2 else ("plain", "wrapped")
        for name in names:
            seconds = compile_once(lower[name])
            if turn > 0:
                times[name].append(seconds)
    row: dict[str, Any] = {
        "benchmark": "compile_time",
        "api": api,
        "policy": policy,
        "peer": f"plain Flax, dtype={jnp.dtype(PLAIN_DTYPE[policy] or jnp.float32).name}",
        "backend": jax.default_backend(),
        "rounds": rounds,
    }
    parts = ("trace_lower", "compile", "total", "cpu")
    for name, each in times.items():
        row[name] = {part: round(median(seconds[part] for seconds in each), 3) for part in parts}
    for part in parts:
        row[f"ratio_{part}"] = round(row["wrapped"][part] / row["plain"][part], 3)
    return row | {"target": TARGET, "reached": row["ratio_total"] <= TARGET}


def linen_step(policy: str | None, dtype: Any) -> Callable[[], Any]:
    """A function that lowers the Linen step: wrapped under `policy`, or plain with `dtype`."""
    model = models.ByteLM(SETTINGS.shape, dtype)
    model = model if policy is None else mp.wrap(model, policy)
    tx = runs.make_optimizer(SETTINGS.learning_rate, SETTINGS.steps)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    moments = jax.eval_shape(tx.init, variables)
    step = partial(runs.linen_train, model, tx)
    # A new jit each time, as donation and partial are the demo's own.
    return lambda: jax.jit(step, donate_argnums=(0, 1)).lower(variables, moments, TOKENS, TOKENS)


def nnx_step(policy: str | None, dtype: Any) -> Callable[[], Any]:
    """A function that lowers the NNX step: wrapped under `policy`, or plain with `dtype`."""
    model = models.ByteLMNNX(SETTINGS.shape, dtype, rngs=nnx.Rngs(0))
    model = model if policy is None else mp.wrap(model, policy)
    tx = runs.make_optimizer(SETTINGS.learning_rate, SETTINGS.steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    tokens = jnp.zeros(TOKENS.shape, TOKENS.dtype)
    return lambda: runs.nnx_train.lower(model, optimizer, tokens, tokens)


if __name__ == "__main__":
    main()
