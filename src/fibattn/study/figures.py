"""Figures, each with the CSV of what it shows beside it."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from fibattn import files

COLOURS = ("#c2410c", "#0f766e", "#4338ca", "#a16207", "#be185d", "#0369a1")
_STYLE = {
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


@dataclass(frozen=True)
class Curve:
    """One model's perplexity at every length."""

    label: str
    lengths: Sequence[int]
    perplexities: Sequence[float]


def extrapolation(curves: Sequence[Curve], trained_at: int, path: Path) -> Path:
    """Draw perplexity over evaluation length, both logarithmic, as SVG and PNG; the CSV lies beside them."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 3.7), layout="constrained")
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.plot(curve.lengths, curve.perplexities, "o-", color=colour, linewidth=2, markersize=5)
            axes.annotate(
                curve.label,
                (curve.lengths[-1], curve.perplexities[-1]),
                xytext=(-4, 9),
                textcoords="offset points",
                color=colour,
                ha="right",
                weight="bold",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({length for curve in curves for length in curve.lengths})
        axes.set_xticks(lengths, [f"{length:,}\n{length / trained_at:g}×" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        values = [value for curve in curves for value in curve.perplexities]
        axes.set_ylim(min(values) / 1.06, max(values) * 1.12)
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain) if max(values) < 6 * min(values) else NullFormatter())
        axes.set_xlabel("evaluation length (tokens, times the training length)")
        axes.set_ylabel("perplexity")
        rows = [
            (curve.label, length, value)
            for curve in curves
            for length, value in zip(curve.lengths, curve.perplexities, strict=True)
        ]
        return save(figure, path, ("model", "length", "perplexity"), rows)


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


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"
