"""The loss of a model on every token of held-out sequences; perplexity and its relatives follow from it.

Convention: disjoint sequences of `length` inputs, each with `length` targets, nothing carried over (the
paper's, section 5). Early positions have little context, so a longer sequence is a little easier; the loss of
the last 256 positions of a sequence leaves that effect out.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from fibattn.data.sequences import TrainingSequences
from fibattn.model.loss import SLICE_LOGITS, check_head
from fibattn.parallel.sharing import Sharing
from fibattn.progress import Meter

LAST = 256
"""How many positions at the end of a sequence the second convention looks at."""


@dataclass(frozen=True)
class PositionLoss:
    """The loss of every target of sequences (nats, float32, (sequences, length)), and their bytes of text in all."""

    losses: np.ndarray
    size: int

    def nll(self, first: int = 0, last: int | None = None) -> float:
        """Mean loss in nats over positions first … last - 1."""
        return float(self.losses[:, first:last].mean(dtype=np.float64))

    def perplexity(self, first: int = 0) -> float:
        """`exp` of the mean loss from position `first` on."""
        return math.exp(self.nll(first))

    @property
    def bits_per_byte(self) -> float:
        """Bits of loss for each byte of text, which does not depend on the tokenizer."""
        return float(self.losses.sum(dtype=np.float64)) / math.log(2) / self.size

    def bins(self, count: int = 8) -> list[float]:
        """Mean loss in nats of `count` equal parts of the sequence, or of every position of a shorter one."""
        length = self.losses.shape[1]
        count = min(count, length)
        edges = [length * part // count for part in range(count + 1)]
        return [self.nll(first, last) for first, last in itertools.pairwise(edges)]


@torch.inference_mode()
def token_losses(
    model: nn.Module,
    sequences: TrainingSequences,
    *,
    batch_tokens: int = 32_768,
    label: str = "eval",
    quiet: bool = False,
    sharing: Sharing | None = None,
) -> np.ndarray:
    """The loss of every target, float32 (sequences, length), in nats.

    The head is applied a slice of tokens at a time, so that a long sequence does not need all its logits at once.

    Args:
        model: a Transformers causal language model; it is put in evaluation mode.
        sequences: all of them are taken, in order.
        batch_tokens: tokens of a forward pass, at least one sequence.
        label, quiet: of the progress, as `Meter` has them.
        sharing: how several processes share the sequences, each of which gets all losses; made for `model.base_model`.

    Raises:
        InputError: when the model changes its logits after the output embedding, and for a length that does not divide
            over the processes that share a sequence.
    """
    device = next(model.parameters()).device
    model.eval()
    check_head(model, sequences[0]["input_ids"][None, :16].to(device))
    sharing = sharing or Sharing(model)
    own = sharing.rows(len(sequences))
    found = [torch.zeros(0, sequences.length // sharing.cut, device=device)]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    with Meter(label, len(sequences) * sequences.length, "tokens", quiet=quiet) as meter, autocast:
        # From pinned memory a copy need not wait for what the GPU still has to do.
        pinned = device.type == "cuda"
        size = min(max(1, batch_tokens * sharing.cut // sequences.length), len(sequences))
        for batch in DataLoader(Subset(sequences, own), size, pin_memory=pinned):
            inputs, targets = (batch[name].to(device, non_blocking=pinned) for name in ("input_ids", "shift_labels"))
            with sharing.parts(inputs, targets):
                found.append(_losses(model, inputs, targets))
            meter.update(inputs.numel() * len(sequences) / len(own))
    return sharing.whole(torch.cat(found), len(sequences)).cpu().numpy()


def _losses(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods (batch, tokens), float32."""
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # pyright: ignore
    head = model.get_output_embeddings()  # pyright: ignore
    step = max(1, SLICE_LOGITS // head.weight.shape[0])
    parts = [
        functional.cross_entropy(head(rows).float(), goal, reduction="none")
        for rows, goal in zip(hidden.split(step), targets.flatten().split(step), strict=True)
    ]
    return torch.cat(parts).view_as(targets)
