"""Python processes that begin with the imports done, which take seconds: each is forked from one that did them.

They take a command as `subprocess` does, and differ from a fresh process in nothing else. What an import does, and how
much memory a process takes, is tested in fresh ones.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


class Server:
    """Forks a process for each command, with `modules` imported."""

    def __init__(self, *modules: str):
        command = [sys.executable, __file__, *modules]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> "Forked":
        """Begin `sys.executable` with `-m`, `-c` or a program, and what belongs to it."""
        assert command[0] == sys.executable
        folder = tempfile.TemporaryDirectory()
        for stream in ("stdout", "stderr"):
            (Path(folder.name) / stream).touch()
        request = {
            "words": list(map(str, command[1:])),
            "folder": folder.name,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }
        return Forked(self, self.ask(request), folder)

    def run(self, words: Sequence[str | Path], *, check: bool = False, **how: Any) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run`, with what the process says captured as text."""
        process = self.start(words, **how)
        done = subprocess.CompletedProcess(words, process.wait(), process.said("stdout"), process.said("stderr"))
        if check:
            assert done.returncode == 0, done.stderr[-3000:]
        return done

    def several(self, words: Sequence[str | Path], processes: int, **env: str) -> list["Forked"]:
        """Begin a command in several processes that know of each other, as torchrun does."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
        return [self.start(words, env={**os.environ, **place, **count, **rank, **env}) for rank in ranks]

    def ask(self, request: dict[str, Any]) -> Any:
        """The server's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


class Forked:
    """One of its processes, as a `subprocess.Popen`."""

    def __init__(self, server: Server, pid: int, folder: tempfile.TemporaryDirectory[str]):
        self._server, self.pid, self._folder = server, pid, folder

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        return self._server.ask({"pid": self.pid, "options": os.WNOHANG})

    def wait(self) -> int:
        """How it ended, once it has."""
        return self._server.ask({"pid": self.pid, "options": 0})

    def said(self, stream: str) -> str:
        """What it has written so far to `stdout` or `stderr`."""
        written = (Path(self._folder.name) / stream).read_text(encoding="utf-8")
        return written.partition("nanobind: leaked ")[0]  # Triton's bindings end with a list of what is frozen


def together(processes: Sequence[Forked]) -> list[str]:
    """What each said to stdout, once all have ended well; where one has not, the others are ended, as by torchrun."""
    waiting = list(processes)
    while waiting:
        for process in tuple(waiting):
            status = process.poll()
            if status is not None:
                waiting.remove(process)
            if status:
                for other in waiting:
                    os.kill(other.pid, signal.SIGKILL)
                    other.wait()
                raise AssertionError(process.said("stderr")[-9000:])
        time.sleep(0.01)
    return [process.said("stdout") for process in processes]


def _next_command() -> list[str]:
    """Serve requests; returns in a new process, with the words that it is to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], request["options"])
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            # A shell starts what runs in its background with interrupts ignored, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["env"])
            folder = Path(request["folder"])
            for target, path in enumerate((os.devnull, folder / "stdout", folder / "stderr")):
                os.dup2(os.open(path, os.O_RDWR), target)
            sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            tempfile.tempdir = None  # TMPDIR may be another
            return request["words"]
        print(json.dumps(answer), flush=True)
    gc.unfreeze()
    raise SystemExit


if __name__ == "__main__":
    for module in sys.argv[1:]:
        import_module(module)
    # Processes that walked what the imports left, a million objects, would copy it, and take a second to end.
    gc.collect()
    gc.freeze()
    sys.argv = _next_command()
    if sys.argv[0] == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
