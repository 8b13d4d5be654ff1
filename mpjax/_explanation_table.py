"""Rows of products as text, and for rich."""

from collections.abc import Iterator, Sequence
from typing import Any

HEADINGS = ("where", "pass", "operands", "unit", "GFLOP", "MB read", "copies", "reason")
_RIGHT = (4, 5)


def cells(products: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    """One tuple of texts for each product, in the order of `HEADINGS`."""
    for each in products:
        times = f" x{each.times}" if each.times > 1 else ""
        yield (
            (each.where or each.instruction) + times,
            each.direction,
            f"{each.lhs} x {each.rhs}",
            each.unit,
            "?" if each.flops is None else f"{each.flops / 1e9:,.3g}",
            f"{each.weight_bytes / 1e6:,.3g}",
            ", ".join(_copies(each)),
            each.reason,
        )


def _copies(product: Any) -> Iterator[str]:
    for kind in ("padding", "transposed", "dequantized"):
        count = getattr(product, f"{kind}_bytes")
        if count:
            yield f"{kind} {count / 1e6:,.3g} MB"


def table(products: Sequence[Any]) -> str:
    """Aligned columns under headings, with spaces."""
    rows = [HEADINGS, *cells(products)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(
            text.rjust(width) if i in _RIGHT else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rich_table(products: Sequence[Any], caption: str) -> Any:
    """The same for `rich.print`."""
    from rich.table import Table
    from rich.text import Text

    made = Table(caption=caption, caption_justify="left")
    for i, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if i in _RIGHT else "left", overflow="fold")
    for product, row in zip(products, cells(products), strict=True):
        made.add_row(*map(Text, row), style="red" if product.is_miss else "")
    return made
