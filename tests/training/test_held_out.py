"""The loss on held-out text in training: the right numbers, the same text, and a run that does not notice."""

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import Server
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback

from fibattn import FibAttnForCausalLM
from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.data.sequences import TrainingSequences
from fibattn.data.shards import write_shard
from fibattn.model.loading import load_model
from fibattn.progress import Meter
from fibattn.training.held_out import HeldOut
from fibattn.training.recipe import Recipe
from fibattn.training.run import train


def stream(path: Path, tokens: int) -> TokenStream:
    """A held-out set of so many tokens: 0, 1, 2, … again and again below 250."""
    ids = (np.arange(tokens) % 250).astype(np.uint16)
    write_shard(path, [ids], np.ones(512, np.uint16), np.dtype("<u2"), tokens, None)
    return TokenStream([path])


def lines(recipe: Recipe, name: str = "held-out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.out / name).read_text().splitlines()]


def starts(parts: dict[str, TrainingSequences]) -> dict[str, list[int]]:
    return {name: one.order.tolist() for name, one in parts.items()}


def test_every_set_gives_an_equal_part_that_is_spread_over_it(tmp_path: Path) -> None:
    held_out = {name: stream(tmp_path / f"{name}.bin", size) for name, size in (("a", 1001), ("b", 81), ("c", 8))}
    training = {name: stream(tmp_path / f"{name}-train.bin", size) for name, size in (("a", 401), ("b", 25), ("c", 99))}
    sizes = np.full(512, 3, np.uint16)

    def choose(tokens: int, *names: str) -> HeldOut | None:
        return HeldOut.choose({name: held_out[name] for name in names}, training, sizes, 8, tokens)

    # "c" has no sequence of 8 and the target after it; the other two share 80 tokens, and "b" has ten sequences.
    found = choose(80, "a", "b", "c")
    assert found is not None
    assert starts(found.held_out) == {"a": [0, 200, 400, 600, 800], "b": [0, 16, 32, 48, 64]}
    assert starts(found.training) == {"a": [0, 80, 160, 240, 320], "b": [0, 8, 16]}
    found = choose(1000, "a", "b")
    assert found is not None
    assert {name: len(one) for name, one in found.held_out.items()} == {"a": 62, "b": 10}
    assert found.sizes == {"a": 62 * 8 * 3, "b": 10 * 8 * 3}
    found = choose(1, "a", "b")
    assert found is not None
    assert starts(found.held_out) == starts(found.training) == {"a": [0], "b": [0]}
    assert choose(80, "c") is choose(80) is None
    assert HeldOut.choose({"a": held_out["a"]}, {"a": held_out["c"]}, sizes, 8, 80) is None


@torch.no_grad()
def plain_loss(model: Any, sequences: TrainingSequences) -> float:
    """The sum over all targets, from whole logits."""
    total = 0.0
    for start in sequences.order:
        tokens = torch.from_numpy(sequences.stream.sequence(int(start), sequences.length + 1))
        logits = model(input_ids=tokens[None, :-1]).logits[0].double()
        total += float(functional.cross_entropy(logits, tokens[1:], reduction="sum"))
    return total


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_losses_are_those_of_plain_logits(model: FibAttnForCausalLM, tmp_path: Path, batch: int) -> None:
    held_out = {"a": stream(tmp_path / "a.bin", 900), "b": stream(tmp_path / "b.bin", 70)}
    training = {"a": stream(tmp_path / "a-train.bin", 1234), "b": stream(tmp_path / "b-train.bin", 131)}
    sizes = np.arange(512).astype(np.uint16)
    chosen = HeldOut.choose(held_out, training, sizes, 24, 2 * 5 * 24)
    assert chosen is not None
    found = chosen.losses(model, batch, Accelerator(cpu=True))
    for name, count in (("a", 5), ("b", 2)):
        sequences = chosen.held_out[name]
        assert (len(sequences), len(chosen.training[name])) == (count, 5)
        text = sum(int(sizes[held_out[name].sequence(start + 1, 24)].sum()) for start in sequences.order.tolist())
        right, training_loss = plain_loss(model, sequences), plain_loss(model, chosen.training[name]) / (5 * 24)
        assert found[f"{name}/loss"] == pytest.approx(right / (count * 24), rel=1e-6)
        assert found[f"{name}/bits_per_byte"] == pytest.approx(right / math.log(2) / text, rel=1e-6)
        assert found[f"{name}/training_loss"] == pytest.approx(training_loss, rel=1e-6)
        assert found[f"{name}/gap"] == pytest.approx(right / (count * 24) - training_loss, abs=1e-5)
    for what in ("loss", "bits_per_byte", "training_loss", "gap"):
        assert found[what] == pytest.approx((found[f"a/{what}"] + found[f"b/{what}"]) / 2)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(model: FibAttnForCausalLM, tmp_path: Path, training: bool) -> None:
    sets = {"a": stream(tmp_path / "a.bin", 900)}
    chosen = HeldOut.choose(sets, sets, np.ones(512, np.uint16), 24, 100)
    assert chosen is not None
    before = torch.get_rng_state()
    model.train(training)
    chosen.losses(model, 2, Accelerator(cpu=True))
    assert all(module.training == training for module in model.modules())
    model.eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


class RandomState(TrainerCallback):
    """Keeps the state of the random numbers after every step."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_ends_with_the_same_bits_with_it_and_without(recipe: Recipe, precision: Literal["fp32", "bf16"]) -> None:
    def run(every: int | None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[float]]:
        watch = RandomState()
        one = replace(recipe, out=recipe.out / str(every), precision=precision, evaluate_every=every)
        weights = load_file(train(one, [watch]) / "model.safetensors")
        assert (one.out / "held-out.jsonl").exists() == (every is not None)
        return weights, watch.states, [line["loss"] for line in lines(one, "metrics.jsonl")]

    (weights, states, losses), (expected, right_states, right_losses) = run(2), run(None)
    assert losses == right_losses
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(states) == recipe.steps
    assert all(torch.equal(*pair) for pair in zip(states, right_states, strict=True))


def test_a_line_says_what_the_finished_model_would(recipe: Recipe) -> None:
    run = replace(recipe, evaluate_every=5, evaluate_tokens=300)
    model, data = load_model(train(run)), PreparedData.open(run.data)
    found = lines(run)
    assert [line["step"] for line in found] == [5, 10, 12]
    assert [line["tokens"] for line in found] == [step * 4 * 32 for step in (5, 10, 12)]
    chosen = HeldOut.choose(data.validation, data.training, data.token_bytes, 32, 300)
    assert chosen is not None
    right = chosen.losses(model, 4, Accelerator(cpu=True))
    (name,) = data.validation
    values = ("loss", "training_loss", "gap", "bits_per_byte")
    assert list(found[-1]) == ["step", "tokens", *values, "sets", "seconds"]
    for what in values:
        assert found[-1][what] == found[-1]["sets"][name][what] == pytest.approx(right[what], rel=1e-5, abs=1e-6)
    assert found[-1]["loss"] < found[0]["loss"]


def test_the_gap_grows_where_a_text_is_learnt_by_heart(recipe: Recipe, forked: Server, tmp_path: Path) -> None:
    """Digits that follow no rule: all that is learnt of their order is learnt by heart."""
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, rng.integers(0, 10, 100))))
    command = [sys.executable, "-m", "fibattn", "prepare", str(tmp_path / "data"), f"a={tmp_path / 'train.txt'}"]
    flags = ["--vocab-size", "300", "--held-out", "0", "--val", f"a={tmp_path / 'val.txt'}"]
    forked.run([*command, *flags], check=True)
    run = replace(recipe, data=tmp_path / "data", sequence_length=16, steps=120, evaluate_every=40, save_every=400)
    train(run)
    gaps = [line["gap"] for line in lines(run)]
    assert abs(gaps[0]) < 0.2
    assert gaps[-1] > gaps[1] > gaps[0]
    assert gaps[-1] > 0.5


def test_lines_are_those_of_a_whole_run_wherever_it_was_cut(recipe: Recipe) -> None:
    run = replace(recipe, evaluate_every=5, log_every=2, save_every=7)

    def found() -> list[dict[str, Any]]:
        train(run)
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(run)]

    whole = found()
    assert [line["step"] for line in whole] == [5, 10, 12]
    for made in ("model", "checkpoint-12"):
        shutil.rmtree(run.out / made)
    with (run.out / "held-out.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert found() == whole


def test_a_run_that_goes_on_may_be_watched_and_logged_more_often(recipe: Recipe) -> None:
    run = replace(recipe, evaluate_every=None, log_every=4, save_every=6)
    train(run)
    for made in ("model", "checkpoint-12"):
        shutil.rmtree(run.out / made)
    run = replace(run, evaluate_every=3, log_every=2)
    train(run)
    assert [line["step"] for line in lines(run)] == [9, 12]
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 4, 6, 8, 9, 10, 12]


def test_the_clock_of_the_tokens_a_second_stands_still_meanwhile(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts 2 seconds for a step and 1,000 for an evaluation."""
    now, measure = [0.0], HeldOut.losses

    class Step(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            now[0] += 2

    def slowly(self: HeldOut, *rest: Any) -> dict[str, float]:
        now[0] += 1000
        return measure(self, *rest)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(HeldOut, "losses", slowly)
    run = replace(recipe, evaluate_every=3, log_every=2, save_every=6)
    train(run, [Step()])
    assert [line["seconds"] for line in lines(run)] == [1000] * 4
    assert {line["tokens_per_second"] for line in lines(run, "metrics.jsonl")} == {4 * 32 / 2}


def test_the_progress_and_the_trackers_say_it(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            logged.append(logs)

    monkeypatch.setattr("fibattn.training.trainer.Meter", partial(Meter, every=0.0))
    run = replace(recipe, evaluate_every=6)
    train(run, [Tracker()])
    (name,) = PreparedData.open(run.data).validation
    said = capsys.readouterr().err
    values = [logs for logs in logged if "eval_loss" in logs]
    assert len(values) == 2
    for logs, line in zip(values, lines(run), strict=True):
        assert logs["eval_bits_per_byte"] == line["bits_per_byte"]
        assert logs[f"eval_{name}/loss"] == line["sets"][name]["loss"]
    losses = {line["step"]: line["loss"] for line in lines(run, "metrics.jsonl")}
    first = lines(run)[0]["bits_per_byte"]
    for step in (7, 8):
        assert f", step {step - 1}, loss {losses[step - 1]:.4f}, held out {first:.4f} bits/byte\n" in said


def test_data_without_a_held_out_set_are_trained_on_in_silence(recipe: Recipe, forked: Server, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of {n * n % 97};\n" for n in range(2000)))
    command = [sys.executable, "-m", "fibattn", "prepare", str(tmp_path / "data"), str(text), "--vocab-size", "300"]
    forked.run([*command, "--held-out", "0"], check=True)
    run = replace(recipe, data=tmp_path / "data", evaluate_every=2)
    train(run)
    assert not (run.out / "held-out.jsonl").exists()
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == list(range(1, 13))
    said = forked.run([sys.executable, "-m", "fibattn", "train", str(run.out / "recipe.json")], check=True).stdout
    assert "the model is in" in said
    assert "evaluate it" not in said  # there is nothing to evaluate it on
