"""A row of `train_step.py` as a table for people."""

from typing import Any

from _table import console, contenders_table

HEADINGS = ("ms", "quartiles", "compile s", "of it traced", "temporary MiB", "gradient", "loss")


def print_row(row: dict[str, Any]) -> None:
    """Prints everyone's figures, our ratios, and the targets."""
    screen = console()
    machine = row["machine"]
    screen.print(
        f"{machine['device']}, {machine['cores']} cores, load {machine['load']} before, Python "
        f"{machine['python']}, JAX {machine['jax']}."
    )
    table, errors = contenders_table(row, HEADINGS, lambda _, entry: _figures(entry))
    screen.print(table)
    for line in errors + verdicts(row):
        screen.print(line, markup=False)


def verdicts(row: dict[str, Any]) -> list[str]:
    """A line per target: what we have, of what, and whether it is enough."""
    words = {True: "reached", False: "MISSED", None: "unknown"}
    return [
        f"{words[target['reached']]}: {target['figure']} of {target['ours']}: {target['ratio']} of "
        f"{target['peer']}, target {target['at_most']}"
        for target in row["targets"]
    ]


def _figures(entry: dict[str, Any]) -> list[str]:
    return [
        f"{entry['median_ms']:.3f}",
        f"{entry['p25_ms']:.3f}-{entry['p75_ms']:.3f}",
        f"{entry['compile_s']['total']:.2f}",
        f"{entry['compile_s']['trace_lower']:.2f}",
        f"{entry['temporary_bytes'] / 2**20:.2f}",
        f"{entry['gradient_error']:.2g}",
        f"{entry['loss']:.2f}",
    ]
