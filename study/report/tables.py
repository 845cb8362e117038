"""What a table of the report is: plain cells, for HTML and Markdown."""

from dataclasses import dataclass

from study.report.findings import percent, real_minus
from study.report.results import Group, Model

ABSENT = "not run"


@dataclass(frozen=True)
class Table:
    """A table and what to know when reading it."""

    title: str
    note: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in GitHub's Markdown; numbers to the right."""
        rule = "| --- |" + " ---: |" * (len(self.heading) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (self.heading, *self.rows)]
        return "\n".join([f"### {self.title}", "", self.note, "", lines[0], rule, *lines[1:], ""])


def against(model: Model, other: Model | None, group: Group) -> tuple[str, str]:
    """The difference of two models at the training length over the seeds that both have: in per cent, and in σ.

    Dashes for what there is none of: another model, a common seed, a second seed.
    """
    gap = None if other is None or other is model else model.gap(other, group.trained_at)
    if other is None or gap is None:
        return "–", "–"
    sigma = group.sigma(model, other)
    return percent(gap), real_minus(f"{gap / sigma:+.1f}") if sigma else "–"
