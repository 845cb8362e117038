"""Healing converted models: every architecture to the end, what is learnt, what a cut leaves, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import torch
from forked import Server
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import fibattn
from fibattn import files, sealed
from fibattn.cli.main import main
from fibattn.model.conversion import ARCHITECTURES, attention_modules
from fibattn.training.healing import heal as heal_whole
from fibattn.training.healing_recipe import HealingRecipe
from fibattn.training.healing_stages import AttentionMatching, Distillation, sparse_layers

PATTERN = ["--window", "3", "--rungs", "7", "--keep", "1"]
SMALL: list[Any] = ["--sequence-length", 32, "--sequences-per-step", 4, "--learning-rate", "3e-3"]
SMALL += ["--matching", 0.25]
TEN_STEPS = ["--tokens", 10 * 4 * 32]
KINDS = [*ARCHITECTURES, "fibattn"]
Folder = Callable[[str], Path]


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def heal(*words: Any) -> int:
    return run("heal", *SMALL, *words)


@pytest.fixture(scope="module")
def text(prepared: Path) -> Path:
    """A file of text."""
    return min(prepared.parent.glob("texts/*.txt"))


@pytest.fixture(scope="module")
def dense(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Gives the folder of a small random model of an architecture, with the tokenizer of the prepared text."""

    @cache
    def made(kind: str) -> Path:
        folder, tokenizer = (
            tmp_path_factory.mktemp(kind) / "dense",
            AutoTokenizer.from_pretrained(prepared / "tokenizer"),
        )
        given: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        if kind == "fibattn":
            given |= {"layer_types": ["full_attention"] * foreign_decoders.LAYERS, "qk_norm": True, "gated_mlp": False}
        foreign_decoders.model(kind, vocab_size=len(tokenizer), **given).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def converted(dense: Folder) -> Folder:
    """Gives the folder that `fibattn convert` makes of it."""

    @cache
    def made(kind: str) -> Path:
        out = dense(kind).parent / "out"
        assert run("convert", dense(kind), out, *PATTERN) == 0
        return out

    return made


@pytest.fixture(scope="module")
def healed(converted: Folder, text: Path) -> Folder:
    """Gives the run in which that was healed for ten steps."""

    @cache
    def made(kind: str) -> Path:
        assert heal(converted(kind), "--text", text, *TEN_STEPS) == 0
        return converted(kind).with_name("out-healed")

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_healed(kind: str, healed: Folder, converted: Folder) -> None:
    for stage, steps in (("attention", 2), ("logits", 8)):
        lines = (healed(kind) / stage / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == steps
    folder = healed(kind) / "model"
    sealed.verify(folder)
    record = files.read_json(folder / "conversion.json")
    assert (record["healing"]["recipe"]["tokens"], record["healing"]["teacher"]) == (1280, record["source"])
    card = (folder / "README.md").read_text()
    assert "It was trained since." in card
    assert f"Trained on 1.28k tokens in sequences of 32, beside {record['source']}: all" in " ".join(card.split())
    assert "In 2 of 10 steps each sparse layer's attention" in " ".join(card.split())
    for name in ("config.json", "modeling_fibattn.py", "tokenizer.json"):
        assert files.read_json(folder / name) if name.endswith("n.json") else (folder / name).exists()
    before, after = (AutoModelForCausalLM.from_pretrained(one) for one in (converted(kind), folder))
    assert sparse_layers(before) == sparse_layers(after) == [0, 2, 3]
    healed_weights = after.state_dict()
    assert not any(torch.equal(weight, healed_weights[name]) for name, weight in before.state_dict().items())
    assert after.dtype == before.dtype


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_layers_that_choose_are_healed_and_learn_to_trust(
    kind: str, dense: Folder, text: Path, tmp_path: Path, foreign: Server
) -> None:
    out = tmp_path / "out"
    assert run("convert", dense(kind), out, "--window", 3, "--blocks", 1, "--keep", 1) == 0
    assert heal(out, "--text", text, "--sequence-length", 64, "--tokens", 10 * 4 * 64) == 0
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out-healed" / "model").eval()
    trusts = [weight for name, weight in healed.named_parameters() if name.endswith("trust")]
    assert [bool(trust.all()) for trust in trusts] == ([True] * 3 if kind == "llama" else [])
    assert sparse_layers(healed) == [0, 2, 3]
    ids = torch.arange(3, 60)[None]
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "print(model.generate(torch.arange(3, 60)[None], max_new_tokens=30, do_sample=False)[0].tolist())"
    )
    done = foreign.run([sys.executable, "-c", code, str(tmp_path / "out-healed" / "model")], check=True)
    right = healed.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    assert json.loads(done.stdout) == right[0].tolist()


def test_it_generates_the_same_where_the_package_was_not_imported(healed: Folder, foreign: Server) -> None:
    folders = [str(healed(kind) / "model") for kind in KINDS]
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM; assert 'fibattn' not in sys.modules\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    found = model.generate(torch.arange(3, 40)[None], max_new_tokens=12, do_sample=False)\n"
        "    print(json.dumps(found[0].tolist()))"
    )
    done = foreign.run([sys.executable, "-c", code, *folders], check=True)
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        here = model.generate(torch.arange(3, 40)[None], max_new_tokens=12, do_sample=False)[0].tolist()
        assert json.loads(line) == here


def pair(kind: str) -> tuple[Any, Any]:
    """A converted model and the dense one."""
    given = {"layer_types": ["full_attention"] * 4} if kind == "fibattn" else {}
    student = fibattn.convert(foreign_decoders.model(kind, **given), window=3, rungs=7, keep_layers=[1])
    return student, foreign_decoders.model(kind, **given)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "fibattn"])
def test_attention_is_matched_layer_by_layer_at_the_dense_models_inputs(kind: str) -> None:
    student, teacher = pair(kind)
    with torch.no_grad():  # what is not compared may differ
        student.base_model.layers[0].mlp.up_proj.weight.normal_()
        attention_modules(student.base_model)[2].o_proj.weight.mul_(1.5)
    stage = AttentionMatching(student, teacher, student.parameters())
    ids = foreign_decoders.tokens()
    given, right = {}, {}

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given[module.layer_idx] = args, kwargs
        right[module.layer_idx] = output[0] if isinstance(output, tuple) else output

    modules = attention_modules(teacher.base_model)
    for module in modules:
        module.register_forward_hook(record, with_kwargs=True)
    loss = stage(input_ids=ids).loss
    loss.backward()
    theirs = dict(right)
    # The same from the outside: the dense model with the converted one's attention in one layer at a time.
    with torch.no_grad():
        expected = []
        for layer in (0, 2, 3):
            swapped = fibattn.convert(
                foreign_decoders.model(kind, **({"layer_types": ["full_attention"] * 4} if kind == "fibattn" else {})),
                window=3,
                rungs=7,
                keep_layers=[one for one in range(4) if one != layer],
            )
            ours = attention_modules(swapped.base_model)[layer]
            ours.load_state_dict(attention_modules(student.base_model)[layer].state_dict())
            ours.register_forward_hook(record, with_kwargs=True)
            swapped(ids, use_cache=False)
            expected.append((right[layer] - theirs[layer]).square().mean() / theirs[layer].square().mean())
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)
    moved = {name for name, one in student.named_parameters() if one.grad is not None}
    assert moved == {name for name, _ in student.named_parameters() if "self_attn" in name and ".1." not in name}
    assert not any(module._forward_hooks for module in attention_modules(student.base_model) if kind == "fibattn")


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_next_tokens_are_those_of_the_dense_model_and_of_the_text(weight: float) -> None:
    student, teacher = pair("llama")
    rows = foreign_decoders.tokens()
    ids, targets = rows[:, :-1], rows[:, 1:]
    stage = Distillation(student, teacher, student.parameters(), text_weight=weight)
    loss = stage(input_ids=ids, shift_labels=targets).loss
    ours, right = (one(ids, use_cache=False).logits.flatten(0, 1) for one in (student, teacher))
    p = functional.softmax(right, -1)
    divergence = (p * (p.log() - functional.log_softmax(ours, -1))).sum(-1).mean()
    text = functional.cross_entropy(ours, targets.flatten())
    right = (1 - weight) * divergence + weight * text
    torch.testing.assert_close(loss, right)
    expected = torch.autograd.grad(right, list(student.parameters()))
    (3 * loss).backward()
    for one, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, 3 * gradient)
    assert all(one.grad is None for one in teacher.parameters())


def test_a_converted_model_comes_nearer_to_the_dense_one(
    dense: Folder, converted: Folder, text: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense("llama"))
    ids = torch.tensor([tokenizer.encode(text.read_text())[:256]]).view(8, 32)

    @torch.no_grad()
    def distance(folder: Path) -> float:
        ours, right = (
            AutoModelForCausalLM.from_pretrained(one)(ids).logits.log_softmax(-1) for one in (folder, dense("llama"))
        )
        return float(functional.kl_div(ours, right, reduction="batchmean", log_target=True))

    words = [converted("llama"), "--text", text, "--tokens", 60 * 4 * 32, "--text-weight", 0]
    before = distance(converted("llama"))
    for name, part, how in (("all", 0.7, []), ("matched", 0.99, ["--matching", 1]), ("lora", 0.9, ["--lora", 4])):
        assert heal(*words, *how, "--out", tmp_path / name) == 0
        assert distance(tmp_path / name / "model") < part * before
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "model").state_dict()
    changed = {
        name
        for name, one in AutoModelForCausalLM.from_pretrained(converted("llama")).state_dict().items()
        if not torch.equal(one, kept[name])
    }
    assert changed == {name for name in kept if "_proj" in name and "self_attn" in name}


class Cut(TrainerCallback):
    """Ends the process, as far as the run can tell, after a step of a stage."""

    def __init__(self, stage: str, step: int):
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [None, 4])
def test_a_run_that_was_cut_goes_on_and_ends_with_the_same_weights(
    rank: int | None, converted: Folder, text: Path, tmp_path: Path
) -> None:
    whole = HealingRecipe(
        converted("llama"),
        text=(text,),
        out=tmp_path / "whole",
        tokens=16 * 4 * 32,
        sequence_length=32,
        sequences_per_step=4,
        save_every=3,
        matching=0.25,
        lora=rank,
    )
    right = heal_whole(whole)
    cut = replace(whole, out=tmp_path / "cut")
    for stage, step, left in (
        ("attention", 2, []),
        ("attention", 4, ["attention/checkpoint-3"]),
        ("logits", 8, ["attention/trained.safetensors", "logits/checkpoint-6"]),
    ):
        with pytest.raises(KeyboardInterrupt):
            heal_whole(cut, [Cut(stage, step)])
        found = [str(one.relative_to(cut.folder)) for one in cut.folder.glob("*/*") if one.suffix != ".json"]
        assert sorted(one for one in found if "checkpoint" in one or "trained" in one) == left
    assert heal_whole(cut) == cut.folder / "model"
    assert files.sha256(cut.folder / "model" / "model.safetensors") == files.sha256(right / "model.safetensors")
    assert not list(cut.folder.rglob("*.tmp"))
    began = (right / "model.safetensors").stat().st_mtime_ns
    assert heal_whole(whole) == right  # finished already
    assert (right / "model.safetensors").stat().st_mtime_ns == began


@pytest.mark.parametrize(
    ("which", "words", "message"),
    [
        ("out", [], "which text? Give --text FILE …, or --data FOLDER"),
        ("out", ["--text", "TEXT", "--data", "DATA"], "which text? Give --text FILE …, or --data FOLDER"),
        ("out", ["--text", "TEXT", "--matching", 2], "matching is 2.0; it must be from 0 to 1"),
        ("out", ["--text", "TEXT", "--lora", 0], "lora is 0; it must be at least 1"),
        ("out", ["--text", "TEXT", "--sequence-length", 0], "sequence_length is 0; it must be at least 1"),
        ("out", ["--text", "TEXT", "--tokens", 100], "tokens is 100, less than the 128 of one step; give more"),
        ("out", ["--text", "SHORT"], "tokens, one sequence of 32 needs 33; prepare more text"),
        ("out", ["--text", "odd.pdf"], "odd.pdf is no text that can be read"),
        ("out", ["--text", "out"], "out is a folder; give .txt, .md, .jsonl or .parquet files"),
        ("out", ["--text", "chat.jsonl"], "row 1 of chat.jsonl has no field 'text'; it has 'messages'"),
        ("dense", ["--text", "TEXT"], "was not converted; heal what `fibattn convert` wrote"),
        ("nowhere", ["--text", "TEXT"], "holds no model (config.json is missing)"),
        ("out", ["--text", "TEXT", "--teacher", "qwen3"], "converted from: model_type is qwen3 there, expected llama"),
        ("out", ["--text", "TEXT", "--teacher", "wide"], "converted from: intermediate_size is 48 there, expected 40"),
        (
            "out",
            ["--text", "TEXT", "--teacher", "other"],
            "other has other weights than what out was converted from; give that by --teacher",
        ),
        ("out", ["--text", "TEXT", "--teacher", "gone"], "the dense model: gone cannot be loaded"),
        ("out", ["--text", "TEXT", "--teacher", "quantised"], "are quantised (gptq)"),
        ("quantised", ["--text", "TEXT"], "are quantised (gptq)"),
        ("moved", ["--text", "TEXT"], "if it is elsewhere now, give --teacher"),
        ("bare", ["--text", "TEXT"], "no tokenizer can be loaded from"),
        ("out", ["--text", "TEXT", "--out", "there"], "there/model exists and is no finished model of a run"),
    ],
)
def test_mistakes_are_one_line(
    which: str,
    words: list[Any],
    message: str,
    dense: Folder,
    converted: Folder,
    prepared: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out", "quantised", "moved", "bare"):
        shutil.copytree(converted("llama"), name)
    Path("short.txt").write_text("ab")
    Path("there/model").mkdir(parents=True)
    Path("odd.pdf").write_text("odd")
    Path("chat.jsonl").write_text('{"messages": []}\n')
    shutil.copytree(dense("llama"), "dense")
    given = {"vocab_size": AutoModelForCausalLM.from_pretrained("dense").config.vocab_size}
    foreign_decoders.model("qwen3", **given).save_pretrained("qwen3")
    foreign_decoders.model("llama", intermediate_size=48, **given).save_pretrained("wide")
    other = AutoModelForCausalLM.from_pretrained("dense")
    other.get_input_embeddings().weight.data.normal_()
    other.save_pretrained("other")
    stored = files.read_json(Path("quantised/config.json"))
    files.write_json(Path("quantised/config.json"), stored | {"quantization_config": {"quant_method": "gptq"}})
    record = files.read_json(Path("moved/conversion.json"))
    files.write_json(Path("moved/conversion.json"), record | {"source": "gone"})
    for one in Path("bare").glob("tokenizer*"):
        one.unlink()
    for name in ("quantised", "moved", "bare"):
        sealed.seal(Path(name))
    capsys.readouterr()
    told = {"TEXT": text, "DATA": prepared, "SHORT": "short.txt"}
    assert heal(which, *(told.get(word, word) for word in words)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fibattn heal: ")
    assert message in said
    assert not Path("out-healed").exists()  # what is refused leaves nothing that the next command would meet


def test_a_model_that_caps_its_logits_is_refused_rather_than_healed_wrong(
    dense: Folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(dense("llama"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    capped = foreign_decoders.model("gemma3_text", vocab_size=len(tokenizer), final_logit_softcapping=2.0, **ends)
    capped.save_pretrained("capped")
    tokenizer.save_pretrained("capped")
    assert run("convert", "capped", "out", *PATTERN) == 0
    assert heal("out", "--text", text, *TEN_STEPS) == 2
    assert "Gemma3ForCausalLM changes its logits after the output embedding" in capsys.readouterr().err
    assert not Path("out-healed").exists()


def test_the_dense_model_is_found_from_any_folder(
    dense: Folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(dense("llama"), tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    assert run("convert", "dense", "out", *PATTERN) == 0
    monkeypatch.chdir("/")
    assert heal(tmp_path / "out", "--text", text, "--tokens", 4 * 32) == 0


def test_the_folder_that_one_stands_in_is_healed_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    beside = tmp_path.with_name(f"{tmp_path.name}-healed")
    assert HealingRecipe(Path()).folder == HealingRecipe(Path("runs/..")).folder == beside


def test_a_folder_of_another_run_is_refused(
    healed: Folder, converted: Folder, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healed("llama")
    words = [converted("llama"), "--text", text]
    assert heal(*words, *TEN_STEPS, "--text-weight", 0.5) == 2
    assert "out-healed/attention was trained on other data" in capsys.readouterr().err
    assert heal(*words, *TEN_STEPS, "--learning-rate", 1) == 2
    assert "out-healed/attention holds another run: optimizer.learning_rate was 0.003" in capsys.readouterr().err
    assert heal(*words, *TEN_STEPS) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_run_of_another_pattern_or_dense_model_is_refused(
    dense: Folder, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    model = AutoModelForCausalLM.from_pretrained(dense("llama"))
    for weight in model.parameters():
        weight.data += 0.1 * weight.std() * torch.randn_like(weight)
    shutil.copytree(dense("llama"), moved)
    model.save_pretrained(moved)
    few = ["--text", text, "--sequence-length", 32, "--tokens", 4 * 32, "--out", tmp_path / "healed"]
    assert run("convert", dense("llama"), out, *PATTERN) == 0
    assert heal(out, *few) == 0
    assert heal(out, *few, "--teacher", moved) == 2
    assert "was trained on other data" in capsys.readouterr().err
    shutil.rmtree(out)
    assert run("convert", dense("llama"), out, "--window", 9, "--rungs", 0, "--keep", 1) == 0
    assert heal(out, *few) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_a_run_that_wrote_down_less_goes_on(
    healed: Folder, converted: Folder, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("attention", "logits"):
        path = healed("llama") / stage / "inputs.json"
        known = files.read_json(path)
        assert {"config_sha256", "teacher_sha256"} <= known.keys()
        files.write_json(path, {name: one for name, one in known.items() if name[:6] not in ("config", "teache")})
    (healed("llama") / "logits" / "checkpoint-9").touch()
    assert heal(converted("llama"), "--text", text, *TEN_STEPS) == 0
    assert "is finished already" in capsys.readouterr().out
