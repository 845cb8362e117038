"""Text without end: one token after another, in the memory of the model and its bounded cache.

`generate()` keeps every token and a mask as long as the text, which is right for an answer and wrong for a
stream. Here nothing is kept but the cache, so a model none of whose layers looks back to the beginning goes on for
ever at constant cost.
"""

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from fibattn.errors import InputError
from fibattn.machine import check_compiler
from fibattn.model.cache import CACHE_NAME
from fibattn.model.converted_pattern import STORED_PATTERN, sliding_window

_PREFILL = 4096


def stream(
    model: PreTrainedModel,
    prompt: Iterable[int],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Collection[int] = (),
    compiled: bool = False,
) -> Generator[int, None, None]:
    """The tokens that follow `prompt`, each as soon as it is drawn; what is wrong with the arguments is said at once.

    Args:
        model: a causal language model; its layers with full attention, if any, keep every token.
        prompt: token ids, at least one.
        max_new_tokens: how many at most; no limit when None.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draw from the fewest tokens that together have this probability, above 0 and at most 1.
        seed: of the draws, 0 or more; a fresh one when None.
        stop: ids that end the stream; the one that does is yielded.
        compiled: compile the step, with a static cache (and CUDA graphs on a GPU): slow to begin, then faster.

    Raises:
        InputError: for an empty prompt, a limit, temperature, top_p or seed outside the above, an unlimited compiled
            stream of a model with full attention, or where PyTorch cannot compile.
    """
    ids = list(prompt)
    if not ids:
        raise InputError("the prompt has no tokens; give at least one")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; it must be a finite number, 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more, or None for no limit")
    if isinstance(stop, int):
        raise InputError(f"stop is {stop}; give the ids in a list: [{stop}]")
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be from 0 to 2**63 - 1")
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache: Cache = DynamicCache(config=model.config)
    step: Callable[..., Any] = model
    if compiled:
        if max_new_tokens is None and growing_layers(model):
            raise InputError("a compiled stream with full-attention layers needs a limit: their cache has a fixed size")
        if model.device.type == "cpu":
            check_compiler()
        # Sliding windows are cut to the length of a static cache, so without a limit it has room for one.
        window = getattr(model.config, "sliding_window", None) or 0
        more = window if max_new_tokens is None else max_new_tokens
        cache = StaticCache(config=model.config, max_cache_len=len(ids) + more)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        step = torch.compile(model.forward, fullgraph=True, mode=mode)
    draw = partial(_draw, temperature=temperature, top_p=top_p, generator=generator)
    return _written(model, step, ids, {CACHE_NAME: cache, "use_cache": True}, draw, max_new_tokens, stop)


@torch.no_grad()
def _written(
    model: PreTrainedModel,
    step: Callable[..., Any],
    ids: list[int],
    cached: dict[str, Any],
    draw: Callable[[Tensor], Tensor],
    max_new_tokens: int | None,
    stop: Collection[int],
) -> Generator[int, None, None]:
    logits = None
    for piece in torch.tensor([ids], device=model.device).split(_PREFILL, dim=1):
        logits = model(piece, **cached, logits_to_keep=1).logits
    made = 0
    while max_new_tokens is None or made < max_new_tokens:
        assert logits is not None
        token = draw(logits[0, -1].float())
        made += 1
        yield int(token)
        if int(token) in stop or made == max_new_tokens:
            return
        logits = step(token.view(1, 1), **cached).logits


def growing_layers(model: PreTrainedModel) -> int:
    """How many layers attend to everything, so that their cache grows with the text; converted ones do not."""
    config: Any = model.config
    layers: Iterable[int] = range(config.num_hidden_layers)
    converted = getattr(config, STORED_PATTERN, None)
    if converted is not None:
        layers = [] if converted["full_reach"] is not None else converted["keep_layers"]
    kinds = getattr(config, "layer_types", None)
    return sum(sliding_window(config, one) is None and (not kinds or kinds[one] == "full_attention") for one in layers)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id, (1,)."""
    if temperature == 0:
        return logits.argmax(keepdim=True)
    colder = max(temperature, 1e-30)  # float32 has no smaller ones to divide by
    chances, order = torch.softmax((logits - logits.max()) / colder, dim=-1).sort(descending=True)
    # A token stays while those more likely than it have not reached top_p: the first always does.
    chances[chances.cumsum(0) - chances >= top_p] = 0.0
    return order[torch.multinomial(chances, 1, generator=generator)]


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, in whole characters.

    A token is decoded after the ones before it, since some tokenizers write a word differently at the start of a text.
    Up to three replacement characters at the end may be the bytes of a character that is not complete: they wait.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    before: list[int] = []
    waiting: list[int] = []
    said = 0
    for token in tokens:
        if token in special:  # not printed, and no word to decode the next one after
            continue
        waiting.append(token)
        text = tokenizer.decode([*before, *waiting], skip_special_tokens=True)
        whole = len(text) - min(len(text) - len(text.rstrip("\ufffd")), 3)
        if whole > said:
            yield text[said:whole]
            said = whole
        if whole == len(text):
            before, waiting = waiting, []
            said = len(tokenizer.decode(before, skip_special_tokens=True))
    rest = tokenizer.decode([*before, *waiting], skip_special_tokens=True)[said:]
    if rest:
        yield rest
