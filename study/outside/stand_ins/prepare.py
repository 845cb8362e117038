"""In place of autoresearch's module of this name: the study's prepared text, and bits per byte of its held-out sets.

The interface is theirs: two constants, a tokenizer, batches, an evaluation. What differs is what is trained on, and
that sequences are cut from one long text, in whole passes over it, as the study's are: packed from whole documents,
most of every book would be thrown away, since theirs drops what does not fit a sequence.
"""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.data.sequences import held_out_sequences
from study.same_bytes import sizes_of, targets_within

DATA, LIKE, SECONDS, TARGETS = (f"FIBATTN_OUTSIDE_{name}" for name in ("DATA", "LIKE", "SECONDS", "TARGETS"))
"""Environment variables: the text in a vocabulary of this program's size, the study's own, how long to train, and how
many of the study's tokens each held-out set is cut to."""

MAX_SEQ_LEN = 2048
TIME_BUDGET = float(os.environ.get(SECONDS, "300"))

FOUND: dict[str, float] = {}
"""Bits per byte by held-out set, once evaluated."""


@dataclass(frozen=True)
class Tokenizer:
    """What the program asks of a tokenizer."""

    data: PreparedData

    @classmethod
    def from_directory(cls) -> "Tokenizer":
        """Of the data in the environment."""
        return cls(PreparedData.open(os.environ[DATA]))

    def get_vocab_size(self) -> int:
        """How many token ids there are."""
        return self.data.vocab_size


def make_dataloader(
    tokenizer: Tokenizer, rows: int, length: int, split: str, device: str = "cuda"
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Inputs and targets (rows, length) for ever, and which pass over the text this is, counted from 1.

    Each pass has the text's disjoint sequences in an order of its own, as the study's order "epochs"; a last batch that
    would not be full is left out. All tokens lie on the device, so that nothing waits for them.
    """
    assert split == "train"
    stream = tokenizer.data.train
    tokens = torch.from_numpy(stream.sequence(0, len(stream)).astype(np.int32)).to(device)
    generator, distinct = torch.Generator(device).manual_seed(42), (len(tokens) - 1) // length
    steps = torch.arange(length + 1, device=device)
    for epoch in itertools.count(1):
        order = torch.randperm(distinct, generator=generator, device=device)
        for chosen in order[: distinct // rows * rows].split(rows):
            taken = tokens[chosen[:, None] * length + steps].long()
            yield taken[:, :-1].contiguous(), taken[:, 1:].contiguous(), epoch


@torch.no_grad()
def evaluate_bpb(model: Any, tokenizer: Tokenizer, rows: int, device: str = "cuda") -> float:
    """The mean over the held-out sets of bits per byte, kept in `FOUND`; disjoint sequences, every position."""
    like, data = PreparedData.open(os.environ[LIKE]), tokenizer.data
    for name, size in sizes_of(data, like, int(os.environ[TARGETS])).items():
        stream = data.validation[name]
        sequences = held_out_sequences(stream, MAX_SEQ_LEN, targets_within(stream, data.token_bytes, size))
        FOUND[name] = _bits(model, sequences, rows, device) / _size(stream, data, len(sequences) * MAX_SEQ_LEN)
    return sum(FOUND.values()) / len(FOUND)


def _size(stream: TokenStream, data: PreparedData, targets: int) -> int:
    return int(stream.byte_counts(1, targets, data.token_bytes).sum())


def _bits(model: Any, sequences: Any, rows: int, device: str) -> float:
    """The loss of all targets in bits; batches have `rows` rows, as in training, so that nothing is compiled anew."""
    total = 0.0
    for first in range(0, len(sequences), rows):
        batch = [sequences[i] for i in range(first, min(first + rows, len(sequences)))]
        inputs, targets = (torch.stack([one[name] for one in batch]) for name in ("input_ids", "shift_labels"))
        missing = rows - len(batch)
        inputs = torch.nn.functional.pad(inputs, (0, 0, 0, missing)).to(device)
        targets = torch.nn.functional.pad(targets, (0, 0, 0, missing), value=-1).to(device)
        losses = model(inputs, targets, reduction="none")
        total += losses.double().sum().item()
    return total / math.log(2)
