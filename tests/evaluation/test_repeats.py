"""Loss on repeated pairs: sequences short enough to count by hand, and a slow count of real ones."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fibattn import FibAttnForCausalLM
from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.data.sequences import TrainingSequences, held_out_sequences
from fibattn.data.shards import write_shard
from fibattn.evaluation import repeats as module
from fibattn.evaluation.loss import token_losses
from fibattn.evaluation.repeats import frequent_pairs, last_distances, repeats, repeats_table
from fibattn.evaluation.sweep import sweep, tables

VOCABULARY = 10
NONE = np.zeros(0, np.int64)


def stream(folder: Path, *shards: list[int]) -> TokenStream:
    """A stream of shards of one document each, whose tokens are a byte each."""
    paths = [folder / f"{number}.bin" for number in range(len(shards))]
    for path, tokens in zip(paths, shards, strict=True):
        ids = [np.array(tokens, np.uint16)]
        write_shard(path, ids, np.ones(VOCABULARY, np.uint16), np.dtype("<u2"), len(tokens), None)
    return TokenStream(paths)


def test_distances_are_to_the_last_of_the_same_in_a_row() -> None:
    rows = np.array([[5, 7, 5, 5, 7, 5], [5, 5, 5, 9, 9, 7]])
    assert last_distances(rows).tolist() == [[0, 0, 2, 1, 3, 2], [0, 1, 1, 0, 1, 0]]


def test_hits_by_hand(tmp_path: Path) -> None:
    # The pairs of the first row: 1-2, 2-3, 3-1, 1-2 (distance 3), 2-4, 4-1, 1-2 (distance 3).
    # The second's: 1-1, 1-1 (distance 1), 1-5, 5-6, 6-1, 1-1 (distance 4), 1-1 (distance 1).
    one = stream(tmp_path, [1, 2, 3, 1, 2, 4, 1, 2], [1, 1, 1, 5, 6, 1, 1, 1])
    sequences = TrainingSequences(one, np.array([0, 8]), 7)
    losses = np.array([[1, 2, 3, 4, 5, 6, 7], [10, 20, 30, 40, 50, 60, 70]], np.float32)
    found = repeats(losses, sequences, NONE, VOCABULARY)
    assert found["hits"] == {"targets": 5, "nll": pytest.approx((4 + 7 + 20 + 60 + 70) / 5)}
    assert found["rest"] == {"targets": 9, "nll": pytest.approx((1 + 2 + 3 + 5 + 6 + 10 + 30 + 40 + 50) / 9)}
    assert found["frequent"] == {"targets": 0, "nll": None}
    assert found["by_distance"] == [
        {"first": 1, "last": 1, "targets": 2, "nll": pytest.approx((20 + 70) / 2)},
        {"first": 2, "last": 3, "targets": 2, "nll": pytest.approx((4 + 7) / 2)},
        {"first": 4, "last": 7, "targets": 1, "nll": pytest.approx(60)},
    ]
    known = repeats(losses, sequences, np.array([11, 12]), VOCABULARY)
    assert known["hits"] == {"targets": 0, "nll": None}
    assert known["rest"] == {"targets": 14, "nll": pytest.approx(losses.mean())}
    assert known["frequent"] == found["hits"]
    assert known["by_distance"] == []


@pytest.mark.parametrize("chunk", [1 << 22, 7, 1])
def test_frequent_is_what_comes_more_than_1250_times_in_training(
    prepared: Path, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs over the edge of a shard, and over that of what is read at once, are counted once."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    folders = [tmp_path / name for name in ("train", "val")]
    for folder in folders:
        folder.mkdir()
    train = stream(folders[0], [1, 2] * 600 + [1], [2] + [1, 2] * 650 + [4, 4])
    held_out = stream(folders[1], [1, 2, 1, 2, 1, 4, 4, 5, 9, 9])
    fields = {"vocab_size": VOCABULARY, "train": train, "validation": {"a": held_out}}
    data = PreparedData(**{**PreparedData.open(prepared).__dict__, **fields})
    # 1-2: 600 + the one between the shards + 650 = 1251 times; 2-1: 1250 times.
    assert frequent_pairs(data, {"a": 9}).tolist() == [12]
    assert frequent_pairs(data, {"a": 3}).tolist() == [12]
    assert frequent_pairs(data, {"a": 2}).tolist() == [], "it does not come again"


def slowly(tokens: list[int]) -> list[int]:
    """The distance of every target's pair to the last earlier one, by looking at all of them."""
    pairs = list(pairwise(tokens))
    return [
        next((back for back in range(1, here + 1) if pairs[here - back] == pairs[here]), 0)
        for here in range(len(pairs))
    ]


def test_a_sweep_has_them_at_every_length(prepared: Path, model: FibAttnForCausalLM) -> None:
    data = PreparedData.open(prepared)
    ((name, held_out),) = data.validation.items()
    tokens = held_out.sequence(0, 1201)
    common = np.array([int(tokens[30]) * data.vocab_size + int(tokens[31])])
    found = sweep(model, data, lengths=[100, 600], sets=[], tokens=1200, frequent=common, quiet=True)
    assert "repeats" not in sweep(model, data, lengths=[100], sets=[], tokens=100, quiet=True)["sets"][name]["100"]
    for length in (100, 600):
        losses = token_losses(model, held_out_sequences(held_out, length, 1200), quiet=True)
        kinds: dict[str, list[float]] = {"hits": [], "rest": [], "frequent": [], "near": []}
        for row, start in zip(losses, range(0, 1200, length), strict=True):
            here = tokens[start : start + length + 1].tolist()
            for loss, distance, first, second in zip(row, slowly(here), here, here[1:], strict=False):
                known = first * data.vocab_size + second == common[0]
                kinds["hits" if distance and not known else "rest"].append(loss)
                if distance and known:
                    kinds["frequent"].append(loss)
                if 16 <= distance < 32 and not known:
                    kinds["near"].append(loss)
        assert all(kinds.values())
        row = found["sets"][name][str(length)]["repeats"]
        near = next(one for one in row["by_distance"] if one["first"] == 16)
        for kind, group in (*((kind, row[kind]) for kind in ("hits", "rest", "frequent")), ("near", near)):
            assert group["targets"] == len(kinds[kind])
            assert group["nll"] == pytest.approx(np.mean(kinds[kind]), rel=1e-5)
        assert sum(one["targets"] for one in row["by_distance"]) == row["hits"]["targets"]
    assert len(tables(found)) == 3


def test_the_table_takes_three_powers_of_two_together() -> None:
    def row(first: int, targets: int, perplexity: float) -> dict:
        return {"first": first, "last": 2 * first - 1, "targets": targets, "nll": float(np.log(perplexity))}

    distances = [row(1, 1, 2.0), row(4, 3, 32.0), row(8, 5, 7.0), row(512, 1, 9.0)]
    hits, rest = row(1, 10, 11.0), row(1, 30, 3.0)
    lengths = {
        "64": {"targets": 40, "repeats": {"hits": hits, "rest": rest, "by_distance": distances[:3]}},
        "1024": {"targets": 40, "repeats": {"hits": hits, "rest": rest, "by_distance": distances}},
        "8": {"targets": 40, "repeats": {"hits": {"targets": 0, "nll": None}, "rest": rest, "by_distance": []}},
    }
    console = Console(width=120, file=io.StringIO())
    console.print(repeats_table("books", lengths))
    assert isinstance(console.file, io.StringIO)
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["length", "share", "hits", "1–7", "8–63", "512–4,095", "rest"] in lines
    # (1 · log 2 + 3 · log 32) / 4 = 4 · log 2
    assert ["64", "25.0", "%", "11.00", "16.00", "7.00", "3.00"] in lines
    assert ["1,024", "25.0", "%", "11.00", "16.00", "7.00", "9.00", "3.00"] in lines
    assert ["8", "0.0", "%", "3.00"] in lines
