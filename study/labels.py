"""Names of curves beside a panel, for the figures of the report and of the demonstration."""

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes


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
