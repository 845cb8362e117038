"""Converted models in the hands of those who know nothing of conversion: they must not run dense without a word."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_decoders import PATTERN, model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import fibattn
from fibattn import InputError
from fibattn.model.conversion import ARCHITECTURES

WITHOUT = "import sys; sys.modules['fibattn'] = None; import transformers; "


@pytest.fixture(params=["llama", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    fibattn.convert(model(request.param), **PATTERN, keep_layers=[1]).save_pretrained(tmp_path / "converted")
    return tmp_path / "converted"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("given", [{}, {"attn_implementation": None}], ids=["nothing", "None"])
@torch.no_grad()
def test_no_attention_named_is_the_folders_own(folder: Path, given: dict[str, Any]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    with pytest.raises(InputError, match=r"has not been converted .*call fibattn\.convert\(model\)"):
        loaded(tokens())
    with pytest.raises(InputError, match=r"call fibattn\.convert\(model\)"):
        loaded.generate(tokens(), max_new_tokens=2)
    again = fibattn.convert(AutoModelForCausalLM.from_pretrained(folder)).eval()
    assert torch.equal(fibattn.convert(loaded)(tokens()).logits, again(tokens()).logits)


def test_running_dense_because_that_was_asked_for_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"attention was set to 'eager' while loading: it runs dense"):
        dense = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.isfinite(dense(tokens()).logits).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fibattn.restore(fibattn.convert(model(), **PATTERN))


def test_what_chooses_by_architecture_finds_none(folder: Path) -> None:
    """As `transformers serve` does, in a process without this package; other engines choose by the same name."""
    code = (
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1]); "
        "getattr(transformers, config.architectures[0]).from_pretrained(sys.argv[1], attn_implementation=None)"
    )
    done = run(code, folder)
    assert done.returncode != 0
    assert "FibAttnConverted" in done.stderr.splitlines()[-1]


def test_what_chooses_by_model_type_does_not_know_the_attention(folder: Path) -> None:
    done = run("transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])", folder)
    assert done.returncode != 0
    assert 'attn_implementation="fibattn"` is not supported' in done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_architecture_named_is_no_other_after_saving_twice_and_its_own_after_restoring(
    architecture: str, tmp_path: Path
) -> None:
    made = fibattn.convert(model(architecture), **PATTERN)
    for _ in range(2):
        made.save_pretrained(tmp_path / "converted")
        made.config.save_pretrained(tmp_path / "converted")
    named = AutoConfig.from_pretrained(tmp_path / "converted").architectures
    assert named == [f"FibAttnConverted{type(made).__name__}"]
    fibattn.restore(made).save_pretrained(tmp_path / "restored")
    assert AutoConfig.from_pretrained(tmp_path / "restored").architectures == [type(made).__name__]


@pytest.mark.parametrize("saved", [True, False], ids=["of a folder", "made in memory"])
def test_an_adapter_of_a_converted_model_is_not_loaded_on_a_dense_one(saved: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model().save_pretrained(tmp_path / "dense")
    made: Any = fibattn.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), **PATTERN).eval()
    if saved:
        made.save_pretrained(tmp_path / "converted")
        made = fibattn.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")).eval()
    chosen = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(made, chosen).eval()
    right = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    if saved:
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        with pytest.raises(InputError, match=r"call fibattn\.convert\(model\)"):
            loaded(tokens())
        fibattn.convert(loaded.get_base_model())
    else:
        with pytest.raises((OSError, ValueError), match=r"converted by fibattn\.convert\(model, window=3"):
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        base = fibattn.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), **PATTERN)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens()).logits, right)


def test_a_restored_model_has_its_name_back(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "window=3" in fibattn.convert(made, **PATTERN).name_or_path
    assert fibattn.restore(made).name_or_path == made.base_model.name_or_path == str(tmp_path)
