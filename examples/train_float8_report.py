"""What the example shows: a table, what follows from it, and the loss curves as a PNG."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from byte_lm_report import make_figure, save_figure, smooth, within_one_percent
from rich import box
from rich.table import Table

BASE = "mixed_bfloat16"


@dataclass(frozen=True)
class Outcome:
    """What training under one policy came to.

    Attributes:
      losses: of each training step, bits per byte.
      step_times: seconds of each step that did not compile.
      bits_per_byte: of the held-out text.
      skipped_steps: steps whose gradients were not finite.
      loss_scale: at the end; 1 for a policy that scales no loss.
      weights_sha256: hexadecimal, of all parameters.
    """

    losses: list[float]
    step_times: list[float]
    bits_per_byte: float
    skipped_steps: int
    loss_scale: float
    weights_sha256: str

    @property
    def step_time(self) -> float:
        return float(np.median(self.step_times)) if self.step_times else float("nan")


def make_table(outcomes: dict[str, Outcome]) -> Table:
    """One row per policy, with ratios to mixed_bfloat16 where that is among them."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for name in (
        "held-out\nbits/byte",
        "against\nmixed_bfloat16",
        "train step\nseconds",
        "against\nmixed_bfloat16",
        "skipped\nsteps",
        "final\nloss scale",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    base = outcomes.get(BASE)
    for name, outcome in outcomes.items():
        excess = outcome.bits_per_byte / base.bits_per_byte - 1 if base else float("nan")
        times = outcome.step_time / base.step_time if base else float("nan")
        table.add_row(
            name,
            f"{outcome.bits_per_byte:.4f}",
            _cell(excess, "+.3%"),
            _cell(outcome.step_time, ".4f"),
            _cell(times, ".2f", "x"),
            str(outcome.skipped_steps),
            f"{outcome.loss_scale:g}",
        )
    return table


def _cell(value: float, form: str, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}{unit}"


def remarks(outcomes: dict[str, Outcome]) -> list[str]:
    """What the table does not say: whose steps take longer, and which weights these are."""
    base = outcomes.get(BASE)
    lines = []
    for name, outcome in outcomes.items():
        if base and outcome.step_time > base.step_time:
            times = outcome.step_time / base.step_time
            lines.append(f"A step under {name} takes {times:.2f} times as long as under {BASE}.")
    if any("float8" in line for line in lines):
        lines.append("So 8 bits save no time here; benchmarks/train_step.py is about speed.")
    lines.append("SHA-256 of the trained weights:")
    return lines + [f"  {outcome.weights_sha256}  {name}" for name, outcome in outcomes.items()]


def targets(outcomes: dict[str, Outcome]) -> list[tuple[str, bool]]:
    """What is promised of a full run, each with whether it came true."""
    base = outcomes.get(BASE)
    if base is None:
        return []
    return [
        within_one_percent(name, outcome.bits_per_byte, BASE, base.bits_per_byte)
        for name, outcome in outcomes.items()
        if name != BASE
    ]


def write_figure(outcomes: dict[str, Outcome], path: Path) -> None:
    """Draws the loss curves above their differences to mixed_bfloat16's."""
    figure, top, bottom = make_figure()
    base = outcomes.get(BASE)
    for i, (name, outcome) in enumerate(outcomes.items()):
        losses = np.array(outcome.losses)
        top.plot(*smooth(losses), color=f"C{i}", linewidth=1, label=name)
        if base and outcome is not base:
            bottom.plot(*smooth(losses - np.array(base.losses)), color=f"C{i}", linewidth=1)
    top.set(
        ylabel="training loss, bits per byte",
        title="Byte-level language model, same weights at first, same batches",
    )
    top.legend()
    bottom.axhline(0, color="gray", linewidth=0.8)
    bottom.set(xlabel="step", ylabel=f"minus\n{BASE}")
    save_figure(figure, path)
