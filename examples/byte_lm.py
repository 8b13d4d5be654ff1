"""What do bfloat16 and int8 cost a language model, in bits per byte, in bytes and in seconds?

A transformer written in plain Flax reads the source code of Python's standard library, byte by
byte. It is trained twice, from the same weights, on the same batches, under the policies `float32`
and `mixed_bfloat16`; then the weights of the second become int8. All three predict the same
held-out files. The table gives each figure beside its ratio to float32, and `byte_lm.png` shows
the two loss curves.

    python examples/byte_lm.py            # Linen, under five minutes on two cores
    python examples/byte_lm.py --nnx      # the same with NNX

The two trainings take turns, step by step, and so do the three evaluations, batch by batch, so
that whatever else the machine does falls on all of them alike. Times are medians, and the first
call of each function, which compiles it, is not among them.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from byte_lm_report import (
        BFLOAT16,
        FLOAT32,
        INT8,
        Result,
        Row,
        make_table,
        remarks,
        targets,
        tree_bytes,
        write_figure,
    )
    from rich.console import Console
    from rich.progress import Progress
    from shown_progress import ShownProgress
    from verdict import verdict
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("rich", "matplotlib"):
        raise
    sys.exit(f'the demo needs `{package}`, which is not installed: pip install "mpjax[demo]"')

import byte_lm_data as data
import numpy as np
from byte_lm_runs import LinenRun, NNXRun, Run, make_optimizer
from byte_lm_settings import BITS, QUICK, Settings

PROMPT = b"def "


def main() -> int:
    """Runs the demo; returns 0, 1 where a target was missed, 130 where it was interrupted."""
    options, settings = parse_options()
    console = Console(width=None if sys.stdout.isatty() else 100)
    train, held_out = data.load()
    held_out = held_out[: settings.evaluated]
    console.print(
        f"{train.size / 1e6:.1f} MB of source code to train on, {held_out.size / 1e3:.0f} kB of "
        f"other files held out; {settings.steps} steps of "
        f"{settings.batch * settings.shape.context} bytes, seed {settings.seed}."
    )
    result = Result(data.order0_entropy(held_out), data.zlib_bits_per_byte(held_out))
    started, sample, interrupted = time.perf_counter(), b"", False
    try:
        with ShownProgress(console) as progress:
            make_run = NNXRun if options.nnx else LinenRun
            sample = work(make_run, settings, (train, held_out), result, progress)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted: this is what was measured so far.")
    path = options.out / ("byte_lm_nnx.png" if options.nnx else "byte_lm.png")
    report(console, result, sample, path)
    console.print(f"{time.perf_counter() - started:.0f} seconds, compilation included.")
    if interrupted:
        return 130
    claimed = not options.quick and settings.steps >= Settings.steps
    return 0 if not claimed or verdict(console, targets(result)) else 1


def parse_options() -> tuple[argparse.Namespace, Settings]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nnx", action="store_true", help="the model in NNX instead of Linen")
    parser.add_argument("--steps", type=int, help=f"training steps (default {Settings.steps})")
    parser.add_argument("--seed", type=int, help=f"weights and batches (default {Settings.seed})")
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of the PNG")
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless, for tests")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}: at least 1")
    if options.seed is not None and options.seed < 0:
        parser.error(f"--seed is {options.seed}: at least 0")
    if not options.out.is_dir():
        parser.error(f"--out is `{options.out}`, which is not a folder; make it first")
    try:
        tempfile.TemporaryFile(dir=options.out).close()  # now, and not after the training
    except OSError as error:
        parser.error(f"--out is `{options.out}`, where no file can be written: {error.strerror}")
    given = {k: v for k in ("steps", "seed") if (v := getattr(options, k)) is not None}
    return options, dataclasses.replace(QUICK if options.quick else Settings(), **given)


def work(
    make_run: type,
    settings: Settings,
    text: tuple[np.ndarray, np.ndarray],
    result: Result,
    progress: Progress,
) -> bytes:
    """Trains, quantizes, evaluates and samples; fills `result` as it goes, returns the sample."""
    train, held_out = text
    context = settings.shape.context
    tx = make_optimizer(settings.learning_rate, settings.steps)
    runs = {name: make_run(name, settings.shape, settings.seed, tx) for name in (FLOAT32, BFLOAT16)}
    for name, run in runs.items():
        result.rows[name].weight_bytes = tree_bytes(run.weights())
    train_in_turns(
        runs,
        data.training_batches(train, context, settings.batch, settings.steps, settings.seed),
        result,
        progress,
    )

    runs[INT8] = runs[BFLOAT16].quantized()
    result.rows[INT8] = Row(weight_bytes=tree_bytes(runs[INT8].weights()))
    evaluate_in_turns(
        runs,
        data.evaluation_batches(held_out, context, settings.evaluation_batch),
        result,
        progress,
    )
    return generate(runs[INT8], settings, progress)


def train_in_turns(
    runs: dict[str, Run], batches: data.Batches, result: Result, progress: Progress
) -> None:
    """Takes each training step once per run, on the same batch."""
    task = progress.add_task("compiling the training step", total=len(batches))
    for step, batch in enumerate(batches):
        for name, run in runs.items():
            row = result.rows[name]
            loss, seconds = timed(run.train_step, *batch)
            row.losses.append(loss * BITS)
            if step > 0:  # the first call compiles
                row.step_times.append(seconds)
        bits = " ".join(f"{name} {result.rows[name].losses[-1]:.2f}" for name in runs)
        progress.update(task, advance=1, description=f"training, bits per byte: {bits}")


def evaluate_in_turns(
    runs: dict[str, Run], batches: data.Batches, result: Result, progress: Progress
) -> None:
    """Scores every held-out byte with each run, one batch after the other."""
    size = sum(float(weights.sum()) for _, _, weights in batches)
    task = progress.add_task("compiling the forward pass", total=len(batches))
    for run in runs.values():
        run.total_loss(*batches[0])
    totals = dict.fromkeys(runs, 0.0)
    for batch in batches:
        for name, run in runs.items():
            loss, seconds = timed(run.total_loss, *batch)
            totals[name] += loss
            result.rows[name].forward_times.append(seconds)
            result.rows[name].forward_bytes = batch[0].size
        progress.update(task, advance=1, description="evaluating held-out files")
    for name, total in totals.items():
        result.rows[name].bits_per_byte = total * BITS / size


def generate(run: Run, settings: Settings, progress: Progress) -> bytes:
    """Continues the prompt by `sampled` bytes, at temperature 0.8."""
    task = progress.add_task("writing a sample", total=settings.sampled)
    context, random = settings.shape.context, np.random.default_rng(settings.seed)
    text = list(PROMPT)
    for _ in range(settings.sampled):
        seen = text[-context:]
        tokens = np.array([seen + [0] * (context - len(seen))], np.int32)
        logits = run.logits(tokens)[0, len(seen) - 1] / 0.8  # what follows is masked: causal
        text.append(int(np.argmax(logits + random.gumbel(size=logits.shape))))
        progress.update(task, advance=1)
    return bytes(text)


def timed(call: Callable[..., float], *args: Any) -> tuple[float, float]:
    """Returns what `call` returns, and the seconds it took; a float leaves nothing in flight."""
    started = time.perf_counter()
    value = call(*args)
    return value, time.perf_counter() - started


def report(console: Console, result: Result, sample: bytes, path: Path) -> None:
    """Prints the sample, table and remarks that there are, and draws the losses, if any."""
    if sample:
        text = sample.decode("ascii", "backslashreplace")
        console.print("\nA sample of the int8 model:\n")
        console.print(text, markup=False, highlight=False, style="dim")
    console.print()
    console.print(make_table(result))
    for line in remarks(result):
        console.print(line, highlight=False)
    if any(row.losses for row in result.rows.values()):
        write_figure(result, path)
        console.print(f"Loss curves: {path}", highlight=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
