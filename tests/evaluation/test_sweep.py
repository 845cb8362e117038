"""The length sweep: the same tokens at every length, both conventions, several sets, models that cannot be loaded."""

import io
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn import functional

from fibattn import FibAttnForCausalLM, files
from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from fibattn.evaluation.sweep import change, sweep, tables
from fibattn.model.loading import find_model, load_model


@pytest.fixture(scope="module")
def data(prepared: Path) -> PreparedData:
    return PreparedData.open(prepared)


@pytest.fixture
def folder(model: FibAttnForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def losses(model: FibAttnForCausalLM, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """(sequences, length), from whole logits and PyTorch's cross entropy."""
    inputs, targets = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    logits = model(input_ids=inputs).logits
    return functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="none").view(-1, length)


def test_every_number_equals_plain_logits_on_the_same_tokens(data: PreparedData, model: FibAttnForCausalLM) -> None:
    found = sweep(model, data, lengths=[100, 300, 600], sets=[], tokens=1500)
    ((name, stream),) = data.validation.items()
    # 1500 is cut to two sequences of the longest; all lengths see these 1200 targets.
    tokens = torch.from_numpy(stream.sequence(0, 1201))
    size = data.token_bytes[tokens[1:].numpy()].sum()
    assert (found["trained_at"], found["data_fingerprint"]) == (64, data.fingerprint)
    assert list(found["sets"][name]) == ["100", "300", "600"]
    for length in (100, 300, 600):
        row, expected = found["sets"][name][str(length)], losses(model, tokens, length)
        assert row["targets"] == 1200
        assert row["nll"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(float(expected.sum()) / math.log(2) / size, rel=1e-5)
        assert row["last_256_perplexity"] == pytest.approx(math.exp(float(expected[:, -256:].mean())), rel=1e-5)
        edges = [length * part // 8 for part in range(9)]
        bins = [float(expected[:, a:b].mean()) for a, b in itertools.pairwise(edges)]
        assert row["bins"] == pytest.approx(bins, rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_tables_show_every_set_and_length(data: PreparedData, model: FibAttnForCausalLM) -> None:
    found = sweep(model, data, lengths=[64, 128], sets=[], tokens=256)
    console = Console(width=120, file=io.StringIO())
    shown = tables(found)
    assert len(shown) == 2
    for table in shown:
        console.print(table)
    text = console.file.getvalue()
    ((_, rows),) = found["sets"].items()
    assert "256 tokens" in text
    for length in ("64", "128"):
        assert f"{rows[length]['perplexity']:.2f}" in text
        assert f"{rows[length]['bits_per_byte']:.4f}" in text
        assert all(f"{value:.3f}" in text for value in rows[length]["bins"])
    assert change(rows["128"]["perplexity"], rows["64"]["perplexity"]) in text
    assert "(2×)" in text


def test_change_is_against_the_training_length_and_parts_are_those_of_the_longest(
    data: PreparedData, model: FibAttnForCausalLM
) -> None:
    found = sweep(model, data, lengths=[4, 64, 128], sets=[], tokens=256)
    ((_, rows),) = found["sets"].items()
    lengths, parts = tables(found)
    perplexities = {length: rows[length]["perplexity"] for length in ("4", "64", "128")}
    assert list(lengths.columns[2].cells) == [change(one, perplexities["64"]) for one in perplexities.values()]
    assert list(parts.columns[0].cells) == ["64", "128"]


def test_change_is_in_per_cent() -> None:
    assert change(3.0, 2.0) == "+50.0 %"
    assert change(1.5, 2.0) == "-25.0 %"
    assert change(2.0, 2.0) == ""


def test_a_set_too_short_for_the_longest_window_is_refused(data: PreparedData, model: FibAttnForCausalLM) -> None:
    (name,) = data.validation
    with pytest.raises(
        InputError, match=rf"the held-out set '{name}' has \d+ tokens .* one sequence of 10000000; eval"
    ):
        sweep(model, data, lengths=[64, 10_000_000], sets=[])
    with pytest.raises(InputError, match=r"\(limit 63\), fewer than one sequence of 64"):
        sweep(model, data, lengths=[64], sets=[], tokens=63)


def test_an_unknown_set_is_refused_with_the_near_name(data: PreparedData, model: FibAttnForCausalLM) -> None:
    (name,) = data.validation
    with pytest.raises(InputError, match=rf"no held-out set '{name}s': did you mean '{name}'\?"):
        sweep(model, data, lengths=[64], sets=[f"{name}s"])
    with pytest.raises(InputError, match=rf"no held-out set 'zzz': the held-out sets are {name}"):
        sweep(model, data, lengths=[64], sets=["zzz"])


def test_a_foreign_vocabulary_is_refused(data: PreparedData, model: FibAttnForCausalLM) -> None:
    other = FibAttnForCausalLM(type(model.config)(**{**model.config.to_dict(), "vocab_size": 300}))
    with pytest.raises(InputError, match=rf"has 300 token ids and the data {data.vocab_size}; use the data it was"):
        sweep(other, data, lengths=[64], sets=[])


# Finding and loading


def test_a_loaded_model_gives_the_same_bits(folder: Path, model: FibAttnForCausalLM) -> None:
    tokens = torch.arange(40)[None]
    loaded = load_model(find_model(folder.parent)).cpu()
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model \(config.json is missing\); give a model folder"):
        find_model(tmp_path)


def test_weights_cut_short_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"holds no model that can be loaded .*restore it or train it anew"):
        load_model(folder)


def test_missing_weights_are_refused_rather_than_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = sorted(weights)[-1]
    save_file({name: x for name, x in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 weights, {lost} among them"):
        load_model(folder)


def test_what_is_not_a_language_model_is_refused(folder: Path) -> None:
    files.write_json(folder / "config.json", {"model_type": "nothing-known"})
    with pytest.raises(InputError, match=r"holds no model that can be loaded"):
        load_model(folder)
