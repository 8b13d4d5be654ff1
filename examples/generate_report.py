"""What the example shows: agreement with float32, bytes, speed, and what was promised of them."""

from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.table import Table

# Of whom the greedy bytes agree with float32's in at least this share of positions.
AGREEMENT = {"int8, cache int8": 0.95, "int8, cache float8": 0.93}
CACHE = 0.55  # of bfloat16's, at most


@dataclass
class Row:
    """What was measured of one model.

    Attributes:
      agreement: share of positions where its likeliest byte is float32's.
      weight_bytes: of all weights.
      cache_bytes: of the cache of one text.
      speeds: bytes decoded per second, of each round.
    """

    agreement: float
    weight_bytes: int
    cache_bytes: int
    speeds: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return float(np.median(self.speeds)) if self.speeds else float("nan")


def make_table(rows: dict[str, Row], texts: int) -> Table:
    """A row per model; the cache beside its ratio to bfloat16's, the speed beside float32's."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{texts} texts at once")
    for heading in ("weights", "same byte as float32", "weights, MB", "cache, kB", "bytes/s"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    half, reference = rows["bfloat16"].cache_bytes, rows["float32"].speed
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.agreement:.3f}",
            f"{row.weight_bytes / 1e6:.2f}",
            f"{row.cache_bytes / 1e3:.1f} ({row.cache_bytes / half:.2f}x)",
            f"{row.speed:,.0f} ({row.speed / reference:.2f}x)".replace(",", " "),
        )
    return table


def targets(rows: dict[str, Row]) -> list[tuple[str, bool]]:
    """Each promise, and whether it came true."""
    found = []
    for name, least in AGREEMENT.items():
        same = rows[name].agreement
        ratio = rows[name].cache_bytes / rows["bfloat16"].cache_bytes
        found.append(
            (f"{name}: {same:.3f} of bytes are float32's, at least {least}", same >= least)
        )
        found.append((f"{name}: {ratio:.2f} of bfloat16's cache, at most {CACHE}", ratio <= CACHE))
    return found
