"""The report of the published results, held cell for cell against what it was before it was written anew."""

from pathlib import Path

import pandas as pd
import pytest

from study.commands.report import GENERATED, SHOWN
from study.report.write import write_report

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's folder, made of a copy of the published results."""
    folder = tmp_path_factory.mktemp("published")
    for source in (ROOT / "study" / "results").glob("*/*.json*"):
        copy = folder / source.parent.name / source.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    return write_report(folder).parent


def tables(markdown: str) -> dict[str, list[list[str]]]:
    """The cells of every table by its title, rows of one cell for what is written beside them."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in filter(None, markdown.splitlines()):
        if line.startswith("### "):
            title = line
            assert title not in found
            found[title] = []
        elif not line.startswith("| ---"):
            found[title].append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_every_table_has_the_cells_that_it_had(report: Path) -> None:
    expected = tables((GOLDEN / "tables.md").read_text(encoding="utf-8"))
    assert len(expected) == 21
    found = tables((report / "tables.md").read_text(encoding="utf-8"))
    assert [title for title in found if title in expected] == list(expected)  # others are younger
    for title, rows in expected.items():
        assert found[title] == rows, title


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.csv")), ids=lambda path: path.stem)
def test_every_figure_has_the_numbers_that_it_had(report: Path, path: Path) -> None:
    expected, found = (pd.read_csv(one) for one in (path, report / path.name))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-12)


def test_the_tables_and_figures_kept_with_the_source_are_those_of_the_results(report: Path) -> None:
    kept = (ROOT / "study" / "tables.md").read_text(encoding="utf-8")
    assert kept == GENERATED + (report / "tables.md").read_text(encoding="utf-8")
    for name, shown in SHOWN.items():
        figure = ROOT / "docs" / "figures" / f"{shown}.csv"
        assert figure.read_text() == (report / f"{name}.csv").read_text()


def test_what_markdown_has_as_code_is_code_on_the_page(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    assert "<code>python -m study run ladder --data DATA " in text
    assert "`" not in text
