"""Converted models as models of this project's own kind: the same logits, the same weights, and the way back."""

import json
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import torch
from foreign_decoders import LAYERS, PATTERN, SLIDING, model, tokens
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import fibattn
from fibattn import FibAttnConfig, FibAttnForCausalLM, FibAttnModel, InputError
from fibattn.files import sha256
from fibattn.model import native
from fibattn.model.streaming import growing_layers

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "mistral", "qwen2", "qwen3", "smollm3")},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, of another shape": ("llama", {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1}),
    "llama with another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    **{
        f"llama, {kind} RoPE": (
            "llama",
            {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **given}, "max_position_embeddings": 32},
        )
        for kind, given in SCALED.items()
    },
    "mistral without a sliding window": ("mistral", {"sliding_window": None}),
    "qwen3 with biases and sliding windows": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 1},
    ),
    "smollm3 with sliding windows": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": SLIDING,
            "no_rope_layers": [0, 1, 0, 1, 1],
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}
DENSE: dict[str, Any] = {"layer_types": ["full_attention"] * LAYERS}
SOURCES |= {
    "own": ("fibattn", {**DENSE, "qk_norm": True, "gated_mlp": False, "hidden_act": "relu2"}),
    "own, with more": (
        "fibattn",
        {
            **DENSE,
            **dict.fromkeys(("embedding_skip", "head_gates", "value_embeddings", "attention_bias"), True),
            "no_rope_layers": [1, 0, 1, 1],
        },
    ),
    "own, with limits": ("fibattn", {**DENSE, "layer_limits": [8, None, 20, 5]}),
    "own, bounded": ("fibattn", {**DENSE, "layer_limits": [5, None, None, 20], "full_reach": 9}),
    "own, with what sparse layers have": ("fibattn", {**DENSE, "kv_convolution": 3, "stagger_heads": True}),
    "own, yarn RoPE": ("fibattn", {**DENSE, **SOURCES["llama, yarn RoPE"][1]}),
}
PLACES: dict[str, dict[str, Any]] = {"none": {}, "kept": {"keep_layers": [1, 2]}}
PLACES["bounded"] = {"keep_layers": [0, 2], "full_reach": 9}


def dense(name: str) -> PreTrainedModel:
    """The model of that name, its biases large enough that they show."""
    architecture, changes = SOURCES[name]
    return model(architecture, **changes)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def close(ours: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_its_logits_and_texts_are_those_of_the_model_converted_in_place(name: str, place: str, tmp_path: Path) -> None:
    made, ids = fibattn.convert(dense(name), **PATTERN, **PLACES[place]), tokens()
    made.save_pretrained(tmp_path)
    own = loaded(tmp_path)
    assert type(own) is FibAttnForCausalLM
    close(own(ids).logits, made(ids).logits)
    answers = [m.generate(ids[:, :9], max_new_tokens=30, do_sample=False) for m in (own, made)]
    assert torch.equal(*answers)
    assert growing_layers(own) == growing_layers(made)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_a_window_over_everything_gives_the_sources_logits(name: str, tmp_path: Path) -> None:
    source, ids = dense(name), tokens()
    right = source(ids).logits
    fibattn.convert(source, window=49, rungs=0).save_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tmp_path)(ids).logits, right, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOURCES)
def test_the_way_back_has_the_sources_bytes_and_configuration(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense(name).to(dtype).save_pretrained(tmp_path / "source")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    fibattn.convert(source, **PATTERN, keep_layers=[1]).save_pretrained(tmp_path / "own")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert own.dtype == dtype
    fibattn.restore(own).save_pretrained(tmp_path / "back")
    names = ("source", "own", "back")
    assert len({sha256(tmp_path / one / "model.safetensors") for one in names}) == 1
    first, _, last = (json.loads((tmp_path / one / "config.json").read_text()) for one in names)
    assert first == last
    assert (tmp_path / "back" / "modeling_fibattn.py").exists() == name.startswith("own")


def test_what_is_trained_goes_back(tmp_path: Path) -> None:
    fibattn.convert(dense("qwen3"), **PATTERN).save_pretrained(tmp_path)
    own, ids = loaded(tmp_path), tokens()
    own.resize_token_embeddings(70)
    with torch.no_grad():
        own.model.layers[2].self_attn.q_norm.weight.mul_(1.5)
    back = fibattn.restore(own)
    theirs = dense("qwen3")
    theirs.resize_token_embeddings(70)
    theirs.load_state_dict(own.state_dict())
    assert type(back) is type(theirs)
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    assert back.config.vocab_size == 70


@torch.no_grad()
def test_a_dense_model_of_our_own_is_converted_and_restored_in_place() -> None:
    made, ids = dense("own"), tokens()
    right, before = made(ids).logits, made.config.to_dict()
    assert fibattn.convert(made, **PATTERN, keep_layers=[1], full_reach=9) is made
    sparse = made(ids).logits
    assert (sparse - right).abs().max() > 1e-2
    with pytest.raises(InputError, match="it was converted already; restore it first"):
        fibattn.convert(made, **PATTERN)
    assert fibattn.restore(made) is made
    assert torch.equal(made(ids).logits, right)
    assert made.config.to_dict() == before
    assert torch.equal(fibattn.convert(made, **PATTERN, keep_layers=[1], full_reach=9)(ids).logits, sparse)


@torch.no_grad()
def test_kept_layers_of_a_bounded_dense_model_look_no_farther_than_they_did(tmp_path: Path) -> None:
    made, ids = dense("own"), tokens()
    made.save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path, full_reach=9).eval()
    right, before = made(ids).logits, made.config.to_dict()
    close(fibattn.convert(made, window=9, rungs=0, keep_layers=[1])(ids).logits, right)
    assert made.config.full_reach == 9
    assert made.config.layer_limits == [9, None, 9, 9]  # of the kept layer it may still be taken away
    assert fibattn.restore(made).config.to_dict() == before


def test_a_body_alone_is_one_too(tmp_path: Path) -> None:
    body, ids = dense("qwen2").base_model, tokens()
    right = fibattn.convert(body, **PATTERN)(ids).last_hidden_state
    body.save_pretrained(tmp_path)
    own: Any = AutoModel.from_pretrained(tmp_path).eval()
    assert type(own) is FibAttnModel
    close(own(ids).last_hidden_state, right)
    assert type(fibattn.restore(own)).__name__ == "Qwen2Model"


def test_layers_say_what_they_attend_to(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 2}
    made = fibattn.convert(model("qwen2", **sliding), window=3, rungs=7, keep_layers=[0, 2])
    made.save_pretrained(tmp_path)
    own = FibAttnConfig.from_pretrained(tmp_path)
    assert own.layer_types == ["full_attention", "fibonacci_attention"] * 2
    assert own.layer_limits == [None, None, SLIDING - 1, SLIDING - 1]
    assert [own.layer_reach(layer) for layer in range(LAYERS)] == [None, 18, 11, 8]
    patterns = [own.layer_patterns(layer) for layer in range(LAYERS)]
    assert patterns[2] == (fibattn.Pattern(SLIDING - 1),)
    converted: Any = made.base_model
    ours = [layer.self_attn.fibattn.pattern for layer in converted.layers]
    assert [one and one[0] for one in patterns] == [ours[0], ours[1], fibattn.Pattern(SLIDING - 1), ours[3]]
    assert own.qkv_bias
    assert own.converted_from is not None
    assert own.converted_from["model_type"] == "qwen2"


def test_a_bound_can_be_given_while_loading(tmp_path: Path) -> None:
    made, ids = fibattn.convert(dense("llama"), **PATTERN, keep_layers=[1]), tokens()
    made.save_pretrained(tmp_path)
    right = fibattn.convert(dense("llama"), **PATTERN, keep_layers=[1], full_reach=9)(ids).logits
    close(AutoModelForCausalLM.from_pretrained(tmp_path, full_reach=9).eval()(ids).logits, right)
    assert not torch.allclose(right, made(ids).logits, atol=1e-2)


@torch.no_grad()
def test_drafts_can_be_taken_back(tmp_path: Path) -> None:
    fibattn.convert(dense("llama"), **PATTERN, keep_layers=[1]).save_pretrained(tmp_path)
    own, ids = loaded(tmp_path), tokens(1, 9)
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    right = own.generate(ids, **how)
    assert torch.equal(own.generate(ids, **how, assistant_model=loaded(tmp_path)), right)
    assert torch.equal(own.generate(ids, **how, prompt_lookup_num_tokens=4), right)


def test_training_takes_the_same_steps(tmp_path: Path) -> None:
    made, ids = fibattn.convert(dense("llama with biases"), **PATTERN, keep_layers=[1]), tokens(4, 32)
    made.save_pretrained(tmp_path)
    own = loaded(tmp_path)
    for one in (made.train(), own.train()):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-2)
        for _ in range(3):
            one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(own.named_parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_what_was_not_converted_has_no_way_back() -> None:
    with pytest.raises(InputError, match="was not converted from another model"):
        fibattn.restore(FibAttnForCausalLM(FibAttnConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_limits": [3]}, "layer_limits has 1 entries for 2 layers"),
        ({"layer_limits": [3, 0]}, r"layer_limits is \[3, 0\]; each entry is at least 1, or None"),
        ({"layer_limits": [3, None], "schedule": "learned"}, "layer_limits are given, but a learned scale"),
    ],
)
def test_limits_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FibAttnConfig(num_hidden_layers=2, **changes)


def test_old_configurations_mean_what_they_meant() -> None:
    found = FibAttnConfig()
    assert not any((found.attention_bias, found.qkv_bias, found.mlp_bias, found.rope_scales_all))
    assert found.layer_limits is None
    assert found.converted_from is None
    names = dict(
        FibAttnForCausalLM(FibAttnConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)).named_parameters()
    )
    assert not any("bias" in name for name in names)


def test_the_library_knows_as_much_of_each_source() -> None:
    """A field of a source that this project's model neither has nor may leave out would be lost on the way."""
    left_out = {"pretraining_tp", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
    left_out |= {"attention_dropout", "no_rope_layer_interval"}
    of_any = set(foreign_decoders.configuration("gpt2").to_dict()) & set(fibattn.FibAttnConfig().to_dict())
    for architecture in ("llama", "mistral", "qwen2", "qwen3", "smollm3"):
        theirs = set(type(foreign_decoders.configuration(architecture)).__annotations__)
        assert theirs <= set(FibAttnConfig.__annotations__) | left_out | of_any, architecture


def test_every_field_of_our_own_goes_along_or_is_one_that_a_conversion_decides() -> None:
    """Of those that are not handed on, the sources above have what a dense model may say in them."""
    given = {*native._SAME, *native._FAMILIES[FibAttnConfig.model_type][0], *native._PATTERN}
    decided = {"block_rope", "converted_from", "layer_limits", "layer_offsets", "layer_types", "rope_scales_all"}
    sparse_alone = {"kv_convolution", "stagger_heads"}
    of_beginnings = {"zero_init_outputs"}
    assert set(FibAttnConfig.__annotations__) <= given | decided | sparse_alone | of_beginnings
