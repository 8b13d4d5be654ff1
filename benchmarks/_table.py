"""The rows of a benchmark as a table for people; the JSON rows hold more."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# (heading, width); fixed, so that the tables of the cases line up.
COLUMNS = (
    ("", 20),
    ("ms", 10),
    ("quartiles", 19),
    ("ours / peer", 11),
    ("target", 15),
    ("GB/s", 13),
    ("Gop/s", 15),
    ("compile s", 9),
    ("error", 9),
)
WIDTH = sum(width for _, width in COLUMNS) + 2 * len(COLUMNS)


def console() -> Console:
    """Standard output, wide enough for the table where the terminal does not say how wide it is."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDTH)


def contenders_table(
    row: dict[str, Any],
    headings: Sequence[str],
    figures: Callable[[str, dict[str, Any]], list[str]],
) -> tuple[Table, list[str]]:
    """A line per contender, and those that cannot run. `figures` is of a name and its entry."""
    table = Table(title=row["case"], title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    errors = []
    for name, entry in row["contenders"].items():
        if "error" in entry:
            errors.append(f"{name} cannot run: {_first_line(entry['error'])}")
        else:
            table.add_row(name, *figures(name, entry))
    return table, errors


def machine_line(environment: dict[str, Any], limits: dict[str, float]) -> str:
    """One line: the hardware, the versions and the measured limits."""
    cores = f"{environment['cores']} cores" if environment["backend"] == "cpu" else "one device"
    return (
        f"{environment['device']}, {cores}, load {environment['load']} before, Python "
        f"{environment['python']}, JAX {environment['jax']}. Measured limits: "
        f"{limits['read_gb_per_s']} GB/s read, "
        f"{limits['copy_gb_per_s']} GB/s copied, {limits['float32_gops']} Gop/s in float32, "
        f"{limits['int8_gops']} in int8."
    )


def case_table(row: dict[str, Any]) -> Table:
    """The table of one case: us, then each peer, or the error of one that cannot run."""
    title = row["case"]
    if row["slower_than_float32"]:
        title += "   [bold red]SLOWER THAN FLOAT32[/]"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_edge=False)
    for index, (heading, width) in enumerate(COLUMNS):
        table.add_column(heading, min_width=width, justify="left" if index == 0 else "right")
    verdicts = {verdict["peer"]: verdict for verdict in row["targets"]}
    table.add_row("[bold]ours[/]", *_figures(row["ours"], None))
    errors = []
    for name, entry in row["peers"].items():
        if "error" in entry:
            errors.append(f"{name} cannot run: {_first_line(entry['error'])}".replace("[", r"\["))
        else:
            table.add_row(name, *_figures(entry, verdicts.get(name)))
    table.caption = "\n".join(errors) or None
    table.caption_justify = "left"
    return table


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What became of the targets, where we are slower than float32, and who could not run."""
    verdicts = [(row["case"], verdict) for row in rows for verdict in row["targets"]]
    reached = [verdict for _, verdict in verdicts if verdict["reached"]]
    lines = [f"{len(reached)} of {len(verdicts)} targets reached."] if verdicts else []
    lines += [
        f"missed: {case}: {_number(verdict['ratio'])} of {verdict['peer']}, "
        f"target {verdict['at_most']}"
        for case, verdict in verdicts
        if verdict["reached"] is False
    ]
    lines += [
        f"slower than float32: {row['case']}: {_number(row['peers']['float32']['ratio'])}"
        for row in rows
        if row["slower_than_float32"]
    ]
    failed = {name for row in rows for name, entry in row["peers"].items() if "error" in entry}
    lines += [f"could not run in every case: {', '.join(sorted(failed))}"] if failed else []
    return lines


def _figures(entry: dict[str, Any], verdict: dict[str, Any] | None) -> list[str]:
    target = ""
    if verdict is not None:
        outcome = "[green]reached[/]" if verdict["reached"] else "[red]missed[/]"
        target = f"{verdict['at_most']} {outcome}"
    share = entry.get("of_copy_limit", entry["of_read_limit"])
    gops = ""
    if "gops" in entry:
        gops = f"{entry['gops']:.0f} ({entry['of_float32_limit']:.2f})"
    return [
        f"{entry['median_ms']:.3f}",
        f"{entry['p25_ms']:.3f}-{entry['p75_ms']:.3f}",
        _number(entry.get("ratio")),
        target,
        f"{entry['gb_per_s']:.1f} ({share:.2f})",
        gops,
        f"{entry['compile_s']:.2f}",
        "" if entry["relative_error"] is None else f"{entry['relative_error']:.2g}",
    ]


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _first_line(error: str) -> str:
    line = error.strip().splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."
