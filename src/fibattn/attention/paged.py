"""Attention from pages: the newest tokens of several sequences at once, whose keys lie in pages of a common cache.

So do engines keep them that batch continuously: token `p` of a sequence stands in row `p mod rows` of the page that the
sequence's table has at `p // rows`. Pages out of a layer's reach may belong to others by now; they are not read. Here
is what the host does, and the CPU's way: one-token steps together, longer chunks one after the other. No gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fibattn.attention import ops, ring
from fibattn.attention.api import Backend, attend, choose
from fibattn.attention.checks import check_pattern
from fibattn.attention.reference import Patterns, wide
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern, reach_of

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _uncompiled(function: _Function) -> _Function:
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Batch:
    """Whose the tokens of a call are, and where their keys lie. All on the device of the call.

    Args:
        starts: int32 (sequences + 1,), where the new tokens of each sequence begin, and where the last ones end.
        lengths: int32 (sequences,), the tokens of each sequence, the new ones included; 0 for none.
        longest: the most new tokens of a sequence. Where it is 1, token `i` is that of sequence `i`.
        table: int32 (sequences, most pages), the pages of each.
        first: int32 (sequences,), in place of a table where there is one page for all: the row of each one's first
            token. What rows before the first page would have must be out of reach.
    """

    starts: Tensor
    lengths: Tensor
    longest: int
    table: Tensor | None = None
    first: Tensor | None = None


@_uncompiled
def attend_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pattern: Pattern | Sequence[Pattern] | LearnedPattern,
    batch: Batch,
    *,
    alpha: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`attend` for the newest tokens of several sequences, whose keys and values are in the pages already.

    Args:
        q: (tokens, query heads, head size), the tokens of one sequence after those of another.
        k_pages, v_pages: (pages, rows, KV heads, head size), any strides with the last dimension contiguous.
        pattern, alpha, scale, backend: as in `attend`.
        batch: which tokens and pages are whose. Values are not checked.
        out: like `q`, receives the result; what no sequence has stays as it was.

    Returns:
        `out`, or a new one; that has zeros for tokens of no sequence, and of one of length 0.

    Raises:
        InputError: (a ValueError) for shapes, dtypes or a pattern that do not fit.
    """
    heads, size = k_pages.shape[2:]
    if k_pages.shape != v_pages.shape or q.shape[1] % heads or (q.shape[2], q.dtype) != (size, k_pages.dtype):
        found = f"q is {tuple(q.shape)} in {q.dtype}, the pages are {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        raise InputError(
            f"{found} in {k_pages.dtype}; expected (tokens, query heads, head size) and (pages, rows, KV heads, head "
            "size) in one dtype"
        )
    patterns = check_pattern(pattern, alpha, q, heads)
    scale = float(size**-0.5 if scale is None else scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out
    chosen = choose(backend, q)
    if chosen != "triton":
        return _one_by_one(q, k_pages, v_pages, patterns, batch, alpha, scale, out, chosen)
    given = ops.Given(scale, *ops.as_integers(patterns))
    places = (batch.starts, batch.lengths, batch.table, batch.first, batch.longest)
    rungs = ops.kernels("learned").rungs_of(q, alpha, given.window, given.sets, given.max_offset)
    return ops.kernels("paged").attend(q, k_pages, v_pages, *places, out, scale, given.window, *rungs)


def _one_by_one(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    patterns: Patterns,
    batch: Batch,
    alpha: Tensor | None,
    scale: float,
    out: Tensor,
    backend: str,
) -> Tensor:
    starts, lengths, counts = batch.starts.tolist(), batch.lengths.tolist(), batch.starts.diff().tolist()
    steps = [one for one, count in enumerate(counts) if count == 1 <= lengths[one] and backend == "cpu"]
    if steps:
        at = batch.starts[steps].long()
        out[at] = _steps(q[at], k_pages, v_pages, patterns, batch, torch.tensor(steps), alpha, scale)
    reach = reach_of(patterns, 0.0 if alpha is None else float(alpha))
    for one in sorted({one for one, count in enumerate(counts) if count and lengths[one]} - set(steps)):
        own, which = slice(starts[one], starts[one] + counts[one]), torch.tensor([one], device=q.device)
        seen = torch.arange(max(0, lengths[one] - counts[one] - reach), lengths[one], device=q.device)
        keys, values = (_rows(x, batch, which, seen[None, None]).transpose(1, 2) for x in (k_pages, v_pages))
        out[own] = attend(q[None, own], keys, values, patterns, alpha=alpha, scale=scale, backend=backend)[0]  # pyright: ignore
    return out


def _steps(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    patterns: Patterns,
    batch: Batch,
    which: Tensor,
    alpha: Tensor | None,
    scale: float,
) -> Tensor:
    """The newest token of the sequences `which`, (sequences, query heads, head size)."""
    given = ops.Given(scale, *ops.as_integers(patterns))
    positions = (batch.lengths[which].long() - 1)[:, None, None]

    def read(distances: Tensor) -> tuple[Tensor, Tensor]:
        at = positions - distances
        at = torch.where(at < 0, positions, at)
        keys, values = (_rows(x, batch, which, at).to(wide(q)) for x in (k_pages, v_pages))
        return keys, values

    oldest = int(positions.max())
    return ring.attend_at(q[:, None], read, positions, oldest, scale, given.window, *given.beyond(alpha))[:, 0]


def _rows(pages: Tensor, batch: Batch, which: Tensor, at: Tensor) -> Tensor:
    """Rows at positions (sequences, KV heads or 1, count) of some sequences: (sequences, KV heads, count, size)."""
    heads = torch.arange(pages.shape[2], device=pages.device)[:, None]
    if batch.table is None:
        assert batch.first is not None
        return pages[0, at + batch.first[which].long()[:, None, None], heads]
    page = batch.table[which].long().gather(1, (at // pages.shape[1]).flatten(1)).view_as(at)
    return pages[page, at % pages.shape[1], heads]


def store_paged(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, backend: Backend = "auto"
) -> None:
    """Write keys and values (tokens, KV heads, head size) into the pages, in place.

    Args:
        k_pages, v_pages: as in `attend_paged`.
        slots: integer (tokens,), page times rows plus row; those below 0 are not written.
        backend: as in `attend`.
    """
    if choose(backend, k) == "triton":
        ops.kernels("paged").store(k, v, k_pages, v_pages, slots)
        return
    kept = slots >= 0
    at = (slots[kept] // k_pages.shape[1], slots[kept] % k_pages.shape[1])
    k_pages[at], v_pages[at] = k[kept], v[kept]
