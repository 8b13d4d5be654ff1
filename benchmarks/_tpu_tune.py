"""From the rows of `tpu_kernels.py` to the table by which the library takes its Pallas kernel.

Of each chip, for the kernel that the library has (the cases `w4a16`):

    from how many rows   the least number of which each shape is estimated at 0.85 of XLA's cycles
                         or less, where none of as many rows or more is at more than XLA's
    in which blocks      below 256 rows, and from there on: the candidate whose worst ratio to
                         XLA's cycles is the least

A chip that is not known gets what holds for all of these: the largest of those numbers, and the
blocks whose worst ratio on any of them is the least.

Beside few rows the kernel is for int4 of as many entries as the smallest weight that was compared:
int8 takes XLA hardly longer than its bytes do (there the kernel is at 1.04 to 1.16 of its cycles on
a v6e, at 1.45 and more on a TPU7x), and small weights are read in less time than a kernel takes to
start (1.08 and more for 1024 x 1024).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mpjax as mp
from mpjax_kernels import _tpu

CANDIDATES = tuple(
    _tpu.Blocks(rows=512, columns=columns, terms=terms)
    for columns, terms in ((256, 4096), (512, 2048), (512, 4096), (1024, 1024), (1024, 2048))
)
TABLE = Path(__file__).parents[1] / "kernels/mpjax_kernels/_tpu_tuned.py"
WINS = 0.85
_GROUP = 128
_MANY = 256  # rows: the matrix unit has as many, and is what takes the time

_TABLE = '''"""From how many rows on, and in which blocks, `_tpu.py` multiplies on each kind of TPU.

Written by `python benchmarks/tpu_kernels.py --tune`, by the estimates for each chip that are in
`benchmarks/results/tpu_kernels.jsonl`: not to be edited. `benchmarks/_tpu_tune.py` has the rule.
"""

# By what JAX calls the devices: {{fewest rows: at most [rows, columns, terms] in a step}}.
TUNED: dict[str, dict[int, tuple[int, int, int]]] = {{
{tuned}
}}
FOR_ANY: dict[int, tuple[int, int, int]] = {any}
# Few rows are those below the first; what was compared beside them are weights of int4, of so many
# entries or more.
FEW = {few}
SMALLEST = {smallest}
'''


def tune(rows: Path) -> None:
    """Writes the library's table by a file of rows."""
    TABLE.write_text(table(map(json.loads, rows.read_text().splitlines())))
    print(f"{TABLE}: written")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The source of the table."""
    ours = [row for row in rows if row["kind"] == "w4a16"]
    of_each = {row["target"]: [r for r in ours if r["target"] == row["target"]] for row in ours}
    fewest = {target: _fewest(found) for target, found in of_each.items()}
    tuned = [
        f'    "{"|".join(mp.resolve_target(target).kinds)}": {_entry(found, fewest[target])},'
        f"  # {target}"
        for target, found in of_each.items()
    ]
    few = [row for row in ours if _count(row) < _MANY]
    return _TABLE.format(
        tuned="\n".join(tuned),
        any=_entry(ours, max(fewest.values())),
        few=_MANY,
        smallest=min(math.prod(row["m_k_n"][1:]) for row in few),
    )


def _fewest(rows: list[dict[str, Any]]) -> int:
    """From how many rows on the kernel is taken.

    Raises:
        ValueError: It is not to be taken at all.
    """
    found = None
    for count in sorted({_count(row) for row in rows}, reverse=True):
        ratios = [row["ratio"] for row in rows if _count(row) == count]
        if max(ratios) > 1:
            break
        if max(ratios) <= WINS:
            found = count
    if found is None:
        raise ValueError(f"{rows[0]['target']}: XLA's product is the faster at most rows")
    return found


def _entry(rows: list[dict[str, Any]], fewest: int) -> dict[int, tuple[int, int, int]]:
    """Blocks from the fewest rows on, and from many on if those are others."""
    few = [row for row in rows if fewest <= _count(row) < _MANY]
    many = [row for row in rows if _count(row) >= max(fewest, _MANY)]
    if not few or _best(few) == _best(many):
        return {fewest: _best(many)}
    return {fewest: _best(few), _MANY: _best(many)}


def _best(rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    worst = {most: max(_ratio(row, most) for row in rows) for most in CANDIDATES}
    found = min(worst, key=worst.__getitem__)
    return found.rows, found.columns, found.terms


def _ratio(row: dict[str, Any], most: _tpu.Blocks) -> float:
    """With these blocks; infinite where they were not tried or did not fit."""
    m, k, n = row["m_k_n"]
    blocks = vars(_tpu.blocks_for(m, n, k, _GROUP, most))
    cycles = [each["cycles"] for each in row["candidates"] if blocks.items() <= each.items()]
    return min(cycles, default=float("inf")) / row["xla"]["cycles"]


def _count(row: dict[str, Any]) -> int:
    return row["m_k_n"][0]
