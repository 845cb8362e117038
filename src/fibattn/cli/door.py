"""The entry of a program with verbs: finds the verb, imports only what it needs, and turns a mistake into one line.

A verb is a module with a function `run(arguments)`, of the package that the program names. Its table of verbs is all
that `--help` needs, so it answers before anything heavy is imported.
"""

import errno
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fibattn._version import __version__
from fibattn.errors import InputError, suggestion

_PATIENCE = 10  # seconds
_OF_ANOTHER = ("closed by peer", "reset by peer", "remote process exit")
"""What gloo and NCCL say when a process that they spoke with is gone."""

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of this user on the disk is used up",
    errno.EFBIG: "a file grew larger than the system allows",
}
_NO_PLACE = "cannot be read or written here: the system does not permit it; choose another place, or change its rights"
_FILE = {
    errno.ENOENT: "does not exist; check the path",
    errno.EACCES: _NO_PLACE,
    errno.EPERM: _NO_PLACE,
    errno.EROFS: "is on a file system that can only be read; choose another place",
    errno.EISDIR: "is a folder, and a file was expected; check the path",
    errno.ENOTDIR: "lies in a file, and a folder was expected; check the path",
    errno.EEXIST: "is there already, as something else; choose another place",
    errno.ENAMETOOLONG: "is too long a name; choose a shorter one",
    errno.ELOOP: "is a link that leads back to itself; check the path",
}


@dataclass(frozen=True)
class Program:
    """A program with verbs."""

    name: str
    """As it is called."""
    about: str
    verbs: Mapping[str, str]
    """What each does, in a line."""
    package: str
    """Where the verbs' modules are, a hyphen written as an underscore."""
    resumed: Mapping[str, str] = field(default_factory=dict)
    """What a verb that goes on where it was stopped says of it."""


def enter(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status, as `guarded` gives it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    return guarded(f"{program.name} {verb}", partial(_open, program, verb), rest, program.resumed.get(verb, ""))


def guarded(name: str, work: Callable[[Sequence[str]], None], words: Sequence[str], resumed: str = "") -> int:
    """Do the work of a command; the exit status: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted.

    A mistake in the input, a full disk, and what is wrong with a file that the user named are one line that begins with
    `name`. Whatever else goes wrong is a fault of the program, and keeps its traceback. `resumed` is said after an
    interruption. Of several processes under torchrun the first says what is wrong, and torchrun ends the others, which
    wait for that, whatever they run into meanwhile; one that is not ended says it itself.
    """
    # Before torch loads: threads that spin at barriers take the cores of a busy machine from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        work(words)
        sys.stdout.flush()  # here, where a reader that went away is expected
    except KeyboardInterrupt:
        if is_first_process():
            print(f"\ninterrupted{resumed}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - so that the flush at exit stays silent
        return 1
    except Exception as error:
        message = _in_a_line(error, words, resumed)
        let_the_first_speak()
        if message is None or os.environ.get("FIBATTN_TRACEBACK"):
            raise
        print(f"{name}: {message}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def let_the_first_speak() -> None:
    """Wait for that in any other process."""
    if not is_first_process():
        time.sleep(_PATIENCE)


def _open(program: Program, verb: str, rest: Sequence[str]) -> None:
    if verb in ("-h", "--help"):
        print(_help(program))
    elif verb == "--version":
        print(f"fibattn {__version__}")
    elif verb in program.verbs:
        importlib.import_module(f"{program.package}.{verb.replace('-', '_')}").run(list(rest))
    else:
        raise InputError(f"unknown verb {verb!r}: {suggestion(verb, program.verbs, 'verbs')}")


def _in_a_line(error: Exception, words: Sequence[str], resumed: str) -> str | None:
    """What is wrong: in the input, with a file that the user named, the disk or another process; None for a fault."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, OSError):
        of_another = any(said in str(error) for said in _OF_ANOTHER)
        return f"another process of this run is gone, and torchrun says which{resumed}" if of_another else None
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else None
    if error.errno in _DISK:
        where = f" while writing {path}" if path else ""
        return f"{_DISK[error.errno]}{where}; make room and run the same command again"
    if error.errno not in _FILE or path is None or not _is_named(Path(path), words):
        return None
    return f"{path} {_FILE[error.errno]}"


def _is_named(path: Path, words: Sequence[str]) -> bool:
    """Whether a path was named on the command line, lies in or above one that was, or is in the current folder."""
    place = Path(os.path.abspath(path))  # noqa: PTH100 - as it was named, links and all
    names = {name for word in words for name in (word, word.partition("=")[2], word.rpartition("=")[2]) if name}
    places = [Path(os.path.abspath(name)) for name in names]  # noqa: PTH100
    return not path.is_absolute() or any(place == one or place in one.parents or one in place.parents for one in places)


def _help(program: Program) -> str:
    usage = f"usage: {program.name} VERB [arguments]      {program.name} VERB --help"
    lines = [f"{program.name}: {program.about}", "", usage, ""]
    width = max(13, *map(len, program.verbs))
    lines += [f"  {verb:<{width}} {summary}" for verb, summary in program.verbs.items()]
    return "\n".join(lines)
