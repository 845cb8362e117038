import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fibattn.data import encoding
from fibattn.data import tokenizer as tokenization
from fibattn.errors import InputError

U2 = np.dtype("<u2")
SAMPLE = ["the cat sat on the mat 12345 " * 20, "naïve café\n\n東京 the the cat " * 20] * 3


@pytest.fixture(scope="module")
def trained():
    return tokenization.train_tokenizer(SAMPLE, 300)


def encode(tokenizer, texts):
    return list(encoding.encode(tokenizer, texts, tokenization.separator(tokenizer), U2))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_decoding_gives_back_any_text_and_bytes_are_exact(trained, text):
    (ids,) = encode(trained, [text])
    assert ids[0] == trained.bos_token_id
    assert (ids[1:] > 1).all()  # the two special tokens never come from a text
    assert trained.decode(ids[1:].tolist()) == text
    assert trained.decode(trained.encode(text)) == text
    assert tokenization.token_bytes(trained)[ids].sum() == len(text.encode())


def test_special_tokens_in_a_text_are_ordinary_text(trained):
    text = "before <|bos|> between <|pad|> after"
    (ids,) = encode(trained, [text])
    assert (ids == trained.bos_token_id).sum() == 1
    assert trained.decode(ids[1:].tolist()) == text


def test_training_is_repeatable_and_a_saved_folder_is_a_transformers_tokenizer(trained, tmp_path):
    assert tokenization.tokenizer_sha256(tokenization.train_tokenizer(SAMPLE, 300)) == (
        tokenization.tokenizer_sha256(trained)
    )
    tokenization.save_tokenizer(trained, tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded.bos_token_id == loaded.eos_token_id == 0
    assert loaded.pad_token_id == 1
    assert loaded.encode(SAMPLE[1]) == trained.encode(SAMPLE[1])


def test_ids_with_gaps_are_counted_to_the_largest():
    vocabulary = {character: 3 * index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary | {"<bos>": 1000}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<bos>"])
    gaps = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>")
    assert len(gaps) == 257
    assert tokenization.vocabulary_size(gaps) == 1001
    sizes = tokenization.token_bytes(gaps)
    assert sizes.shape == (1001,)
    (ids,) = encode(gaps, ["naïve"])
    assert ids[0] == 1000
    assert sizes[ids].sum() == len("naïve".encode())


def test_batches_are_padded_where_generation_does_not_go_on(trained, tmp_path):
    tokenization.save_tokenizer(trained, tmp_path / "t")
    ids = AutoTokenizer.from_pretrained(tmp_path / "t")(["the cat sat", "a"], padding=True)["input_ids"]
    assert ids[1][0] == trained.pad_token_id
    assert trained.pad_token_id not in (ids[0][-1], ids[1][-1])


def test_digits_go_in_groups_of_at_most_two(trained):
    assert max(len(trained.decode([i])) for w, i in trained.get_vocab().items() if w.isdigit()) <= 2


def test_a_small_sample_gives_a_small_vocabulary_with_every_byte():
    tokenizer = tokenization.train_tokenizer(["aa"], 1000)
    assert len(tokenizer) == 258
    assert tokenizer.decode(tokenizer.encode("東京")) == "東京"


def test_long_documents_are_encoded_in_pieces(trained, monkeypatch):
    text = "the cat sat\non the mat\n\n" * 300
    (whole,) = encode(trained, [text])
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "BATCH", 1000)
    first, second, third = encode(trained, [text, "x" * 450, ""])
    assert trained.decode(first[1:].tolist()) == trained.decode(whole[1:].tolist()) == text
    assert trained.decode(second[1:].tolist()) == "x" * 450
    assert third.tolist() == [0]


def test_an_endless_line_makes_no_endless_token():
    tokenizer = tokenization.train_tokenizer(["-" * 9_000, "ab" * 4_500], 512)
    sizes = tokenization.token_bytes(tokenizer)
    assert 128 < sizes.max() <= tokenization.LONGEST


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(InputError, match="vocab_size is 100; expected at least 258"):
        tokenization.train_tokenizer(["a"], 100)
    with pytest.raises(InputError, match=r"no tokenizer can be loaded from .*expected a folder with tokenizer.json"):
        tokenization.load_tokenizer(tmp_path)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="neither a bos nor an eos token"):
        tokenization.separator(plain)
    with pytest.raises(InputError, match="not byte-level"):
        tokenization.token_bytes(plain)
