"""`fibattn convert` as a user runs it: every architecture, which layers are kept, the way back, and what takes it."""

import json
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fibattn
from fibattn import files, sealed
from fibattn.cli.main import main
from fibattn.data.sequences import held_out_sequences, read_tokens
from fibattn.evaluation.placement import kept_loss
from fibattn.model.conversion import ARCHITECTURES

PLAIN = ["--window", "3", "--rungs", "7"]


def source(architecture: str, prepared: Path, folder: Path, **changes: Any) -> Path:
    """The folder of a small model with the tokenizer of the prepared text."""
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    made = foreign_decoders.model(architecture, **{"vocab_size": len(tokenizer), **ids, **changes})
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers, trained for some seconds on text of the prepared kind."""
    from fibattn.data.prepared import PreparedData

    folder = source("llama", prepared, tmp_path_factory.mktemp("llama") / "source")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.apply(model._init_weights)
    stream, optimizer = PreparedData.open(prepared).train, torch.optim.AdamW(model.parameters(), 5e-3)
    torch.manual_seed(0)
    for _ in range(60):
        starts = torch.randint(0, len(stream) - 100, (8,))
        ids = torch.stack([torch.from_numpy(stream.sequence(int(start), 100)).long() for start in starts])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(prepared: Path) -> Path:
    """A file of text."""
    return next(iter(sorted(prepared.parent.glob("texts/*.txt"))))


def convert(*words: Any) -> int:
    return main(["convert", *map(str, words)])


def logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_converted_and_goes_back(architecture: str, prepared: Path, tmp_path: Path) -> None:
    first = source(architecture, prepared, tmp_path / "source")
    assert convert(first, tmp_path / "out", *PLAIN, "--keep", "1") == 0
    ids = torch.arange(3, 60)[None]
    dense = AutoModelForCausalLM.from_pretrained(first).eval()
    farthest = dense.config.max_position_embeddings - 1
    right = fibattn.convert(dense, window=3, rungs=7, max_offset=farthest, keep_layers=[1])
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out", ids), right(ids).logits, rtol=1e-4, atol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == AutoTokenizer.from_pretrained(first).get_vocab()
    )
    sealed.verify(tmp_path / "out")
    assert {"README.md", "modeling_fibattn.py", "conversion.json"} <= {one.name for one in (tmp_path / "out").iterdir()}
    assert convert(tmp_path / "out", tmp_path / "back", "--restore") == 0
    for folder in (tmp_path / "out", tmp_path / "back"):
        assert {path.stat().st_mode & 0o444 for path in folder.iterdir()} == {folder.stat().st_mode & 0o444}
    for name in ("config.json", "model.safetensors"):
        assert files.sha256(tmp_path / "back" / name) == files.sha256(first / name)


@pytest.mark.parametrize(
    ("words", "kept", "offsets"),
    [
        ([], [], [[4, 6, 10], [4, 7, 11, 18], [6, 9, 15, 24], [4, 8, 12, 20, 32]]),
        (["--keep", "0,3"], [0, 3], [None, [4, 7, 11, 18], [6, 9, 15, 24], None]),
        (["--keep", "every:2", "--rungs", "0"], [1, 3], [[], None, [], None]),
        (["--schedule", "fixed", "--max-offset", "9"], [], [[5, 8]] * 4),
        (["--base", "power_of_two", "--schedule", "fixed"], [], [[4, 8, 16, 32, 64]] * 4),
    ],
)
def test_patterns(
    words: list[str], kept: list[int], offsets: list, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(llama, tmp_path / "out", *PLAIN, *words) == 0
    assert f"{tmp_path / 'out'} holds the converted model" in capsys.readouterr().out
    record = files.read_json(tmp_path / "out" / "conversion.json")
    assert record["pattern"]["keep_layers"] == kept
    assert record["source"] == str(llama)
    assert [one and [d for d in one if d > 3] for one in record["pattern"]["layer_offsets"]] == offsets


def test_blocks_are_chosen_beside_layers_that_are_measured_with_them(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--window", 5, "--blocks", 1, "--block-size", 32, "--keep", "auto:1", "--text", text, "--tokens", 600]
    assert convert(llama, tmp_path / "out", *how, "--sequence-length", 100) == 0
    record = files.read_json(tmp_path / "out" / "conversion.json")
    kept = record["placement"]["search"][0]["layer"]
    assert record["pattern"]["keep_layers"] == [kept]
    assert [record["pattern"][name] for name in ("blocks", "block_size", "block_reach")] == [1, 32, 127]
    config = fibattn.FibAttnConfig.from_pretrained(tmp_path / "out")
    right = ["full_attention" if layer == kept else "chosen_attention" for layer in range(4)]
    assert (config.layer_types, config.block_rope, config.block_size) == (right, True, 32)
    measured, source = record["placement"], AutoModelForCausalLM.from_pretrained(llama)
    pattern: dict[str, Any] = {"window": 5, "blocks": 1, "block_size": 32}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sequences = held_out_sequences(read_tokens([text], tokenizer, 601), 100, 600)
    assert measured["none"] == pytest.approx(kept_loss(source, pattern, sequences, []), rel=1e-4)
    assert measured["search"][0]["loss"] == pytest.approx(kept_loss(source, pattern, sequences, [kept]), rel=1e-4)
    assert main(["sample", str(tmp_path / "out"), "once upon", "--max-new-tokens", "60"]) == 0
    assert convert(tmp_path / "out", tmp_path / "back", "--restore") == 0
    assert files.sha256(tmp_path / "back" / "model.safetensors") == files.sha256(llama / "model.safetensors")


def test_kept_layers_can_be_bounded(llama: Path, tmp_path: Path) -> None:
    assert convert(llama, tmp_path / "out", *PLAIN, "--keep", "2", "--full-reach", "sequence") == 0
    config = fibattn.FibAttnConfig.from_pretrained(tmp_path / "out")
    assert config.full_reach == config.max_position_embeddings - 1 == config.layer_reach(2)
    assert "| 2 | the last 128 | none |" in (tmp_path / "out" / "README.md").read_text()


def test_measured_layers_are_kept_and_the_measure_is_shown(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--keep", "auto:2", "--text", text, "--tokens", 600, "--sequence-length", 100]
    assert convert(llama, tmp_path / "out", *PLAIN, *how) == 0
    found = files.read_json(tmp_path / "out" / "conversion.json")["placement"]
    kept = [step["layer"] for step in found["search"]]
    assert fibattn.FibAttnConfig.from_pretrained(tmp_path / "out").layer_types.count("full_attention") == 2
    assert found["text"] == [str(text)]
    assert (found["sequences"], found["sequence_length"]) == (6, 100)
    printed, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert f"The original has {found['dense']:.4f}" in " ".join(printed.split())
    for layer, rise in enumerate(found["alone"]):
        place = kept.index(layer) + 1 if layer in kept else ""
        assert f"| {layer} | {rise:+.4f} | {place} |" in card
        assert f"{rise:+.4f}" in printed
    # A trained model loses by becoming sparse, and the layers that are kept give some of it back.
    assert found["dense"] < found["search"][1]["loss"] < found["search"][0]["loss"] < found["none"]
    assert found["search"][1]["loss"] <= found["evenly"]["loss"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_other_verbs_take_it(
    architecture: str, llama: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = llama if architecture == "llama" else source(architecture, prepared, tmp_path / "source")
    assert convert(first, tmp_path / "out", *PLAIN, "--keep", "1") == 0
    assert main(["sample", str(tmp_path / "out"), "so says line", "--max-new-tokens", "20"]) == 0
    assert "20 tokens" in capsys.readouterr().err
    evaluated = ["--data", str(prepared), "--lengths", "64", "--tokens", "640", "--out", str(tmp_path / "found.json")]
    assert main(["eval", str(tmp_path / "out"), *evaluated]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["trained_at"] == 128
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out"), "--data", str(prepared)]) == 0
    assert "the card has the perplexities, --out FILE keeps all" in capsys.readouterr().out
    assert "| 128 (1×) |" in (tmp_path / "out" / "README.md").read_text()


def test_it_is_trained_as_it_is_and_goes_back(
    llama: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(llama, tmp_path / "out", *PLAIN, "--keep", "1") == 0
    command = [
        "train",
        "small",
        "--data",
        str(prepared),
        "--out",
        str(tmp_path / "run"),
        "--start",
        str(tmp_path / "out"),
    ]
    command += ["--sequence-length", "64", "--sequences-per-step", "4", "--steps", "3", "--save-every", "2"]
    assert main(command) == 2
    assert "was converted from another model, which no recipe describes; add --keep-model" in capsys.readouterr().err
    assert main([*command, "--keep-model"]) == 0
    before, after = (
        fibattn.FibAttnConfig.from_pretrained(one) for one in (tmp_path / "out", tmp_path / "run" / "model")
    )
    for name in ("layer_types", "layer_offsets", "rms_norm_eps", "converted_from", "max_position_embeddings"):
        assert getattr(after, name) == getattr(before, name)
    ids = torch.arange(3, 60)[None]
    assert (logits(tmp_path / "run" / "model", ids) - logits(tmp_path / "out", ids)).abs().max() > 1e-4
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "model").rename(tmp_path / "before")  # the run goes on without its start
    assert main([*command, "--keep-model"]) == 0
    ours, theirs = (
        files.sha256(one / "model.safetensors") for one in (tmp_path / "run" / "model", tmp_path / "before")
    )
    assert ours == theirs
    assert convert(tmp_path / "run" / "model", tmp_path / "back", "--restore") == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back).__name__ == "LlamaForCausalLM"


def mistakes(llama: Path, prepared: Path, text: Path, tmp_path: Path) -> dict[str, tuple[list[Any], str]]:
    out = tmp_path / "out"
    quantised, converted, there = tmp_path / "quantised", tmp_path / "converted", tmp_path / "there"
    return {
        "there": ([llama, there, *PLAIN], f"{there} is there already; give another place"),
        "no window": ([llama, out], "give --window to convert a model (128, for example), or --restore alone"),
        "both": ([llama, out, "--restore", "--keep", "1"], "--restore goes back by itself; leave the other flags out"),
        "nothing there": ([tmp_path, out, *PLAIN], "holds no model (config.json is missing)"),
        "no such name": ([tmp_path / "nowhere", out, *PLAIN], "cannot be loaded"),
        "quantised": ([quantised, out, *PLAIN], f"the weights of {quantised} are quantised (gptq)"),
        "capped": ([tmp_path / "gemma2", out, *PLAIN], "it caps its attention logits at 50.0"),
        "another kind": ([tmp_path / "neox", out, *PLAIN], "(model type 'gpt_neox') cannot be converted"),
        "converted": (
            [converted, out, *PLAIN],
            "it was converted already; restore it first (`fibattn convert MODEL OUT --restore`)",
        ),
        "not converted": ([llama, out, "--restore"], "this LlamaForCausalLM is not converted"),
        "layers": (
            [llama, out, *PLAIN, "--keep", "first"],
            "--keep is 'first'; expected, of 4 layers, layers",
        ),
        "every what": ([llama, out, *PLAIN, "--keep", "every:0"], "--keep is 'every:0'; expected, of 4 layers, layers"),
        "too few": ([llama, out, *PLAIN, "--keep", "every:5"], "--keep is 'every:5'; expected, of 4 layers, layers"),
        "no such layer": ([llama, out, *PLAIN, "--keep", "4"], "keep_layers is [4]; expected different indices"),
        "all": ([llama, out, *PLAIN, "--keep", "every:1"], "every layer of the model"),
        "no text": ([llama, out, *PLAIN, "--keep", "auto:2"], "--keep is 'auto:2', --text is not; the two go together"),
        "text": ([llama, out, *PLAIN, "--text", text], "--keep is '', --text is given; the two go together"),
        "short text": (
            [llama, out, *PLAIN, "--keep", "auto:1", "--text", text, "--tokens", "100"],
            "a sequence of 128 needs 129 tokens",
        ),
        "no measure": (
            [llama, out, *PLAIN, "--keep", "1", "--tokens", "500"],
            "--keep is '1', --tokens is given; the two go together: --keep auto:4 --text FILE",
        ),
        "nothing to measure": (
            [llama, out, "--window", "99", "--keep", "auto:1", "--text", text, "--sequence-length", "100"],
            "--window is 99, which covers the sequences of 100 tokens that would be measured",
        ),
        "rungs and blocks": ([llama, out, *PLAIN, "--blocks", "2"], "rungs is 7 and blocks 2; beyond the window there"),
        "base and blocks": (
            [llama, out, "--window", "3", "--blocks", "1", "--schedule", "fixed", "--max-offset", "9"],
            "schedule is 'fixed', max_offset is 9 and blocks 1; beyond the window there are either rungs or blocks",
        ),
        "no blocks": ([llama, out, *PLAIN, "--no-block-anchor"], "block_anchor is False, without blocks; give blocks"),
        "blocks": ([llama, out, "--window", "3", "--blocks", "0"], "blocks is 0; a query chooses 1 to 64 of them"),
        "bound": ([llama, out, *PLAIN, "--full-reach", "9"], "full_reach is 9, but no layer keeps its own attention"),
    }


@pytest.mark.parametrize("which", mistakes(Path(), Path(), Path(), Path()))
def test_mistakes_are_one_line_and_leave_nothing(
    which: str, llama: Path, prepared: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    if which == "converted":
        assert convert(llama, tmp_path / "converted", *PLAIN) == 0
    if which == "capped":
        foreign_decoders.model("gemma2").save_pretrained(tmp_path / "gemma2")
    if which == "another kind":
        foreign_decoders.model("gpt_neox").save_pretrained(tmp_path / "neox")
    if which == "quantised":
        source("llama", prepared, tmp_path / "quantised")
        stored = files.read_json(tmp_path / "quantised" / "config.json")
        files.write_json(
            tmp_path / "quantised" / "config.json", stored | {"quantization_config": {"quant_method": "gptq"}}
        )
    capsys.readouterr()
    words, message = mistakes(llama, prepared, text, tmp_path)[which]
    assert convert(*words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fibattn convert: ")
    assert message in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_folder_that_an_earlier_version_wrote_is_written_anew(llama: Path, prepared: Path, tmp_path: Path) -> None:
    old = source("llama", prepared, tmp_path / "old")
    pattern = {"window": 3, "base": "fibonacci", "schedule": "linear", "rungs": 7, "rung_reach": 127}
    stored = {"fibattn_pattern": pattern, "attn_implementation": "fibattn", "architectures": ["FibAttnConverted"]}
    files.write_json(old / "config.json", files.read_json(old / "config.json") | stored)
    with pytest.warns(UserWarning, match="the pattern left out: window=3"):
        assert convert(old, tmp_path / "out", *PLAIN) == 0
    assert convert(source("llama", prepared, tmp_path / "dense"), tmp_path / "right", *PLAIN) == 0
    for name in ("config.json", "model.safetensors"):
        assert files.sha256(tmp_path / "out" / name) == files.sha256(tmp_path / "right" / name)


def test_a_model_without_a_tokenizer_is_converted_without(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "bare")
    assert convert(tmp_path / "bare", tmp_path / "out", *PLAIN) == 0
    assert "has no tokenizer; the folder has none, either" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()
