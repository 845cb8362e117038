"""Every example runs as it stands, offline, in seconds; `tests/hf/tuning.py` runs the one that needs TRL."""

import os
import sys
from pathlib import Path

import pytest
from forked import Server

EXAMPLES = sorted(
    path for path in Path(__file__).parents[1].glob("*.py") if path.stem not in ("__init__", "tune_with_trl")
)
FEWER = {"extrapolate": ["12"]}  # steps of training


STRICT = """
import runpy, sys, warnings
warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(forked: Server, example: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = forked.run([sys.executable, "-c", STRICT, example, *arguments], cwd=folder, env=environment, check=True)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def test_there_are_five() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, forked: Server, tmp_path: Path) -> None:
    assert len(run(forked, example, tmp_path, *FEWER.get(example.stem, [])).splitlines()) > 3
