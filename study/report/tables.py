"""What a table of the report is: a frame of texts, for HTML and Markdown."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from study.report.claims import Finding, percent, real_minus
from study.report.results import Frame, Group, trained_alone

ABSENT = "not run"
NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table and what to know when reading it."""

    title: str
    note: str
    frame: Frame
    """Texts; columns may have the same heading."""
    words: int = 1
    """So many columns are words, to the left; the others are numbers."""

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells."""
        return list(self.frame.itertuples(index=False, name=None))

    @property
    def is_zero(self) -> bool:
        """Whether there is nothing to see but zeros."""
        cells = {cell for row in self.rows for cell in row[self.words :]} - {NONE}
        return bool(cells) and not any(cell.strip("0.") for cell in cells)

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---"] * self.words + ["---:"] * (self.frame.shape[1] - self.words)
        lines = ["| " + " | ".join(row) + " |" for row in (tuple(self.frame.columns), tuple(rule), *self.rows)]
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), *lines, ""])


def table(title: str, note: str, cells: Any, headings: list[str] | None = None, words: int = 1) -> Table:
    """A table of what makes a frame; `headings` in place of its names, where these are not the same."""
    frame = pd.DataFrame(cells).astype(object).fillna(NONE)
    return Table(title, note, frame if headings is None else frame.set_axis(headings, axis=1), words)


def where_run(records: Iterable[dict[str, Any]]) -> str:
    """On which card, with which PyTorch: of each kind that the records name, in their order."""
    return " and ".join(
        dict.fromkeys(f"{one['hardware']['device']}, PyTorch {one['versions']['torch']}" for one in records)
    )


def speed(records: Iterable[dict[str, Any]]) -> str:
    """Training tokens a second, the median of the runs that trained alone."""
    known = [one["training"]["tokens_per_second"] for one in records if trained_alone(one)]
    return f"{statistics.median(known) / 1e3:.0f} k" if known else NONE


def findings_table(title: str, findings: list[Finding], note: str) -> Table:
    """Claims, verdicts, evidence."""
    rows = [(one.claim, one.verdict, one.evidence) for one in findings]
    return Table(title, note, pd.DataFrame(rows, columns=["claim", "here", "evidence"]), words=3)


def text(form: str | Callable[[Any], str], value: Any) -> str:
    """A number as a table shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    return real_minus(form.format(value) if isinstance(form, str) else form(value))


def texts(form: str | Callable[[Any], str], values: Frame) -> Frame:
    """Numbers as a table shows them."""
    return values.map(lambda value: text(form, value)).astype(object)


def perplexities(group: Group) -> Frame:
    """Perplexity on each held-out set at the training length, of the lowest seed of every model."""
    first = group.models[["run"]].merge(group.losses, on="run")
    near = first[(first["way"] == "plain") & (first["length"] == group.trained_at)]
    return near.pivot(index="model", columns="set", values="nll")[group.sets].map(math.exp)


def against(group: Group, name: str, other: str) -> tuple[str, str]:
    """The difference of two models at the training length over the seeds that both have: in per cent, and in σ.

    Dashes for what there is none of: another model, a common seed, a second seed.
    """
    gap = math.nan if name == other else group.gap(name, other)
    if math.isnan(gap):
        return NONE, NONE
    sigma = group.sigma(name, other)
    return percent(gap), text("{:+.1f}", gap / sigma if sigma else math.nan)
