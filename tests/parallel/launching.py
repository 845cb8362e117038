"""Programs of this folder in several processes."""

import os
import subprocess
import sys
from pathlib import Path

from forked import Server, together

FOLDER = Path(__file__).parent


def launch(forked: Server, program: str, processes: int, *words: str) -> str:
    """What a program of this folder prints in processes that know of each other."""
    return "".join(together(forked.several([sys.executable, FOLDER / program, *words], processes, **_environment())))


def under_torchrun(program: str, processes: int, *words: str) -> None:
    """Run it under torchrun itself, which looks after the processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, FOLDER / program, *words],
        env={**os.environ, **_environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-9000:]


def _environment() -> dict[str, str]:
    paths = [FOLDER.parent / "model", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
