"""How much memory does quantizing take, beside the weights, and how much does the result?

A float32 model of 1 GB (an embedding and 28 residual pairs of Dense layers, each weight 17 MB) is
quantized by `mp.quantize`: from arrays in memory, from arrays that are donated, and straight from a
safetensors file or an Orbax checkpoint on disk; and what `mp.save` wrote of it is loaded. Every
measurement has a process of its own: the peak of its resident memory (VmHWM of Linux, reset before
the call) less what was resident when everything was imported and, unless they are on disk, the
bytes of the float weights. The quantized result is in the peak.

One JSON row per measurement, in MB of 10^6 bytes: `before_mb`, `above_mb` (the peak less that),
`float_mb` and `quantized_mb` (the bytes of the trees), their ratio `of_float32`, `seconds` of the
call; in `targets` which of these we want. Nobody else is measured.

    python benchmarks/quantize_memory.py [--cases linen ...] [--quick]
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mpjax as mp
from _machine import environment
from _suite import Rows, output_folder, parser, selected

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
BYTES = {"int8": 0.30, "int4/128": 0.20}  # of float32, at most
ABOVE = {"memory": 450, "safetensors": 500, "orbax": 500}  # MB of a 1 GB model, at most


@dataclass(frozen=True)
class Size:
    """Of the model."""

    vocabulary: int = 16384
    width: int = 1024
    blocks: int = 28


@dataclass(frozen=True)
class Case:
    """One measurement: where the weights come from, and what they become."""

    api: str
    mode: str
    source: str

    def __str__(self) -> str:
        return f"{self.api} {self.mode} from {self.source}"


SIZE, QUICK_SIZE = Size(), Size(256, 128, 2)
CASES = {
    str(case): case
    for case in (
        *(Case("linen", m, s) for m in BYTES for s in ("memory", "donated", "safetensors")),
        Case("linen", "int8", "orbax"),
        Case("linen", "int8", "saved file"),
        *(Case("nnx", "int8", s) for s in ("memory", "donated", "safetensors")),
    )
}


class Net(nn.Module):
    """An embedding and pairs of Dense layers."""

    size: Size

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.size.vocabulary, self.size.width, name="embed")(tokens)
        for i in range(self.size.blocks):
            hidden = nn.Dense(4 * self.size.width, name=f"up_{i}")(x)
            x += nn.Dense(self.size.width, name=f"down_{i}")(nn.gelu(hidden))
        return x


class NetNNX(nnx.Module):
    """The same, with the same names."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.blocks = size.blocks
        self.embed = nnx.Embed(size.vocabulary, size.width, rngs=rngs)
        for i in range(size.blocks):
            setattr(self, f"up_{i}", nnx.Linear(size.width, 4 * size.width, rngs=rngs))
            setattr(self, f"down_{i}", nnx.Linear(4 * size.width, size.width, rngs=rngs))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for i in range(self.blocks):
            x += getattr(self, f"down_{i}")(nnx.gelu(getattr(self, f"up_{i}")(x)))
        return x


TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    size = QUICK_SIZE if options.quick else SIZE
    if options.measure:
        print(json.dumps(_measured(CASES[options.measure], size, options.folder)))
        return
    if not CLEAR.exists():
        raise SystemExit(f"the peak of a call is read from Linux' /proc: there is no {CLEAR}")
    machine = environment()
    written = Rows("quantize_memory", output_folder(options, whole=options.cases is None))
    with tempfile.TemporaryDirectory() as folder:
        _write(size, Path(folder))
        for name, case in selected(CASES, options.cases).items():
            row = {"benchmark": "quantize_memory", "case": name, **vars(case)}
            row |= _in_a_process(name, folder, quick=options.quick)
            row["targets"] = [] if options.quick else targets(case, row)
            written.add(row | {"machine": machine})
            print(_line(row), flush=True)


def targets(case: Case, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What we want of a row of the 1 GB model, and whether it is so."""
    wanted = {"of_float32": BYTES[case.mode]}
    if case.mode == "int8" and case.source in ABOVE:
        wanted["above_mb"] = ABOVE[case.source]
    return [
        {"figure": figure, "at_most": limit, "reached": row[figure] <= limit}
        for figure, limit in wanted.items()
    ]


def _parser() -> argparse.ArgumentParser:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", nargs="+", help=f"parts of their names: {'; '.join(CASES)}")
    arguments.add_argument("--measure", help=argparse.SUPPRESS)  # what a process is started for
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return arguments


def _in_a_process(name: str, folder: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    command += ["--quick"] * quick
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _write(size: Size, folder: Path) -> None:
    """The files that are read."""
    params = floats(size)
    mp.save(folder / "float.safetensors", params)
    mp.save_checkpoint(folder / "float", params, step=0)
    model = mp.wrap(Net(size), "int8_from_float32")
    mp.save(
        folder / "int8.safetensors", mp.quantize(model, {"params": params}, TOKENS, donate=True)
    )


def floats(size: Size) -> dict[str, Any]:
    """Parameters of the model: Gaussians, the same in every process."""
    shapes = jax.eval_shape(Net(size).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)


def _measured(case: Case, size: Size, folder: Path) -> dict[str, Any]:
    """Prepares, then measures one call."""
    jax.block_until_ready(jnp.zeros(1) + 1)  # what JAX starts, is started
    if case.source == "orbax":
        importlib.import_module("orbax.checkpoint")  # its 30 MB are not the weights'
    before = resident()
    call, float_bytes = _call(case, size, folder)
    before += float_bytes if case.source in ("memory", "donated") else 0
    CLEAR.write_text("5")  # sets the peak back to what is resident now
    started = time.perf_counter()
    result = jax.block_until_ready(call())
    seconds = time.perf_counter() - started
    peak = resident(peak=True)
    quantized = sum(x.nbytes for x in jax.tree.leaves(result, is_leaf=_is_weight))
    return {
        "before_mb": round(before / 1e6, 1),
        "above_mb": round((peak - before) / 1e6, 1),
        "float_mb": round(float_bytes / 1e6, 1),
        "quantized_mb": round(quantized / 1e6, 1),
        "of_float32": round(quantized / float_bytes, 4),
        "seconds": round(seconds, 1),
    }


def _call(case: Case, size: Size, folder: Path) -> tuple[Callable[[], Any], int]:
    """The call to measure, with what it needs in memory, and the bytes of the float weights."""
    policy = f"{case.mode}_from_float32"
    shapes = jax.eval_shape(Net(size).init, jax.random.key(0), TOKENS)["params"]
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    if case.source == "saved file":
        return lambda: mp.load(folder / "int8.safetensors"), nbytes
    path = folder / ("float" if case.source == "orbax" else "float.safetensors")
    from_disk = case.source in ("safetensors", "orbax")
    if case.api == "linen":
        model = mp.wrap(Net(size), policy)
        params = None if from_disk else floats(size)

        def quantize() -> Any:
            tree = mp.open_weights(path) if params is None else params
            return mp.quantize(model, {"params": tree}, TOKENS, donate=case.source == "donated")

        return quantize, nbytes
    abstract = nnx.eval_shape(lambda: NetNNX(size, nnx.Rngs(0)))
    model = mp.wrap(abstract, policy)
    if not from_disk:
        nnx.update(model, floats(size))

    def quantize_nnx() -> Any:
        weights = (mp.open_weights(path),) if from_disk else ()
        quantized = mp.quantize(model, *weights, donate=case.source == "donated")
        return nnx.as_pure(nnx.state(quantized, nnx.Param))

    return quantize_nnx, nbytes


def resident(peak: bool = False) -> int:
    """The resident bytes of this process, now or at most since the peak was set back."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _is_weight(x: Any) -> bool:
    return hasattr(x, "nbytes")


def _line(row: dict[str, Any]) -> str:
    words = {True: "reached", False: "MISSED"}
    wanted = "".join(
        f", {each['figure']} at most {each['at_most']}: {words[each['reached']]}"
        for each in row["targets"]
    )
    return (
        f"{row['case']}: {row['above_mb']} MB above {row['before_mb']} in {row['seconds']} s, "
        f"weights {row['quantized_mb']} of {row['float_mb']} MB ({row['of_float32']}){wanted}"
    )


if __name__ == "__main__":
    main()
