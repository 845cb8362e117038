"""The operator in plain PyTorch on the CPU, forward and backward, in time and memory linear in length.

Queries are taken in chunks that fit the processor's cache. In a chunk the window is a banded matrix product
(small square blocks against the keys just before them) and every rung a contiguous slice of the keys, since
the key of rung `d` for the queries a … b is rows a-d … b-d. The transpose of a fixed distance is a fixed
distance, so the backward adds slices where the forward read them: no scatter, no atomics, the same bits
every time. The backward recomputes the weights from the log-sum-exp; nothing quadratic is ever stored.

Inside, tensors are (batch, KV heads, tokens, …) with the query heads of a KV head as a group G beside the
tokens, in float32 (float64 for float64 input).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fibattn.attention.reference import document_limit, wide
from fibattn.pattern import InterpolatedRung, Pattern

_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Chunk:
    """Queries `start … stop` as key indices, and how far back each may look: `limit` (B or 1, 1, C, 1)."""

    start: int
    stop: int
    limit: Tensor

    def rows(self, distance: int) -> tuple[int, slice]:
        """Where the keys at `distance` are, and how many of the first queries have none."""
        distance = min(distance, self.stop)
        first = min(max(distance - self.start, 0), self.stop - self.start)
        return first, slice(self.start + first - distance, self.stop - distance)


class FixedRungs:
    """Integer offsets beyond the window, one set for all KV heads or one for each.

    `nearest` (1 or KV heads, 1, count): how far back a query must be able to look for a rung to exist.
    """

    def __init__(self, patterns: Sequence[Pattern], device: torch.device):
        self.sets = [pattern.offsets for pattern in patterns]
        self.count = max(map(len, self.sets))
        # A head with fewer rungs than the others is filled up with rungs that no query can reach.
        unreachable = torch.iinfo(torch.int64).max
        table = [[*offsets, *[unreachable] * (self.count - len(offsets))] for offsets in self.sets]
        self.nearest = torch.tensor(table, dtype=torch.int64, device=device).view(len(table), 1, self.count)

    def _slices(self, chunk: Chunk) -> Iterator[tuple[slice, int, int, slice]]:
        for head, offsets in enumerate(self.sets):
            heads = slice(None) if len(self.sets) == 1 else slice(head, head + 1)
            for index, distance in enumerate(offsets):
                yield heads, index, *chunk.rows(distance)

    def gather(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Rows of x (B, Hkv, Tk, D) at every rung of the chunk's queries: (B, Hkv, C, count, D)."""
        batch, heads, _, size = x.shape
        rows = x.new_zeros(batch, heads, chunk.stop - chunk.start, self.count, size)
        for some, index, first, keys in self._slices(chunk):
            rows[:, some, first:, index] = x[:, some, keys]
        return rows

    def scatter(self, grad: Tensor, into: Tensor, x: Tensor, chunk: Chunk) -> None:
        """The transpose of `gather`: add `grad` (B, Hkv, C, count, D) to `into` (B, Hkv, Tk, D)."""
        for some, index, first, keys in self._slices(chunk):
            into[:, some, keys] += grad[:, some, first:, index]


class LearnedRungs:
    """Real-valued distances: each rung is read between two neighbouring keys, and learns where it should be."""

    def __init__(self, rungs: Sequence[InterpolatedRung], device: torch.device):
        self.rungs = rungs
        self.count = len(rungs)
        near = torch.tensor([rung.near for rung in rungs], dtype=torch.int64, device=device)
        self.nearest = near.view(1, 1, self.count)
        self.fraction_grad = [0.0] * self.count

    def _pairs(self, x: Tensor, chunk: Chunk) -> Iterator[tuple[int, int, slice, Tensor, Tensor, Tensor, Tensor]]:
        for index, rung in enumerate(self.rungs):
            first, near = chunk.rows(rung.near)
            if first == chunk.stop - chunk.start:
                continue
            near_rows, far_rows = x[:, :, near], x[:, :, max(near.start - 1, 0) : near.stop - 1]
            if near.start == 0:
                # This query has no farther key, and fraction 0: any row will do.
                far_rows = torch.cat([near_rows[:, :, :1], far_rows], dim=2)
            # Where the nearer key is the first of its document, the farther one is clamped to it: no interpolation.
            inside = (chunk.limit[:, :, first:] != rung.near).to(x.dtype)
            yield index, first, near, near_rows, far_rows, inside, inside * rung.fraction

    def gather(self, x: Tensor, chunk: Chunk) -> Tensor:
        """As in `FixedRungs`."""
        batch, heads, _, size = x.shape
        rows = x.new_zeros(batch, heads, chunk.stop - chunk.start, self.count, size)
        for index, first, _, near_rows, far_rows, _, fraction in self._pairs(x, chunk):
            rows[:, :, first:, index] = near_rows.lerp(far_rows, fraction)
        return rows

    def scatter(self, grad: Tensor, into: Tensor, x: Tensor, chunk: Chunk) -> None:
        """As in `FixedRungs`."""
        for index, first, near, near_rows, far_rows, inside, fraction in self._pairs(x, chunk):
            rows = grad[:, :, first:, index]
            far_grad = rows * fraction
            into[:, :, near] += rows - far_grad
            none = int(near.start == 0)
            into[:, :, near.start - 1 + none : near.stop - 1] += far_grad[:, :, none:]
            self.fraction_grad[index] += float((rows * (far_rows - near_rows) * inside).sum())


Rungs = FixedRungs | LearnedRungs


@torch.autocast("cpu", enabled=False)
def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, rungs: Rungs, scale: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, Tq, Hq, D) in the dtype of `q`, and the natural log-sum-exp (B, Hq, Tq)."""
    work = _Work(q, k, v, window, rungs, scale, positions)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=work.dtype)
    for chunk in work.chunks():
        queries = work.queries(q, chunk)
        scores = work.scores(queries, work.band(k, chunk), rungs.gather(work.keys, chunk), chunk)
        log_sum = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = torch.exp(scores - log_sum)
        result = work.weighted(weights, work.band(v, chunk), rungs.gather(work.values, chunk))
        work.give(out, result, chunk)
        work.sums(lse, chunk)[:] = log_sum[..., 0]
    return out, lse


@torch.autocast("cpu", enabled=False)
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    rungs: Rungs,
    scale: float,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in its tensor's dtype; learned rungs keep theirs in `fraction_grad`."""
    work = _Work(q, k, v, window, rungs, scale, positions)
    lse, grad_lse = lse.to(work.dtype), None if grad_lse is None else grad_lse.to(work.dtype)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=work.dtype, memory_format=torch.contiguous_format) for x in (k, v))
    for chunk in work.chunks():
        queries, upstream = work.queries(q, chunk), work.queries(grad_out, chunk)
        near_keys, far_keys = work.band(k, chunk), rungs.gather(work.keys, chunk)
        near_values, far_values = work.band(v, chunk), rungs.gather(work.values, chunk)
        weights = torch.exp(work.scores(queries, near_keys, far_keys, chunk) - work.sums(lse, chunk)[..., None])
        shift = (upstream * work.queries(out, chunk)).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift = shift - work.sums(grad_lse, chunk)[..., None]
        grad_scores = weights * (work.products(upstream, near_values, far_values) - shift) * scale
        work.give(dq, work.weighted(grad_scores, near_keys, far_keys), chunk)
        for grad, left, right, into in ((grad_scores, queries, work.keys, dk), (weights, upstream, work.values, dv)):
            near_grad, far_grad = work.transposed(grad, left)
            work.add_band(near_grad, into.transpose(1, 2), chunk)
            rungs.scatter(far_grad, into.transpose(1, 2), right, chunk)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class _Work:
    """The shapes of one call and the products on one chunk. A band is (B, Hkv, blocks, block + window, D)."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, rungs: Rungs, scale: float, positions: Tensor | None
    ):
        self.batch, self.tokens, heads, self.size = q.shape
        self.kv_heads, self.group = k.shape[2], heads // k.shape[2]
        window = min(window, k.shape[1] - 1)
        self.window, self.rungs, self.scale = window, rungs, scale
        self.dtype = wide(q)
        self.past = k.shape[1] - self.tokens
        self.limit = document_limit(q, k, positions)[:, None, :, None]
        # From here on no query misses a key; never, where a head has fewer rungs than others or documents are packed.
        self.complete_from = max(window, int(rungs.nearest.max()) if rungs.count else 0)
        if positions is not None:
            self.complete_from = torch.iinfo(torch.int64).max
        self.keys = k.transpose(1, 2).to(self.dtype)
        self.values = v.transpose(1, 2).to(self.dtype)
        self.block = min(max(32, 1 << max(window - 1, 0).bit_length()), 256, self.tokens)
        self.distances = torch.arange(window, -1, -1, device=q.device)[None, None, None]

    def chunks(self) -> Iterator[Chunk]:
        """Chunks of queries, a whole number of blocks each (but the last), sized to stay in the cache."""
        per_block = self.batch * self.kv_heads * self.block * self.dtype.itemsize
        per_block *= max(self.rungs.count * self.size, self.group * (self.block + self.window), 1)
        step = self.block * max(1, _CHUNK_BYTES // per_block)
        for start in range(0, self.tokens, step):
            stop = min(start + step, self.tokens)
            yield Chunk(self.past + start, self.past + stop, self.limit[:, :, start:stop])

    def query_rows(self, chunk: Chunk) -> slice:
        return slice(chunk.start - self.past, chunk.stop - self.past)

    def sums(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part of x (B, Hq, Tq) as (B, Hkv, C, G), a view."""
        return x.unflatten(1, (self.kv_heads, self.group))[..., self.query_rows(chunk)].movedim(2, -1)

    def queries(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's rows of x (B, Tq, Hq, D) as (B, Hkv, C, G, D)."""
        rows = x[:, self.query_rows(chunk)].unflatten(2, (self.kv_heads, self.group))
        return rows.permute(0, 2, 1, 3, 4).to(self.dtype).contiguous()

    def give(self, into: Tensor, rows: Tensor, chunk: Chunk) -> None:
        """Write rows (B, Hkv, C, G, D) into their place in (B, Tq, Hq, D)."""
        into[:, self.query_rows(chunk)] = rows.permute(0, 2, 1, 3, 4).flatten(2, 3).to(into.dtype)

    def _band_rows(self, chunk: Chunk) -> tuple[slice, slice]:
        """Which keys are in the band of a chunk, and where in it: before the first key there is nothing."""
        begin = chunk.start - self.window
        first = max(begin, 0)
        return slice(first, chunk.stop), slice(first - begin, chunk.stop - begin)

    def band(self, x: Tensor, chunk: Chunk) -> Tensor:
        """For every block of queries, the rows of x (B, Tk, Hkv, D) from `window` before it to its end."""
        blocks = -(-(chunk.stop - chunk.start) // self.block)
        rows = x.new_zeros(self.batch, self.kv_heads, blocks * self.block + self.window, self.size, dtype=self.dtype)
        keys, places = self._band_rows(chunk)
        rows[:, :, places] = x[:, keys].transpose(1, 2)
        return rows.unfold(2, self.block + self.window, self.block).transpose(-1, -2)

    def add_band(self, grad: Tensor, into: Tensor, chunk: Chunk) -> None:
        """The transpose of `band`, into (B, Hkv, Tk, D): overlapping blocks are added in a fixed order."""
        blocks = grad.shape[2]
        width = self.block * (blocks - 1 + -(-(self.block + self.window) // self.block))
        rows = into.new_zeros(self.batch, self.kv_heads, width, self.size)
        for start in range(0, self.block + self.window, self.block):
            part = grad[:, :, :, start : start + self.block]
            place = rows[:, :, start : start + blocks * self.block].unflatten(2, (blocks, self.block))
            place[:, :, :, : part.shape[3]] += part
        keys, places = self._band_rows(chunk)
        into[:, :, keys] += rows[:, :, places]

    def _padded(self, x: Tensor, blocks: int) -> Tensor:
        """(B, Hkv, C, G, n) as (B, Hkv, blocks, block * G, n), the last block filled up with zeros."""
        missing = blocks * self.block - x.shape[2]
        if missing:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
        return x.reshape(self.batch, self.kv_heads, blocks, self.block * self.group, x.shape[-1])

    def _diagonals(self, square: Tensor) -> Tensor:
        """Of products (B, Hkv, blocks, block * G, block + window) the window of each query, as a view."""
        width = self.block + self.window
        *outer, row, one = square.stride()
        shape = (*square.shape[:3], self.block, self.group, self.window + 1)
        assert (row, one) == (width, 1)
        return square.as_strided(shape, (*outer, self.group * width + 1, width, 1))

    def products(self, left: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Dot products of rows (B, Hkv, C, G, D) with their window and rungs: (B, Hkv, C, G, window + 1 + R)."""
        square = torch.matmul(self._padded(left, near.shape[2]), near.transpose(-1, -2))
        window = self._diagonals(square).flatten(2, 3)[:, :, : left.shape[2]]
        return torch.cat([window, torch.matmul(left, far.transpose(-1, -2))], dim=-1)

    def scores(self, queries: Tensor, near: Tensor, far: Tensor, chunk: Chunk) -> Tensor:
        """Scaled logits, minus infinity where a query has no such key."""
        scores = self.products(queries * self.scale, near, far)
        if chunk.start >= self.complete_from:
            return scores
        near_missing = self.distances > chunk.limit
        far_missing = self.rungs.nearest > chunk.limit
        heads = max(near_missing.shape[1], far_missing.shape[1])
        missing = torch.cat([near_missing.expand(-1, heads, -1, -1), far_missing.expand(-1, heads, -1, -1)], dim=-1)
        return scores.masked_fill_(missing[:, :, :, None], -torch.inf)

    def _split(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, Hkv, C, G, window + 1 + R) as banded squares and rungs."""
        near = weights[..., : self.window + 1]
        blocks = -(-near.shape[2] // self.block)
        shape = (self.batch, self.kv_heads, blocks, self.block * self.group, self.block + self.window)
        square = weights.new_zeros(shape)
        self._diagonals(square)[:] = self._padded(near, blocks).unflatten(3, (self.block, self.group))
        return square, weights[..., self.window + 1 :]

    def weighted(self, weights: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Sums of the window's and the rungs' rows with the given weights: (B, Hkv, C, G, D)."""
        square, rungs = self._split(weights)
        sums = torch.matmul(square, near).view(self.batch, self.kv_heads, -1, self.group, self.size)
        return sums[:, :, : weights.shape[2]] + torch.matmul(rungs, far)

    def transposed(self, weights: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of `weighted`: what each row of the window and of the rungs receives from `left`."""
        square, rungs = self._split(weights)
        near = torch.matmul(square.transpose(-1, -2), self._padded(left, square.shape[2]))
        return near, torch.matmul(rungs.transpose(-1, -2), left)
