"""Perplexity by position in documents: which documents, and the means of plain losses over blocks."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional

from fibattn import FibAttnForCausalLM
from fibattn.data.prepared import PreparedData, TokenStream
from fibattn.data.sequences import document_beginnings
from fibattn.data.shards import write_shard
from fibattn.evaluation.positions import by_position, positions_table


def stream(folder: Path, *shards: list[int]) -> TokenStream:
    """A stream of documents of these lengths, in shards; its tokens are 0, 1, 2, … again and again below 250."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [folder / f"{number}.bin" for number in range(len(shards))], 0
    for path, lengths in zip(paths, shards, strict=True):
        edges = itertools.pairwise(itertools.accumulate(lengths, initial=first))
        documents = [(np.arange(a, b) % 250).astype(np.uint16) for a, b in edges]
        first += sum(lengths)
        write_shard(path, documents, np.ones(512, np.uint16), np.dtype("<u2"), sum(lengths), None)
    return TokenStream(paths)


def test_documents_of_several_shards(tmp_path: Path) -> None:
    one = stream(tmp_path, [5, 9, 4], [20], [6, 9])
    assert one.documents().tolist() == [0, 5, 14, 18, 38, 44, 53]
    # A target more than inputs: of documents of 5, 9, 4, 20, 6 and 9 tokens, three have eight targets.
    sequences = document_beginnings(one, 8, 100)
    assert sequences.order.tolist() == [5, 18, 44]
    assert sequences[1]["input_ids"].tolist() == list(range(18, 26))
    assert sequences[1]["shift_labels"].tolist() == list(range(19, 27))
    assert document_beginnings(one, 8, 23).order.tolist() == [5, 18]
    assert len(document_beginnings(one, 20, 100)) == 0
    assert document_beginnings(one, 19, 100).order.tolist() == [18]


def opened(prepared: Path, **sets: TokenStream) -> PreparedData:
    return PreparedData(**{**PreparedData.open(prepared).__dict__, "validation": sets})


@torch.no_grad()
def plain_losses(model: FibAttnForCausalLM, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(tokens)
    return functional.cross_entropy(model(input_ids=ids[None, :-1]).logits[0].double(), ids[1:], reduction="none")


def test_blocks_are_means_over_documents(prepared: Path, tmp_path: Path, model: FibAttnForCausalLM) -> None:
    books = stream(tmp_path / "books", [30, 83, 84], [200, 81])
    data = opened(prepared, books=books, notes=stream(tmp_path / "notes", [70, 80]))
    found = by_position(model, data, length=80, sets=["books", "notes"], batch_tokens=100, quiet=True)
    assert list(found) == ["books"], "a note has at most 79 targets"
    assert found["books"]["documents"] == 4
    losses = torch.stack([plain_losses(model, books.sequence(start, 81)) for start in (30, 113, 197, 397)])
    blocks = found["books"]["blocks"]
    assert [(block["first"], block["last"]) for block in blocks] == [(n, n + 9) for n in range(0, 80, 10)]
    for block in blocks:
        part = losses[:, block["first"] : block["last"] + 1]
        assert block["nll"] == pytest.approx(float(part.mean()), rel=1e-5)
        assert block["perplexity"] == pytest.approx(math.exp(float(part.mean())), rel=1e-5)
        so_far = float(losses[:, : block["last"] + 1].mean())
        assert block["cumulative_perplexity"] == pytest.approx(math.exp(so_far), rel=1e-5)


def test_thirty_two_thousand_positions_are_sixteen_blocks(
    prepared: Path, tmp_path: Path, model: FibAttnForCausalLM
) -> None:
    data = opened(prepared, books=stream(tmp_path, [32_769, 40_000]))
    found = by_position(model, data, length=32_768, sets=["books"], tokens=40_000, quiet=True)
    assert found["books"]["documents"] == 1
    blocks = found["books"]["blocks"]
    assert [block["first"] for block in blocks] == list(range(0, 32_768, 2048))
    assert blocks[-1]["last"] == 32_767
    losses = plain_losses(model, data.validation["books"].sequence(0, 6145))
    for number, part in enumerate(losses.split(2048)):
        assert blocks[number]["nll"] == pytest.approx(float(part.mean()), rel=1e-4)


def test_a_table_has_a_row_for_each_block_and_one_for_all() -> None:
    def one(documents: int, *perplexities: float) -> dict:
        rows = zip((0, 10), (9, 14), perplexities[:2], (perplexities[0], perplexities[2]), strict=True)
        names = ("first", "last", "perplexity", "cumulative_perplexity")
        return {"documents": documents, "blocks": [dict(zip(names, row, strict=True)) for row in rows]}

    console = Console(width=120, file=io.StringIO())
    console.print(positions_table({"books": one(3, 30.0, 20.0, 25.0), "docs": one(1234, 3.0, 2.0, 2.5)}))
    assert isinstance(console.file, io.StringIO)
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["positions", "books", "(3)", "docs", "(1,234)"] in lines
    assert ["0–9", "30.00", "3.00"] in lines
    assert ["10–14", "20.00", "2.00"] in lines
    assert ["all", "25.00", "2.50"] in lines
