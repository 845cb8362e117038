"""The door: finds the verb, imports only what it needs, and turns a user's mistake into one line.

A verb is a module of this package with a function `run(arguments)`. The table below is all that
`fibattn --help` needs, so it answers before anything heavy is imported.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from fibattn._version import __version__
from fibattn.errors import InputError, suggestion

VERBS = {
    "pattern": "show which distances every layer attends to, and what the stack reaches",
    "prepare": "turn text into a tokenizer, token shards and held-out sets",
    "train": "train a model from a recipe",
    "sample": "continue a prompt, streamed, for as long as wanted",
    "eval": "perplexity, bits per byte and length extrapolation of a trained model",
    "probe": "retrieval, recall, variable tracking, public tasks, latency, operations",
    "study": "train and evaluate a matrix of models, and report on them beside the paper's",
    "report": "write the page and the tables from the results of studies",
    "bench": "time the attention operator against dense and masked attention on this machine",
    "demo": "train dense and staggered on the standard library, and show both past their training length",
}


_KEPT = "; what was finished is kept, the same command goes on from there"
_RESUMED = {
    "prepare": _KEPT,
    "train": "; the same command goes on from the last checkpoint, or begins anew where there is none yet",
    "study": _KEPT,
    "demo": _KEPT,
}
"""What a verb that goes on where it was stopped says of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    try:
        if verb in ("-h", "--help"):
            print(_help())
        elif verb == "--version":
            print(f"fibattn {__version__}")
        elif verb in VERBS:
            importlib.import_module(f"fibattn.cli.{verb}").run(rest)
        else:
            raise InputError(f"unknown verb {verb!r}: {suggestion(verb, VERBS, 'verbs')}")
        sys.stdout.flush()  # here, where a reader that went away is expected
    except KeyboardInterrupt:
        print(f"\ninterrupted{_RESUMED.get(verb, '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - so that the flush at exit stays silent
        return 1
    except (InputError, ImportError, OSError) as error:
        if os.environ.get("FIBATTN_TRACEBACK"):
            raise
        print(f"fibattn {verb}: {_explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if isinstance(error, ImportError):
        return f"{error}; set FIBATTN_TRACEBACK=1 to see where"
    return str(error)


def _help() -> str:
    lines = [
        f"fibattn {__version__}: fixed-offset sparse attention, from text to an extrapolation table",
        "",
        "usage: fibattn VERB [arguments]      fibattn VERB --help",
        "",
    ]
    lines += [f"  {verb:<10}{summary}" for verb, summary in VERBS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
