"""Folders whose files can be trusted: listed with size and SHA-256 in `COMPLETE.json`, and checked against it."""

import os
from pathlib import Path

from fibattn import files
from fibattn.errors import InputError

CARD = "README.md"
"""A model card may be edited; nothing depends on it, so it is not in the manifest."""
_MANIFEST = "COMPLETE.json"
_UNSEALED = (_MANIFEST, CARD)


def seal(folder: Path) -> None:
    """Write the manifest of a finished folder: the size and SHA-256 of every file but its card."""
    files.let_read(folder)
    manifest = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _UNSEALED:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            manifest[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    files.write_json(folder / _MANIFEST, manifest)


def verify(folder: Path) -> dict[str, str]:
    """Check every file of a sealed folder.

    Returns:
        The SHA-256 of each, by name.

    Raises:
        InputError: naming the file that is missing, cut short or changed.
    """
    if not (folder / _MANIFEST).exists():
        raise InputError(f"{folder} has no {_MANIFEST}: it was not finished; use another checkpoint")
    manifest = files.read_json(folder / _MANIFEST)
    if not all(isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in manifest.values()):
        raise InputError(f"{folder / _MANIFEST} does not list files with their sizes; use another checkpoint")
    for name, expected in manifest.items():
        path = folder / name
        if not path.exists():
            raise InputError(f"{path} is missing; use another checkpoint")
        if path.stat().st_size != expected["bytes"]:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, expected {expected['bytes']}: it was cut short or changed; "
                "restore it, or use another checkpoint"
            )
        if files.sha256(path) != expected["sha256"]:
            raise InputError(f"{path} was changed since it was written (SHA-256); restore it or use another checkpoint")
    return {name: expected["sha256"] for name, expected in manifest.items()}


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a manifest to be checked against."""
    return (folder / _MANIFEST).exists()
