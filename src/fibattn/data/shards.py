"""Token shards on disk, in the format of llm.c: 256 int32 of header, then the tokens.

header[0] is a magic number, [1] the version, [2] the count of tokens: 20240520 and 1 for uint16, 20240801
and 7 for uint32. Beside `x.bin` lies `x.starts.npy`, the position of each document's first token (uint64).
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fibattn import files
from fibattn.errors import InputError

HEADER_BYTES = 1024
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}
MAX_TOKENS = 2**31 - 1  # the header counts in int32


@dataclass(frozen=True)
class Shard:
    """One finished shard; `bytes`: UTF-8 length of its text; `cut`: its last document is not whole."""

    file: str
    tokens: int
    documents: int
    bytes: int
    cut: bool
    sha256: str
    starts_sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """Uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def starts_path(path: Path) -> Path:
    """Where the document starts of the shard `path` lie."""
    return path.with_suffix(".starts.npy")


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array as .npy, whole or not at all."""
    buffer = io.BytesIO()  # numpy's own writing to a full disk raises an error that does not say so
    np.save(buffer, values)
    with files.replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def write_shard(
    path: Path,
    documents: Iterable[np.ndarray],
    sizes: np.ndarray,
    dtype: np.dtype,
    full: int,
    limit: int | None,
) -> Shard:
    """Write documents until there are `full` tokens or more, never more than `limit`; the last may be cut.

    `documents` are arrays of token ids; no more of them are taken than go in. `sizes` is the table of bytes
    of each token, see `tokenizer.token_bytes`. The file appears under its name once it is whole.
    """
    limit = MAX_TOKENS if limit is None else min(limit, MAX_TOKENS)
    starts, total, size, cut = [], 0, 0, False
    with files.replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(bytes(HEADER_BYTES))
            for document in documents:
                cut = len(document) > limit - total
                document = document[: limit - total]
                starts.append(total)
                total += len(document)
                size += int(sizes[document].sum(dtype=np.int64))
                file.write(np.ascontiguousarray(document, dtype).data)
                if total >= min(full, limit):
                    break
            file.seek(0)
            file.write(_header(dtype, total))
        save_array(starts_path(path), np.array(starts, np.uint64))
        digest = files.sha256(temporary)
    return Shard(path.name, total, len(starts), size, cut, digest, files.sha256(starts_path(path)))


def _header(dtype: np.dtype, tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = (*FORMATS[dtype], tokens)
    return header.tobytes()


def cut_shard(path: Path, sizes: np.ndarray, limit: int) -> Shard:
    """Rewrite a shard with its first `limit` tokens."""
    tokens, starts = open_shard(path), np.load(starts_path(path))
    documents = (tokens[a:b] for a, b in pairwise([*starts.tolist(), len(tokens)]))
    return write_shard(path, documents, sizes, tokens.dtype, limit, limit)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped; a missing, foreign or truncated one is an `InputError`."""
    repair = "run the same `fibattn prepare` again, it makes that shard anew"
    if not path.exists():
        raise InputError(f"the shard {path} is missing; {repair}")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3)
    dtype = next((dtype for dtype, magic in FORMATS.items() if (*magic,) == tuple(header[:2])), None)
    if dtype is None or len(header) < 3:
        found = header[:2].tolist()
        raise InputError(f"{path} is not a token shard: magic and version {found}, expected [20240520, 1]; {repair}")
    expected = HEADER_BYTES + int(header[2]) * dtype.itemsize
    if size != expected:
        raise InputError(f"the shard {path} has {size} bytes, expected {expected} for {header[2]} tokens; {repair}")
    return np.memmap(path, dtype, "r", offset=HEADER_BYTES)


def is_intact(folder: Path, shard: Shard) -> bool:
    """Whether the files of a shard are there and are what was written."""
    path = folder / shard.file
    expected = {path: shard.sha256, starts_path(path): shard.starts_sha256}
    return all(file.exists() and files.sha256(file) == digest for file, digest in expected.items())
