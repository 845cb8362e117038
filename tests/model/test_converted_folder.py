"""Folders of converted models: they come back sparse, wherever they are loaded, or are refused."""

import json
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_decoders import LAYERS, PATTERN, model, tokens
from forked import Server
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import fibattn
from fibattn import InputError
from fibattn.files import sha256
from fibattn.model.conversion import ARCHITECTURES

OTHERS = ("mixtral", "gemma", "gemma3_text")
NATIVE = tuple(kind for kind in ARCHITECTURES if kind not in OTHERS)
IN_MEMORY: dict[str, dict[str, Any]] = {"llama": {}, "fibattn": {"layer_types": ["full_attention"] * LAYERS}}
WITHOUT = """
import json, sys
sys.modules["fibattn"] = None
import transformers
said = []
for given in ({}, {"attn_implementation": None}, {"trust_remote_code": True}):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], **given)
    except Exception as error:
        said.append(str(error))
print("\\n" + json.dumps(said))  # behind the questions that Transformers asks
"""
FOREIGN = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.cli.serving import model_manager

ids = torch.arange(2, 50)[None]
for given in ({}, {"attn_implementation": None}, {"attn_implementation": "sdpa"}, {"dtype": "float32"}):
    made = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **given).eval()
    print(made(ids).logits.double().sum().item())
made.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
print(again(ids).logits.double().sum().item())
# As `transformers serve` does: the configuration, then the class from the library.
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
kind = getattr(model_manager.transformers, config.architectures[0])
given = {"attn_implementation": None, "dtype": "auto", "device_map": "cpu", "trust_remote_code": True}
print(kind.from_pretrained(sys.argv[1], **given).eval()(ids).logits.double().sum().item())
"""


def saved(architecture: str, folder: Path, **how: Any) -> Any:
    """A converted model, and its folder written."""
    made = fibattn.convert(model(architecture), **PATTERN, **{"keep_layers": [1], **how})
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_it_comes_back_sparse_and_saves_again(architecture: str, tmp_path: Path) -> None:
    made, ids = saved(architecture, tmp_path / "first"), tokens()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    torch.testing.assert_close(loaded(ids).logits, made(ids).logits, rtol=1e-4, atol=3e-5)
    assert loaded.name_or_path == str(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors", "modeling_fibattn.py"):
        assert sha256(tmp_path / "first" / name) == sha256(tmp_path / "second" / name)
    dense = fibattn.restore(loaded)
    assert torch.equal(dense(ids).logits, model(architecture)(ids).logits)
    dense.save_pretrained(tmp_path / "dense")
    assert "fibattn" not in (tmp_path / "dense" / "config.json").read_text()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_programs_that_never_heard_of_it_run_it_sparse(architecture: str, foreign: Server, tmp_path: Path) -> None:
    made = saved(architecture, tmp_path / "first")
    command = [sys.executable, "-c", FOREIGN, str(tmp_path / "first"), str(tmp_path / "second")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = foreign.run(command, env=environment, check=True)
    right = float(made(torch.arange(2, 50)[None]).logits.detach().double().sum())
    assert [float(line) for line in done.stdout.split()] == pytest.approx([right] * 6, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_programs_that_cannot_run_it_say_so(architecture: str, foreign: Server, tmp_path: Path) -> None:
    saved(architecture, tmp_path / "converted")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = foreign.run([sys.executable, "-c", WITHOUT, tmp_path / "converted"], env=environment, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    reasons = ("trust_remote_code", "trust_remote_code", "this model needs the package fibattn")
    for one, reason in zip(said, reasons, strict=True):
        assert reason in one
        assert "NoneType" not in one


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_folder_names_a_class_or_type_that_others_have(architecture: str, tmp_path: Path) -> None:
    saved(architecture, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    kind = "FibAttnForCausalLM" if architecture in NATIVE else "FibAttnConvertedForCausalLM"
    assert stored["model_type"] == ("fibattn" if architecture in NATIVE else "fibattn_converted")
    assert stored["architectures"] == [kind]
    found = runpy.run_path(str(tmp_path / "modeling_fibattn.py"))
    for where in stored["auto_map"].values():
        assert where.removeprefix("modeling_fibattn.") in found
    assert stored["auto_map"]["AutoModelForCausalLM"] == f"modeling_fibattn.{kind}"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_other_heads_and_none(architecture: str, tmp_path: Path) -> None:
    made = model("qwen3", AutoModelForSequenceClassification, num_labels=3)
    ids = tokens()
    right = fibattn.convert(made, **PATTERN)(ids).logits
    made.save_pretrained(tmp_path / "labels")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "labels").eval()
    assert torch.equal(loaded(ids).logits, right)
    whole = saved(architecture, tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole").eval()
    found = whole.get_output_embeddings()(body(ids).last_hidden_state)
    torch.testing.assert_close(found, whole(ids).logits, rtol=1e-4, atol=3e-5)


def test_a_configuration_alone_makes_a_sparse_model(tmp_path: Path) -> None:
    saved("gemma", tmp_path)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert fresh.base_model.layers[0].self_attn.fibattn.pattern is not None


@pytest.mark.parametrize("named", ["eager", "flash_attention_2"])
def test_another_attention_is_refused_where_it_would_not_be_taken(named: str, tmp_path: Path) -> None:
    saved("gemma", tmp_path)
    with pytest.raises(InputError, match=f"attn_implementation is '{named}'.*leave it out"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=named)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"rungs": 8}, "its other fields give"), ({"keep_layers": [9]}, "different indices from 0 to 3")],
)
def test_stored_patterns_that_contradict_themselves(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved("gemma", tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["pattern"] |= change
    file.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=reason):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_an_adapter_keeps_the_pattern(architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    saved(architecture, tmp_path / "converted")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    chosen = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(made, chosen).eval()
    right = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens()).logits, right)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens()).logits
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", IN_MEMORY)
def test_an_adapter_of_a_model_converted_in_memory_is_not_loaded_on_the_dense_one(
    architecture: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model(architecture, **IN_MEMORY[architecture]).save_pretrained(tmp_path / "dense")
    made: Any = fibattn.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), **PATTERN).eval()
    chosen = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(made, chosen).eval()
    right = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError), match=r"converted by fibattn\.convert\(model, window=3"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = fibattn.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), **PATTERN)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens()).logits, right)


@pytest.mark.parametrize("architecture", IN_MEMORY)
def test_a_restored_model_has_its_name_back(architecture: str, tmp_path: Path) -> None:
    model(architecture, **IN_MEMORY[architecture]).save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "window=3" in fibattn.convert(made, **PATTERN).name_or_path
    assert fibattn.restore(made).name_or_path == made.base_model.name_or_path == str(tmp_path)


# Folders that earlier versions wrote


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder as earlier versions wrote it: the decoder's own type, a pattern, and an attention that is ours."""
    model().save_pretrained(tmp_path)
    pattern = {"window": 3, "base": "fibonacci", "schedule": "linear", "rungs": 7, "rung_reach": 127}
    pattern |= {"max_offset": None, "keep_layers": [1], "layer_offsets": [[4, 6, 10], None, [6, 9, 15, 24], [8, 12]]}
    file = tmp_path / "config.json"
    stored = {"fibattn_pattern": pattern, "attn_implementation": "fibattn"}
    stored["architectures"] = ["FibAttnConvertedLlamaForCausalLM"]
    file.write_text(json.dumps(json.loads(file.read_text()) | stored))
    return tmp_path


@pytest.mark.parametrize("given", [{}, {"attn_implementation": None}], ids=["nothing", "None"])
def test_an_old_folder_is_refused_with_the_way_to_a_new_one(old: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"earlier fibattn wrote.*'sdpa'.*window=3.* keep_layers=\[1\].*save it anew"):
        AutoModelForCausalLM.from_pretrained(old, **given)


def test_an_old_folder_becomes_a_new_one(old: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the attention is 'sdpa' and the pattern left out: window=3"):
        dense = AutoModelForCausalLM.from_pretrained(old, attn_implementation="sdpa").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = fibattn.convert(dense, **PATTERN, keep_layers=[1])
        made.save_pretrained(tmp_path / "new")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert type(again) is fibattn.FibAttnForCausalLM
    assert torch.equal(again(tokens()).logits, made(tokens()).logits)


def test_a_shared_configuration_is_noticed() -> None:
    made = model()
    shared = made.config
    fibattn.convert(made, **PATTERN)
    with pytest.raises(InputError, match="give it a copy of the original's"):
        type(made)(shared)
