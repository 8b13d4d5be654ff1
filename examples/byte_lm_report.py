"""What the demo shows: one table, the words under it, and the loss curves as a PNG.

Every sentence is computed from a measurement. A figure that was not reached, because the demo
was interrupted, is printed as `-`, and no claim is made of it.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

FLOAT32, BFLOAT16, INT8 = "float32", "mixed_bfloat16", "int8 (from mixed_bfloat16)"


@dataclass
class Row:
    """What was measured of one model. Times are seconds per call; `losses` are bits per byte."""

    losses: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    forward_times: list[float] = field(default_factory=list)
    forward_bytes: int = 0
    weight_bytes: float = float("nan")
    bits_per_byte: float = float("nan")

    @property
    def step_time(self) -> float:
        return float(np.median(self.step_times)) if self.step_times else float("nan")

    @property
    def speed(self) -> float:
        """Bytes (tokens) per second of a forward pass."""
        if not self.forward_times:
            return float("nan")
        return self.forward_bytes / float(np.median(self.forward_times))


@dataclass
class Result:
    """The rows, by name, beside what needs no model: order-0 entropy and zlib, bits per byte."""

    entropy: float
    zlib: float
    rows: dict[str, Row] = field(default_factory=lambda: {FLOAT32: Row(), BFLOAT16: Row()})


def tree_bytes(tree) -> int:
    """Bytes of every leaf of a tree: embeddings, norms, biases, scales and padding count."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def make_table(result: Result) -> Table:
    """One row per model, each figure followed by its ratio to float32's."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Each figure, and its ratio to float32's",
        title_justify="left",
        caption="Inference is a forward pass and its loss, over a batch of held-out bytes.",
        caption_justify="left",
    )
    table.add_column("model")
    for name in ("held-out\nbits/byte", "weights\nMB", "train step\nms", "inference\ntokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    base = result.rows[FLOAT32]
    for name, row in result.rows.items():
        table.add_row(
            name,
            _cell(row.bits_per_byte, base.bits_per_byte, ".3f", ".3f"),
            _cell(row.weight_bytes / 1e6, base.weight_bytes / 1e6, ".2f"),
            _cell(row.step_time * 1e3, base.step_time * 1e3, ".1f"),
            _cell(row.speed, base.speed, ",.0f"),
        )
    table.add_section()
    table.add_row("zlib, level 9", f"{result.zlib:.3f}       ", "", "", "")
    table.add_row("order-0 entropy", f"{result.entropy:.3f}       ", "", "", "")
    return table


def _cell(value: float, base: float, form: str, ratio_form: str = ".2f") -> str:
    if np.isnan(value):
        return "-"
    return f"{value:{form}} {value / base:{ratio_form}}x"


def remarks(result: Result) -> list[str]:
    """Where a row is slower than float32, a sentence that says so, by how much."""
    base = result.rows[FLOAT32]
    lines = []
    for name, row in result.rows.items():
        if row.step_time > base.step_time:
            times = row.step_time / base.step_time
            lines.append(f"{name} trains {times:.2f} times slower than float32 on this machine.")
        if row.speed < base.speed:
            times = base.speed / row.speed
            lines.append(f"{name} infers {times:.2f} times slower than float32 on this machine.")
    scores = [row.bits_per_byte for row in result.rows.values() if row.bits_per_byte > 0]
    if scores and min(scores) > result.zlib:
        lines.append("zlib, which looks 32 kB back, is ahead of every model here.")
    return lines


def targets(result: Result) -> list[tuple[str, bool]]:
    """What the demo promises of a full run, each with whether it came true."""
    f32, bf16, int8 = (result.rows[name] for name in (FLOAT32, BFLOAT16, INT8))
    size = int8.weight_bytes / f32.weight_bytes
    return [
        (f"float32: {f32.bits_per_byte:.3f} bits per byte, at most 3.0", f32.bits_per_byte <= 3.0),
        within_one_percent(BFLOAT16, bf16.bits_per_byte, FLOAT32, f32.bits_per_byte),
        within_one_percent(
            "int8", int8.bits_per_byte, f"the {BFLOAT16} model it came from", bf16.bits_per_byte
        ),
        (f"int8: {size:.3f} of float32's weight bytes, at most 0.30", size <= 0.30),
    ]


def within_one_percent(name: str, bits: float, base_name: str, base: float) -> tuple[str, bool]:
    """What a model lost to another, in words, and whether that is at most 1% to either side."""
    excess = bits / base - 1
    side = "above" if excess > 0 else "below"
    return f"{name}: {abs(excess):.3%} {side} {base_name}, within 1%", abs(excess) <= 0.01


def write_figure(result: Result, path: Path) -> None:
    """Draws both loss curves above their difference."""
    figure, top, bottom = make_figure()
    curves = {name: np.array(row.losses) for name, row in result.rows.items() if row.losses}
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=False):
        top.plot(*smooth(curve), style, label=name)
    top.axhline(result.entropy, color="gray", linestyle=":", label="order-0 entropy, held out")
    top.axhline(result.zlib, color="gray", linestyle="-.", label="zlib level 9, held out")
    top.set(
        ylabel="training loss, bits per byte",
        title="Byte-level language model, same initial weights",
    )
    top.legend()
    if len(curves) == 2:
        f32, bf16 = curves.values()
        steps = min(f32.size, bf16.size)
        bottom.plot(*smooth(bf16[:steps] - f32[:steps]), color="C1")
    bottom.axhline(0, color="gray", linewidth=0.8)
    bottom.set(xlabel="step", ylabel="bfloat16\nminus float32")
    save_figure(figure, path)


def make_figure() -> tuple[Figure, Axes, Axes]:
    """An empty figure: a place for curves, and under it a lower one for their differences."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    return figure, top, bottom


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def smooth(curve: np.ndarray, window: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean of the last `window` values at each; fewer where the curve is short."""
    window = max(1, min(window, curve.size // 5))
    mean = np.convolve(curve, np.ones(window) / window, mode="valid")
    return np.arange(window, curve.size + 1), mean
