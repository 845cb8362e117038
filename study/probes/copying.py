"""Copying: does a model name what comes next when it reads random tokens a second time?

Text that repeats itself is cheap for a model with induction heads and dear for one that has not learnt them yet
(Olsson et al. 2022, arXiv 2209.11895, who test with repeated random tokens too). Perplexity mixes that with all else.
"""

from collections.abc import Sequence

import torch
from torch import nn

from study.probes.fit import autocast

_BATCH_TOKENS = 4096
_PARTS = (64, 16, 4, 2)
_TIMES = (1, 4)


def distances(length: int) -> list[int]:
    """How far apart the two copies begin, for a model trained at `length`: parts of it, then it and a multiple.

    Two copies fit into a training sequence up to half of it; farther back only a model that holds past it can look.
    """
    return [length // part for part in _PARTS if length >= 2 * part] + [length * times for times in _TIMES]


@torch.inference_mode()
def copying(model: nn.Module, lengths: Sequence[int], *, sequences: int = 32, seed: int = 0) -> dict[str, float]:
    """The part of the tokens of a second copy that the model names, by the distance to the first, a string as in JSON.

    Args:
        model: a Transformers causal language model; it is put in evaluation mode.
        lengths: tokens of a copy, each at least 2.
        sequences: rows of two copies for each of them.
        seed: of the tokens, drawn evenly from the vocabulary.
    """
    model.eval()
    where = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]  # pyright: ignore
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for length in lengths:
        once = torch.randint(vocabulary, (sequences, length), generator=draws)
        right = 0
        for rows in torch.cat([once, once], dim=1).split(max(1, _BATCH_TOKENS // (2 * length))):
            ids = rows.to(where)
            with autocast(where):
                named = model(input_ids=ids, use_cache=False).logits[:, length:-1].argmax(dim=-1)
            right += int((named == ids[:, length + 1 :]).sum())
        found[str(length)] = right / (sequences * (length - 1))
    return found
