"""One process's part of a row that is cut into equal parts, in order: what the layers of a model ask it for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from fibattn.attention import attend, attend_chosen
from fibattn.model.positions import check_padding
from fibattn.parallel.exchange import exchange, gathered, wanted
from fibattn.pattern import ChosenPattern, LearnedPattern, Pattern, reach_of


@dataclass(frozen=True)
class Shard:
    """The part `rank` of `ranks`; `group` is the name of the process group that holds them."""

    rank: int
    ranks: int
    group: str
    blocks_from: Tensor | None = field(default=None, kw_only=True)
    """The token of the whole row from which chosen blocks are counted, int64 (batch or 1, 1); the first when None."""

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Shard":
        """The part of this process, of as many as the group has processes."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group.group_name)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern | Sequence[Pattern] | LearnedPattern | ChosenPattern | None,
        *,
        positions: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """`attend`, or `attend_chosen`, for the queries of this part: to its own keys, and those before within reach.

        Keys and values come in one message, of the size of the reach. Nothing is computed meanwhile: to split the
        queries by whether they need it would copy more than the message takes.

        Args:
            q: (batch, tokens, query heads, head size), of this part; k, v: (batch, tokens, KV heads, head size).
            pattern: as in `attend`; None for everything before a query, in time quadratic in the row's length.
            positions: as in `attend`, those of this part, in their documents.
            how: what else either takes.
        """
        tokens = q.shape[1]
        if isinstance(pattern, ChosenPattern):
            return self._attend_chosen(q, k, v, pattern, positions=positions, **how)
        if pattern is None and tokens % 2 == 0:
            return self._attend_to_all(q, k, v, positions, **how)
        pattern = Pattern(self.ranks * tokens - 1) if pattern is None else pattern
        k, v = self._with_earlier((k, v), reach_of(pattern))
        return attend(q, k, v, pattern, positions=positions, **how)

    def _attend_chosen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: ChosenPattern,
        *,
        far: tuple[Tensor, Tensor] | None = None,
        **how: Any,
    ) -> Tensor:
        own = (k, v) if far is None else (k, v, far[1])
        # One more than the reach: a first key within it would pass for the first of the text.
        k, v, *far_k = self._with_earlier(own, pattern.reach + 1)
        if far is not None:
            how["far"] = far[0], *far_k
        first = self.blocks_from if self.blocks_from is not None else q.new_zeros(1, 1, dtype=torch.int64)
        first = first - self.rank * q.shape[1] + k.shape[1] - q.shape[1]
        return attend_chosen(q, k, v, pattern, blocks_from=first, **how)[0]

    def _with_earlier(self, parts: Sequence[Tensor], reach: int) -> list[Tensor]:
        """Tensors (batch, tokens, KV heads, head size), each behind those of the tokens before this part."""
        return [torch.cat(pair, dim=1) for pair in zip(self.before(parts, reach), parts, strict=True)]

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, **how: Any) -> Tensor:
        """`attend` to everything before a query, as much work for each process.

        Later queries have more keys. So of all parts' halves, 0 … 2 ranks - 1, each process works on an early and a
        late one, `rank` and `2 ranks - 1 - rank`, with all keys and values.
        """
        ranks, rank, half = self.ranks, self.rank, q.shape[1] // 2
        to, of = [0] * ranks, [0] * ranks
        early, late = rank, 2 * ranks - 1 - rank
        for number in (2 * rank, 2 * rank + 1):
            to[min(number, 2 * ranks - 1 - number)] += half
        for number in (early, late):
            of[number // 2] += half
        # Messages are in the order of processes, and in the second half of a row a part's second half goes first.
        turned = half if 2 * rank >= ranks else 0

        def there(x: Tensor) -> Tensor:
            return exchange(x.transpose(0, 1).roll(turned, 0), of, to, self.group).transpose(0, 1)

        k, v = self._from_all((k, v), [2 * half] * ranks)
        q, positions = there(q), None if positions is None else there(positions)
        parts = []
        for number, some in ((early, slice(0, half)), (late, slice(half, None))):
            at, seen = None if positions is None else positions[:, some], half * (number + 1)
            everything = Pattern(2 * half * ranks - 1)
            parts.append(attend(q[:, some], k[:, :seen], v[:, :seen], everything, positions=at, **how))
        out = exchange(torch.cat(parts, dim=1).transpose(0, 1), to, of, self.group)
        return out.roll(turned, 0).transpose(0, 1)

    def _from_all(self, parts: Sequence[Tensor], counts: list[int]) -> Sequence[Tensor]:
        """Of tensors (batch, tokens, ..., size) the newest tokens of every part in order, so many of each."""
        own, tokens = counts[self.rank], parts[0].shape[1]
        mine = torch.cat([x[:, tokens - own :] for x in parts], dim=-1).transpose(0, 1)
        every = exchange(torch.cat([mine] * self.ranks), counts, [own] * self.ranks, self.group)
        return every.transpose(0, 1).split([x.shape[-1] for x in parts], dim=-1)

    def positions(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        """`model.positions.document_positions` of this part, int32 (batch or 1, tokens), in a row cut over processes.

        Documents begin where they would in the whole row. What is exchanged is a few numbers for each row.

        Args:
            attention_mask: (batch, tokens), `position_ids`: (batch or 1, tokens), of this part.

        Raises:
            InputError: for a mask with zeros between ones.
        """
        begins = None
        if position_ids is not None:
            begins = self._differences(position_ids) != 1
        if attention_mask is not None:
            padding_ends = self._differences((attention_mask != 0).to(torch.int32)) > 0
            ends = gathered(padding_ends.sum(dim=1), self.ranks, self.group)
            check_padding(ends.sum(dim=0))
            # Padding on the left is no document: were it counted, it could pass for the longest.
            padding = padding_ends.cumsum(dim=1) + ends[: self.rank].sum(dim=0)[:, None] == 0
            begins = padding_ends | padding if begins is None else begins | padding_ends | padding
        if begins is None:
            return None
        index = torch.arange(begins.shape[1], device=begins.device, dtype=torch.int32) + self.rank * begins.shape[1]
        newest = torch.where(begins, index, 0).cummax(dim=1).values
        earlier = gathered(newest[:, -1], self.ranks, self.group)[: self.rank]
        if self.rank:
            newest = torch.maximum(newest, earlier.amax(dim=0)[:, None])
        return index - newest

    def before(self, parts: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Of tensors (batch, tokens, ..., size) the `count` tokens before this part, fewer where the row has fewer."""
        tokens, size = parts[0].shape[1], parts[0].shape[-1]
        last = torch.cat([x[:, tokens - min(count, tokens) :] for x in parts], dim=-1)
        return self._halo(last, tokens, count).split(size, dim=-1)

    def with_blocks(self, positions: Tensor | None) -> "Shard":
        """The same, of a row whose queries choose blocks, which are counted as in the whole row.

        That is from the first token of its longest document, as in `attend_chosen`. What is exchanged is two numbers
        for each row.

        Args:
            positions: what `positions` gave.
        """
        if positions is None:
            return self
        longest = positions.max(dim=1, keepdim=True)
        begin = self.rank * positions.shape[1] + longest.indices - longest.values
        every = gathered(torch.cat((longest.values.long(), begin), dim=1), self.ranks, self.group)
        of_longest = every[..., 0].argmax(dim=0, keepdim=True)
        return Shard(self.rank, self.ranks, self.group, blocks_from=every[..., 1].gather(0, of_longest).T)

    def _differences(self, x: Tensor) -> Tensor:
        """x (rows, tokens) less the token before, which is 0 before the row."""
        before = self._halo(x[:, -1:], x.shape[1], 1)
        return functional.pad(torch.cat((before, x), dim=1), (1 - before.shape[1], 0)).diff(dim=1)

    def _halo(self, last: Tensor, tokens: int, reach: int) -> Tensor:
        """The `reach` tokens before this part, or as many as the row has there: (batch, 0 … reach, ...).

        They may be in several parts, of `tokens` each, whose `last` are given, `reach` of them or all. Every process
        calls it, those that get nothing too: in the backward pass it is they who do.
        """
        receive, send = (
            [wanted(way * (self.rank - other), reach, tokens) for other in range(self.ranks)] for way in (1, -1)
        )
        x = last.transpose(0, 1)
        parts = [x[x.shape[0] - count :] for count in send if count] or [x[:0]]
        return exchange(torch.cat(parts), receive, send, self.group).transpose(0, 1)
