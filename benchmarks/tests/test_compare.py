"""`python -m benchmarks compare`: two trees of one function each, which give the same or do not."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main

CASES = """
import types
import torch
import fibattn

def cases(device):
    def build(values):
        work = lambda: {"out": torch.tensor(values, dtype=torch.bfloat16), "one": torch.tensor(1.0)}
        return types.SimpleNamespace(work=work, outputs=work, cold=True, capture=True)
    return {
        "the same": lambda: build([1.0]),
        "another": lambda: build(fibattn.VALUES),
        "no more": lambda: build(fibattn.GONE),
        "not asked": lambda: build([1.0]),
    }
"""


@pytest.fixture
def trees(tmp_path: Path) -> list[str]:
    (tmp_path / "cases.py").write_text(CASES)
    for name, text in (("old", "VALUES = [3.0, 4.0]\nGONE = [1.0]"), ("new", "VALUES = [3.0, 3.5]")):
        package = tmp_path / name / "src" / "fibattn"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
    return [str(tmp_path / "old"), str(tmp_path / "new"), "--cases", str(tmp_path / "cases.py"), "--device", "cpu"]


def test_times_and_outputs_of_two_trees(trees: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result" / "compare.json"
    words = ["--only", "the same", "another", "no more", "--rounds", "2", "--out", str(out)]
    assert main(["compare", *trees, *words]) == 0
    result = json.loads(out.read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == ["the same", "another", "no more"]
    assert rows["the same"]["differences"] == {}
    assert rows["another"]["differences"] == {"out": pytest.approx(0.1)}
    assert rows["another"]["ratio"] == rows["another"]["new"] / rows["another"]["old"]
    assert [len(rounds) for rounds in rows["another"]["rounds"]] == [2, 2]
    assert rows["no more"]["errors"].keys() == {"new"}
    printed = capsys.readouterr().out
    assert "the same bits" in printed
    assert "1 outputs differ: out 1.0e-01" in printed
    assert "no more: new: AttributeError" in printed


def test_mistakes_are_one_line(trees: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", trees[0], str(tmp_path)]) == 2
    assert "is no source tree" in capsys.readouterr().err
    assert main(["compare", *trees, "--only", "nothing like it"]) == 2
    assert "no case has nothing like it in its name; there are: the same, another" in capsys.readouterr().err
