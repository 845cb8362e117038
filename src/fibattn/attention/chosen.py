"""Attention to a window and to blocks that each query chooses, as callers and PyTorch see it."""

from typing import Any

import torch
from torch import Tensor

from fibattn.attention import blocks, reference, ring
from fibattn.attention.api import Backend, choose, is_step
from fibattn.attention.checks import check_positions, check_rings, check_tensors, under_autocast
from fibattn.attention.ops import kernels, output_and_sums, result_like, tracked
from fibattn.attention.reference import wide
from fibattn.errors import InputError
from fibattn.pattern import ChosenPattern

_library = torch.library.Library("fibattn", "FRAGMENT")
_PATTERN = "float scale, int window, int reach, int block, int blocks, bool anchored"
_CHOICE = "Tensor bits, Tensor lists"
_GIVEN = (
    f"Tensor q, Tensor k, Tensor v, Tensor far_q, Tensor far_k, Tensor? positions, Tensor? shift, {_CHOICE}, {_PATTERN}"
)
_SAVED = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse"
_CHOOSES = f"Tensor q, Tensor means, int keys, Tensor? positions, Tensor? shift, {_PATTERN}"
_library.define(f"choose_blocks({_CHOOSES}) -> (Tensor, Tensor)")
_library.define(f"attend_chosen_forward({_GIVEN}) -> (Tensor, Tensor)")
_library.define(f"attend_chosen_backward({_SAVED}, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_RINGS = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? far_cache, Tensor k, Tensor v"
_STEP = f"Tensor q, {_RINGS}, Tensor? far_q, Tensor? far_k, Tensor? trust, Tensor cache_positions, Tensor? positions"
_library.define(f"attend_chosen_step({_STEP}, {_PATTERN}) -> Tensor")


def attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: ChosenPattern,
    *,
    far: tuple[Tensor, Tensor] | None = None,
    trust: Tensor | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    blocks_from: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of q, k, v (batch, tokens, heads, head size) to a window and the blocks that `pattern` chooses.

    In one softmax are the keys of the window and, beyond it, all keys of the chosen blocks. To a key of a block its
    mean key is added, times `trust`: the scores that choose are so among those that are summed, and learn. The choice
    itself has no gradient. Shapes, dtypes and autocast are as in `attend`.

    Args:
        q, k, v, scale, positions, cu_seqlens, backend: as in `attend`. Blocks are cut from the first key of a row's
            longest document, so padding changes nothing. Of others in the row, a block that begins in another
            is for none of their queries.
        pattern: the window and the blocks.
        far: queries and keys for what lies beyond the window, shaped like q and k: without rotary positions, say.
            q and k when None.
        trust: (KV heads,), floating-point, on the device of `q`; it has a gradient. 1 when None.
        blocks_from: the key from which blocks are counted instead, int64 (batch or 1, 1); below 0 where it is before
            those that are given. A part of a row has the blocks of the whole row so.

    Returns:
        The output, (batch, query tokens, query heads, head size) in the dtype of `q`, and the natural log-sum-exp,
        float32 (float64 for float64 input), (batch, query heads, query tokens). Both are differentiable.

    Raises:
        InputError: (a ValueError) for shapes, dtypes, devices or values outside the above.
    """
    q, k, v = under_autocast(q, k, v)
    far_q, far_k, _ = (q, k, v) if far is None else under_autocast(*far, v)
    scale = check_tensors(q, k, v, scale)
    _check_far(q, k, far_q, far_k, trust)
    if not isinstance(pattern, ChosenPattern):
        raise InputError(f"pattern is {pattern!r}; expected a fibattn.ChosenPattern, or call attend")
    positions = check_positions(q, k, positions, cu_seqlens)
    if blocks_from is not None and (blocks_from.dtype, *blocks_from.shape[1:]) != (torch.int64, 1):
        found = f"{tuple(blocks_from.shape)} {blocks_from.dtype}"
        raise InputError(f"blocks_from is {found}; expected (batch or 1, 1) torch.int64")
    chosen = choose(backend, q)
    if chosen == "reference":
        return reference.attend_chosen(q, k, v, far_q, far_k, trust, pattern, scale, positions, blocks_from)
    if chosen == "cpu":
        return blocks.attend(q, k, v, far_q, far_k, trust, pattern, scale, positions, blocks_from)
    shift, means, far_k = _blocks_of(far_k, q.shape[1], positions, blocks_from, pattern.block, trust)
    numbers = numbers_of(pattern, scale)
    seen = (far_q.detach(), means.detach(), k.shape[1], positions, shift)
    choice = torch.ops.fibattn.choose_blocks(*seen, *numbers)
    call = _AttendChosen.apply if tracked() else torch.ops.fibattn.attend_chosen_forward
    out, lse = call(q, k, v, far_q, far_k, positions, shift, *choice, *numbers)
    return out, lse.to(wide(q))


def attend_chosen_cached(
    q: Tensor,
    rings: tuple[Tensor, ...],
    k: Tensor,
    v: Tensor,
    pattern: ChosenPattern,
    *,
    cache_positions: Tensor,
    far: tuple[Tensor, Tensor] | None = None,
    trust: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attend_chosen` for the next tokens of a sequence whose earlier ones are in rings, which receive the new ones.

    The cost of a token does not depend on how long the sequence is; on a GPU a single one without gradients is one
    kernel, all else is plain PyTorch. The rings are written in place, outside of autograd; gradients reach the tensors
    of this call.

    Args:
        q, k, v, far, trust, scale: as in `attend_chosen`.
        rings: of k, v and, where `far` is given, the far keys, (batch, rows, KV heads, head size) each; at least
            `reach + 1` rows, or as many as the sequence has tokens after this call. Under autocast the others are cast
            to their dtype.
        cache_positions, positions: as in `attend_cached`.

    Raises:
        InputError: (a ValueError) as in `attend_chosen` and `attend_cached`, and for another number of rings.
    """
    wanted = 2 if far is None else 3
    if len(rings) != wanted:
        raise InputError(f"there are {len(rings)} rings; give {wanted}: of keys, of values, and with far of far keys")
    q, k, v = under_autocast(q, k, v, rings[0].dtype)
    far_q, far_k, _ = (q, k, v) if far is None else under_autocast(*far, v, rings[0].dtype)
    scale = check_tensors(q, k, v, scale)
    _check_far(q, k, far_q, far_k, trust)
    positions = check_positions(q, k, positions, None)
    check_rings(q, rings, k, cache_positions, pattern.reach)
    if choose("auto", q) == "triton" and is_step("triton", q, k, v, far_q, far_k, trust):
        own_far = (None, None, None) if far is None else (rings[2], far_q, far_k)
        given = (q, rings[0], rings[1], own_far[0], k, v, *own_far[1:], trust, cache_positions, positions)
        return torch.ops.fibattn.attend_chosen_step(*given, *numbers_of(pattern, scale))
    at, own = blocks.needed(cache_positions, positions, pattern)
    new, seen = at - cache_positions[:, :1], []
    written = (k, v) if far is None else (k, v, far_k)
    for one, cache in zip(written, rings, strict=True):
        kept, fresh = blocks.rows_at(cache, at % cache.shape[1]), blocks.rows_at(one, new.clamp(0, q.shape[1] - 1))
        seen.append(torch.where((new < 0)[..., None, None], kept, fresh))
    limit = ring.write(rings, written, cache_positions, positions)
    given = (q, seen[0], seen[1], far_q, seen[0 if far is None else 2], trust, pattern, scale)
    return blocks.attend_from(*given, own, limit)[0]


def numbers_of(pattern: ChosenPattern, scale: float) -> tuple[float, int, int, int, int, bool]:
    """As the schemas have them."""
    return scale, pattern.window, pattern.reach, pattern.block, pattern.blocks, pattern.anchored


def _blocks_of(
    k: Tensor, tokens: int, positions: Tensor | None, first: Tensor | None, block: int, trust: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """How many keys before its first a row's first block begins (batch or 1,), their means, and keys with these."""
    if positions is None and first is None:
        means = blocks.block_means(k, block)
        return None, means, blocks.with_means(k, means, block, trust)
    keys = k.shape[1]
    if first is None:
        assert positions is not None
        first = blocks.first_key(torch.arange(keys - tokens, keys, device=k.device)[None], positions)
    shift = (-first[:, 0] % block).to(torch.int32)
    at = torch.arange(-(-keys // block) * block, device=k.device) - shift[:, None]
    means = blocks.block_means(blocks.rows_at(k, at.clamp(0, keys - 1)), block)
    added = blocks.with_means(torch.zeros_like(k[:, :1]).expand(-1, at.shape[1], -1, -1), means, block, trust)
    own = torch.arange(keys, device=k.device) + shift[:, None]
    return shift, means, k + blocks.rows_at(added, own.clamp(max=at.shape[1] - 1))


def _check_far(q: Tensor, k: Tensor, far_q: Tensor, far_k: Tensor, trust: Tensor | None) -> None:
    for name, like, x in (("q", q, far_q), ("k", k, far_k)):
        if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
            found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            raise InputError(f"the far {name} is {found}; expected it like {name}: {tuple(like.shape)} {like.dtype}")
    good = trust is None or (trust.shape == k.shape[2:3] and trust.is_floating_point() and trust.device == q.device)
    if trust is not None and not good:
        found = f"{tuple(trust.shape)} {trust.dtype} on {trust.device}"
        raise InputError(f"trust is {found}; expected {k.shape[2]} floating-point numbers on {q.device}")


@torch.library.impl("fibattn::choose_blocks", ("cuda", "cpu"), lib=_library)
def _(q, means, keys, positions, shift, *pattern) -> tuple[Tensor, Tensor]:
    room = kernels("chosen")
    return room.choose(q, means, keys, positions, shift, room.Numbers(*pattern))


@torch.library.impl("fibattn::attend_chosen_forward", ("cuda", "cpu"), lib=_library)
def _(q, k, v, far_q, far_k, positions, shift, bits, lists, *pattern):
    given, numbers = (q, k, v, far_q, far_k), kernels("chosen").Numbers(*pattern)
    return kernels("chosen_forward").forward(given, positions, shift, bits, lists, numbers)


@torch.library.impl("fibattn::attend_chosen_backward", ("cuda", "cpu"), lib=_library)
def _(grad_out, grad_lse, out, lse, q, k, v, far_q, far_k, positions, shift, bits, lists, *pattern):
    given, numbers = (q, k, v, far_q, far_k), kernels("chosen").Numbers(*pattern)
    rest = (given, positions, shift, bits, lists, numbers)
    return kernels("chosen_backward").backward(grad_out, grad_lse, out, lse, *rest)


@torch.library.impl("fibattn::attend_chosen_step", ("cuda", "cpu"), lib=_library)
def _(q, k_cache, v_cache, far_cache, k, v, far_q, far_k, trust, cache_positions, positions, *pattern) -> Tensor:
    far = None if far_cache is None else (far_cache, far_q, far_k)
    rest = (trust, cache_positions, positions, kernels("chosen").Numbers(*pattern))
    return kernels("chosen_decode").decode(q, k_cache, v_cache, k, v, far, *rest)


torch.library.register_fake("fibattn::attend_chosen_step", lambda q, *_, **__: result_like(q), lib=_library)


@torch.library.register_fake("fibattn::choose_blocks", lib=_library)
def _(q, means, keys, positions, shift, scale, window, reach, block, *_):
    batch, tokens = q.shape[:2]
    kv_heads = means.shape[2]
    tiles = -(-(keys if shift is None else keys + block - 1) // 16) - (keys - tokens) // 16
    return (
        q.new_empty(batch, kv_heads, tokens, dtype=torch.int64),
        q.new_empty(batch, kv_heads, tiles, 65, dtype=torch.int32),
    )


torch.library.register_fake("fibattn::attend_chosen_forward", output_and_sums, lib=_library)


@torch.library.register_fake("fibattn::attend_chosen_backward", lib=_library)
def _(grad_out, grad_lse, out, lse, q, k, v, far_q, far_k, *_, **__):
    return tuple(map(result_like, (q, k, v, far_q, far_k)))


class _AttendChosen(torch.autograd.Function):
    """The forward operator with gradients in q, k, v, and the far queries and keys."""

    @staticmethod
    def forward(q, k, v, far_q, far_k, positions, shift, bits, lists, scale, window, reach, block, blocks, anchored):
        # As in `ops.py`, all named.
        given = (q, k, v, far_q, far_k, positions, shift, bits, lists)
        return torch.ops.fibattn.attend_chosen_forward(*given, scale, window, reach, block, blocks, anchored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:9], *output)
        ctx.rest = inputs[9:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = torch.ops.fibattn.attend_chosen_backward(grad_out, grad_lse, out, lse, *inputs, *ctx.rest)
        return *grads, *[None] * 10
