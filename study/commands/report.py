"""`python -m study report RESULTS`: the page and the tables from the results of studies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fibattn.cli.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Write RESULTS/report: one self-contained page, the tables in Markdown, the figures with their numbers."""

    results: Annotated[Path, tyro.conf.Positional] = Path("study/results")
    """The folder that `python -m study run` wrote."""
    into: Path | None = None
    """A Markdown document to put the tables into, after its line <!-- written by python -m study report --into -->."""


def run(arguments: list[str]) -> None:
    """Write the report and say where it is."""
    chosen = parse(Arguments, arguments, "python -m study report")
    from study.report.write import insert_tables, write_report

    print(f"the report is in {write_report(chosen.results)}")
    if chosen.into is not None:
        insert_tables(chosen.results, chosen.into)
