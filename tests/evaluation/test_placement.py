"""Which layers should keep their attention: against losses by hand, and where the right answer is known."""

import json
from pathlib import Path
from typing import Any

import foreign_decoders
import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn import functional

import fibattn
from fibattn import InputError
from fibattn.data.prepared import TokensInMemory
from fibattn.data.sequences import TrainingSequences, held_out_sequences, read_tokens
from fibattn.data.tokenizer import load_tokenizer
from fibattn.evaluation.placement import evenly_kept, kept_loss, search

PATTERN: dict[str, Any] = {"window": 2, "rungs": 3}


def as_sequences(rows: Tensor) -> TrainingSequences:
    """Each row but its last token a sequence."""
    starts = np.arange(len(rows)) * rows.shape[1]
    return TrainingSequences(TokensInMemory(rows.flatten().numpy()), starts, rows.shape[1] - 1)


def text(count: int = 3, length: int = 40) -> TrainingSequences:
    return as_sequences(foreign_decoders.tokens(count, length + 1))


def sequences(paths: list[Path], tokenizer: Any, length: int, tokens: int) -> TrainingSequences:
    return held_out_sequences(read_tokens(paths, tokenizer, tokens + 1), length, tokens)


def by_hand(model: Any, rows: TrainingSequences) -> float:
    inputs, targets = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "shift_labels"))
    logits = model(inputs, use_cache=False).logits.flatten(0, 1)
    return float(functional.cross_entropy(logits.double(), targets.flatten()))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@torch.no_grad()
def test_losses_are_those_of_the_converted_model(architecture: str) -> None:
    model, ids = foreign_decoders.model(architecture), text()
    dense = by_hand(model, ids)
    assert kept_loss(model, PATTERN, ids, range(4)) == pytest.approx(dense, rel=1e-5)
    for kept in ([], [2], [0, 3]):
        converted = fibattn.convert(foreign_decoders.model(architecture), **PATTERN, keep_layers=kept)
        assert kept_loss(model, PATTERN, ids, kept) == pytest.approx(by_hand(converted, ids), rel=1e-5)
    assert by_hand(model, ids) == dense


@torch.no_grad()
def test_layers_that_are_kept_with_a_bound_are_measured_with_it() -> None:
    model, ids = foreign_decoders.model(), text()
    free, bounded = (search(model, PATTERN, ids, 1, full_reach) for full_reach in (None, 5))
    assert [free[what] == pytest.approx(bounded[what]) for what in ("dense", "none", "alone")] == [True] * 3
    for what in (bounded["search"][0], bounded["evenly"]):
        kept = what["layers"] if "layers" in what else [what["layer"]]
        converted = fibattn.convert(foreign_decoders.model(), **PATTERN, keep_layers=kept, full_reach=5)
        assert what["loss"] == pytest.approx(by_hand(converted, ids), rel=1e-5)
    assert bounded["evenly"]["loss"] != pytest.approx(free["evenly"]["loss"], rel=1e-5)


def test_the_search_takes_the_best_layer_each_time() -> None:
    model, ids = foreign_decoders.model(), text()
    found = search(model, PATTERN, ids, 2)
    dense = kept_loss(model, PATTERN, ids, range(4))
    alone = [kept_loss(model, PATTERN, ids, [one for one in range(4) if one != layer]) - dense for layer in range(4)]
    assert found["alone"] == pytest.approx(alone, abs=1e-6)
    one = {layer: kept_loss(model, PATTERN, ids, [layer]) for layer in range(4)}
    first = min(one, key=lambda layer: one[layer])
    two = {layer: kept_loss(model, PATTERN, ids, [first, layer]) for layer in range(4) if layer != first}
    second = min(two, key=lambda layer: two[layer])
    assert found["search"] == [
        {"layer": first, "loss": pytest.approx(one[first])},
        {"layer": second, "loss": pytest.approx(two[second])},
    ]
    assert found["dense"] == pytest.approx(dense)
    assert found["none"] == pytest.approx(kept_loss(model, PATTERN, ids, []))
    assert found["evenly"] == {"layers": [1, 3], "loss": pytest.approx(kept_loss(model, PATTERN, ids, [1, 3]))}
    assert (found["sequences"], found["sequence_length"]) == (3, 40)


@pytest.mark.parametrize("only", [0, 2])
def test_the_one_layer_whose_attention_counts_is_found(only: int) -> None:
    model: Any = foreign_decoders.model()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(float(index == only))
    torch.manual_seed(0)
    written = model.generate(
        foreign_decoders.tokens(8, 2), max_new_tokens=39, do_sample=True
    )  # by which it is the likelier one
    found = search(model, PATTERN, as_sequences(written), 1)
    assert [layer for layer, rise in enumerate(found["alone"]) if abs(rise) > 1e-4] == [only]
    assert found["alone"][only] > 0.1
    assert found["search"] == [{"layer": only, "loss": pytest.approx(found["dense"], abs=1e-4)}]
    assert found["none"] == pytest.approx(found["dense"] + found["alone"][only], abs=1e-4)


@pytest.mark.parametrize("count", [0, 4])
def test_as_many_layers_as_there_are_or_none_are_no_choice(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} layers are to be kept of 4; give a number from 1 to 3"):
        search(foreign_decoders.model(), PATTERN, text(), count)


def test_a_model_that_cannot_be_converted_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match="its layers are sparse by themselves"):
        search(tiny_models.model(), PATTERN, None, 1)  # pyright: ignore


def test_evenly() -> None:
    assert evenly_kept(16, 4) == [3, 7, 11, 15]
    assert evenly_kept(30, 4) == [7, 14, 21, 29]
    assert evenly_kept(5, 1) == [4]


def test_text_becomes_sequences_that_follow_one_another(prepared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    (tmp_path / "a.txt").write_text("aaa 49 follows n7; so says line 4.\n" * 20)
    (tmp_path / "b.jsonl").write_text('{"text": "bb 1 follows h1"}\n{"text": "c 4"}\n')
    bos = tokenizer.bos_token_id
    plain = [tokenizer.encode(one, add_special_tokens=False) for one in ("bb 1 follows h1", "c 4")]
    first = tokenizer.encode((tmp_path / "a.txt").read_text(), add_special_tokens=False)
    whole = [bos, *first, bos, *plain[0], bos, *plain[1]]
    found = sequences([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, 7, 10**6)
    assert len(found) == (len(whole) - 1) // 7
    inputs, targets = (torch.stack([row[name] for row in found]) for name in ("input_ids", "shift_labels"))
    assert inputs.dtype == torch.int64
    assert inputs.shape == (len(found), 7)
    assert inputs.flatten().tolist() == whole[: len(found) * 7]
    assert targets.flatten().tolist() == whole[1 : len(found) * 7 + 1]
    assert len(sequences([tmp_path / "a.txt"], tokenizer, 7, 30)) == 4


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("a.txt", 999, r"a sequence of 999 needs 1000 tokens; the text has \d+ and a limit of 65536: give more"),
        ("a.pdf", 9, r"a\.pdf is no text that can be read"),
    ],
)
def test_text_that_cannot_be_measured_on(name: str, length: int, message: str, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("so says line 4.\n" * 9)
    with pytest.raises(InputError, match=message):
        sequences([tmp_path / name], load_tokenizer(prepared / "tokenizer"), length, 65_536)


def test_of_several_files_as_much_is_read(prepared: Path, tmp_path: Path) -> None:
    tokenizer, lines = load_tokenizer(prepared / "tokenizer"), {"a": 30, "b": 3, "c": 30}
    for letter, count in lines.items():
        (tmp_path / f"{letter}.jsonl").write_text(count * (json.dumps({"text": letter}) + "\n"))
    ids = read_tokens([tmp_path / f"{letter}.jsonl" for letter in lines], tokenizer, 42).sequence(0, 42)
    read = [tokenizer.decode([one]) for one in ids]  # of a document a letter and a separator
    assert len(ids) == 42
    assert [read.count(letter) for letter in lines] == [9, 3, 9]
    for letter in lines:  # a file of plain text is one document
        (tmp_path / f"{letter}.txt").write_text(lines[letter] * 100 * f"{letter} ")
    text = read_tokens([tmp_path / f"{letter}.txt" for letter in lines], tokenizer, 3000).sequence(0, 3000)
    letters = tokenizer.decode(text, skip_special_tokens=True)
    counts = [letters.count(letter) for letter in lines]
    assert counts[1] == 300
    assert counts[0] == pytest.approx(counts[2], rel=0.25)  # pieces of 256 tokens
