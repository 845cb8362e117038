"""How the report's figures are drawn: for a page and for a phone, and a model alike in all of them."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from fibattn import files
from fibattn.plotting import COLOURS, STYLE, save
from study.report.page import narrow
from study.report.results import Model

QUIET = "#a8a29e"
# Widths in a legend, in parts of the size of its letters: what stands before a label, a letter, one in a wide word.
_KEY, _LETTER, _WIDE_LETTER = 5, 0.52, 0.6
_RUST, _TEAL, _INDIGO, _OCHRE, _PINK, _BLUE = COLOURS
LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": _RUST, "marker": "o"},
    "hybrid": {"color": _INDIGO, "marker": "D"},
    "window hybrid": {"color": "#8b5cf6", "marker": "d"},
    "window": {"color": _PINK, "marker": "^"},
    "stagger": {"color": _BLUE, "marker": "P"},
    "linear": {"color": _TEAL, "marker": "s"},
    "fixed": {"color": _OCHRE, "marker": "v"},
    "coprime": {"color": "#4d7c0f", "marker": "X"},
    "learned": {"color": "#44403c", "marker": "p"},
}
"""Colour and marker of every kind of model, and of every schedule of the paper's."""


@dataclass(frozen=True)
class Page:
    """What a figure is drawn for."""

    width: float
    """In inches."""
    font: float
    """In points."""
    across: bool
    """Whether panels stand beside each other, not one below the other."""

    def panels(self, count: int, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
        """A figure of panels, each `height` inches high."""
        rows, columns = (1, count) if self.across else (count, 1)
        size = (self.width, rows * height)
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kwargs)
        # A wide one also stands alone, white on a page that may be dark.
        figure.set_layout_engine("constrained", w_pad=self.width / 90, h_pad=self.width / 150)
        return figure, list(axes.flat)

    def name_axes(self, panels: Sequence[Axes], across: str, up: str) -> None:
        """Say what the axes of all panels are, each where it stands alone."""
        for axes in panels if self.across else panels[-1:]:
            axes.set_xlabel(across)
        for axes in panels[:1] if self.across else panels:
            axes.set_ylabel(up)

    def legend(self, figure: Figure, handles: Sequence[Artist]) -> None:
        """What is what, below the panels, in as many columns as the labels leave room for; the figure grows by it.

        A label too long for one column is broken.
        """
        width = 72 * self.width / self.font
        labels = [textwrap.fill(str(handle.get_label()), int((width - _KEY) / _WIDE_LETTER)) for handle in handles]
        lines = [line for label in labels for line in label.splitlines()]
        columns = max(int(width / (_KEY + _LETTER * max(map(len, lines)))), 1)
        rows = math.ceil(len(lines) / columns)
        figure.set_figheight(figure.get_figheight() + (0.5 + 1.5 * rows) * self.font / 72)
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=self.font)


_WIDE = Page(width=10.4, font=11, across=True)
_NARROW = Page(width=4.1, font=9.5, across=False)


def drawn(draw: Callable[[Page], Figure], path: Path, heading: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Save the wide drawing with its numbers, and beside it the narrow one."""
    with plt.rc_context({**STYLE, "font.size": _WIDE.font}):
        save(draw(_WIDE), path, heading, rows)
    with plt.rc_context({**STYLE, "font.size": _NARROW.font}), files.replacing(narrow(path)) as temporary:
        figure = draw(_NARROW)
        figure.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(figure)
    return path


def kind(model: Model) -> str:
    """A key of `LOOKS`."""
    own = model.recipe
    if own["attention"] == "full":
        return "dense"
    if own["full_layers"]:
        return "window hybrid" if own["attention"] == "sliding" else "hybrid"
    return "window" if own["attention"] == "sliding" else own["schedule"] if model.is_papers else "stagger"


def look_of(model: Model) -> dict[str, Any]:
    """Colour and marker of a model."""
    return LOOKS[kind(model)]


def powers_of_two(axes: Axes) -> None:
    """A logarithmic axis of lengths or distances."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
