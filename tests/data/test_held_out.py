"""Held-out rows: what is evaluated on is never trained on, under whatever key or source it comes again."""

import json

import numpy as np
import pytest
from corpus_files import documents, make, write_jsonl

from fibattn.data.sources import Source, parse_source
from fibattn.errors import InputError


def test_explicit_held_out_texts_are_never_trained_on_in_any_source(texts, tmp_path):
    held = texts["books"][:10]
    books = write_jsonl(tmp_path / "books.jsonl", texts["books"])
    docs = write_jsonl(tmp_path / "docs.jsonl", [*texts["docs"], *held[:3]])
    val = write_jsonl(tmp_path / "v.jsonl", held)
    sources = [parse_source(str(books)), parse_source(str(docs))]
    data = make(tmp_path / "out", sources, validation={"books": parse_source(str(val))}, held_out_tokens=10**6)
    assert documents(data, "books", "val") == held
    assert documents(data, "books", "train") == texts["books"][10:]
    assert not set(documents(data, "docs", "train")) & set(held)
    assert np.load(tmp_path / "out/shards/books/held-out.npy").shape == (10,)


def test_rows_with_one_key_are_held_out_together_and_duplicates_never_leak(tmp_path):
    rows = [{"problem": f"problem {i % 20}", "text": f"solution {i} " + "word " * 20} for i in range(200)]
    rows += [{"problem": f"twin {i}", "text": f"solution {i % 50} " + "word " * 20} for i in range(100)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source("m", (path,), text=("problem", "text"), key="problem")
    data = make(tmp_path / "out", [source], held_out_tokens=10**6)
    sides = [{text.split("\n")[0] for text in documents(data, "m", split)} for split in ("train", "val")]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    only = Source("m", (path,), key="problem")  # now twins have the text of another key
    data = make(tmp_path / "only", [only], held_out_tokens=10**6)
    assert not set(documents(data, "m", "train")) & set(documents(data, "m", "val"))


def test_no_row_is_trained_on_whose_key_the_held_out_set_has(tmp_path):
    def rows(problems, solution):
        return [{"problem": f"problem {i}", "text": f"{solution} of {i} " + "word " * 20} for i in problems]

    kinds = {"a": rows(range(30), "first") + rows(range(30), "second"), "b": rows(range(30), "third")}
    sources, validation = [], Source("a", (tmp_path / "val.jsonl",), text=("problem", "text"), key="problem")
    for name, made in {**kinds, "val": rows(range(5), "fourth")}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        if name != "val":
            sources.append(Source(name, (tmp_path / f"{name}.jsonl",), text=("problem", "text"), key="problem"))
    for _ in "made", "left":
        data = make(tmp_path / "out", sources, validation={"a": validation}, held_out=0.0)
        trained = [text.split("\n")[0] for text in documents(data, "a", "train")]
        assert sorted(trained) == sorted(f"problem {i}" for i in range(5, 30) for _ in "ab")
        assert len(list(documents(data, "b", "train"))) == 30  # another source's keys are its own
        assert len(list(documents(data, "a", "val"))) == 5
    path = tmp_path / "out" / "data.json"
    before = path.read_text()
    assert before.count('"left out of training"') == 1
    path.write_text(before.replace('"left out of training"', "null"))
    with pytest.raises(InputError, match="keys was None, is left out of training"):
        make(tmp_path / "out", sources, validation={"a": validation}, held_out=0.0)


def test_few_documents_still_give_a_held_out_one(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 50)
    data = make(tmp_path / "out", [parse_source(f"t={tmp_path}/*.txt")], held_out=0.001)
    assert (data.sources[0]["train"]["documents"], data.sources[0]["val"]["documents"]) == (2, 1)
    one = [parse_source(f"t={tmp_path}/1.txt")]
    with pytest.raises(InputError, match=r"'t' holds a single document.*--val t=FILE.*--held-out 0"):
        make(tmp_path / "one", one)
    assert make(tmp_path / "one", one, held_out=0.0).validation == {}


def test_a_tokenizer_made_again_knows_no_more_of_what_is_held_out(tmp_path):
    """Texts that another source holds out under another key are in its sample, the first time and any other."""
    rows = [{"text": f"the {word} of number {n}", "k": str(n % 7)} for n in range(60) for word in ("cat", "dog", "hat")]
    for name, shift in (("a", 0), ("b", 3)):
        moved = [row | {"k": str((int(row["k"]) + shift) * (shift or 1))} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    sources = [Source(name, (tmp_path / f"{name}.jsonl",), key="k") for name in "ab"]
    first = make(tmp_path / "data", sources, held_out=0.3).fingerprint
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("")
    assert make(tmp_path / "data", sources, held_out=0.3).fingerprint == first
