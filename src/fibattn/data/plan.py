"""What to prepare: the sources, their weights and budget, and how they are held out, tokenised and cut."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from fibattn.data.sources import Source
from fibattn.data.tokenizer import check_vocab_size
from fibattn.errors import InputError, suggestion

_LARGEST_SHARD = 10**9  # tokens: a file holds 2**31, and its last document is to end in it


@dataclass(frozen=True)
class Plan:
    """Everything but the texts themselves that decides the contents of a prepared folder.

    `weights` are each source's part of the training tokens (made to sum to 1); without them, and with a
    budget `tokens`, all sources have the same. Without a budget the weights take as many tokens as all
    sources can fill; with neither, everything is taken. `validation` names a held-out source for a training
    source; the others have `held_out` of their documents held out, of which the set has the first `held_out_tokens`;
    what is beyond them is in no set. `tokenizer` is a folder or an id of the Hub; without it one of `vocab_size` is
    trained.
    """

    sources: tuple[Source, ...]
    validation: Mapping[str, Source] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None
    tokens: int | None = None
    held_out: float = 0.02
    held_out_tokens: int = 2**20 + 1
    vocab_size: int = 32_768
    tokenizer: str | None = None
    shard_tokens: int = 100_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        names = [source.name for source in self.sources]
        if not names:
            raise InputError("there is no source; name at least one file, folder, glob or data set")
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two sources are named {name!r}; name them apart: NAME=WHAT")
        for name in self.weights or ():
            self.check_name("weight", name)
        for name in self.validation:
            self.check_name("held-out set", name)
        self._check_weights(names)
        for name in ("tokens", "held_out_tokens", "shard_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; expected 1 or more")
        if self.shard_tokens > _LARGEST_SHARD:
            raise InputError(f"shard_tokens is {self.shard_tokens}; expected at most {_LARGEST_SHARD:,}")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; expected a number that fits into 64 bits")
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}; expected a share from 0 to below 1, such as 0.02")

    def check_name(self, what: str, name: str) -> None:
        """Refuse a name that no source has, for which `what` was given."""
        if name not in (own := [source.name for source in self.sources]):
            raise InputError(f"a {what} is given for {name!r}, which is no source: {suggestion(name, own, 'sources')}")

    def _check_weights(self, names: list[str]) -> None:
        if self.weights is None:
            return
        for name in names:
            weight = self.weights.get(name)
            if weight is None:
                raise InputError(f"source {name!r} has no weight; give one for every source: {', '.join(names)}")
            if not (weight > 0 and math.isfinite(weight)):
                raise InputError(f"the weight of {name!r} is {weight}; expected a number above 0")

    @property
    def fractions(self) -> dict[str, float] | None:
        """Each source's part of the training tokens, or None when everything is taken."""
        if self.weights is None and self.tokens is None:
            return None
        weights = self.weights or {source.name: 1.0 for source in self.sources}
        total = sum(weights.values())
        return {source.name: weights[source.name] / total for source in self.sources}


def shares(total: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """`total` tokens split by fractions into whole numbers that sum to `total`."""
    edges = [0, *(round(total * part) for part in accumulate(fractions.values()))]
    return {name: end - begin for name, (begin, end) in zip(fractions, pairwise(edges), strict=True)}


def largest_shares(available: Mapping[str, int], fractions: Mapping[str, float]) -> dict[str, int]:
    """The largest split by fractions that every source can fill."""
    total = int(min(available[name] / fraction for name, fraction in fractions.items()))
    while any(share > available[name] for name, share in shares(total, fractions).items()):
        total -= 1  # rounding gave one source a token more than it has
    return shares(total, fractions)
