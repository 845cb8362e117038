"""How the report's figures are drawn: narrow enough to be read on a phone, and a model alike in all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fibattn.plotting import COLOURS, plain, save

_MARKERS = {"dense": "o", "hybrid": "D", "window hybrid": "d", "window": "^", "stagger": "P"}
_MARKERS |= {"linear": "s", "fixed": "v", "coprime": "X", "learned": "p"}
LOOKS: dict[str, dict[str, Any]] = {kind: {"color": COLOURS[kind], "marker": one} for kind, one in _MARKERS.items()}
"""Colour and marker of every kind of model, and of every schedule of the paper's."""


def panels(count: int, height: float, across: str, up: str) -> tuple[Figure, list[Any]]:
    """Panels one below the other, each `height` inches high, and what their axes are."""
    figure, axes = plt.subplots(count, figsize=(5.4, count * height), layout="constrained", squeeze=False)
    for one in axes.flat:
        one.set_ylabel(up)
    axes.flat[-1].set_xlabel(across)
    return figure, list(axes.flat)


def legend(figure: Figure, handles: Sequence[Artist], columns: int = 3) -> None:
    """What is what, below the panels."""
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, columnspacing=1)


def saved(figure: Figure, path: Path, numbers: pd.DataFrame) -> Path:
    """Write a figure with its numbers beside it."""
    return save(figure, path, [str(name) for name in numbers], numbers.to_numpy(object).tolist())


def plain_ticks(axes: Axes) -> None:
    """A logarithmic axis of lengths or distances, in powers of two written out."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=4))
    axes.xaxis.set_major_formatter(plain)
