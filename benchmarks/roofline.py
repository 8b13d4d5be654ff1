"""How near does each product come to what this machine can do?

Draws the rows that `matmul.py` wrote as rooflines, one picture per format: operations per second
over operations per byte of arguments and result, under the measured read bandwidth and the
measured peaks of multiplication (`limits` of the rows). We and every peer are a point per case. A
point above the slope had its weights in a cache; `matmul.py --cold` leaves none there.

    python benchmarks/roofline.py [--cold] [--output FOLDER]

reads `matmul.jsonl`, or with --cold `matmul_cold.jsonl`, in the folder (`benchmarks/results` unless
told otherwise), and writes `roofline.svg` or `roofline_cold.svg` beside it.
"""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from _suite import RESULTS, parser

MARKERS, OWN = "os^vDPX<>", "mpjax"
PEAKS = {"int8_gops": "int8", "float32_gops": "float32"}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--cold", action="store_true", help="what was measured with empty caches")
    given = options.parse_args(arguments)
    folder, ending = given.output or RESULTS, "_cold" if given.cold else ""
    source = folder / f"matmul{ending}.jsonl"
    if not source.exists():
        command = f"benchmarks/matmul.py{' --cold' if given.cold else ''} --output {folder}"
        raise SystemExit(f"{source} is not there: run `python {command}` first")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    if not rows:
        raise SystemExit(f"{source} has no rows: was its run stopped? Run `matmul.py` again")
    target = folder / f"roofline{ending}.svg"
    draw(rows, target)
    print(f"{target}: {len(rows)} cases of {', '.join(formats(rows))}")


def formats(rows: list[dict[str, Any]]) -> list[str]:
    """The formats of the rows, in their order."""
    return list(dict.fromkeys(row["format"] for row in rows))


def points(rows: list[dict[str, Any]], format: str) -> dict[str, list[tuple[float, float]]]:
    """By contender: operations per byte and 10**9 operations per second, a point per case."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["format"] == format:
            for name, entry in ({OWN: row["ours"]} | row["peers"]).items():
                if "gops" in entry and entry["gb_per_s"]:
                    at = entry["gops"] / entry["gb_per_s"], entry["gops"]
                    found.setdefault(name, []).append(at)
    return found


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """One picture per format, each with the roofs of the run; an SVG without a date."""
    names, limits = formats(rows), rows[0]["limits"]
    everyone = list(dict.fromkeys(n for name in names for n in points(rows, name)))
    styles = {
        n: (m, f"C{i}") for i, (n, m) in enumerate(zip(everyone, cycle(MARKERS), strict=False))
    }
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    with mpl.rc_context({"svg.hashsalt": "mpjax", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5 * columns, 4 * height + 0.8), layout="constrained")
        for place, name in enumerate(names, start=1):
            axes = figure.add_subplot(height, columns, place)
            _picture(axes, name, points(rows, name), limits, styles)
        marks = {}
        for axes in figure.axes:
            marks |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=6)
        machine = rows[0]["machine"]
        figure.suptitle(
            f"{machine['device']}, {machine['cores']} cores, JAX {machine['jax']}, caches "
            f"{rows[0]['caches']}"
        )
        figure.savefig(target, format="svg", metadata={"Date": None})


def _picture(
    axes: Axes,
    format: str,
    found: dict[str, list[tuple[float, float]]],
    limits: dict[str, float],
    styles: dict[str, tuple[str, str]],
) -> None:
    bandwidth = limits["read_gb_per_s"]
    widths = [x for each in found.values() for x, _ in each]
    x = np.geomspace(min(widths) / 2, max(widths) * 2, 200)
    for key, peak in PEAKS.items():
        dash = "-" if key == "int8_gops" else "--"
        y = np.minimum(x * bandwidth, limits[key])
        axes.plot(x, y, dash, color="black", linewidth=1, label=f"{peak} and read limits")
    for name, each in found.items():
        marker, color = styles[name]
        axes.scatter(
            *zip(*each, strict=True),
            marker=marker,
            color=color,
            s=60 if name == OWN else 20,
            zorder=3 if name == OWN else 2,
            label=name,
        )
    axes.set(
        xscale="log",
        yscale="log",
        title=format,
        xlabel="operations per byte",
        ylabel="10$^9$ operations per second",
    )


if __name__ == "__main__":
    main()
