"""One process a folder: between processes, across a kill and a removal, and where a file system cannot lock."""

import errno
import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fibattn.lock import locked

HOLD = """
import sys
from pathlib import Path
from fibattn.lock import locked
with locked(Path(sys.argv[1])) as free:
    print(free, flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with locked(folder) as free:
            assert not free
        other.kill()
    with locked(folder) as free:
        assert free
    assert folder.exists(), "it was there before"


def test_only_an_empty_folder_that_was_made_for_it_is_removed(tmp_path: Path) -> None:
    for content, stays in (("", False), ("notes.txt", True)):
        with locked(tmp_path / "run"):
            if content:
                (tmp_path / "run" / content).write_text("mine")
        assert (tmp_path / "run").exists() == stays


def test_a_folder_that_is_removed_and_made_anew_is_free(tmp_path: Path) -> None:
    with locked(tmp_path / "run") as free:
        assert free
        shutil.rmtree(tmp_path / "run")
        with locked(tmp_path / "run") as again:
            assert again


def test_where_a_folder_cannot_be_locked_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run") as free:
        assert free
        (tmp_path / "run" / "shard").write_text("x")
    assert (tmp_path / "run" / "shard").exists()
