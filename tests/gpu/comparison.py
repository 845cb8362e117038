"""How the kernels are judged: against the float64 reference on inputs that were rounded first.

The yardstick is the same attention written with PyTorch's own operators in the same precision: neither the mean
error nor that of the worst row may be more than twice its error.
"""

from functools import partial

import torch
from torch import Tensor

from fibattn.attention import attend, reference
from fibattn.pattern import Pattern, base_rungs

FIBONACCI = Pattern.fibonacci(window=12)
RUNGS = base_rungs("fibonacci")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensors(batch, tokens, heads, kv_heads, size, dtype=torch.bfloat16, keys=None, kind="random", device="cuda"):
    """q, k, v, rounded to `dtype`."""
    keys = tokens if keys is None else keys
    q = torch.randn(batch, tokens, heads, size, device=device)
    k, v = (torch.randn(batch, keys, kv_heads, size, device=device) for _ in range(2))
    if kind == "peaked":  # one key dominates
        k[:, :: max(keys // 7, 1)] *= 12
    if kind == "correlated":  # neighbours alike, and a common direction, as in real activations
        q, k, v = (x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=device)[:, None, None] + 1 for x in (q, k, v))
    if kind == "large":
        q, k, v = q * 8, k * 8, v * 100
    return [x.to(dtype) for x in (q, k, v)]


def torch_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same attention in PyTorch's operators, in the precision of q: mask (B or 1, Hkv or 1, Tq, Tk)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(group, 1)
    scores = (q.transpose(1, 2) @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2), torch.logsumexp(scores.float(), -1)


def mask_of(q: Tensor, k: Tensor, patterns, positions=None) -> Tensor:
    return torch.stack([reference.allowed(q, k, one.window, one.offsets, positions) for one in patterns], 1)


def with_gradients(function, inputs, upstream=None):
    """Output, log-sum-exp and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    if upstream is None:
        torch.manual_seed(1)
        upstream = (torch.randn_like(out), torch.randn_like(lse))
    upstream = [x.to(y.dtype) for x, y in zip(upstream, (out, lse), strict=True)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, upstream)], upstream


def assert_precise(ours: list[Tensor], theirs: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    names = ("out", "lse", "dq", "dk", "dv", "dalpha")
    for name, mine, yardstick, exact in zip(names, ours, theirs, right, strict=False):
        assert torch.isfinite(mine).all(), name
        exact = exact.double()
        rows = [(x.double() - exact).reshape(-1, x.shape[-1] if x.ndim == 4 else 1) for x in (mine, yardstick)]
        # What rounding the exact result once would cost: no computation can be asked to be better.
        once = (exact.to(dtype).double() - exact).reshape(-1, rows[0].shape[-1])
        tiny = torch.finfo(dtype).eps * exact.abs().mean() * 0.02 + 1e-9
        mean, bar = (x.abs().mean() for x in rows)
        assert mean <= 2 * torch.maximum(bar, once.abs().mean()) + tiny, (
            f"{name}: mean error {mean:.2e}, PyTorch {bar:.2e}"
        )
        worst, bar = (x.norm(dim=1).max() for x in rows)
        floor = torch.maximum(bar, once.norm(dim=1).max())
        assert worst <= 2 * floor + 50 * tiny, f"{name}: worst row {worst:.2e}, PyTorch {bar:.2e}"


def check(inputs, pattern, positions=None, scale=None):
    q, k, _ = inputs
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ours, upstream = with_gradients(
        partial(attend, pattern=pattern, positions=positions, scale=scale, return_lse=True), inputs
    )
    mask = mask_of(q, k, patterns, positions)
    theirs, _ = with_gradients(partial(torch_attend, mask=mask, scale=scale), inputs, upstream)
    right, _ = with_gradients(
        lambda q, k, v: reference.attend(q, k, v, patterns, scale, positions), [x.double() for x in inputs], upstream
    )
    assert_precise(ours, theirs, right, q.dtype)
