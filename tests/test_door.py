"""The door of a program with verbs: a user's mistake is one line, a fault of the program keeps its traceback."""

import errno
import os
import sys
from pathlib import Path

import pytest

from fibattn.cli.door import Program, enter
from fibattn.errors import InputError

VERB = """
def run(words):
    import os
    from pathlib import Path
    from fibattn.errors import InputError, MissingExtraError
    exec(words[0])
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """One with a verb that runs the code in its first word."""
    (tmp_path / "verbs").mkdir()
    (tmp_path / "verbs" / "work.py").write_text(VERB)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("verbs", "verbs.work"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return Program("try", "for a test", {"work": "runs code"}, "verbs")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_module", ImportError),
        ("from pathlib import no_such_name", ImportError),
        ("raise OSError('a connection was lost')", OSError),
        ("raise OSError(98, 'Address already in use')", OSError),
        ("open('/usr/nowhere/table-of-the-program.json')", FileNotFoundError),
        ("{}['missing']", KeyError),
        ("raise ValueError('shape mismatch')", ValueError),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(program: Program, code: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        enter(program, ["work", code])


def test_a_process_that_is_gone_is_one_line_in_the_others(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    code = "raise RuntimeError('pair.cc:537: Connection closed by peer [127.0.0.1]:45991. This is typically caused by')"
    assert enter(program, ["work", code]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("try work: another process of this run is gone")


@pytest.mark.parametrize("flag", ["{}", "--out={}", "name={}"])
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOENT, "does not exist"),
        (errno.EACCES, "the system does not permit it"),
        (errno.EPERM, "the system does not permit it"),
        (errno.EROFS, "can only be read"),
        (errno.EISDIR, "is a folder"),
        (errno.ENOTDIR, "lies in a file"),
    ],
)
def test_what_is_wrong_with_a_file_that_the_user_named_is_one_line(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, said: str, flag: str
) -> None:
    out = tmp_path / "out"
    for path in (out, out / "model" / "config.json", tmp_path):
        code = f"raise OSError({number}, os.strerror({number}), {str(path)!r})"
        assert enter(program, ["work", code, flag.format(out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"try work: {path} ")
        assert said in line
        assert "Errno" not in line


def test_a_real_folder_that_takes_nothing_is_said_in_words(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/sys/kernel").is_dir():
        pytest.skip("no /sys here")
    assert enter(program, ["work", "Path('/sys/fibattn').mkdir()", "/sys/fibattn"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("try work: /sys/fibattn cannot be read or written here")


def test_a_full_disk_is_one_line_wherever_it_is(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"raise OSError({errno.ENOSPC}, os.strerror({errno.ENOSPC}), '/var/cache/kernel')"
    assert enter(program, ["work", code]) == 1
    assert "the disk is full while writing /var/cache/kernel; make room" in capsys.readouterr().err


def test_a_mistake_and_a_missing_extra_are_one_line_and_status_2(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enter(program, ["work", "raise InputError('steps is 0')"]) == 2
    assert capsys.readouterr().err == "try work: steps is 0\n"
    assert enter(program, ["work", "raise MissingExtraError('a drawing needs matplotlib', 'plots')"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("try work: a drawing needs matplotlib, which is not installed; install it: pip install ")


def test_the_traceback_of_a_mistake_can_be_asked_for(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "FIBATTN_TRACEBACK", "1")
    with pytest.raises(InputError):
        enter(program, ["work", "raise InputError('steps is 0')"])


def test_the_help_has_all_summaries_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {"work": "runs code", "work-for-a-long-time": "runs it again"}
    assert enter(Program("try", "for a test", verbs, "verbs"), ["--help"]) == 0
    (short, long) = capsys.readouterr().out.splitlines()[-2:]
    assert short.index("runs") == long.index("runs") == len("  work-for-a-long-time ")
