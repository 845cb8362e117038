"""Figures, each with the CSV of what it shows beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from fibattn.plotting import COLOURS, STYLE, save


@dataclass(frozen=True)
class Curve:
    """One model's perplexity at every length."""

    label: str
    lengths: Sequence[int]
    perplexities: Sequence[float]


def extrapolation(curves: Sequence[Curve], trained_at: int, path: Path) -> Path:
    """Draw perplexity over evaluation length, both logarithmic, as SVG and PNG; the CSV lies beside them."""
    with plt.rc_context(STYLE):
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


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"
