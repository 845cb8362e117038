"""The loss on held-out text while a model trains: the same few sequences of every set each time.

It draws no random numbers and leaves the model as it was, so a run ends with the same bits with it and without it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import default_collate

from fibattn.data.prepared import TokenStream
from fibattn.data.sequences import TrainingSequences
from fibattn.model.loss import IGNORED


@dataclass(frozen=True)
class HeldOut:
    """Fixed sequences of every held-out set, and how many bytes of text their targets are."""

    sequences: dict[str, TrainingSequences]
    sizes: dict[str, int]

    @classmethod
    def choose(
        cls, sets: dict[str, TokenStream], token_bytes: np.ndarray, length: int, tokens: int
    ) -> "HeldOut | None":
        """Sequences of `length`, `tokens` targets in all, of which every set gives an equal part, spread over it.

        A set with fewer gives what it has, each gives one sequence at least; one shorter than that is left out. None
        where no set is left.
        """
        sequences, sizes = {}, {}
        long = {name: stream for name, stream in sets.items() if len(stream) > length}
        for name, stream in long.items():
            count = min(max(tokens // len(long) // length, 1), (len(stream) - 1) // length)
            starts = np.arange(count, dtype=np.int64) * ((len(stream) - 1) // count)
            sequences[name] = TrainingSequences(stream, starts, length)
            texts = (stream.byte_counts(start + 1, length, token_bytes) for start in starts.tolist())
            sizes[name] = sum(int(text.sum()) for text in texts)
        return cls(sequences, sizes) if sequences else None

    @torch.no_grad()
    def losses(self, model: nn.Module, batch: int, accelerator: Accelerator) -> dict[str, float]:
        """The mean loss of a target in nats, and bits per byte, of each set ("books/loss") and their means ("loss").

        Every process of a run calls this, and gets the same. `batch` sequences are one forward pass of a process.
        `model` is called itself, not parts of it: where it is sharded, its call gathers the weights.
        """
        was_training = model.training
        model.eval()
        parts = torch.stack([self._sum(model, one, batch, accelerator) for one in self.sequences.values()])
        model.train(was_training)
        sums: Any = accelerator.reduce(parts)
        found: dict[str, float] = {}
        for (name, one), total in zip(self.sequences.items(), sums.tolist(), strict=True):
            found[f"{name}/loss"] = total / (len(one) * one.length)
            found[f"{name}/bits_per_byte"] = total / math.log(2) / self.sizes[name]
        for what in ("loss", "bits_per_byte"):
            found[what] = sum(found[f"{name}/{what}"] for name in self.sequences) / len(self.sequences)
        return found

    def _sum(self, model: nn.Module, sequences: TrainingSequences, batch: int, accelerator: Accelerator) -> Tensor:
        """This process's part of a set's loss, in nats, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        world = accelerator.num_processes
        for first in range(0, len(sequences), world * batch):
            last = min(first + world * batch, len(sequences))
            inputs, targets = _batch(sequences, range(first + accelerator.process_index, last, world))
            total += model(
                input_ids=inputs.to(accelerator.device),
                shift_labels=targets.to(accelerator.device),
                use_cache=False,
                num_items_in_batch=1,  # the sum
                logits_to_keep=1,  # the loss is over all targets nevertheless, without all logits at once
            ).loss
        return total


def _batch(sequences: TrainingSequences, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, length); of no rows, one without targets: sharded, all processes call alike often."""
    made = default_collate([sequences[row] for row in rows or [0]])
    targets = made["shift_labels"]
    return made["input_ids"], targets if rows else torch.full_like(targets, IGNORED)
