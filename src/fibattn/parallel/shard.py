"""One process's part of a row that is cut into equal parts, in order: what the layers of a model ask it for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from fibattn.attention import attend
from fibattn.model.positions import check_padding
from fibattn.parallel.exchange import gathered, halo, summed
from fibattn.pattern import LearnedPattern, Pattern


@dataclass(frozen=True)
class Shard:
    """The part `rank` of `ranks`; `group` is the name of the process group that holds them."""

    rank: int
    ranks: int
    group: str

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Shard":
        """The part of this process, of as many as the group has processes."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group.group_name)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern | Sequence[Pattern] | LearnedPattern | None,
        *,
        positions: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """`fibattn.attend` for the queries of this part: to its own keys, and those before it within reach.

        Keys and values come in one message, of the size of the reach. Nothing is computed meanwhile: to split the
        queries by whether they need it would copy more than the message takes.

        Args:
            q: (batch, tokens, query heads, head size), of this part; k, v: (batch, tokens, KV heads, head size).
            pattern: as in `attend`; None for everything before a query, in time quadratic in the row's length.
            positions: as in `attend`, those of this part, in their documents.
            how: alpha and scale, as in `attend`.
        """
        tokens = q.shape[1]
        pattern = Pattern(self.ranks * tokens - 1) if pattern is None else pattern
        reach = max(one.reach for one in pattern) if isinstance(pattern, Sequence) else pattern.reach
        first = tokens - min(reach, tokens)
        both = self._halo(torch.cat((k[:, first:], v[:, first:]), dim=-1), tokens, reach)
        earlier = both.split((k.shape[-1], v.shape[-1]), dim=-1)
        k, v = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
        return attend(q, k, v, pattern, positions=positions, **how)

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
            check_padding(summed(padding_ends.sum(dim=1), self.group))
            begins = padding_ends if begins is None else begins | padding_ends
        if begins is None:
            return None
        index = torch.arange(begins.shape[1], device=begins.device, dtype=torch.int32) + self.rank * begins.shape[1]
        newest = torch.where(begins, index, 0).cummax(dim=1).values
        earlier = gathered(newest[:, -1], self.ranks, self.group)[: self.rank]
        if self.rank:
            newest = torch.maximum(newest, earlier.amax(dim=0)[:, None])
        return index - newest

    def _differences(self, x: Tensor) -> Tensor:
        """x (rows, tokens) less the token before, which is 0 before the row."""
        before = self._halo(x[:, -1:], x.shape[1], 1)
        return functional.pad(torch.cat((before, x), dim=1), (1 - before.shape[1], 0)).diff(dim=1)

    def _halo(self, last: Tensor, tokens: int, reach: int) -> Tensor:
        """Of parts with so many tokens, whose last are given, (batch, tokens, ...), what is before this one."""
        return halo(last.transpose(0, 1), tokens, reach, self.rank, self.ranks, self.group).transpose(0, 1)
