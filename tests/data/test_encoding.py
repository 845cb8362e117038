"""Tokens of whole documents, and the bytes of text that they stand for, with tokenizers that change the text."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpus_files import write_jsonl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fibattn.data import encoding
from fibattn.data import tokenizer as tokenization
from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.prepared import PreparedData
from fibattn.data.sources import parse_source

SAMPLE = ["The cat SAT on the mat 12345. " * 20, "Naïve cafe\u0301\n\n東京 the the cat\n  indented\n" * 20] * 3
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(normalizer=None, prefix: bool = False, **model: str) -> Tokenizer:
    made = Tokenizer(models.BPE(**model))
    made.normalizer = normalizer  # pyright: ignore
    words = pre_tokenizers.Split(Regex(tokenization.WORDS), behavior="isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=prefix)
    made.pre_tokenizer = alphabet if prefix else pre_tokenizers.Sequence([words, alphabet])  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    return made


def sentence_piece(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizer  # pyright: ignore
    made.pre_tokenizer = pre_tokenizer  # pyright: ignore
    replace, fuse = decoders.Replace("▁", " "), decoders.Fuse()
    made.decoder = decoders.Sequence([replace, decoders.ByteFallback(), fuse, decoders.Strip(" ", 1, 0)])  # pyright: ignore
    return made


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
    "own": byte_level(),
    "prefix": byte_level(prefix=True),
    "nfc": byte_level(normalizers.NFC()),
    "nfd": byte_level(normalizers.NFD()),
    "lower": byte_level(normalizers.Lowercase()),
    "strip": byte_level(normalizers.Strip()),
    "llama 2": sentence_piece(LLAMA_2),
    "metaspace": sentence_piece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "always": sentence_piece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "never": sentence_piece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "special bytes": sentence_piece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "few bytes": byte_level(),
    "word ends": byte_level(end_of_word_suffix="</w>"),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return trained(request.param)


def trained(kind: str) -> PreTrainedTokenizerFast:
    made = Tokenizer.from_str(KINDS[kind].to_str())
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if made.model.byte_fallback else []
    special = ["<bos>", "<unk>", *fallback]
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        initial_alphabet=[] if fallback or kind == "few bytes" else BYTES,
        end_of_word_suffix=made.model.end_of_word_suffix or "",
        show_progress=False,
    )
    made.train_from_iterator(SAMPLE, trainer)
    if fallback and kind != "special bytes":  # they are what bytes fall back to, and no special tokens
        vocabulary = made.get_vocab(with_added_tokens=False)
        merges = [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
        again = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
        again.normalizer, again.pre_tokenizer, again.decoder = made.normalizer, made.pre_tokenizer, made.decoder
        again.add_special_tokens(["<bos>", "<unk>"])
        made = again
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


def texts() -> list[str]:
    rng = random.Random(3)
    parts = ["the cat", " SAT", "\n", "\n\n", "  ", "cafe\u0301", "é", "東京", "🙂", "12345", "İ", ".", "\t", "x" * 30]
    made = ["".join(rng.choices(parts, k=rng.randint(1, 400))) for _ in range(12)]
    return [*made, " leading", "\n\n", " ", "e\u0301" * 300, "-" * 3000, "ab " * 900, "\n" * 900 + "the end", "İ" * 200]


def encoded(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    return list(encoding.encode(tokenizer, documents, 0, np.dtype("<u2")))


@pytest.mark.parametrize("piece", [200, 2**20])
def test_a_document_has_the_tokens_of_the_whole_and_its_own_bytes(
    tokenizer: PreTrainedTokenizerFast, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE", piece)
    monkeypatch.setattr(encoding, "OVERLAP", 100)
    sizes, documents = tokenization.token_bytes(tokenizer), texts()
    for text, found in zip(documents, encoded(tokenizer, documents), strict=True):
        ids, count = (found, sizes[found]) if found.ndim == 1 else found
        assert ids[1:].tolist() == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert count.sum() == len(text.encode())
        assert not len(text.strip()) or len(ids) == 1 or count[0] == 0


def test_long_documents_are_really_cut(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: no piece of ordinary text is much longer than asked for."""
    monkeypatch.setattr(encoding, "PIECE", 1000)
    monkeypatch.setattr(encoding, "OVERLAP", 100)
    seen: list[int] = []
    join = encoding._join
    monkeypatch.setattr(encoding, "_join", lambda *a: seen.append(join(*a) is not None) or join(*a))
    encoded(tokenizer, ["".join(f"line {number} of the cat\n" for number in range(1000))])
    assert len(seen) > 15
    assert all(seen)


def test_only_what_changes_no_byte_does_without_counts() -> None:
    assert {kind for kind in KINDS if encoding.keeps_bytes(trained(kind))} == {"own", "never", "special bytes"}
    swallows = trained("own")
    swallows.add_tokens([AddedToken("<mark>", lstrip=True)])
    assert not encoding.keeps_bytes(swallows)


def test_the_record_and_bits_per_byte_are_of_the_texts_own_bytes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rng = random.Random(5)
    words = ["The", "cat", "cafe\u0301", "東京", "SAT", "İ", "\n"]
    documents = [" ".join(rng.choices(words, k=60)) + f" {number}" for number in range(40)]
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "v.jsonl", held_out := documents[:9])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source, val = parse_source(str(tmp_path / "a.jsonl")), parse_source(f"a={tmp_path / 'v.jsonl'}")
    plan = {"validation": {"a": val}, "tokenizer": str(tmp_path / "tokenizer"), "shard_tokens": 500}
    data = prepare(tmp_path / "data", Plan((source,), held_out_tokens=10**6, **plan), quiet=True)
    (of_source,) = data.sources
    assert of_source["train"]["bytes"] == sum(len(text.encode()) for text in documents[9:])
    assert of_source["val"]["bytes"] == sum(len(text.encode()) for text in held_out)
    stream = data.validation["a"]
    counts = stream.byte_counts(0, len(stream), data.token_bytes)
    starts = np.flatnonzero(stream.sequence(0, len(stream)) == data.separator)
    assert np.add.reduceat(counts, starts).tolist() == [len(text.encode()) for text in held_out]
    assert stream.byte_counts(7, 300, data.token_bytes).tolist() == counts[7:307].tolist()

    tokens = sum(shard["tokens"] for shard in of_source["train"]["shards"]) - 130
    cut = prepare(tmp_path / "cut", Plan((source,), tokens=tokens, held_out_tokens=10**6, **plan), quiet=True)
    whole = data.train.byte_counts(0, tokens, data.token_bytes)
    assert cut.train.byte_counts(0, tokens, cut.token_bytes).tolist() == whole.tolist()
    assert cut.sources[0]["train"]["bytes"] == whole.sum()

    if not encoding.keeps_bytes(tokenizer):
        path = next((tmp_path / "data").rglob("val-00000.bytes.npy"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x09")
        with pytest.raises(ValueError, match=r"val-00000.bin was altered"):
            PreparedData.open(tmp_path / "data")
        again = prepare(tmp_path / "data", Plan((source,), held_out_tokens=10**6, **plan), quiet=True)
        assert again.fingerprint == data.fingerprint
