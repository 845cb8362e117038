"""The demonstration's figures, each with the CSV of what it shows beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fibattn.pattern import Pattern
from fibattn.plotting import COLOURS, STYLE, plain, save
from study.labels import label_ends


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
        ends = []
        for curve in curves:
            # A model bounded is the same model.
            colour, style = COLOURS[curve.label.split(",")[0]], "--" if "," in curve.label else "-"
            axes.plot(curve.lengths, curve.perplexities, "o", color=colour, linestyle=style, linewidth=2, markersize=5)
            ends.append((curve.label, curve.perplexities[-1], colour))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({length for curve in curves for length in curve.lengths})
        axes.set_xticks(lengths, [f"{length:,}\n{length / trained_at:g}×" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        values = [value for curve in curves for value in curve.perplexities]
        axes.set_ylim(min(values) / 1.06, max(values) * 1.06)
        narrow = max(values) < 6 * min(values)
        axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
        axes.set_xlabel("evaluation length (tokens, times the training length)")
        axes.set_ylabel("perplexity")
        label_ends(axes, ends)
        rows = [
            (curve.label, length, value)
            for curve in curves
            for length, value in zip(curve.lengths, curve.perplexities, strict=True)
        ]
        return save(figure, path, ("model", "length", "perplexity"), rows)


def distances(patterns: Sequence[Pattern], limit: int, path: Path) -> Path:
    """Draw which distances up to `limit` each layer attends to, and a dense layer's above them.

    SVG and PNG, and a CSV with one row for each layer (counted from 1) and distance.
    """
    dense, sparse = COLOURS["dense"], COLOURS["hybrid"]
    names = [f"hybrid, layer {layer}" for layer in range(1, len(patterns) + 1)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 0.9 + 0.32 * (1 + len(patterns))), layout="constrained")
        axes.plot((1, limit), (0, 0), color=dense, linewidth=6, solid_capstyle="butt")
        for row, pattern in enumerate(patterns, start=1):
            axes.plot((1, max(pattern.window, 1)), (row, row), color=sparse, linewidth=6, solid_capstyle="butt")
            axes.plot(pattern.offsets, [row] * len(pattern.offsets), "o", color=sparse, markersize=6)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.9, limit * 1.1)
        axes.xaxis.set_major_formatter(plain)
        axes.set_yticks(range(len(patterns) + 1), ["dense, every layer", *names])
        axes.set_ylim(len(patterns) + 0.6, -0.6)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("distance back (tokens)")
        rows = [(layer, distance) for layer, one in enumerate(patterns, start=1) for distance in one.distances]
        return save(figure, path, ("layer", "distance"), rows)
