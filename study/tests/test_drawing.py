"""Figures for a page and for a phone."""

import pytest
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from study.report.drawing import Page


@pytest.mark.parametrize("words", [3, 9, 30])
@pytest.mark.parametrize("page", [Page(width=10.4, font=11, across=True), Page(width=4.1, font=9.5, across=False)])
def test_a_legend_stays_on_its_figure_and_below_its_panel(page: Page, words: int) -> None:
    figure, (axes,) = page.panels(1, 2.0)
    labels = [" ".join(["bounded"] * count) for count in (1, 2, words)]
    page.legend(figure, [Line2D([], [], label=label) for label in labels])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= axes.get_window_extent().y0
    assert [text.get_text().split() for text in legend.get_texts()] == [label.split() for label in labels]
    plt.close(figure)
