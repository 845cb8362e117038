"""Sequences of a token stream as a PyTorch data set."""

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from fibattn.data.encoding import encode
from fibattn.data.prepared import TokensInMemory, TokenStream
from fibattn.data.readers import kind, read_file
from fibattn.data.tokenizer import separator
from fibattn.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TrainingSequences(Dataset[dict[str, torch.Tensor]]):
    """Item i is the sequence that starts at `order[i]`: `input_ids` and `shift_labels`, both int64 [length].

    `shift_labels` are the tokens one later, so that the loss is over all `length` targets; `labels` are the
    inputs, by which Transformers counts items.
    """

    def __init__(self, stream: TokenStream, order: np.ndarray, length: int):
        self.stream, self.order, self.length = stream, order, length

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.stream.sequence(int(self.order[index]), self.length + 1))
        inputs = tokens[:-1]
        return {"input_ids": inputs, "labels": inputs, "shift_labels": tokens[1:]}


def held_out_sequences(stream: TokenStream, length: int, limit_tokens: int | None = None) -> TrainingSequences:
    """Disjoint sequences, for evaluation: sequence s starts at s·length and has `length` targets.

    At most `limit_tokens` targets in all. `InputError` when not even one sequence fits.
    """
    targets = len(stream) - 1 if limit_tokens is None else min(len(stream) - 1, limit_tokens)
    if targets < length:
        limit = "" if limit_tokens is None else f" and a limit of {limit_tokens}"
        raise InputError(
            f"a sequence of {length} needs {length + 1} tokens; the text has {len(stream)}{limit}: give more text, or "
            "evaluate shorter sequences"
        )
    return TrainingSequences(stream, np.arange(targets // length, dtype=np.int64) * length, length)


def document_beginnings(stream: TokenStream, length: int, limit_tokens: int) -> TrainingSequences:
    """The first `length` targets of every document that has so many; at most `limit_tokens` in all, maybe none."""
    edges = stream.documents()
    starts = edges[:-1][np.diff(edges) > length]
    return TrainingSequences(stream, starts[: limit_tokens // length], length)


def read_tokens(paths: Iterable[Path], tokenizer: "PreTrainedTokenizerFast", most: int) -> TokensInMemory:
    """The first tokens of some text files, `most` in all, of each as many as of the others as far as it has them.

    They come file by file. Files are as `fibattn prepare` takes them; each document is behind a separator.

    Raises:
        InputError: for a file of an unknown kind, and one that cannot be read.
    """
    files: list[Iterator[np.ndarray]] = []
    for path in dict.fromkeys(paths):
        if kind(path) is None:
            what = "a folder" if path.is_dir() else "no text that can be read"
            raise InputError(f"{path} is {what}; give .txt, .md, .jsonl or .parquet files")
        texts = (text for _, text in read_file(path, ("text",), None))
        files.append(_pieces(encode(tokenizer, texts, separator(tokenizer), np.dtype(np.uint32))))
    found: list[list[np.ndarray]] = [[] for _ in files]
    counts = [(0, number) for number in range(len(files))]  # a heap: the file that has given least is first
    while counts and most > 0:
        count, number = heappop(counts)
        piece = next(files[number], None)
        if piece is not None:
            piece = piece[:most]
            found[number].append(piece)
            most -= len(piece)
            heappush(counts, (count + len(piece), number))
    return TokensInMemory(np.concatenate([np.zeros(0, np.uint32), *chain.from_iterable(found)]))


def _pieces(documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The ids of documents, few at a time: a file may be a single one."""
    for ids in documents:
        ids = ids if ids.ndim == 1 else ids[0]
        yield from (ids[first : first + 256] for first in range(0, len(ids), 256))
