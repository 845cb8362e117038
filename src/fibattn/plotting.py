"""What every figure shares: one style, and files that are written whole with their numbers beside them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fibattn import files

COLOURS = {
    "dense": "#c2410c",
    "stagger": "#0f766e",
    "hybrid": "#4338ca",
    "fixed": "#a16207",
    "window": "#be185d",
    "window hybrid": "#0284c7",
    "linear": "#0f766e",
    "coprime": "#65a30d",
    "learned": "#44403c",
}
"""One colour a kind of model, in every figure; the linear schedule is the stagger's."""
QUIET = "#a8a29e"
"""For what stands beside the models."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fibattn",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#78716c",
    "axes.labelcolor": "#44403c",
    "xtick.color": "#44403c",
    "ytick.color": "#44403c",
    "axes.grid": True,
    "grid.color": "#e7e5e4",
}
"""For `matplotlib.pyplot.rc_context`."""


def save(figure: Figure, path: Path, heading: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Write `path` (.svg), a .png and a .csv of the same name, each whole or not at all; closes the figure."""
    for suffix in (".svg", ".png"):
        with files.replacing(path.with_suffix(suffix)) as temporary:
            # Without a date the same numbers give the same file.
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(temporary, format=suffix[1:], dpi=160, metadata=metadata)
    plt.close(figure)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    files.write_text(path.with_suffix(".csv"), text.getvalue())
    return path


def label_ends(axes: Axes, curves: Sequence[tuple[str, float, str]]) -> None:
    """Name curves at the right of a finished panel, each at its end and in its colour, none over another.

    Args:
        axes: the panel; an end outside its limits is named at the edge.
        curves: name, end and colour of each.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    step = 1.3 * plt.rcParams["font.size"] / 72 * figure.dpi / axes.get_window_extent().height
    curves = sorted(curves, key=lambda one: one[1])
    places = [axes.transLimits.transform(axes.transScale.transform((1, end)))[1] for _, end, _ in curves]
    places = [min(max(place, 0), 1) for place in places]
    for one in range(1, len(places)):
        places[one] = max(places[one], places[one - 1] + step)
    for one in reversed(range(len(places))):
        places[one] = min(places[one], 1 - step * (len(places) - 1 - one))
    for (name, _, colour), place in zip(curves, places, strict=True):
        axes.annotate(name, (1.02, place), xycoords="axes fraction", color=colour, va="center")


def plain(value: float, _: float) -> str:
    """A tick's number written out, without powers of ten."""
    return f"{value:,.10g}"
