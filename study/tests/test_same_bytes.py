"""Held-out sets in another tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest

from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.prepared import PreparedData
from fibattn.data.sources import Source
from fibattn.errors import InputError
from fibattn.evaluation.sweep import shared_targets
from study.same_bytes import targets_of, targets_within


@pytest.fixture(scope="module")
def coarse(prepared: Path) -> PreparedData:
    return PreparedData.open(prepared)


@pytest.fixture(scope="module")
def fine(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The same text, nearly in bytes."""
    texts = tuple(sorted((prepared.parent / "texts").iterdir()))
    plan = Plan((Source("texts", paths=texts),), vocab_size=280, held_out=0.15)
    return prepare(tmp_path_factory.mktemp("fine"), plan, quiet=True)


def test_as_many_bytes_are_more_of_the_finer_tokens(coarse: PreparedData, fine: PreparedData) -> None:
    (alone,), (more,) = (targets_of(fine, like, [64], 512).values() for like in (None, coarse))
    assert alone == 512 < more
    ((name, stream),) = coarse.validation.items()
    size = stream.byte_counts(1, 512, coarse.token_bytes).sum()
    own = fine.validation[name].byte_counts(1, len(fine.validation[name]) - 1, fine.token_bytes).cumsum()
    assert own[more - 1] <= size < own[more + 64]
    assert targets_of(coarse, coarse, [64, 128], 512) == shared_targets(coarse, lengths=[64, 128], sets=[], tokens=512)


def test_targets_end_within_the_bytes_that_were_asked_for(coarse: PreparedData) -> None:
    (stream,) = coarse.validation.values()
    sizes = stream.byte_counts(1, 100, coarse.token_bytes)
    assert targets_within(stream, coarse.token_bytes, int(sizes.sum())) in (100, 101)  # a separator has no bytes
    assert targets_within(stream, coarse.token_bytes, int(sizes[:50].sum()) - 1) < 50


def test_other_sets_are_refused(coarse: PreparedData, fine: PreparedData) -> None:
    fine = replace(fine, validation={"others": coarse.train})
    with pytest.raises(InputError, match=r"has the held-out sets texts, and .* has others; prepare both from the same"):
        targets_of(coarse, fine, [64], 512)
