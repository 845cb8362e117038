"""What a table of the report is: plain cells, for HTML and Markdown."""

from dataclasses import dataclass

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


def in_sigmas(gap: float, sigma: float | None) -> str:
    """A difference of losses in standard deviations."""
    return "–" if not sigma else f"{gap / sigma:+.1f}".replace("-", "−")
