"""Recall rows against a solver that reads them, and what the compared models can reach."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import study.probes.recall
from fibattn import FibAttnForCausalLM
from fibattn.errors import InputError
from fibattn.model.loss import IGNORED
from study.probes.recall import (
    KEYS,
    NOISE,
    PAIRS,
    TASKS,
    VOCABULARY,
    Task,
    accuracy,
    keys,
    lessons,
    questions,
    recall,
    training_rows,
    variants,
)
from study.probes.settings import Recall


def pairs(ids: list[int]) -> dict[int, tuple[int, int]]:
    """Where each key stands with a value after it, and that value."""
    starts = range(len(ids) - 1)
    return {ids[i]: (i, ids[i + 1]) for i in starts if NOISE <= ids[i] < NOISE + KEYS <= ids[i + 1]}


def distances(item: dict[str, Tensor]) -> list[int]:
    """The distance of every question; checks that its target is the value of its key."""
    ids, targets = item["input_ids"].tolist(), item["shift_labels"].tolist()
    planted, found = pairs(ids), []
    for place, target in enumerate(targets):
        if target != IGNORED:
            where, value = planted[ids[place]]
            assert target == value
            assert place + 1 == len(ids) or ids[place + 1] < NOISE + KEYS, "no value may follow a question"
            found.append(place - where)
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [16, 64, 1000])
def test_questions_come_from_their_distance(task: Task, distance: int) -> None:
    rows = questions(20, distance, task, seed=0)
    found = [distances(rows[index]) for index in range(20)]
    assert all(distance * 4 // 5 <= one <= distance for row in found for one in row)
    assert all(1 <= len(row) <= PAIRS[task] for row in found)
    assert sum(map(len, found)) > 0.7 * 20 * PAIRS[task]
    assert rows.length >= distance + distance // 4


def test_training_rows_alternate_and_spread_over_distances() -> None:
    rows = training_rows(60, 512, 32, TASKS, seed=0)
    found = [distances(rows[index]) for index in range(60)]
    assert [len(pairs(rows[index]["input_ids"].tolist())) for index in (0, 1, 2)] == [4, 1, 4]
    everything = [one for row in found for one in row]
    assert min(everything) == 2
    assert 384 < max(everything) < 512
    near, middle, far = (sum(low <= one < high for one in everything) for low, high in ((20, 40), (40, 80), (80, 160)))
    assert min(near, middle, far) > 0.7 * max(near, middle, far)
    passkeys = rows[1]["input_ids"].tolist()
    assert set(pairs(passkeys)) == {NOISE}


@pytest.mark.parametrize(
    ("length", "lengths"), [(4096, [16, 64, 256, 1024, 4096]), (512, [16, 64, 256, 512]), (128, [16, 64, 128])]
)
def test_lessons_go_from_short_rows_to_long_ones(length: int, lengths: list[int]) -> None:
    stages = lessons(length, steps=101, batch_tokens=8192, seed=0)
    halves = [lengths[0], *(tokens for tokens in lengths[1:] for _ in range(2))]
    assert [stage.data[0]["input_ids"].shape[0] for stage in stages] == halves
    assert all(stage.batch * tokens == 8192 for stage, tokens in zip(stages, halves, strict=True))
    steps = dict.fromkeys(lengths, 0)
    for stage, tokens in zip(stages, halves, strict=True):
        steps[tokens] += stage.steps
    assert sum(steps.values()) == 101
    assert max(steps.values()) - min(steps.values()) <= 1
    assert max(distances(stages[0].data[0])) < lengths[0]


def test_a_lesson_asks_often_and_then_once() -> None:
    stages = lessons(256, steps=60, batch_tokens=512, seed=0)
    most = [max(len(distances(stage.data[index])) / PAIRS["associative"] for index in (0, 2)) for stage in stages]
    assert most[0] == most[2] == most[4] == 1
    assert most[1] > 2
    assert most[3] > 8
    rows = [tuple(stage.data[index]["input_ids"][:16].tolist()) for stage in stages for index in range(4)]
    assert len(set(rows)) == len(rows), "no row is taught twice"


def test_the_shortest_rows_are_full_and_have_no_passkey() -> None:
    first, second, *_ = (stage.data for stage in lessons(4096, steps=5, batch_tokens=16_384, seed=0))
    for index in range(200):
        assert sorted(place for place, _ in pairs(first[index]["input_ids"].tolist()).values()) == [0, 2, 4, 6]
    assert sum(len(distances(first[index])) for index in range(200)) > 2 * 200
    assert [len(pairs(second[index]["input_ids"].tolist())) for index in (0, 1, 2)] == [4, 1, 4]


def test_lessons_of_few_steps_end_with_the_longest() -> None:
    assert [stage.steps for stage in lessons(4096, steps=1, batch_tokens=1, seed=0)] == [0] * 8 + [1]


def test_rows_depend_on_seed_and_number_alone() -> None:
    one = training_rows(9, 256, 16, TASKS, seed=3)[8]
    again = training_rows(20, 256, 16, TASKS, seed=3)[8]
    other = training_rows(20, 256, 16, TASKS, seed=4)[8]
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert torch.equal(one["shift_labels"], again["shift_labels"])
    assert not torch.equal(one["input_ids"], other["input_ids"])


class Solver(nn.Module):
    """Answers every question right, or the first `reach` tokens back only; else with the value 0 places on."""

    def __init__(self, reach: int):
        super().__init__()
        self.reach, self.parameter = reach, nn.Parameter(torch.zeros(1))
        self.base_model = self.answer

    def answer(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(input_ids.tolist()):
            planted = pairs(ids)
            for place, token in enumerate(ids):
                where, value = planted.get(token, (place, 0))
                hidden[row, place, value if place - where <= self.reach else 0] = 1.0
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()


def test_accuracy_counts_right_answers() -> None:
    rows = questions(10, 100, "associative", seed=0)
    asked = [one for index in range(10) for one in distances(rows[index])]
    assert accuracy(Solver(1000), rows, 3) == (1.0, 40)
    assert accuracy(Solver(10), rows, 3) == (0.0, 40)
    right, _ = accuracy(Solver(90), rows, 3)
    assert right == pytest.approx(sum(one <= 90 for one in asked) / 40)
    assert 0 < right < 1


def test_variants_cost_the_same_and_reach_differently() -> None:
    known = variants(256, window=8, layers=3)
    assert keys(known["window"]) == pytest.approx(keys(known["stagger"]), abs=0.5)
    assert {name: config.max_position_embeddings for name, config in known.items()} == dict.fromkeys(known, 256)
    start = torch.randint(NOISE, (1, 200), generator=torch.Generator().manual_seed(0))
    other = start.clone()
    other[0, 0] = NOISE + 1

    def reaches(name: str) -> bool:
        torch.manual_seed(0)
        model = FibAttnForCausalLM(known[name]).eval()
        with torch.no_grad():
            return not torch.equal(model(start).logits[0, -1], model(other).logits[0, -1])

    assert {name: reaches(name) for name in known} == {
        "window": False,
        "stagger": True,
        "hybrid": True,
        "window hybrid": True,
        "dense": True,
        "chosen": True,
        "chosen hybrid": True,
        "convolved hybrid": True,
        "reaching hybrid": True,
    }


@pytest.mark.parametrize(("length", "reach"), [(128, 511), (1024, 4095), (4096, 8191)])
def test_the_reaching_hybrid_chooses_from_past_its_rows(length: int, reach: int) -> None:
    config = variants(length, window=8, layers=3)["reaching hybrid"]
    assert config.chosen_pattern.reach == reach
    assert keys(config) <= 160


def test_hybrids_have_two_full_layers_without_rope() -> None:
    config = variants(512, window=16, layers=8)["hybrid"]
    assert [layer for layer, kind in enumerate(config.layer_types or []) if kind == "full_attention"] == [3, 7]
    assert config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]


def test_every_variant_runs_and_repeats_itself() -> None:
    def once(*names: str) -> dict:
        shape: dict = {"length": 128, "window": 4, "layers": 2, "distances": (20, 80)}
        return recall(Recall(names=names, steps=2, batch_tokens=128, asked=8, seeds=(3,), **shape))

    result = once()
    assert [(row["variant"], row["task"]) for row in result["rows"][:3]] == [
        ("window", "associative"),
        ("window", "passkey"),
        ("stagger", "associative"),
    ]
    assert all(list(row["accuracy"]) == ["20", "80"] for row in result["rows"])
    assert once("dense")["rows"] == result["rows"][-2:]


def test_full_layers_are_bounded_when_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, float]] = []
    weigh = study.probes.recall.accuracy

    def accuracy(model, rows, batch):
        asked.append((model.config.full_reach, model.model.embed_tokens.weight.detach().sum().item()))
        return weigh(model, rows, batch)

    monkeypatch.setattr("study.probes.recall.accuracy", accuracy)
    how: dict = {"length": 128, "window": 4, "layers": 3, "distances": (20,), "steps": 2, "batch_tokens": 128}
    names = ("chosen hybrid", "convolved hybrid")
    result = recall(Recall(names=names, asked=8, seeds=(3,), bound=127, **how))
    recall(Recall(names=names, asked=8, seeds=(3,), **how))
    assert [bound for bound, _ in asked] == [127] * 4 + [None] * 4
    assert [total for _, total in asked[:4]] == [total for _, total in asked[4:]]
    assert (result["bound"], result["rows"][0]["keys"]) == (127, 96)


def test_a_cut_probe_goes_on_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict = {"length": 128, "window": 4, "layers": 2, "distances": (20, 80), "steps": 1, "batch_tokens": 128}
    kept: list[dict] = []
    first = recall(Recall(**options, names=("window",), asked=8, seeds=(0,)), keep=kept.append)
    assert kept == [first]
    more = Recall(**options, names=("window", "dense"), asked=8, seeds=(0, 1))
    both = recall(more, earlier=json.loads(json.dumps(first)))
    made = [(row["variant"], row["seed"]) for row in both["rows"][::2]]
    assert made == [("window", 0), ("dense", 0), ("window", 1), ("dense", 1)]
    assert both["rows"][:2] == first["rows"]
    assert both["rows"][0]["loss"] != both["rows"][4]["loss"]
    with pytest.raises(InputError, match=r"asked was 8 and is now 4\. Give a new --out"):
        recall(Recall(**options, names=("dense",), asked=4), earlier=first)
    monkeypatch.setattr("study.probes.recall.fit", None)
    assert recall(more, earlier=both) == both


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="unknown variant 'densest'; the variants are window, stagger"):
        recall(Recall(names=("densest",)))
    with pytest.raises(InputError, match="length is 64"):
        recall(Recall(length=64))
    with pytest.raises(InputError, match=r"seeds \[\]: .* there must be a seed"):
        recall(Recall(seeds=()))
