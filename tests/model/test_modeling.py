"""The model against plain formulas and Llama: every row of the study, packing, padding, saving."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import reference_model
import torch
import transformers
from forked import Server
from packaging.version import Version
from tiny_models import KINDS, close, config, model, tokens
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from fibattn import FibAttnConfig, FibAttnForCausalLM, FibAttnModel, InputError

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "another theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def paper(**changes: Any) -> FibAttnForCausalLM:
    with torch.device("meta"):
        return FibAttnForCausalLM(FibAttnConfig(**changes))


# What it computes


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_plain_formulas(kind: str) -> None:
    made, ids = model(kind).double(), tokens(1, 60)
    close(made(ids).logits[0], reference_model.logits(made, ids[0]), 1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_a_dense_model_is_llama(rope: str) -> None:
    """Values, gradients and the growth of dynamic scaling past the training length; Llama's angles are in float32."""
    made = model("full", rope_parameters=ROPES[rope])
    llama = LlamaForCausalLM(reference_model.llama_config(made.config, rope_parameters=dict(ROPES[rope]))).eval()
    llama.load_state_dict(made.state_dict())
    for length in (20, 90, 33):
        ids = tokens(2, length)
        close(made(ids).logits, llama(ids).logits, 1e-4)
    ids = tokens()
    for one in (made, llama):
        one(ids, labels=ids).loss.backward()
    for name, parameter in made.named_parameters():
        close(parameter.grad, llama.get_parameter(name).grad, 1e-4)


@pytest.mark.parametrize("kind", ["linear", "full", "learned"])
@pytest.mark.parametrize("shift", [10**6, 2**24 + 1, 10**9])
def test_far_positions_are_as_sharp_as_near_ones(kind: str, shift: int) -> None:
    made, ids = model(kind), tokens(1, 60)
    places = torch.arange(60)[None]
    near, far = (made(ids, position_ids=at, use_cache=False).logits for at in (places, places + shift))
    close(far, near, 1e-4)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarm", "factor": 2.0}, "unknown rope_type 'yarm' in rope_parameters: did you mean 'yarn'"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 in rope"),
    ],
)
def test_rotary_parameters_that_cannot_be_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model("mixture", rope_parameters=rope | {"rope_theta": 10_000.0})


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_targets_of_another_shape_are_refused(name: str) -> None:
    made, ids = model("linear"), tokens(2, 12)
    for wrong in (ids[:, :5], ids[:1]):
        with pytest.raises(InputError, match=rf"{name} have shape .*; expected \(2, 12\)"), torch.no_grad():
            made(ids, **{name: wrong})


def test_packed_documents_with_a_cache_are_refused_where_full_layers_could_not_tell_them_apart() -> None:
    ids, packed = tokens(1, 12), torch.arange(6).repeat(2)[None]
    with pytest.raises(InputError, match="position_ids restart or leap, and there is a cache"):
        model("mixture")(ids, position_ids=packed, past_key_values=DynamicCache())
    sparse = model("linear")
    close(
        sparse(ids, position_ids=packed, past_key_values=DynamicCache()).logits,
        sparse(ids, position_ids=packed, use_cache=False).logits,
    )


@pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.24"),
    reason="older versions crop cache layers that drafts do not use, where a configuration names the layers' types",
    strict=False,
)
def test_drafts_with_the_first_layers_are_those_of_a_shorter_model() -> None:
    made, ids = model("mixture"), tokens(1, 12)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    right = made.generate(ids, **how)
    assert torch.equal(made.generate(ids, assistant_early_exit=1, **how), right)
    assert torch.equal(made.generate(ids, **how), right)


def test_a_pad_token_among_text_is_text_also_to_an_assistant() -> None:
    made, ids = model("mixture"), tokens(1, 12)
    how: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    right = made.generate(ids, **how, pad_token_id=0)
    pad = next(one for one in right[0, 12:19].tolist() if one not in ids and one != right[0, 19])
    assert torch.equal(made.generate(ids, **how, pad_token_id=pad, assistant_model=model("mixture")), right)
    on = made.generate(right[:, :20], **{**how, "max_new_tokens": 16}, pad_token_id=pad)
    assert torch.equal(on, right)


@pytest.mark.parametrize("seed", range(4))
def test_an_assistant_goes_on_after_a_pad_token_at_the_end(seed: int) -> None:
    shape: dict[str, Any] = {"vocab_size": 12, "eos_token_id": None, "pad_token_id": 3, "bos_token_id": 1}
    torch.manual_seed(seed)
    made, assistant = (FibAttnForCausalLM(config(initializer_range=0.4, **shape)).eval() for _ in range(2))
    ids = torch.randint(4, 12, (1, 15))
    ids[0, -1] = 3 if seed % 2 else ids[0, -1]
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    right = made.generate(ids, **how)
    assert torch.equal(made.generate(ids, **how, assistant_model=assistant), right)


def test_padding_that_generate_finds_by_itself_is_still_padding() -> None:
    made, ids = model("mixture"), tokens(1, 12)
    ids[0, :3] = 0
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(made.generate(ids, **how)[:, 12:], made.generate(ids[:, 3:], **how)[:, 9:])


def test_full_layers_go_through_the_attention_that_was_asked_for() -> None:
    made, ids = model("mixture"), tokens()
    expected = made(ids).logits
    made.set_attn_implementation("eager")
    close(made(ids).logits, expected, 1e-4)


def test_embeddings_in_place_of_tokens() -> None:
    made, ids = model(), tokens()
    embedded = made.get_input_embeddings()(ids)
    assert torch.equal(made(inputs_embeds=embedded).logits, made(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
            made(**wrong)
    valued = model("modern")
    with pytest.raises(
        InputError, match=r"inputs_embeds are given, but this model has value_embeddings.*give input_ids"
    ):
        valued(inputs_embeds=valued.get_input_embeddings()(ids))


@pytest.mark.parametrize("kind", ["linear", "mixture"])
@pytest.mark.parametrize("shape", [(12,), (1, 3), (1, 1), (3, 12)])
def test_position_ids_of_other_tokens_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"position_ids have shape {re.escape(str(shape))}; expected \(2 or 1, 12\)"):
        model(kind)(tokens(2, 12), position_ids=torch.zeros(shape, dtype=torch.long))


def test_logits_of_the_last_tokens_alone() -> None:
    made, ids = model(), tokens()
    whole = made(ids).logits
    close(made(ids, logits_to_keep=3).logits, whole[:, -3:], 1e-5)
    close(made(ids, logits_to_keep=torch.tensor([4, 9])).logits, whole[:, [4, 9]], 1e-5)


def test_hidden_states_of_every_layer() -> None:
    made, ids = model("mixture"), tokens()
    states = made(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[0], made.get_input_embeddings()(ids))
    assert torch.equal(made.lm_head(states[-1]), made(ids).logits)


# The paper's size and start


def test_the_papers_parameter_counts() -> None:
    assert paper().num_parameters() == 60_850_688
    assert paper(schedule="learned").num_parameters() == 60_850_704
    assert paper(layer_types=["full_attention"] * 16).num_parameters() == 60_850_688
    assert paper().num_parameters() - paper().get_input_embeddings().weight.numel() == 44_073_472


def test_the_papers_initial_weights() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 300, "vocab_size": 300}
    made = FibAttnForCausalLM(config(**sizes, schedule="learned", value_embeddings=True))
    for name, parameter in made.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith(("theta", "value_gate.weight")):
            assert not parameter.any(), name
        else:
            scale = 8**-0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            expected = scale * 256**-0.5
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.02), name
            assert abs(float(parameter.detach().mean())) < 4 * expected * parameter.numel() ** -0.5, name
    assert made.lm_head.weight is made.get_input_embeddings().weight
    assert float(made.model.layers[0].self_attn.alpha.detach()) == 1.0


# Packing and padding


def packed(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_those_documents_alone(kind: str) -> None:
    # Blocks are cut from where the longest document begins; one a whole number of blocks away has its own.
    made, lengths = model(kind), [16, 1, 41, 7] if "chosen" in kind else [23, 1, 30, 6]
    ids = tokens(1, sum(lengths))
    found = made(ids, position_ids=packed(lengths), use_cache=False).logits
    expected = [made(part).logits for part in ids.split(lengths, dim=1)]
    close(found, torch.cat(expected, dim=1))


def test_rows_packed_in_different_places() -> None:
    made, ids = model("mixture"), tokens(2, 40)
    positions = torch.cat([packed([10, 30]), packed([25, 15])])
    found = made(ids, position_ids=positions, use_cache=False).logits
    for row, cut in enumerate((10, 25)):
        close(found[row, cut:], made(ids[row : row + 1, cut:]).logits[0])


def test_documents_that_do_not_begin_at_zero() -> None:
    """Where they begin is what counts for the sparse layers; the values are RoPE's, which sees differences."""
    made, ids = model(), tokens(1, 40)
    shifted = packed([18, 22]) + 100
    close(made(ids, position_ids=shifted).logits, made(ids, position_ids=packed([18, 22])).logits, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(kind: str, side: str) -> None:
    made, lengths = model(kind), (50, 31, 1)
    ids = tokens(3, 50)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(50 - length, None) if side == "left" else slice(length)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = made(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert bool(out.isfinite().all())
    for row in range(3):
        kept = mask[row].bool()
        close(out[row, kept], made(ids[row : row + 1, kept]).logits[0])


def test_masks_that_sparse_layers_cannot_apply_are_refused() -> None:
    made, ids = model(), tokens()
    holes = torch.ones_like(ids)
    holes[1, 20] = 0
    with pytest.raises(InputError, match=r"row 1 of attention_mask has zeros between ones; padding must be"):
        made(ids, attention_mask=holes)
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 1, 50, 50\); sparse layers .* = \(2, 50\)"):
        made(ids, attention_mask=torch.ones(2, 1, 50, 50))
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 49\)"):
        made(ids, attention_mask=torch.ones(2, 49))


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_has_the_same_logits_bit_for_bit(kind: str, tmp_path: Path) -> None:
    made, ids = model(kind), tokens()
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is FibAttnForCausalLM
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert type(body) is FibAttnModel
    assert torch.equal(body(ids).last_hidden_state, made.model(ids).last_hidden_state)


def test_a_model_loaded_in_16_bits_keeps_its_angles_in_32(tmp_path: Path) -> None:
    made = model("mixture")
    made.save_pretrained(tmp_path)
    loaded = FibAttnForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    for name in ("rotary_emb", "scaled_rotary_emb"):
        expected = getattr(made.model, name).inv_freq
        assert torch.equal(getattr(loaded.model, name).inv_freq, expected)


def test_importing_the_package_is_enough_for_the_auto_classes(foreign: Server, tmp_path: Path) -> None:
    made = model("learned mixture")
    made.save_pretrained(tmp_path)
    code = (
        "import fibattn, torch; from transformers import AutoModelForCausalLM; "
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval(); "
        "print(m(torch.arange(1, 60)[None]).logits.double().sum().item())"
    )
    said = foreign.run([sys.executable, "-c", code], check=True).stdout
    assert float(said) == pytest.approx(float(made(torch.arange(1, 60)[None]).logits.double().sum()), rel=1e-6)
