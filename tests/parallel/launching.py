"""Programs of this folder under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def launch(program: str, processes: int, *words: str) -> str:
    """What a program of this folder prints under torchrun."""
    paths = [FOLDER.parent / "model", *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, FOLDER / program, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout
