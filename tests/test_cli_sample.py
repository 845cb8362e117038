"""`fibattn sample` as a user runs it: prompts from everywhere, streamed text, an endless run that is interrupted."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fibattn.cli.main import main
from fibattn.model.streaming import pieces

TEXT = "so says line 7.\naaa 49"


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with the tokenizer of the prepared data."""
    from transformers import AutoTokenizer

    from fibattn.model import FibAttnConfig, FibAttnForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = FibAttnForCausalLM(
        FibAttnConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, window=4, rungs=6, initializer_range=0.3, **shape
        )
    )
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sample(capsys, *words) -> tuple[str, str]:
    assert main(["sample", *map(str, words)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_prompts_from_everywhere_give_the_same_text(folder, tmp_path, capsys, monkeypatch):
    argument, err = sample(capsys, folder, TEXT, "--max-new-tokens", 40)
    assert len(argument) > 40
    assert "40 tokens, " in err
    assert "tokens/s, " in err
    assert "MiB" in err
    (tmp_path / "prompt.txt").write_text(f"\ufeff{TEXT}", encoding="utf-8")  # as some editors begin a file
    assert sample(capsys, folder, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 40)[0] == argument
    with (tmp_path / "prompt.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert sample(capsys, folder, "-", "--max-new-tokens", 40)[0] == argument


def test_a_text_ends_where_the_model_says_so(folder, tmp_path, capsys):
    """What separates documents may begin them alone, and several ids may end one."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]])
    written = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    end = next(one for one in written[3:] if one not in written[:3])
    shutil.copytree(folder, tmp_path / "ends")
    GenerationConfig(eos_token_id=[end, 5]).save_pretrained(tmp_path / "ends")
    _, err = sample(capsys, tmp_path / "ends", TEXT, "--temperature", 0, "--max-new-tokens", 20)
    assert f"{min(written.index(one) for one in (end, 5) if one in written) + 1} tokens, " in err


def test_without_a_prompt_a_document_is_begun(folder, capsys):
    text, err = sample(capsys, folder, "--max-new-tokens", 10)
    assert text.strip()
    assert "tokens, " in err


def test_the_prompt_is_printed_before_its_continuation(folder, capsys):
    assert sample(capsys, folder, TEXT, "--max-new-tokens", 5)[0].startswith(TEXT)


def test_a_bound_makes_a_model_with_full_layers_go_on_for_ever(folder, tmp_path, capsys):
    import json
    import shutil

    from fibattn.model.loading import load_bounded
    from fibattn.model.streaming import growing_layers

    full = shutil.copytree(folder, tmp_path / "full")
    settings = json.loads((full / "config.json").read_text())
    settings |= {"layer_types": ["fibonacci_attention", "full_attention"], "layer_offsets": None}
    (full / "config.json").write_text(json.dumps(settings))
    assert growing_layers(load_bounded(full, None)) == 1
    assert growing_layers(load_bounded(full, 12)) == 0
    whole, _ = sample(capsys, full, TEXT, "--max-new-tokens", 60, "--temperature", 0)
    enough, _ = sample(capsys, full, TEXT, "--max-new-tokens", 60, "--temperature", 0, "--full-reach", 200)
    assert enough == whole


def test_the_text_is_that_of_generate(folder, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(TEXT)]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(
        ids, max_new_tokens=60, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )
    ours, _ = sample(capsys, folder, TEXT, "--max-new-tokens", 60, "--temperature", 0)
    ours = ours.removeprefix(TEXT).removesuffix("\n")
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).startswith(ours)
    assert len(ours) > 20


def test_a_tiny_temperature_takes_the_most_likely_token(folder, capsys):
    coldest, _ = sample(capsys, folder, TEXT, "--max-new-tokens", 9, "--temperature", 0)
    assert sample(capsys, folder, TEXT, "--max-new-tokens", 9, "--temperature", 1e-300)[0] == coldest


def test_seeds(folder, capsys):
    texts = [sample(capsys, folder, TEXT, "--max-new-tokens", 20, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_an_endless_stream_ends_cleanly_when_interrupted(folder, forked):
    process = forked.start([sys.executable, "-m", "fibattn", "sample", folder, TEXT, "--max-new-tokens", "0"])
    while len(process.said("stdout")) < 3000:
        assert process.poll() is None, process.said("stderr")
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 0, process.said("stderr")
    assert "tokens/s, " in process.said("stderr")
    assert "Traceback" not in process.said("stderr")


class Chunks:
    """A tokenizer whose tokens are these bytes, some of them special."""

    def __init__(self, chunks: list[bytes], special: tuple[int, ...] = ()):
        self.chunks = chunks
        self.added_tokens_decoder = {index: AddedToken(repr(chunks[index]), special=True) for index in special}

    def decode(self, ids, **_):
        kept = (self.chunks[one] for one in ids if one not in self.added_tokens_decoder)
        return b"".join(kept).decode("utf-8", errors="replace")


def test_characters_come_whole():
    every_byte = Chunks([bytes([byte]) for byte in range(256)])
    text = "a✓é🙂z"
    assert list(pieces(every_byte, text.encode())) == list(text)
    # the character begins within a token and ends within another
    assert list(pieces(Chunks([b"xyz\xf0", b"\x9f", b"\x99", b"\x82"]), range(4))) == ["xyz", "🙂"]
    assert "".join(pieces(every_byte, "a\ufffdb\ufffd".encode())) == "a\ufffdb\ufffd"
    assert "".join(pieces(every_byte, b"a\xff\xff\xff\xffb\xe2")) == "a\ufffd\ufffd\ufffd\ufffdb\ufffd"


def test_words_after_a_special_token_keep_their_blank():
    """Where a word begins a text, Llama 2's tokenizer writes no blank before it; here none does."""
    words = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "▁": 4}
    made = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    for ids in ([2, 1, 3], [1, 2, 3, 1, 1, 2], [4, 2], [1, 4, 1, 2, 3]):
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--prompt-file", "y"], "give one of them"),
        (["--prompt-file", "missing.txt"], "missing.txt cannot be read"),
        (["--prompt-file", "."], ". cannot be read"),
        (["x", "--max-new-tokens", "many"], "expected a whole number below 1e9, 0 or inf"),
        (["x", "--max-new-tokens", "9" * 30, "--compile"], "expected a whole number below 1e9, 0 or inf"),
        (["a prompt", "--temperature", "-1"], "temperature is -1.0; it must be a finite number, 0 or more\n"),
        (["x", "--temperature", "nan"], "temperature is nan"),
        (["x", "--top-p", "0"], "sample: top_p is 0.0; it must be above 0 and at most 1"),
        (["x", "--seed", "-1"], "seed is -1"),
        (["caf\udce9"], "the prompt is not UTF-8 text"),
    ],
)
def test_mistakes(folder, capsys, words, message):
    assert main(["sample", str(folder), *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == "", "not even the prompt is printed"


def test_no_model(tmp_path, capsys):
    assert main(["sample", str(tmp_path), "x"]) == 2
    assert "holds no model" in capsys.readouterr().err
