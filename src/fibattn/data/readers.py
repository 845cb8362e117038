"""Reads the documents of one local file: plain text, JSON lines or Parquet, as it is or compressed.

A plain text file is one document; a row of JSON lines or Parquet is one document. Rows are streamed through
`datasets`, imported only when there are any.
"""

import glob
import gzip
import logging
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fibattn.errors import InputError

PLAIN = (".txt", ".md", ".rst", ".py")
ROWS = {".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")


def kind(path: Path) -> str | None:
    """The suffix that says how `path` is read (".txt", ".jsonl", …), without compression; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":  # Parquet compresses inside
            return None
    known = bool(suffixes) and (suffixes[-1] in PLAIN or suffixes[-1] in ROWS)
    return suffixes[-1] if known else None


def read_file(path: Path, fields: tuple[str, ...], key: str | None) -> Iterator[tuple[str, str]]:
    """Yield (key, text) for each document that is not blank; without a key field the key is the text.

    `InputError`: the file is binary, damaged or not UTF-8, or a row lacks a field.
    """
    if kind(path) in PLAIN:
        text = read_plain(path)
        if text.strip():
            yield text, text
        return
    number = 0
    for number, row in enumerate(_rows(path), start=1):
        document = from_row(row, fields, key, f"row {number} of {path}")
        if document[1].strip():
            yield document
    if number == 0:
        raise InputError(f"{path} has no rows; a whole file was expected: fetch it again or leave it out")


def read_plain(path: Path) -> str:
    """The text of a file, UTF-8 and without a byte-order mark."""
    try:
        data = _decompressed(path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); check it or fetch it again") from None
    if b"\0" in data:
        where = data.index(b"\0")
        raise InputError(f"{path} is binary or UTF-16 (byte 0 at {where}); text in UTF-8 was expected: leave it out")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(path, error)) from None


def _decompressed(path: Path) -> bytes:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    if suffix == ".zst":
        import zstandard

        try:
            with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                return reader.read()
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
    return path.read_bytes()


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    found = error.object[error.start : error.end].hex(" ")
    return (
        f"{path} is not UTF-8: {found} at byte {error.start} ({error.reason}); "
        "convert it (iconv -f LATIN1 -t UTF-8) or leave it out"
    )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, streamed; whatever the readers below say of a damaged file names the file here."""
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; a file with rows was expected: fetch it again or leave it out")
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{path} needs the package datasets to be read: pip install 'datasets>=4'") from None
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it would print the error that is raised below too
    builder, pattern = ROWS[kind(path) or ""], glob.escape(str(path))
    try:
        yield from load_dataset(builder, data_files=[pattern], split="train", streaming=True)
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(path, error)) from None
    except StopIteration:  # what `datasets` raises for an archive with nothing in it
        raise InputError(f"{path} has no rows; fetch it again or leave it out") from None
    except (ValueError, OSError, EOFError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path} is not valid {builder} ({message}); check it or fetch it again") from None


def from_row(row: Mapping[str, Any], fields: tuple[str, ...], key: str | None, where: str) -> tuple[str, str]:
    """(key, text) of a row: its fields joined by a blank line, its key field (without one, the text)."""
    parts = []
    for field in (*fields, *((key,) if key else ())):
        if field not in row:
            have = ", ".join(map(repr, row))
            raise InputError(f"{where} has no field {field!r}; it has {have}: name the right one with --text or --key")
        if not isinstance(row[field], str):
            got = type(row[field]).__name__
            raise InputError(f"field {field!r} in {where} is {got}, text was expected: name another field with --text")
        parts.append(row[field])
    text = "\n\n".join(parts[: len(fields)])
    return (parts[-1] if key else text), text
