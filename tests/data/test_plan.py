from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibattn.data.plan import Plan, largest_shares, shares
from fibattn.data.sources import Source
from fibattn.errors import InputError

BOOKS, DOCS = Source("books", (Path("b"),)), Source("docs", (Path("d"),))
WEIGHTS = st.dictionaries(st.text("abc", min_size=1), st.floats(0.01, 10), min_size=1, max_size=5)


def normal(weights):
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


@given(weights=WEIGHTS, total=st.integers(0, 10**12))
def test_shares_are_whole_and_sum_to_the_total(weights, total):
    fractions = normal(weights)
    result = shares(total, fractions)
    assert sum(result.values()) == total
    assert all(abs(result[name] - total * fraction) <= 1 + 1e-9 * total for name, fraction in fractions.items())


@given(weights=WEIGHTS, data=st.data())
def test_the_largest_shares_fit_and_leave_no_room(weights, data):
    fractions = normal(weights)
    available = {name: data.draw(st.integers(100, 10**9)) for name in fractions}
    result = largest_shares(available, fractions)
    assert all(result[name] <= available[name] for name in result)
    assert any(result[name] >= available[name] - 2 - len(result) for name in result)


def test_weights_are_made_to_sum_to_one():
    assert Plan((BOOKS, DOCS), weights={"books": 3, "docs": 1}).fractions == {"books": 0.75, "docs": 0.25}
    assert Plan((BOOKS, DOCS), tokens=10).fractions == {"books": 0.5, "docs": 0.5}
    assert Plan((BOOKS, DOCS)).fractions is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "there is no source; name at least one"),
        ({"sources": (BOOKS, BOOKS)}, "two sources are named 'books'"),
        (
            {"weights": {"boks": 1}},
            r"a weight is given for 'boks', which is no source: did you mean 'books'\?",
        ),
        ({"weights": {"books": 1}}, "source 'docs' has no weight"),
        ({"weights": {"books": 1, "docs": 0}}, "the weight of 'docs' is 0; expected a number above 0"),
        ({"validation": {"dogs": DOCS}}, "a held-out set is given for 'dogs'.*did you mean 'docs'"),
        ({"tokens": 0}, "tokens is 0; expected 1 or more"),
        ({"shard_tokens": 2 * 10**9}, "shard_tokens is 2000000000; expected at most 1,000,000,000"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected a number that fits into 64 bits"),
        ({"held_out": 1.0}, "held_out is 1.0; expected a share from 0 to below 1"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_read(change, message):
    with pytest.raises(InputError, match=message):
        Plan(**{"sources": (BOOKS, DOCS), **change})
