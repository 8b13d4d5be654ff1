"""Does training in 8 bits cost a language model anything, and does it survive `kill -9`?

The demo's transformer (`byte_lm_models.py`, plain Flax) learns the same text, from the same weights
and on the same batches, under five policies:

    float32
    mixed_bfloat16
    mixed_float16                        with its dynamic loss scale
    float8_from_mixed_bfloat16           float8, scales from the amaxes of earlier steps
    float8_current_from_mixed_bfloat16   float8, scales from the amaxes of the step itself

The table compares the bits each needs per held-out byte with mixed_bfloat16's; the loss curves are
in `train_float8.png`, in the folder of the run. Exits with 1 if one is not within 1%.

    python examples/train_float8.py            # 1000 steps of each: about ten minutes on two cores
    python examples/train_float8.py --resume   # goes on where it was interrupted, or killed
    python examples/train_float8.py --nnx      # the same with NNX

Every 100 steps all of it is saved: parameters, optimizer, scaling states, loss scale, step. A run
that was resumed ends with the same weights, bit for bit: compare the SHA-256 under the table.

This is about quality. On a CPU float8 saves nothing: XLA computes its products in a wider format,
so a step takes about as long as one in bfloat16, or longer. How fast float8 is is the question of
`benchmarks/train_step.py`.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

try:
    from rich.console import Console
    from shown_progress import ShownProgress
    from train_float8_report import Outcome, make_table, remarks, targets, write_figure
    from verdict import verdict
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("rich", "matplotlib"):
        raise
    sys.exit(f'the example needs `{package}`, which is not installed: pip install "mpjax[demo]"')

import byte_lm_data as data
import numpy as np
from train_float8_options import Plan, claim_folder, make_parser
from train_float8_run import run_policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains under each policy; returns 0, 1 where one is not within 1%, 130 if interrupted."""
    parser = make_parser((__doc__ or "").split("\n")[0])
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    text = data.load()
    try:
        plan = claim_folder(options, text[0])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    settings = plan.settings
    console.print(
        f"{settings.steps} steps of {settings.batch * settings.shape.context} bytes, seed "
        f"{settings.seed}, under each of {len(plan.policies)} policies, in "
        f"{'NNX' if plan.nnx else 'Linen'}; the run is in `{options.output}`."
    )
    started = time.perf_counter()
    try:
        outcomes = run_all(plan, text, options.output, console)
    except KeyboardInterrupt:
        console.print("Interrupted: --resume continues from the last checkpoint.")
        return 130
    report(console, outcomes, options.output / "train_float8.png")
    console.print(f"{time.perf_counter() - started:.0f} seconds, compilation included.")
    return 0 if plan.quick or verdict(console, targets(outcomes)) else 1


def run_all(
    plan: Plan, text: tuple[np.ndarray, np.ndarray], folder: Path, console: Console
) -> dict[str, Outcome]:
    """Trains and scores the policies, one after the other."""
    outcomes = {}
    with ShownProgress(console) as progress:
        for policy in plan.policies:
            task = progress.add_task(policy, total=plan.settings.steps)
            show = partial(progress.update, task)
            outcomes[policy] = run_policy(policy, plan, folder / policy, text, show)
    return outcomes


def report(console: Console, outcomes: dict[str, Outcome], path: Path) -> None:
    """Prints the table and what follows from it, and draws the losses."""
    console.print()
    console.print(make_table(outcomes))
    for line in remarks(outcomes):
        console.print(line, highlight=False)
    write_figure(outcomes, path)
    console.print(f"Loss curves: {path}", highlight=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
