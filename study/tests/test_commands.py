"""What a user's mistakes with the study look like: one line that says what to do, and status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from study.__main__ import main
from study.presets import STUDIES


def says(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run a command that must fail, and return the one line it says last."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"python -m study {words[0]}: ")
    return last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run papr", "unknown study 'papr': did you mean 'paper'?"),
        ("run paper", "which data? Give --data"),
        ("run smoke --shard 2/2", "--shard is '2/2'; expected I/N"),
        ("run smoke --processes 0", "--processes is 0; it must be at least 1"),
        ("run smoke --eval-tokens many", "'many' is not a count"),
        ("run smoke --tokens many", "'many' is not a count"),
        ("run smoke --only dens", "no run of the study is named 'dens': did you mean 'dense'?"),
        ("run smoke --minutes -1", "--minutes is -1; it must be above 0"),
        ("run smoke --minutes nan", "--minutes is nan; it must be above 0"),
        ("run smoke --seconds 0", "--seconds is 0; it must be above 0"),
        ("run smoke --seconds 300 --tokens 10k", "--seconds is 300 and --tokens 10k; give one of them"),
        ("report nowhere", "nowhere does not exist"),
        ("far --data d --only window --processes 0", "processes 0, only ['window'], seeds [42]: give at least one of"),
        ("parts --data d --only", "processes 1, only [], seeds [42]: give at least one of each"),
    ],
)
def test_studies_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in says(capsys, *words.split())
    assert not list(tmp_path.iterdir())  # not even smoke's own data


@pytest.mark.parametrize("flag", ["--out", "--work"])
def test_a_file_where_a_study_wants_a_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    for given in (file, file / "folder"):
        line = says(capsys, "run", "smoke", "--out", tmp_path / "new", flag, given)
        assert f"{flag} is {given}, but {file} is a file; give a folder" in line


def test_a_study_under_torchrun_is_refused(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--tee=2"]
    study = ["-m", "study", "run", "smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run([*torchrun, f"--log-dir={tmp_path}", *study], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "python -m study run: torchrun started 2 processes" in done.stderr
    assert "`python -m study run smoke --processes 2`" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_of_study_says_what_the_studies_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {study.about}" in printed for name, study in STUDIES.items())
