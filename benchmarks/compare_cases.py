"""What `python -m benchmarks compare` times in each of two source trees: the operator, a training and a decoding step.

Loaded by a process that imports `fibattn` from one of the trees, so nothing here may import `benchmarks`. A copy with
another name can be given by `--cases`: for trees whose functions are called differently, or for other questions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from fibattn import FibAttnConfig, FibAttnForCausalLM, LearnedPattern, Pattern, attend

RUNGS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)
SHAPES = {"small": (8, 2, 64), "large": (32, 8, 128)}
"""Query heads, KV heads and head size."""


@dataclass(frozen=True)
class Case:
    """Work to time, and what comes of it from a fixed start."""

    work: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]]
    cold: bool = True
    capture: bool = True
    """As `benchmarks.timing.measure` takes them."""


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """Every case by its name, to be built when it is its turn."""
    gpu = device == "cuda"
    shapes = [("small", 1024, 32), ("small", 16_384, 2), ("large", 8192, 2), ("large", 65_536, 1)]
    found: dict[str, Callable[[], Case]] = {}
    for shape, length, batch in shapes if gpu else [("small", 1024, 1), ("small", 8192, 1)]:
        for what, window, learned in (("W=12", 12, False), ("W=128", 128, False), ("W=12 learned", 12, True)):
            for backward in (False, True):
                name = f"operator {shape} {length}x{batch} {what} {'forward+backward' if backward else 'forward'}"
                found[name] = partial(operator, device, shape, (batch, length), window, learned, backward)
    for model in ("learned", "hybrid"):
        found[f"training step {model}"] = partial(training, device, model)
    for model, batch in (("stagger", 1), ("hybrid", 64)):
        found[f"decoding step {model} batch {batch if gpu else 1}"] = partial(decoding, device, model, batch)
    return found


def sparse(q: Tensor, k: Tensor, v: Tensor, window: int, alpha: Tensor | None) -> Tensor:
    """The operator of this tree, with its rungs at `alpha` where there is one."""
    pattern = Pattern.fibonacci(window) if alpha is None else LearnedPattern(window, RUNGS)
    return attend(q, k, v, pattern, alpha=alpha)


def operator(device: str, shape: str, size: tuple[int, int], window: int, learned: bool, backward: bool) -> Case:
    """`attend` on standard normal inputs, bfloat16 on a GPU."""
    heads, kv_heads, width = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": _dtype(device)}
    inputs = [torch.randn(*size, h, width, **options).requires_grad_(backward) for h in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(*size, heads, width, **options)
    alpha = torch.full((), 1.1, device=device, requires_grad=backward) if learned else None
    leaves = [*inputs, *([] if alpha is None else [alpha])]
    names = ("dq", "dk", "dv", "dalpha")

    def work() -> dict[str, Tensor]:
        with torch.set_grad_enabled(backward):
            out = sparse(inputs[0], inputs[1], inputs[2], window, alpha)
        gradients = torch.autograd.grad(out, leaves, upstream) if backward else ()
        return {"out": out.detach(), **dict(zip(names, gradients, strict=False))}

    return Case(work, work)


def model_of(name: str, device: str, full_reach: int | None) -> Any:
    """The paper's shape on a GPU and a small one on a CPU, with the weights of one seed."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape: dict[str, Any] = {} if device == "cuda" else {**sizes, "vocab_size": 256}
    layers = shape.get("num_hidden_layers", 16)
    full = [layer in (layers // 2 - 1, layers - 1) for layer in range(layers)]
    if name == "hybrid":
        kinds = ["full_attention" if one else "fibonacci_attention" for one in full]
        shape |= {"layer_types": kinds, "no_rope_layers": [int(not one) for one in full]}
        shape |= {"window": 64, "max_offset": 1023, "full_reach": full_reach}
    torch.manual_seed(0)
    config = FibAttnConfig(schedule="learned" if name == "learned" else "linear", **shape)
    return FibAttnForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]


def training(device: str, name: str) -> Case:
    """A step of 32,768 tokens as the trainer takes it on one GPU: compiled, autocast, clipped, fused AdamW."""
    model = model_of(name, device, full_reach=None)
    rows = 32 if device == "cuda" else 1
    ids = torch.randint(model.config.vocab_size, (rows, 1025), generator=torch.Generator().manual_seed(1)).to(device)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    step = torch.compile(model, mode="reduce-overhead") if device == "cuda" else model

    def work() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = step(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.detach().clone()

    def outputs() -> dict[str, Tensor]:
        losses = torch.stack([work() for _ in range(3)])
        return {"losses": losses, **{name: weight.detach() for name, weight in model.named_parameters()}}

    return Case(work, outputs, cold=False, capture=False)


def decoding(device: str, name: str, batch: int) -> Case:
    """A greedy step from a static cache, filled with random states: compiled on a GPU, and replayed as a graph."""
    batch = batch if device == "cuda" else 1
    model = model_of(name, device, full_reach=1023).to(_dtype(device)).eval()
    cache = StaticCache(config=model.config, max_cache_len=4096)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        model(token, past_key_values=cache, use_cache=True)
    torch.manual_seed(2)
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(2048)
    step = torch.compile(model.forward, fullgraph=True) if device == "cuda" else model.forward

    @torch.no_grad()
    def work() -> Tensor:
        logits = step(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        return logits

    return Case(work, lambda: {"logits": work()}, cold=False)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32
