"""Converted decoders whose queries choose blocks: all blocks are the original, some the same with and without a cache.

Which blocks are chosen, and what is read of them, `test_modeling` compares with formulas ("chosen, rotated").
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_decoders import LAYERS, model, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fibattn
from fibattn import FibAttnForCausalLM, InputError
from fibattn.files import sha256
from fibattn.model.conversion import ARCHITECTURES
from fibattn.training.card import write_converted_card

FAR: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "gemma3_text": {"sliding_window": 128},
    "fibattn": {"layer_types": ["full_attention"] * LAYERS},
}
"""What lets their layers look back as far as a block may be."""
KINDS = [*ARCHITECTURES, "fibattn"]
NATIVE = [kind for kind in KINDS if kind not in ("mixtral", "gemma", "gemma3_text")]
CHOICE: dict[str, Any] = {"window": 6, "blocks": 2, "keep_layers": [1]}


def dense(kind: str, **changes: Any) -> Any:
    return model(kind, **FAR.get(kind, {}), **changes)


def converted(kind: str) -> Any:
    """Converted, with some trust in every layer that has it, none of them the same."""
    made = fibattn.convert(dense(kind), **CHOICE)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("trust"):
                weight.uniform_(0.3, 1.2)
    return made


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_blocks_are_the_original_and_restoring_gives_its_bits(kind: str) -> None:
    made, ids = dense(kind), tokens(2, 120)
    right, names = made(ids).logits, list(made.state_dict())
    assert fibattn.convert(made, window=15, blocks=64) is made
    torch.testing.assert_close(made(ids).logits, right, rtol=1e-3, atol=3e-4)
    fibattn.restore(made)
    fibattn.convert(made, **CHOICE)
    assert (made(ids).logits - right).abs().max() > 0.1
    fibattn.restore(made)
    assert torch.equal(made(ids).logits, right)
    assert list(made.state_dict()) == names


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_and_the_saved_folder_have_the_tokens_of_the_model_without(kind: str, tmp_path: Path) -> None:
    made, ids = converted(kind), tokens(2, 50)
    how: dict[str, Any] = {"max_new_tokens": 35, "do_sample": False}
    right = made.generate(ids, use_cache=False, **how)
    assert torch.equal(made.generate(ids, **how), right)
    assert torch.equal(made.generate(ids, cache_implementation="static", disable_compile=True, **how), right)
    made.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"]
    assert isinstance(loaded, FibAttnForCausalLM) == (kind in NATIVE)
    assert torch.equal(loaded.eval().generate(ids, **how), right)
    torch.testing.assert_close(loaded(ids).logits, made(ids).logits, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("kind", NATIVE)
def test_the_way_back_from_a_folder_has_the_sources_bytes(kind: str, tmp_path: Path) -> None:
    dense(kind).save_pretrained(tmp_path / "source")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    fibattn.convert(source, **CHOICE).save_pretrained(tmp_path / "own")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert [name for name, _ in own.named_parameters() if "trust" in name] == [
        f"model.layers.{layer}.self_attn.trust" for layer in (0, 2, 3)
    ]
    assert not any(weight.any() for name, weight in own.named_parameters() if "trust" in name)
    fibattn.restore(own).save_pretrained(tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert sha256(tmp_path / "source" / name) == sha256(tmp_path / "back" / name)


@pytest.mark.parametrize("kind", ["llama", "gemma", "fibattn"])
def test_training_reaches_what_chooses(kind: str) -> None:
    made, ids = converted(kind).train(), tokens(2, 80)
    made(ids, labels=ids, use_cache=False).loss.backward()
    layer = made.get_submodule("model.layers.0.self_attn")
    learnt = [layer.q_proj.weight, layer.k_proj.weight, *([layer.trust] if kind != "gemma" else [])]
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in learnt)


@pytest.mark.parametrize("kind", ["llama", "gemma", "fibattn"])
@torch.no_grad()
def test_padding_does_not_show(kind: str) -> None:
    made, ids = converted(kind), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    logits = made(ids.where(mask > 0, 0), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[:1, 11:], made(ids[:1, 11:]).logits, rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(logits[1:], made(ids[1:]).logits, rtol=1e-3, atol=3e-4)


def test_how_far_back_a_block_may_be() -> None:
    made = fibattn.convert(model("llama", max_position_embeddings=4096), **CHOICE)
    assert made.config.fibattn_pattern["block_reach"] == 64 * 16 - 1
    short = fibattn.convert(model("llama", max_position_embeddings=100), **CHOICE, block_size=32)
    assert (short.config.fibattn_pattern["block_reach"], short.config.fibattn_pattern["rungs"]) == (99, 0)
    assert short.config.fibattn_pattern["block_anchor"]
    free = fibattn.convert(model("llama"), **CHOICE, block_anchor=False)
    assert not free.config.fibattn_pattern["block_anchor"]
    assert (
        free(tokens(1, 120)).logits - fibattn.convert(model("llama"), **CHOICE)(tokens(1, 120)).logits
    ).abs().max() > 0.1


def test_its_name_is_a_call_that_can_be_made() -> None:
    source = model("llama")
    source.name_or_path = "there"
    call = "fibattn.convert(model, window=6, keep_layers=[1], full_reach=None, blocks=2, block_size=16, block_reach=127"
    assert fibattn.convert(source, **CHOICE).name_or_path == f"there, converted by {call}, block_anchor=True)"


@torch.no_grad()
def test_a_folder_from_before_anchors_has_none(tmp_path: Path) -> None:
    made, ids = fibattn.convert(dense("gemma"), **CHOICE, block_anchor=False), tokens(2, 120)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pattern"].pop("block_anchor") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, made(ids).logits)


def test_layers_that_look_back_less_are_kept_or_refused() -> None:
    source = dense("gemma3_text")
    source.config.sliding_window = 127
    with pytest.raises(InputError, match=r"block_reach is 127, and layer 0 has a sliding window of 127 keys; keep the"):
        fibattn.convert(source, window=6, blocks=1)
    assert "fibattn" not in vars(source.base_model)
    fibattn.restore(fibattn.convert(source, window=6, blocks=1, block_reach=126))
    fibattn.convert(source, window=6, blocks=1, keep_layers=[0, 2])


def test_a_native_model_keeps_the_sliding_windows_of_kept_layers(tmp_path: Path) -> None:
    made, ids = fibattn.convert(model("mistral", sliding_window=12), **{**CHOICE, "block_reach": 11}), tokens(2, 50)
    made.save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert own.config.layer_limits == [None, 11, None, None]
    torch.testing.assert_close(own(ids).logits, made(ids).logits, rtol=1e-4, atol=3e-5)


def test_other_engines_refuse_it(tmp_path: Path) -> None:
    made = converted("gemma")
    with pytest.raises(InputError, match=r"continuous batching does not do blocks that queries choose yet; without it"):
        made.init_continuous_batching()
    headed = fibattn.convert(model("llama", AutoModelForSequenceClassification), **CHOICE)
    assert not [name for name, _ in headed.named_parameters() if "trust" in name]
    headed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fibattn_converted"


def test_the_card_says_what_is_chosen(tmp_path: Path) -> None:
    for kind in ("llama", "gemma"):
        made = converted(kind)
        made.save_pretrained(tmp_path / kind)
        write_converted_card(
            tmp_path / kind, kind, "source", AutoModelForCausalLM.from_pretrained(tmp_path / kind), None
        )
        assert (
            "2 blocks of 16 keys among the last 128, the first of the text always"
            in (tmp_path / kind / "README.md").read_text()
        )
