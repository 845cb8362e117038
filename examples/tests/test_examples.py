"""Every example runs as it stands, offline, in seconds; `tests/hf/tuning.py` runs the one that needs TRL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(
    path for path in Path(__file__).parents[1].glob("*.py") if path.stem not in ("__init__", "tune_with_trl")
)
FEWER = {"extrapolate": ["12"]}  # steps of training


def run(example: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(example), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def test_there_are_five() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    assert len(run(example, tmp_path, *FEWER.get(example.stem, [])).splitlines()) > 3
