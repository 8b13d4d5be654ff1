"""What the benchmarks share: their options, the loop over the cases, the table and the JSON."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from _contest import Contest, hold
from _machine import cache_eviction, environment, limits
from _table import case_table, console, machine_line, summary

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 15, 2


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every script of this folder takes."""
    arguments = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    arguments.add_argument("--quick", action="store_true", help="few rounds of what is small")
    arguments.add_argument("--rounds", type=int, help="measurements per median")
    arguments.add_argument(
        "--output",
        type=Path,
        help="folder for the JSON rows (default: benchmarks/results if the run is complete)",
    )
    return arguments


def suite_parser(
    doc: str | None, cases: Sequence[str], peers: Sequence[str]
) -> argparse.ArgumentParser:
    """The options of a benchmark that has cases and peers."""
    arguments = parser(doc)
    arguments.add_argument("--cases", nargs="+", help=f"parts of their names: {'; '.join(cases)}")
    arguments.add_argument("--peers", nargs="*", choices=peers, help="all of them by default")
    arguments.add_argument(
        "--cold",
        action="store_true",
        help="empty the caches before every call, as the other layers of a model do",
    )
    return arguments


def run(
    name: str,
    options: argparse.Namespace,
    cases: dict[str, Any],
    quick_cases: dict[str, Any],
    contest: Callable[[Any], Contest],
) -> list[dict[str, Any]]:
    """Measures the machine, then case after case; prints each, writes each, returns the rows."""
    chosen = selected(quick_cases if options.quick else cases, options.cases)
    jax.config.update("jax_enable_compilation_cache", False)
    machine = environment()
    bounds = limits(megabytes=32, size=512) if options.quick else limits()
    shared = {"benchmark": name, "caches": "cold" if options.cold else "warm"}
    screen, rows = console(), []
    screen.print(machine_line(machine, bounds))
    whole = options.cases is None and options.peers is None
    written = Rows(name + ("_cold" if options.cold else ""), output_folder(options, whole))
    for case in chosen.values():
        row = hold(
            contest(case),
            options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            bounds,
            cache_eviction() if options.cold else None,
        )
        rows.append(shared | row | {"machine": machine, "limits": bounds})
        written.add(rows[-1])
        screen.print(case_table(row))
        screen.print()
    for line in summary(rows):
        screen.print(line)
    return rows


class Rows:
    """A file of JSON lines, each written as soon as it is known; no file if the folder is None."""

    def __init__(self, name: str, folder: Path | None):
        self.path = None if folder is None else folder / f"{name}.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def add(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def output_folder(options: argparse.Namespace, whole: bool) -> Path | None:
    """Where the rows go: what --output says, else the committed results if this run is complete."""
    complete = whole and not options.quick and options.rounds is None
    return options.output or (RESULTS if complete else None)


def selected(cases: dict[str, Any], parts: Sequence[str] | None) -> dict[str, Any]:
    """The cases that have one of these parts in their names; all of them if None."""
    if parts is None:
        return cases
    unknown = [part for part in parts if not any(part in name for name in cases)]
    if unknown:
        raise SystemExit(f"no case has {', '.join(unknown)} in its name: {'; '.join(cases)}")
    return {name: case for name, case in cases.items() if any(part in name for part in parts)}
