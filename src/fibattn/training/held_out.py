"""The loss on held-out text while a model trains, beside that on training text: the same few sequences each time.

It draws no random numbers and leaves the model as it was, so a run ends with the same bits with it and without it.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
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
    """Fixed sequences of every held-out set, others of the training text of the same name, and how many bytes of text
    the held-out targets are."""

    held_out: dict[str, TrainingSequences]
    training: dict[str, TrainingSequences]
    sizes: dict[str, int]

    @classmethod
    def choose(
        cls,
        held_out: dict[str, TokenStream],
        training: dict[str, TokenStream],
        token_bytes: np.ndarray,
        length: int,
        tokens: int,
    ) -> "HeldOut | None":
        """Sequences of `length`, of which each set has an equal part of `tokens` targets, and as many of its training.

        They are spread over a text; one with fewer gives what it has, each gives one sequence at least. A set that is
        shorter than that, or whose training text is, is left out. None where no set is left.
        """
        names = [name for name in held_out if min(len(held_out[name]), len(training[name])) > length]
        if not names:
            return None
        count = max(tokens // len(names) // length, 1)
        parts, beside = (
            {name: _spread(streams[name], length, count) for name in names} for streams in (held_out, training)
        )
        return cls(parts, beside, {name: _size(part, token_bytes) for name, part in parts.items()})

    @torch.no_grad()
    def losses(self, model: nn.Module, batch: int, accelerator: Accelerator) -> dict[str, float]:
        """What is found for each set ("books/loss"), and the means of that over the sets ("loss").

        `loss` is the mean of the targets in nats, `bits_per_byte` the same for their text, `training_loss` that of the
        training text, `gap` by how much it is lower. Every process of a run calls this, and gets the same. `batch`
        sequences are one forward pass of a process. `model` is called itself, not parts of it: where it is sharded, its
        call gathers the weights.
        """
        was_training = model.training
        model.eval()
        texts = [*self.held_out.values(), *self.training.values()]
        parts: Any = torch.stack([_sum(model, text, batch, accelerator) for text in texts])
        model.train(was_training)
        sums: Any = accelerator.reduce(parts)
        means = [total / (len(text) * text.length) for total, text in zip(sums.tolist(), texts, strict=True)]
        rows = {}
        for name, loss, training in zip(self.held_out, means, means[len(self.held_out) :], strict=False):
            nats = loss * len(self.held_out[name]) * self.held_out[name].length
            found = {"loss": loss, "training_loss": training, "gap": loss - training}
            rows[name] = found | {"bits_per_byte": nats / math.log(2) / self.sizes[name]}
        totals = {what: sum(row[what] for row in rows.values()) / len(rows) for what in next(iter(rows.values()))}
        return totals | {f"{name}/{what}": value for name, row in rows.items() for what, value in row.items()}


def _spread(stream: TokenStream, length: int, count: int) -> TrainingSequences:
    """At most `count` sequences, evenly over the stream."""
    count = min(count, (len(stream) - 1) // length)
    return TrainingSequences(stream, np.arange(count, dtype=np.int64) * ((len(stream) - 1) // count), length)


def _size(sequences: TrainingSequences, token_bytes: np.ndarray) -> int:
    """Bytes of text of all targets."""
    starts = (sequences.order + 1).tolist()
    return sum(int(sequences.stream.byte_counts(start, sequences.length, token_bytes).sum()) for start in starts)


def _sum(model: nn.Module, sequences: TrainingSequences, batch: int, accelerator: Accelerator) -> Tensor:
    """This process's part of the loss of all targets, in nats, a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    chosen: Any = accelerator.parallelism_config
    cut = 1 if chosen is None else chosen.cp_size
    groups, own = accelerator.num_processes // cut, accelerator.process_index // cut
    for first in range(0, len(sequences), groups * batch):
        last = min(first + groups * batch, len(sequences))
        inputs, targets = (x.to(accelerator.device) for x in _batch(sequences, range(first + own, last, groups)))
        with accelerator.maybe_context_parallel([inputs, targets], [1, 1]) if cut > 1 else nullcontext():
            total += model(
                input_ids=inputs,
                shift_labels=targets,
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
