"""The rows of `inference.py` as tables for people."""

from typing import Any

from rich.table import Table

from _table import console, contenders_table

# Our throughput over these peers' stands in the table, over everyone's in the row.
RATIOS = {
    "flax_float32": "/ float32",
    "qwix_int8": "/ Qwix int8",
    "onnxruntime_int8": "/ ONNX int8",
}


def print_row(row: dict[str, Any]) -> None:
    """Prints everyone's figures, our throughput over that of three peers, and the targets."""
    headings = ("ms", "quartiles", f"{row['unit']}/s", *RATIOS.values(), "MB", "error", "compile s")
    table, errors = contenders_table(
        row, headings, lambda name, entry: _figures(entry, row["ratios"].get(name, {}))
    )
    screen = console()
    screen.print(table)
    for line in errors + list(map(verdict, row["targets"])):
        screen.print(line, markup=False)
    screen.print()


def verdict(target: dict[str, Any]) -> str:
    """A line of one target: whether we have it, and of what."""
    word = {True: "reached", False: "MISSED", None: "unknown"}[target["reached"]]
    return (
        f"{word}: {target['ours']} has {target['ratio']} of the throughput of {target['peer']}, "
        f"target {target['at_least']}"
    )


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How many targets are reached, and which are not."""
    targets = [(row["case"], target) for row in rows for target in row["targets"]]
    reached = sum(target["reached"] is True for _, target in targets)
    lines = [f"{reached} of {len(targets)} targets reached."] if targets else []
    return lines + [f"{case}: {verdict(each)}" for case, each in targets if not each["reached"]]


def print_profile(row: dict[str, Any]) -> None:
    """Prints the milliseconds of each kind of operation in each program."""
    table = Table(title=row["case"], title_justify="left", box=None, pad_edge=False)
    table.add_column("milliseconds per call", no_wrap=True)
    names = list(row["milliseconds"])
    for name in names:
        table.add_column(name, justify="right")
    kinds = dict.fromkeys(kind for each in row["milliseconds"].values() for kind in each)
    for kind in kinds:
        each = [row["milliseconds"][name].get(kind) for name in names]
        table.add_row(kind, *("" if ms is None else f"{ms:.3f}" for ms in each))
    screen = console()
    screen.print(table)
    screen.print()


def _figures(entry: dict[str, Any], ratios: dict[str, float]) -> list[str]:
    return [
        f"{entry['median_ms']:.2f}",
        f"{entry['p25_ms']:.2f}-{entry['p75_ms']:.2f}",
        f"{entry['per_s']:.1f}",
        *(f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in RATIOS),
        f"{entry['bytes'] / 1e6:.0f}",
        f"{entry['relative_error']:.2g}",
        f"{entry['compile_s']:.1f}",
    ]
