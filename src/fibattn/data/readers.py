"""Reads the documents of one local file: plain text, JSON lines or Parquet, as it is or compressed.

A plain text file is one document; a row of JSON lines or Parquet is one document. Lines of JSON are read one by one: a
library that makes columns of them refuses files whose other fields change their type. Of Parquet only the columns that
are asked for are read, so that the others may hold anything.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fibattn.errors import InputError

PLAIN = (".txt", ".md", ".rst", ".py")
ROWS = (".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")

_BLOCK = 1 << 20
_WINDOW = 1 << 31  # what `zstd --long=31` asks for, the most there is
_MARK = "\ufeff"
_ROWS = 64  # of Parquet at once: each may be a book


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
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; a file with rows was expected: fetch it again or leave it out")
    rows = _lines_of_json(path) if kind(path) == ".jsonl" else _parquet(path, wanted_fields(fields, key))
    number = 0
    for number, row in enumerate(rows, start=1):
        document = from_row(row, fields, key, f"row {number} of {path}")
        if document[1].strip():
            yield document
    if number == 0:
        raise InputError(f"{path} has no rows; a whole file was expected: fetch it again or leave it out")


def read_plain(path: Path) -> str:
    """The text of a file, UTF-8 and without byte-order marks, which may begin any line of a file that was joined."""
    data = b"".join(_blocks(path))
    if b"\0" in data:
        where = data.index(b"\0")
        raise InputError(f"{path} is binary or UTF-16 (byte 0 at {where}); text in UTF-8 was expected: leave it out")
    try:
        return data.decode("utf-8-sig").replace(f"\n{_MARK}", "\n")
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(str(path), error)) from None


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, block by block."""
    suffix = path.suffix.lower()
    try:
        with gzip.open(path) if suffix == ".gz" else path.open("rb") as file:
            blocks = iter(lambda: file.read(_BLOCK), b"")
            yield from _decompressed(blocks) if suffix == ".zst" else blocks
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); check it or fetch it again") from None


def _decompressed(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Zstandard, frame by frame; a stream reader of the library would take one that was cut short for its end."""
    import zstandard

    frame = None
    for block in blocks:
        rest = block
        while rest:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("Compressed file ended before the end of a frame")


def _not_utf8(what: str, error: UnicodeDecodeError) -> str:
    found = error.object[error.start : error.end].hex(" ")
    encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"  # by its byte-order mark
    return (
        f"{what} is not UTF-8: {found} at byte {error.start} ({error.reason}); "
        f"convert it (iconv -f {encoding} -t UTF-8) or leave it out"
    )


def _lines_of_json(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file of JSON lines; blank lines are skipped."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"line {number} of {path}"
        try:
            text = line.decode("utf-8-sig").strip()  # of files that were joined, any line may begin with a mark
            row = json.loads(text, parse_int=_integer) if text else None
        except UnicodeDecodeError as error:
            raise InputError(_not_utf8(where, error)) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON ({error}); check it or fetch it again") from None
        if isinstance(row, dict):
            yield row
        elif text:
            raise InputError(f"{where} is {text[:40]!r}; an object with fields was expected: {{...}} in each line")


def _integer(digits: str) -> int | float:
    """A number of a row; Python refuses to read those of thousands of digits, and here they are only passed over."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _lines(path: Path) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in _blocks(path):
        first, *others = block.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _parquet(path: Path, wanted: list[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of a Parquet file, the wanted columns alone, a few at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in wanted if name not in names]:
                raise InputError(_no_field(f"each row of {path}", missing[0], names))
            for batch in file.iter_batches(_ROWS, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path} is not valid parquet ({message}); check it or fetch it again") from None


def _no_field(where: str, field: str, have: Iterable[str]) -> str:
    names = ", ".join(map(repr, have))
    way = "name the right one to `fibattn prepare` (--text, --key); other commands read 'text' alone"
    return f"{where} has no field {field!r}; it has {names}: {way}"


def wanted_fields(fields: tuple[str, ...], key: str | None) -> list[str]:
    """The fields of a row that are read: those of the text and the key's, each once."""
    return list(dict.fromkeys((*fields, key) if key else fields))


def from_row(row: Mapping[str, Any], fields: tuple[str, ...], key: str | None, where: str) -> tuple[str, str]:
    """(key, text) of a row: its fields that are not null joined by a blank line, its key field (or else the text)."""
    for field in wanted_fields(fields, key):
        if field not in row:
            raise InputError(_no_field(where, field, row))
        if row[field] is None and field in fields and field != key:
            continue
        if not isinstance(row[field], str):
            got = type(row[field]).__name__
            flag = "--text" if field in fields else "--key"
            raise InputError(f"field {field!r} in {where} is {got}, text was expected: name another field with {flag}")
        try:
            row[field].encode()
        except UnicodeEncodeError as error:
            wrong = f"{error.object[error.start]!r} at {error.start}"
            raise InputError(
                f"field {field!r} in {where} has half a character ({wrong}); mend it or leave it out"
            ) from None
    text = "\n\n".join(row[field] for field in fields if row[field] is not None)
    return (row[key] if key else text), text
