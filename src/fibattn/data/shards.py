"""Token shards on disk, in the format of llm.c: 256 int32 of header, then the tokens.

header[0] is a magic number, [1] the version, [2] the count of tokens: 20240520 and 1 for uint16, 20240801
and 7 for uint32. Beside `x.bin` lies `x.starts.npy`, the position of each document's first token (uint64).
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fibattn import files
from fibattn.errors import InputError

HEADER_BYTES = 1024
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}
MAX_TOKENS = 2**31 - 1  # the header counts in int32


@dataclass(frozen=True)
class Shard:
    """One finished shard; `bytes`: UTF-8 length of its text; `cut`: its last document is not whole.

    `bytes_sha256` is there where the bytes of each token lie beside it, see `bytes_path`.
    """

    file: str
    tokens: int
    documents: int
    bytes: int
    cut: bool
    sha256: str
    starts_sha256: str
    bytes_sha256: str | None = None


def listed(sources: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[Shard]]:
    """The shards of every source's streams, "train" and "val", from what `data.json` says of the sources."""
    return {
        (source["name"], split): [Shard(**saved) for saved in source[split]["shards"]]
        for source in sources
        for split in ("train", "val")
        if source[split]
    }


def token_dtype(vocab_size: int) -> np.dtype:
    """Uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def starts_path(path: Path) -> Path:
    """Where the document starts of the shard `path` lie."""
    return path.with_suffix(".starts.npy")


def bytes_path(path: Path) -> Path:
    """Where the bytes of text of each token of the shard `path` lie, if its tokenizer does not keep bytes."""
    return path.with_suffix(".bytes.npy")


def byte_count(document: np.ndarray, sizes: np.ndarray) -> int:
    """How many bytes of text: those that the tokens come with, else those of the table `sizes`."""
    return int((sizes[document] if document.ndim == 1 else document[1]).sum(dtype=np.int64))


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array as .npy, whole or not at all."""
    buffer = io.BytesIO()  # numpy's own writing to a full disk raises an error that does not say so
    np.save(buffer, values)
    with files.replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def write_shard(
    path: Path, documents: Iterable[np.ndarray], sizes: np.ndarray, dtype: np.dtype, full: int, limit: int | None
) -> Shard:
    """Write documents until there are `full` tokens or more, never more than `limit`; the last may be cut.

    `documents` are arrays of token ids, or of these above their bytes, see `encoding.encode`; no more of them are
    taken than go in. `sizes` is the table of bytes of each token, see `tokenizer.token_bytes`. The file appears under
    its name once it is whole.
    """
    limit = MAX_TOKENS if limit is None else min(limit, MAX_TOKENS)
    starts, total, size, cut = [], 0, 0, False
    bytes_of_tokens: list[np.ndarray] = []
    with files.replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(bytes(HEADER_BYTES))
            for document in documents:
                cut = document.shape[-1] > limit - total
                document = document[..., : limit - total]
                starts.append(total)
                total += document.shape[-1]
                size += byte_count(document, sizes)
                if document.ndim > 1:
                    document, bytes_here = document
                    bytes_of_tokens.append(bytes_here)
                file.write(np.ascontiguousarray(document, dtype).data)
                if total >= min(full, limit):
                    break
            file.seek(0)
            file.write(np.array((*FORMATS[dtype], total), "<i4").tobytes())
        save_array(starts_path(path), np.array(starts, np.uint64))
        if bytes_of_tokens:
            save_array(bytes_path(path), np.concatenate(bytes_of_tokens))
        digest = files.sha256(temporary)
    of_bytes = files.sha256(bytes_path(path)) if bytes_of_tokens else None
    return Shard(path.name, total, len(starts), size, cut, digest, files.sha256(starts_path(path)), of_bytes)


def cut_shard(path: Path, sizes: np.ndarray, limit: int) -> Shard:
    """Rewrite a shard with its first `limit` tokens."""
    tokens, starts = open_shard(path), np.load(starts_path(path))
    all_of_it = np.stack([tokens, np.load(bytes_path(path))]) if bytes_path(path).exists() else tokens
    documents = (all_of_it[..., a:b] for a, b in pairwise([*starts.tolist(), len(tokens)]))
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


def remove_shard(path: Path) -> None:
    """Remove a shard and what lies beside it."""
    for file in (path, starts_path(path), bytes_path(path)):
        file.unlink(missing_ok=True)


def is_intact(folder: Path, shard: Shard) -> bool:
    """Whether the files of a shard are there and are what was written."""
    path = folder / shard.file
    expected = {path: shard.sha256, starts_path(path): shard.starts_sha256}
    if shard.bytes_sha256 is not None:
        expected[bytes_path(path)] = shard.bytes_sha256
    return all(file.exists() and files.sha256(file) == digest for file, digest in expected.items())
