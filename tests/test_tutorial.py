"""The tutorial's blocks run as they stand, in one process, one after another."""

import re
from pathlib import Path
from typing import Any

import pytest

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"


def test_every_block_of_the_tutorial_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == text.count("```python\n") > 5
    names: dict[str, Any] = {}
    for block in blocks:
        before = text.count("\n", 0, block.start(1))
        # The names of its lines are those of the page.
        exec(compile("\n" * before + block[1], str(TUTORIAL), "exec"), names)
    assert capsys.readouterr().out
