"""What the example shows: agreement with float32, bytes, speed, and what was promised of them."""

from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.table import Table
from sentence_encoder_models import (
    FLOAT8,
    FLOAT32,
    GPTQ,
    INT4,
    ONNX_FLOAT32,
    ONNX_INT8,
    SMOOTHQUANT,
    W8A8,
    W8A16,
)

# Of whom the mean cosine, and the share of equal nearest neighbors, is at least this.
COSINES = {W8A16: 0.999, W8A8: 0.997, SMOOTHQUANT: 0.9985, FLOAT8: 0.997, INT4: 0.955, GPTQ: 0.98}
NEIGHBORS = {W8A16: 0.97, W8A8: 0.93, SMOOTHQUANT: 0.95}
BYTES = {W8A16: 0.30, W8A8: 0.30, SMOOTHQUANT: 0.30, INT4: 0.20, GPTQ: 0.20}  # of float32's


@dataclass
class Row:
    """What was measured of one encoder.

    Attributes:
      cosine: mean cosine of its embeddings with float32's.
      neighbors: share of sentences whose nearest other sentence is the same as float32's.
      weight_bytes: of all weights.
      speeds: sentences per second of each round.
    """

    cosine: float
    neighbors: float
    weight_bytes: int
    speeds: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return float(np.median(self.speeds)) if self.speeds else float("nan")


def agreement(embeddings: np.ndarray, reference: np.ndarray, among: int) -> tuple[float, float]:
    """Mean cosine of embeddings [N, D] with float32's, and the share of equal nearest neighbors.

    Both are of unit length. The nearest neighbor of a sentence is the one with the largest cosine
    among the other `among - 1` of its draw: the more there are, the closer is the second.
    """
    cosine = np.sum(embeddings.astype(np.float64) * reference, axis=1).mean()
    same = [
        nearest_neighbors(embeddings[start : start + among])
        == nearest_neighbors(reference[start : start + among])
        for start in range(0, len(embeddings), among)
    ]
    return float(cosine), float(np.concatenate(same).mean())


def nearest_neighbors(embeddings: np.ndarray) -> np.ndarray:
    """The row of the nearest other sentence, [N], of unit vectors [N, D]."""
    wide = embeddings.astype(np.float64)
    similarity = wide @ wide.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(axis=1)


def make_table(rows: dict[str, Row], title: str) -> Table:
    """One row per encoder."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        caption="MB of all weights, sentences per second; behind each its ratio to Flax float32.",
        caption_justify="left",
    )
    table.add_column("encoder", no_wrap=True)
    for name in ("mean\ncosine", "same nearest\nneighbor", "weights\nMB", "sentences/s"):
        table.add_column(name, justify="right", no_wrap=True)
    if ONNX_FLOAT32 in rows:
        table.add_column("of ONNX\nfloat32", justify="right", no_wrap=True)
        table.add_column("of ONNX\nint8", justify="right", no_wrap=True)
    base = rows[FLOAT32]
    for name, row in rows.items():
        peers = [rows[peer].speed for peer in (ONNX_FLOAT32, ONNX_INT8) if peer in rows]
        table.add_row(
            name,
            f"{row.cosine:.5f}",
            f"{row.neighbors:.3f}",
            f"{row.weight_bytes / 1e6:.2f} {row.weight_bytes / base.weight_bytes:.2f}x",
            f"{row.speed:,.0f} {row.speed / base.speed:.2f}x",
            *(f"{row.speed / peer:.2f}x" for peer in peers),
        )
    return table


def targets(rows: dict[str, Row], float_embeddings: bool) -> list[tuple[str, bool]]:
    """What is promised of a full run, each with whether it came true."""
    checks = []
    for name, least in COSINES.items():
        cosine = rows[name].cosine
        checks.append((f"{name}: mean cosine {cosine:.5f}, at least {least}", cosine >= least))
    for name, least in NEIGHBORS.items():
        share = rows[name].neighbors
        text = f"{name}: nearest neighbor of {share:.3f} the same, at least {least}"
        checks.append((text, share >= least))
    for name, most in {} if float_embeddings else BYTES.items():
        size = rows[name].weight_bytes / rows[FLOAT32].weight_bytes
        checks.append((f"{name}: {size:.3f} of float32's bytes, at most {most}", size <= most))
    return checks
