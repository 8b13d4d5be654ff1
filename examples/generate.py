"""What does a cache of keys and values in 8 bits cost a language model that writes?

The demo's transformer (`byte_lm_models.py`, plain Flax) is trained for a minute on the source code
of Python's standard library, then continues a prompt, greedily and by sampling, with int8 weights
and an int8 cache. What the weights and the cache are stored in is a policy:

    policy = mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", kv_cache="int8")
    model = mp.wrap(ByteLM(shape, decode=True), policy)

The table compares policies: bytes of weights and cache, bytes decoded per second, and how often the
likeliest next byte is float32's, in held-out files.

    python examples/generate.py --prompt "class Path" --temperature 0.8 --top-k 40
    python examples/generate.py --weights lm.safetensors    # trains once, and then reads the file
    python examples/generate.py --nnx                       # decodes by the NNX model

The same seed writes the same text. The models take turns, so that whatever else the machine does
falls on all alike; times are medians, compilation apart.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from generate_report import Row, make_table, targets
    from rich.console import Console
    from rich.progress import Progress
    from shown_progress import ShownProgress
    from verdict import verdict
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package != "rich":
        raise
    sys.exit(f'the example needs `{package}`, which is not installed: pip install "mpjax[demo]"')

import byte_lm_data as data
import jax
import jax.numpy as jnp
import numpy as np
from byte_lm_models import ByteLM, Shape
from byte_lm_runs import LinenRun, make_optimizer
from byte_lm_settings import BITS, Settings
from generate_decoding import Decoder, linen_decoder, nnx_decoder

import mpjax as mp

SOURCE = "mixed_bfloat16"
POLICIES: dict[str, mp.DTypePolicy] = {
    "float32": mp.DTypePolicy("float32"),
    "bfloat16": mp.DTypePolicy(SOURCE),
    "int8": mp.QuantizedDTypePolicy("int8", SOURCE),
    "int8, cache int8": mp.QuantizedDTypePolicy("int8", SOURCE, kv_cache="int8"),
    "int8, cache float8": mp.QuantizedDTypePolicy("int8", SOURCE, kv_cache="float8"),
}
SHOWN = "int8, cache int8"
FULL = Settings(shape=Shape(context=128, width=192, depth=4, heads=4), batch=4)
QUICK = dataclasses.replace(FULL, shape=Shape(32, 32, 1, 2), steps=3, batch=2)
TEXTS, ROUNDS = 16, 5  # held-out texts that are decoded at once, and how often


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains or loads, writes, compares; returns 0, or 1 where a target was missed."""
    options, settings, prompt = parse_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 100)
    train, held_out = data.load()
    try:
        with ShownProgress(console) as progress:
            params = weights_of(options.weights, settings, train, progress)
            make = nnx_decoder if options.nnx else linen_decoder
            decoders = {
                name: make(policy, params, settings.shape, options.top_k)
                for name, policy in POLICIES.items()
            }
            rows = compare(decoders, texts_of(held_out, settings.shape.context), progress)
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 130
    write(console, decoders[SHOWN], prompt, options, settings)
    console.print(make_table(rows, TEXTS))
    return 0 if options.quick or verdict(console, targets(rows)) else 1


def parse_options(
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, Settings, np.ndarray]:
    """Reads the command line: the options, the sizes, and the prompt as bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--prompt",
        default="    def __init__(self, ",
        help="what to continue (default: %(default)r)",
    )
    add("--bytes", type=int, help="how many to write (default: as many as the context has left)")
    add("--temperature", type=float, default=0.8, help="of sampling (default %(default)s)")
    add("--top-k", type=int, default=40, help="sample from as many bytes (default %(default)s)")
    add(
        "--weights", type=Path, help="a file to read them from, or to save them to if there is none"
    )
    add("--steps", type=int, help=f"of training (default {FULL.steps})")
    add("--seed", type=int, default=0, help="of weights, batches and samples (default %(default)s)")
    add("--nnx", action="store_true", help="decode by the model in NNX instead of Linen")
    add("--quick", action="store_true", help="tiny and meaningless, for tests")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    steps = settings.steps if options.steps is None else options.steps
    settings = dataclasses.replace(settings, steps=steps, seed=options.seed)
    prompt = np.frombuffer(options.prompt.encode(), np.uint8)
    if options.bytes is None:
        options.bytes = settings.shape.context - prompt.size
    reason = refusal(options, settings, prompt)
    if reason:
        parser.error(reason)
    return options, settings, prompt


def refusal(options: argparse.Namespace, settings: Settings, prompt: np.ndarray) -> str | None:
    """What is wrong with the options, or None."""
    context = settings.shape.context
    if not prompt.size:
        return "--prompt is empty: give at least one byte to continue"
    if prompt.size >= context:
        return (
            f"--prompt has {prompt.size} bytes, but the model has a context of {context}: at most "
            f"{context - 1}, to leave room for one more"
        )
    if not 1 <= options.bytes <= context - prompt.size:
        return (
            f"--bytes is {options.bytes}: from 1 to {context - prompt.size}, what the context of "
            f"{context} has left after the prompt"
        )
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        return f"--temperature is {options.temperature}: 0 (greedy) or a positive number"
    if not 1 <= options.top_k <= 256:
        return f"--top-k is {options.top_k}: from 1 (greedy) to 256 (all bytes)"
    if settings.steps < 1:
        return f"--steps is {settings.steps}: at least 1"
    if settings.seed < 0:
        return f"--seed is {settings.seed}: at least 0"
    if options.weights and not options.weights.parent.is_dir():
        return f"--weights is `{options.weights}`, in a folder that does not exist; make it first"
    return None


def weights_of(path: Path | None, settings: Settings, text: np.ndarray, progress: Progress) -> Any:
    """The parameters in the file, if there is one; else trained, and saved to it if it is named.

    Raises:
      ValueError: the file is damaged, or holds the weights of another model.
    """
    if path is None or not path.exists():
        params = train(settings, text, progress)
        if path is not None:
            mp.save(path, {"params": params})
        return params
    params = mp.load(path)["params"]
    tokens = jnp.zeros((1, settings.shape.context), jnp.int32)
    wanted = jax.eval_shape(ByteLM(settings.shape).init, jax.random.key(0), tokens)["params"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
        raise ValueError(f"`{path}` holds the weights of another model than this one")
    return params


def train(settings: Settings, text: np.ndarray, progress: Progress) -> Any:
    """The parameters after `steps` steps in float32."""
    tx = make_optimizer(settings.learning_rate, settings.steps)
    run = LinenRun("float32", settings.shape, settings.seed, tx)
    task = progress.add_task("training", total=settings.steps)
    sizes = settings.shape.context, settings.batch, settings.steps, settings.seed
    for batch in data.training_batches(text, *sizes):
        loss = run.train_step(*batch)
        progress.update(task, advance=1, description=f"training, {loss * BITS:.2f} bits per byte")
    return run.weights()["params"]


def texts_of(held_out: np.ndarray, context: int) -> np.ndarray:
    """As many texts, int32 [TEXTS, context], from equal distances in the held-out files."""
    starts = np.linspace(0, held_out.size - context, TEXTS).astype(int)
    return held_out[starts[:, None] + np.arange(context)].astype(np.int32)


def compare(decoders: dict[str, Decoder], texts: np.ndarray, progress: Progress) -> dict[str, Row]:
    """Has each model predict every byte of the texts from those before it, byte by byte."""
    length, key, greedy = texts.shape[1], jax.random.key(0), jnp.float32(0)
    task = progress.add_task("compiling", total=len(decoders) * (ROUNDS + 1))
    rows, expected = {}, None
    for name, decoder in decoders.items():
        predicted = np.asarray(decoder.run(texts, length, key, greedy))
        expected = predicted if expected is None else expected  # of float32, which comes first
        agreement = float(np.mean(predicted == expected))
        rows[name] = Row(agreement, decoder.weight_bytes, decoder.cache_bytes)
        progress.update(task, advance=1, description=f"{name}: comparing")
    for _ in range(ROUNDS):
        for name, decoder in decoders.items():
            started = time.perf_counter()
            decoder.run(texts, length, key, greedy).block_until_ready()
            rows[name].speeds.append(texts.size / (time.perf_counter() - started))
            progress.update(task, advance=1, description=f"{name}: timing")
    return rows


def write(
    console: Console,
    decoder: Decoder,
    prompt: np.ndarray,
    options: argparse.Namespace,
    settings: Settings,
) -> None:
    """Prints what the prompt becomes, greedily and by sampling."""
    texts = np.zeros((TEXTS, settings.shape.context), np.int32)  # the shape that is compiled
    texts[:, : prompt.size] = prompt
    run = partial(decoder.run, texts, prompt.size, jax.random.key(settings.seed))
    sampled = f"temperature {options.temperature}, top {options.top_k}"
    for how, temperature in (("greedy", 0.0), (sampled, options.temperature)):
        chosen = np.asarray(run(jnp.float32(temperature)))[0]
        text = bytes(prompt) + bytes(chosen[prompt.size - 1 :][: options.bytes].astype(np.uint8))
        console.print(f"\n{SHOWN}, {how}:\n")
        shown = text.decode("ascii", "backslashreplace")
        console.print(shown, markup=False, highlight=False, style="dim", soft_wrap=True)
    console.print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
