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

COLOURS = ("#c2410c", "#0f766e", "#4338ca", "#a16207", "#be185d", "#0369a1")
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
