"""Checkpoints that are whole or absent, and known to be whole.

A checkpoint is written into a staging folder, its files are listed with size and SHA-256 in `COMPLETE.json`,
and only then does the folder take its name. A killed run leaves a staging folder, which is never read.
The recipe and the fingerprints of the inputs are among the files, so a checkpoint says which run it belongs to.
"""

import os
import shutil
import sys
from pathlib import Path

from fibattn.errors import InputError
from fibattn.sealed import seal, verify

STAGING = ".staging"
_PREFIX = "checkpoint-"


def publish(run: Path, step: int, keep: int) -> Path:
    """Give the staged checkpoint of `step` its name, and remove all but it and the newest `keep - 1` before it.

    Checkpoints of later steps are removed too: they were damaged, or the run would have resumed from them.
    """
    staged, final = run / STAGING / f"{_PREFIX}{step}", run / f"{_PREFIX}{step}"
    for name in ("recipe.json", "inputs.json"):
        shutil.copyfile(run / name, staged / name)
    seal(staged)
    if final.is_dir():
        shutil.rmtree(final)
    final.unlink(missing_ok=True)
    staged.replace(final)
    _sync_folder(run)
    shutil.rmtree(run / STAGING)
    kept = [folder for folder in folders(run) if step_of(folder) <= step][-keep:]
    for other in folders(run):
        if other not in kept:
            shutil.rmtree(other)
    return final


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a line on stderr.

    Raises:
        InputError: when there are checkpoints and none is whole.
    """
    found = folders(run)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except InputError as error:
            print(f"passing over a damaged checkpoint: {error}", file=sys.stderr)
    if found:
        raise InputError(f"no checkpoint in {run} is whole; remove the folder to start the run anew")
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def folders(run: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, from the first on."""
    named = (path for path in run.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    return sorted((path for path in named if path.is_dir()), key=step_of)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
