"""Tables on a terminal: by rich where it is installed, else in plain columns."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of text under a title; the first row is the header."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(title, rows)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{title}\n")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"  {'  '.join(cells)}".rstrip())
    print()


def _print_rich(title: str, rows: Sequence[Sequence[str]]) -> None:
    rich = importlib.import_module("rich.table")
    table = rich.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(_literal, row))
    importlib.import_module("rich.console").Console().print(table, "")


def _literal(text: str) -> str:
    """Text in which rich finds no markup."""
    return importlib.import_module("rich.markup").escape(text)
