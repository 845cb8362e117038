"""The door of a program with verbs: finds the verb, imports only what it needs, and turns a mistake into one line.

A verb is a module with a function `run(arguments)`, of the package that the program names. Its table of verbs is all
that `--help` needs, so it answers before anything heavy is imported.
"""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fibattn._version import __version__
from fibattn.errors import InputError, suggestion


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
    return guarded(f"{program.name} {verb}", lambda: _open(program, verb, rest), program.resumed.get(verb, ""))


def guarded(name: str, work: Callable[[], None], resumed: str = "") -> int:
    """Do the work of a command and return the exit status: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted.

    A mistake of the user's is one line that begins with `name`; `resumed` is said after an interruption.
    """
    # Before torch loads: threads that spin at barriers take the cores of a busy machine from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        work()
        sys.stdout.flush()  # here, where a reader that went away is expected
    except KeyboardInterrupt:
        print(f"\ninterrupted{resumed}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - so that the flush at exit stays silent
        return 1
    except (InputError, ImportError, OSError) as error:
        if os.environ.get("FIBATTN_TRACEBACK"):
            raise
        print(f"{name}: {_explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _open(program: Program, verb: str, rest: list[str]) -> None:
    if verb in ("-h", "--help"):
        print(_help(program))
    elif verb == "--version":
        print(f"fibattn {__version__}")
    elif verb in program.verbs:
        importlib.import_module(f"{program.package}.{verb.replace('-', '_')}").run(rest)
    else:
        raise InputError(f"unknown verb {verb!r}: {suggestion(verb, program.verbs, 'verbs')}")


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if isinstance(error, ImportError):
        return f"{error}; set FIBATTN_TRACEBACK=1 to see where"
    return str(error)


def _help(program: Program) -> str:
    lines = [
        f"{program.name}: {program.about}",
        "",
        f"usage: {program.name} VERB [arguments]      {program.name} VERB --help",
        "",
    ]
    lines += [f"  {verb:<14}{summary}" for verb, summary in program.verbs.items()]
    return "\n".join(lines)
