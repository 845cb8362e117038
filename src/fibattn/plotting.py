"""What every figure shares: one style, and files that are written whole with their numbers beside them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fibattn import files

COLOURS = {
    "dense": "#c2410c",
    "stagger": "#0f766e",
    "hybrid": "#4338ca",
    "converted": "#a16207",
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


def plain(value: float, _: float) -> str:
    """A tick's number written out, without powers of ten."""
    return f"{value:,.10g}"
