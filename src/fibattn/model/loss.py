"""Cross-entropy of a linear head without ever holding all logits.

At the paper's shape the float32 logits of one step are 4.3 GB. Here they live one slice of tokens at a time: the
forward computes a slice's loss and, where wanted, at once its part of the gradients, so the backward only scales. It
scales in float32: what arrives there, such as a scaler's 65,536, need not fit into 16 bits. PyTorch has a function of
this name as well, but not in 2.11, the oldest version that is supported.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fibattn.errors import InputError

SLICE_LOGITS = 1 << 27
"""Logits that are in memory at a time."""
_MOST_SLICES = 32
"""Of a compiled loss, which has every slice in its graph: at 128 compiling took minutes."""

IGNORED = -100
"""Targets with this value do not count, as everywhere in PyTorch and Transformers."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum over tokens of the negative log-likelihood of `targets` under `softmax(hidden @ weight.T)`.

    Args:
        hidden: (tokens, hidden size).
        weight: (vocabulary, hidden size); the products run in the autocast dtype where that is on.
        targets: integer (tokens,); `IGNORED` entries add nothing.

    Returns:
        A float32 scalar (float64 for float64 input).
    """
    if torch.is_autocast_enabled(device := _autocast_device(hidden)):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, differentiable)[0]


@torch.no_grad()
def check_head(model: nn.Module, inputs: Tensor) -> None:
    """Refuse a model whose logits are not its output embedding's: some scale or cap them, and losses would be wrong.

    `inputs`: a few tokens of a text, integer (batch, tokens).
    """
    logits = model(input_ids=inputs, use_cache=False).logits
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state  # pyright: ignore
    difference = (model.get_output_embeddings()(hidden) - logits).abs().max()  # pyright: ignore
    if not difference <= 1e-3 * logits.abs().max():
        raise InputError(
            f"{type(model).__name__} changes its logits after the output embedding (by up to {difference:.3g}); "
            "only models that do not, such as Llama's and this project's, can be evaluated or healed"
        )


def _autocast_device(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # PyTorch knows no autocast of what has no data


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are outputs too, so that a derivative of them is noticed: it would come back here."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
        narrow = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden if differentiable else hidden[:0])
        grad_of = weight if differentiable else weight[:0]
        grad_weight = torch.zeros_like(grad_of, dtype=torch.promote_types(weight.dtype, torch.float32))
        step, shrink = max(1, SLICE_LOGITS // weight.shape[0]), 1.0
        if torch.compiler.is_compiling():
            step = max(step, -(-hidden.shape[0] // _MOST_SLICES))
        if hidden.dtype == torch.float16:
            # A sum over a slice's tokens may be beyond 65,504; a power of two keeps it inside, and is exact.
            step, shrink = min(step, 4096), 1 / 4096
        start = 0
        with torch.autocast(_autocast_device(hidden), enabled=False):
            # `for start in range(…)` would compile a graph for every number of tokens.
            while start < hidden.shape[0]:
                rows, goal = hidden[start : start + step], targets[start : start + step, None]
                counted = goal != IGNORED
                goal = torch.where(counted, goal, 0)
                log_probabilities = torch.log_softmax(rows @ narrow.T, dim=-1, dtype=wide)
                total = total - (log_probabilities.gather(1, goal) * counted).sum()
                if differentiable:
                    grad = _less_one_at(goal, log_probabilities.exp_()).to(hidden.dtype)
                    grad_hidden[start : start + step] = (grad @ narrow) * counted
                    grad_weight.add_(grad.T @ (rows * counted * shrink), alpha=1 / shrink)
                start += step
        return total, grad_hidden, grad_weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = [given.dtype for given in inputs[:2]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *given: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after the other: a gradient of the weight for each would not fit into memory that is there for one."""
        each = range(info.batch_size)
        rows = [[x if dim is None else x.select(dim, i) for x, dim in zip(given, dims, strict=True)] for i in each]
        outputs = zip(*(_LinearCrossEntropy.apply(*row) for row in rows), strict=True)
        return tuple(torch.stack(output) for output in outputs), (0, 0, 0)

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, second: Tensor | None, other: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # A compiler fills in zeros for outputs that nobody used, and knows no second derivatives itself.
        if not (torch.compiler.is_compiling() or (second is None and other is None)):
            raise InputError("the loss has no second derivatives; take torch's cross_entropy of the logits for them")
        grad_hidden, grad_weight = ctx.saved_tensors
        if upstream is None:
            return None, None, None, None
        scaled = [grad.to(upstream.dtype) * upstream for grad in (grad_hidden, grad_weight)]
        return *(grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)), None, None


def _less_one_at(goal: Tensor, probabilities: Tensor) -> Tensor:
    """`probabilities` (tokens, vocabulary) less one at each token's target `goal` (tokens, 1); may write in place."""
    if torch.compiler.is_compiling():
        # A comparison is fused into the passes around it; a scatter would stand alone between them.
        return probabilities - (torch.arange(probabilities.shape[1], device=goal.device) == goal).to(probabilities)
    return probabilities.scatter_add_(1, goal, torch.full_like(goal, -1, dtype=probabilities.dtype))
