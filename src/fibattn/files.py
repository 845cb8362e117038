"""Files that are either whole or absent: everything is written under a temporary name beside its own, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fibattn.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """The temporary files in `folder` itself that a killed process left there."""
    return [path for path in folder.glob(".*.tmp") if path.is_file()]


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """For libraries whose errors do not say that the disk is full: when it is, raise the `OSError` that does."""
    try:
        yield
    except Exception:
        probe = folder / f".room.{os.getpid()}.tmp"
        try:
            probe.write_bytes(bytes(1 << 20))
        finally:
            probe.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty place beside `path` to write a folder to, which takes its place once all is written."""
    staged = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_a_full_disk(path.parent):
        yield staged
        staged.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all; what is none, as in old names of files, by its escape."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; a missing or damaged one is an `InputError` that names it."""
    try:
        # Some editors begin a file with a byte-order mark.
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore it or make it anew") from None
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} has a number of thousands of digits, or brackets nested as deeply; give smaller ones"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} is a {type(value).__name__}, expected an object with keys; restore it or make it anew"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise InputError(f"names {twice!r} twice; leave one out")
    return value


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file in it")
    folder = next(one for one in path.absolute().parents if one.exists())
    try:  # there are places where root may write by the rights, and cannot
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        raise InputError(
            f"{path} cannot be written: {folder} is no folder that may be written to; give another place"
        ) from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def let_read(folder: Path) -> None:
    """Let whoever may read a folder read its files: safetensors writes them for their owner alone."""
    readers = folder.stat().st_mode & 0o444
    for path in filter(Path.is_file, folder.rglob("*")):
        path.chmod(path.stat().st_mode | readers)
