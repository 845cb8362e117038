"""Forced choice: which of a few continuations does a model think likeliest, and by how much?

A small model rarely writes the right answer by itself, so free generation is at the floor. Among given choices
even a weak preference shows: in the accuracy, and before that in the margin, the log-probability of the right
choice minus that of the best wrong one, each read with the choice's own tokens fed in (teacher-forced).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fibattn.data.tokenizer import separator
from fibattn.errors import InputError
from fibattn.progress import Meter
from study.probes.fit import autocast


@dataclass(frozen=True)
class Item:
    """A prompt, its possible continuations and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def judge(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    label: str,
    batch: int = 4,
    quiet: bool = False,
) -> dict[str, Any]:
    """How a model does on the items.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer; its bos (or eos) token goes before every prompt.
        items: what is asked.
        label: what the progress line is called.
        batch: items of a forward pass.
        quiet: show no progress.

    Returns:
        `accuracy` (a tie is wrong), `margin` in nats and its standard error, `chance` and `items`.

    Raises:
        InputError: when there are no items, `batch` is less than 1, or the tokenizer has neither bos nor eos.
    """
    if not items:
        raise InputError("there is nothing to judge: the number of items is 0; ask for at least 1")
    if batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
    margins = []
    with Meter(label, len(items), "items", quiet=quiet) as meter:
        for start in range(0, len(items), batch):
            some = items[start : start + batch]
            for item, scores in zip(some, _scores(model, tokenizer, some), strict=True):
                wrong = [score for index, score in enumerate(scores) if index != item.answer]
                margins.append(scores[item.answer] - max(wrong))
            meter.update(len(some))
    error = statistics.stdev(margins) / len(margins) ** 0.5 if len(margins) > 1 else None
    return {
        "accuracy": statistics.mean(margin > 0 for margin in margins),
        "margin": statistics.mean(margins),
        "margin_error": error,
        "chance": statistics.mean(1 / len(item.choices) for item in items),
        "items": len(items),
    }


def _scores(model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[list[float]]:
    """The log-probability in nats of every choice of every item."""
    pairs = [_tokens(tokenizer, item.prompt, choice) for item in items for choice in item.choices]
    scores = iter(continuation_logprobs(model, pairs))
    return [[next(scores) for _ in item.choices] for item in items]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    """Prompt and continuation in tokens; where the text's tokens cross the border they belong to the latter."""
    first = [separator(tokenizer)]  # pyright: ignore[reportArgumentType]
    before = tokenizer.encode(prompt, add_special_tokens=False)
    whole = tokenizer.encode(prompt + choice, add_special_tokens=False)
    shared = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return first + whole[:shared], whole[shared:]


@torch.inference_mode()
def continuation_logprobs(model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """The summed log-probability in nats of each continuation after its prompt, both in tokens, in one pass."""
    model.eval()
    where = next(model.parameters()).device
    longest = max(len(prompt) + len(choice) for prompt, choice in pairs)
    kept = longest - min(len(prompt) for prompt, _ in pairs)
    # Padding on the right is behind every token that counts, so a causal model needs no mask.
    rows = [chain(prompt, choice, [0] * (longest - len(prompt) - len(choice))) for prompt, choice in pairs]
    ids = torch.tensor([list(row) for row in rows], device=where)
    with autocast(where):
        logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=kept).logits
    logs = logits.float().log_softmax(dim=-1).gather(2, ids[:, -kept:, None])[:, :, 0]
    index = torch.arange(longest - kept, longest, device=where)
    begins = torch.tensor([len(prompt) for prompt, _ in pairs], device=where)[:, None]
    ends = torch.tensor([len(prompt) + len(choice) for prompt, choice in pairs], device=where)[:, None]
    return logs.where((index >= begins) & (index < ends), 0.0).sum(dim=1).tolist()
