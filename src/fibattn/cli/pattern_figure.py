"""The picture of a stack of patterns: what every layer attends to, and what the layers reach together."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from fibattn.pattern import Pattern
from fibattn.plotting import COLOURS, STYLE, plain, save

_NEAR, _FAR = COLOURS["window"], COLOURS["stagger"]
_NOWHERE = "#d6d3d1"


def draw_patterns(patterns: Sequence[Pattern], needed: Sequence[int | None], context: int, path: Path) -> Path:
    """Draw the distances of every layer above the fewest layers that reach a distance, `context` marked in both parts.

    The SVG is at `path`, a PNG and a CSV are beside it.
    """
    farthest = max(len(needed) - 1, 1)
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, figsize=(7.4, 6.4), layout="constrained")
        _attended(above, patterns)
        _needed(below, needed)
        for axes in (above, below):
            if axes.get_xlim()[0] < context < axes.get_xlim()[1]:
                axes.axvline(context, color="#78716c", linewidth=1, linestyle="--")
                place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
                axes.annotate(f"context {context:,}", (context, 1), **place)
        below.set_xlim(0, farthest)
    rows = [("layer that attends", d, layer) for layer, one in enumerate(patterns) for d in one.distances]
    rows += [("fewest layers", d, "" if n is None else n) for d, n in enumerate(needed)]
    return save(figure, path, ("what", "distance", "value"), rows)


def _attended(axes: Axes, patterns: Sequence[Pattern]) -> None:
    """Dots at the offsets, a bar over the window; the distance is logarithmic, so 0 is not shown."""
    for layer, pattern in enumerate(patterns):
        if pattern.window > 0:
            axes.plot([1, pattern.window], [layer, layer], color=_NEAR, linewidth=4, solid_capstyle="butt")
        axes.plot(pattern.offsets, [layer] * len(pattern.offsets), "o", color=_FAR, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.9, 1.15 * max(2, *(pattern.reach for pattern in patterns)))
    axes.set_ylim(len(patterns) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("distance that the layer attends to (bar: the window)")
    axes.set_ylabel("layer")


def _needed(axes: Axes, needed: Sequence[int | None]) -> None:
    reached = [(d, n) for d, n in enumerate(needed) if n is not None]
    most = max(n for _, n in reached)
    axes.plot(*zip(*reached, strict=True), ".", color=_FAR, markersize=2, rasterized=True)
    for missing, run in groupby(range(len(needed)), key=lambda distance: needed[distance] is None):
        if missing:
            gap = list(run)
            axes.axvspan(gap[0] - 0.5, gap[-1] + 0.5, color=_NOWHERE, linewidth=0)
    axes.set_ylim(-0.4, most + 0.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(plain)
    axes.set_xlabel("distance" + ("" if None not in needed else " (grey: no path of any length reaches it)"))
    axes.set_ylabel("fewest layers that reach it")
