"""Variable tracking, solved by reading the statements."""

import re

import pytest
from transformers import PreTrainedTokenizerBase

from fibattn import FibAttnForCausalLM
from fibattn.errors import InputError
from study.probes.forced_choice import Item
from study.probes.ruler import HOPS, ruler, variable_tracking
from study.probes.settings import Ruler


def follow(item: Item) -> tuple[str, int, int]:
    """The value asked for, the hops it takes and the number of other statements."""
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", item.prompt))
    asked = re.findall(r"Answer: VAR (\w+) =$", item.prompt)[0]
    hops, value = 0, assigned[asked]
    while value in assigned:
        hops, value = hops + 1, assigned[value]
    return value, hops, len(assigned) - hops - 1


@pytest.mark.parametrize("hops", HOPS)
def test_right_answer_ends_the_chain(hops: int) -> None:
    items = variable_tracking(hops, 120)
    assert len({item.prompt for item in items}) == 120
    for item in items:
        assert follow(item) == (item.choices[item.answer].strip(), hops, 8)
        values = re.findall(r"= (\d{5})\.", item.prompt)
        assert sorted(item.choices) == sorted(f" {value}" for value in values)
        assert len(set(item.choices)) == 9
    answers = [item.answer for item in items]
    assert max(answers.count(place) for place in range(9)) < 30


def test_statements_of_a_chain_keep_their_order() -> None:
    for item in variable_tracking(3, 20):
        names = re.findall(r"VAR (\w+) = ", item.prompt)
        for name, before in re.findall(r"VAR (\w+) = VAR (\w+)", item.prompt):
            assert names.index(before) < names.index(name)


def test_items_repeat_with_the_seed() -> None:
    assert variable_tracking(2, 5, seed=1) == variable_tracking(2, 9, seed=1)[:5]
    assert variable_tracking(2, 5, seed=1) != variable_tracking(2, 5, seed=2)


def test_ruler_reports_every_number_of_hops(model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    result = ruler(model, tokenizer, Ruler(items=2))
    assert [row["hops"] for row in result["rows"]] == [2, 3, 4]
    assert all(row["chance"] == pytest.approx(1 / 9) for row in result["rows"])
    assert result == ruler(model, tokenizer, Ruler(items=2, batch=1)) | {
        "rows": [pytest.approx(row) for row in result["rows"]]
    }


def test_no_hops_are_refused() -> None:
    with pytest.raises(InputError, match="number of hops is 0"):
        variable_tracking(0, 1)
