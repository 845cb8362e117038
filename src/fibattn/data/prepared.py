"""Reads a prepared folder: one logical stream of training tokens and one of each held-out set."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fibattn import files
from fibattn.data.record import DATA, UNFINISHED
from fibattn.data.shards import bytes_path, is_intact, listed, open_shard, starts_path
from fibattn.errors import InputError


class TokenStream:
    """The tokens of several shards as one sequence, memory-mapped when a process first reads."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        counts = [len(open_shard(path)) for path in self.paths]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}  # a worker process maps the files itself

    def sequence(self, start: int, length: int) -> np.ndarray:
        """Tokens start … start+length-1, int64 [length], also across shards; `InputError` past the end."""
        if start < 0 or length < 0 or start + length > len(self):
            raise InputError(
                f"tokens {start} to {start + length} were asked of a stream of {len(self)}; the order of "
                "sequences was made for other data: make it anew"
            )
        if self._maps is None:
            self._maps = [open_shard(path) for path in self.paths]
        return self._cut(self._maps, start, length)

    def documents(self) -> np.ndarray:
        """Where each document begins, and where the last ends, int64 [documents + 1]."""
        edges = [0, *self._ends.tolist()]
        starts = (np.load(starts_path(path)).astype(np.int64) for path in self.paths)
        return np.concatenate([*(first + one for first, one in zip(edges[:-1], starts, strict=True)), edges[-1:]])

    def byte_counts(self, start: int, length: int, sizes: np.ndarray) -> np.ndarray:
        """Bytes of text of each of the tokens start … start+length-1, int64 [length].

        Those beside the shards where the tokenizer does not keep bytes, else those of the table `sizes`.
        """
        if not self.paths or not bytes_path(self.paths[0]).exists():
            return sizes[self.sequence(start, length)].astype(np.int64)
        return self._cut([np.load(bytes_path(path), mmap_mode="r") for path in self.paths], start, length)

    def _cut(self, shards: Sequence[np.ndarray], start: int, length: int) -> np.ndarray:
        """Entries start … start+length-1 of arrays that have one for each token, int64."""
        index = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while length > 0:
            shard = shards[index]
            at = start - (int(self._ends[index]) - len(shard))
            parts.append(shard[at : at + length])
            start, length, index = start + len(parts[-1]), length - len(parts[-1]), index + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


class TokensInMemory(TokenStream):
    """Tokens (tokens,) of an integer type, that lie in no file."""

    def __init__(self, tokens: np.ndarray):
        super().__init__(())
        self._ends, self._maps = np.array([len(tokens)]), [tokens]
        self.fingerprint = hashlib.sha256(tokens.tobytes()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


@dataclass(frozen=True)
class PreparedData:
    """A whole prepared folder.

    `training` and `validation` are by source, `train` is all of `training`. `token_bytes` [vocabulary] are the bytes of
    text each token stands for, where its tokenizer keeps bytes (see `TokenStream.byte_counts`); `fingerprint` changes
    when any token does; `separator` is the id that begins every document; `sources` is what `data.json` says of each
    source.
    """

    folder: Path
    train: TokenStream
    training: dict[str, TokenStream]
    validation: dict[str, TokenStream]
    tokenizer_path: Path
    vocab_size: int
    separator: int
    token_bytes: np.ndarray
    fingerprint: str
    sources: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "PreparedData":
        """Open a folder that `prepare` made; `verify` reads every byte (about a second a gigabyte).

        `InputError`: it is missing, unfinished, or a file is not what was written. Without `verify` a shard
        of the wrong length is still found.
        """
        folder = Path(folder)
        if not (folder / DATA).exists():
            if (folder / UNFINISHED).exists():
                raise InputError(f"{folder} is not finished; run the same `fibattn prepare` again, it goes on there")
            raise InputError(f"{folder} holds no prepared data ({DATA} is missing); make it with `fibattn prepare`")
        data = files.read_json(folder / DATA)
        if (found := data.get("format")) != 1:
            raise InputError(f"{folder / DATA} has format {found}, expected 1; prepare the data anew")
        _check(folder, data, verify)
        streams = {
            (name, split): TokenStream([folder / "shards" / name / shard.file for shard in shards])
            for (name, split), shards in listed(data["sources"]).items()
        }
        training, validation = (
            {name: stream for (name, split), stream in streams.items() if split == wanted}
            for wanted in ("train", "val")
        )
        return cls(
            folder=folder,
            train=TokenStream([path for stream in training.values() for path in stream.paths]),
            training=training,
            validation=validation,
            tokenizer_path=folder / "tokenizer",
            vocab_size=data["vocab_size"],
            separator=data["separator"],
            token_bytes=np.load(folder / "token_bytes.npy"),
            fingerprint=data["fingerprint"],
            sources=tuple(data["sources"]),
        )


def fingerprint(data: dict[str, Any]) -> str:
    """SHA-256 over the fingerprints in `data.json`: the tokenizer and every shard in order."""
    shards = [
        [*stream, *(seal for seal in (shard.sha256, shard.starts_sha256, shard.bytes_sha256) if seal)]
        for stream, found in listed(data["sources"]).items()
        for shard in found
    ]
    parts = [data[name] for name in ("vocab_size", "separator", "tokenizer_sha256", "token_bytes_sha256")] + [shards]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _check(folder: Path, data: dict[str, Any], verify: bool) -> None:
    repair = "run the same `fibattn prepare` again, it makes anew what is damaged"
    try:
        found, expected = fingerprint(data), data["fingerprint"]
    except (KeyError, TypeError) as error:
        found, expected = f"without {error}", "a whole one"
    if found != expected:
        raise InputError(
            f"{folder / DATA} was altered: its fingerprint is {found}, expected {expected}; restore or prepare it anew"
        )
    for name, expected in (
        ("tokenizer/tokenizer.json", data["tokenizer_sha256"]),
        ("token_bytes.npy", data["token_bytes_sha256"]),
    ):
        path = folder / name
        found = files.sha256(path) if path.exists() else "missing"
        if found != expected:
            raise InputError(f"{path} differs: SHA-256 {found}, expected {expected}; {repair}")
    for (name, _), shards in listed(data["sources"]).items() if verify else ():
        for shard in shards:
            path = folder / "shards" / name / shard.file
            open_shard(path)  # says more of a missing or truncated one
            if not is_intact(path.parent, shard):
                found = files.sha256(path)
                raise InputError(
                    f"the shard {path} was altered: SHA-256 {found}, expected {shard.sha256} (or its "
                    f"document starts were); {repair}"
                )
