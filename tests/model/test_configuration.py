"""The configuration: what it derives, what it refuses, and that a saved one means the same."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import KINDS, config, model, tokens
from transformers import AutoConfig

from fibattn import FibAttnConfig, FibAttnForCausalLM, InputError, Pattern, layer_patterns

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "offsets.json").read_text())


def test_defaults_are_the_papers_model() -> None:
    found = FibAttnConfig()
    assert (found.hidden_size, found.num_hidden_layers, found.intermediate_size) == (512, 16, 1366)
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (8, 2, 64)
    assert (found.vocab_size, found.max_position_embeddings, found.rms_norm_eps) == (32_768, 1024, 1e-6)
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert found.tie_word_embeddings
    assert found.initializer_range == 512**-0.5
    assert (found.base, found.schedule, found.window, found.rungs) == ("fibonacci", "linear", 12, 15)


@pytest.mark.parametrize("base", ["fibonacci", "power_of_two"])
@pytest.mark.parametrize("schedule", ["fixed", "linear", "coprime"])
@pytest.mark.parametrize("window", [6, 8, 10, 12])
@pytest.mark.parametrize("limit", [None, 1023])
def test_offsets_of_every_row_of_the_study_are_the_golden_ones(
    base: str, schedule: str, window: int, limit: int | None
) -> None:
    found = FibAttnConfig(base=base, schedule=schedule, window=window, max_offset=limit)
    expected = GOLDEN[f"{base}/{schedule}/{window}/{limit}"]
    assert found.layer_offsets == [[offsets] for offsets in expected]
    assert found.layer_patterns(3) == (Pattern(window, tuple(expected[3])),)


def test_layers_without_fixed_rungs_have_no_offsets() -> None:
    found = config("learned mixture")
    assert found.layer_offsets == [None, None, None, [[]]]
    assert [found.learns_alpha(layer) for layer in range(4)] == [True, False, True, False]
    assert found.layer_patterns(0) is None
    assert found.layer_patterns(3) == (Pattern(4),)


def test_layer_alphas_count_all_layers_whatever_their_type() -> None:
    kinds = ["full_attention", "fibonacci_attention", "sliding_attention", "fibonacci_attention"]
    expected = layer_patterns("fibonacci", "linear", layers=4, window=4, rungs=8)
    found = config(layer_types=kinds)
    assert found.layer_offsets == [None, [list(expected[1].offsets)], [[]], [list(expected[3].offsets)]]


def test_power_of_two_reaches_as_far_as_the_training_length_unless_told() -> None:
    assert config("power_of_two").base_rungs == (1, 2, 4, 8, 16, 32)
    assert config("power_of_two", max_position_embeddings=65).base_rungs[-1] == 64
    assert config("power_of_two", rung_reach=200).base_rungs[-1] == 128


def test_sliding_window_is_transformers_count_of_keys() -> None:
    assert config(window=4).sliding_window == 5


def test_full_reach_bounds_the_full_layers_of_a_saved_model(tmp_path):
    config("mixture").save_pretrained(tmp_path)
    whole = FibAttnConfig.from_pretrained(tmp_path)
    assert whole.layer_reach(1) is None
    bounded = FibAttnConfig.from_pretrained(tmp_path, full_reach=9)
    assert [bounded.layer_reach(layer) for layer in (0, 1, 2, 3)] == [whole.layer_reach(0), 9, 4, whole.layer_reach(3)]
    bounded.save_pretrained(tmp_path / "again")
    assert FibAttnConfig.from_pretrained(tmp_path / "again").layer_reach(1) == 9
    with pytest.raises(InputError, match="full_reach is 0; it must be at least 1"):
        config("mixture", full_reach=0)


def test_a_bound_that_is_set_after_loading_is_refused():
    made = model("mixture")
    made.config.full_reach = 9
    with pytest.raises(InputError, match=r"was None when .* and is 9 now; load it anew: .*full_reach=9"):
        made.generate(tokens(1, 5), max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_configurations_come_back_equal(kind: str, tmp_path: Path) -> None:
    made = config(kind)
    made.save_pretrained(tmp_path)
    for loaded in (FibAttnConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is FibAttnConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == made.to_dict()
    again = FibAttnConfig.from_dict(json.loads(made.to_json_string(use_diff=False)))
    assert again.to_dict() == made.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "fibattn"
    assert stored["layer_offsets"] == made.layer_offsets
    assert (stored["window"], stored["base"], stored["schedule"]) == (made.window, made.base, made.schedule)


def test_loading_with_a_changed_window_is_refused_until_the_offsets_are_left_out(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layer_offsets\[0\] is .* window 9 .*leave layer_offsets out"):
        FibAttnConfig.from_pretrained(tmp_path, window=9)
    changed = FibAttnConfig.from_pretrained(tmp_path, window=9, layer_offsets=None)
    assert changed.layer_offsets == config(window=9).layer_offsets
    untouched, unused = FibAttnConfig.from_pretrained(tmp_path, use_cache=False, other=1, return_unused_kwargs=True)
    assert (untouched.use_cache, unused) == (False, {"other": 1})


def test_a_model_of_a_configuration_changed_afterwards_is_refused() -> None:
    changed = config()
    changed.window = 3
    with pytest.raises(InputError, match=r"layer_offsets\[0\] is .* window 3 .*leave layer_offsets out"):
        FibAttnForCausalLM(changed)


def test_stored_offsets_that_contradict_the_rest_are_refused() -> None:
    offsets = config().layer_offsets
    assert offsets is not None
    offsets[2] = [[7, 11]]
    with pytest.raises(InputError, match=r"layer_offsets\[2\] is \[\[7, 11\]\], but base 'fibonacci'.*correct one"):
        config(layer_offsets=offsets)
    with pytest.raises(InputError, match=r"layer_offsets has 3 entries for 4 layers"):
        config(layer_offsets=offsets[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, r"window is -1; it must be 0 or more"),
        ({"sliding_window": 4}, r"sliding_window is 4; it follows from the window.* give window, one less"),
        ({"full_reach": 2**63}, r"full_reach is \d+; it must be at least 1"),
        ({"rungs": -1}, r"the number of rungs is -1; it must be from 0 to 90"),
        ({"base": "power_of_two", "rung_reach": 0}, r"reach of a power-of-two base is 0; it must be at least 1"),
        ({"max_offset": -5}, r"max_offset is -5; it must be 0 or more, or None"),
        ({"base": "lucas"}, r"base is 'lucas'; this version knows fibonacci, power_of_two\. .*newer fibattn"),
        ({"schedule": "zigzag"}, r"schedule is 'zigzag'; this version knows fixed, linear, coprime, learned"),
        ({"num_key_value_heads": 3}, r"4 attention heads do not divide into 3 KV heads; use a multiple"),
        ({"num_key_value_heads": 8}, r"4 attention heads do not divide into 8 KV heads"),
        ({"head_dim": 7}, r"head_dim is 7, and RoPE needs an even head size"),
        ({"hidden_size": 36}, r"head_dim is 9, and RoPE needs .* hidden_size is a multiple of .* \(8\)"),
        ({"hidden_size": 7}, r"hidden_size is 7, which does not divide by 4 attention heads; use a multiple of twice"),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types has 3 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, r"layer_types\[0\] is 'linear_attention'; the types are fib"),
        ({"no_rope_layers": [1, 1]}, r"no_rope_layers has 2 entries for 4 layers"),
        ({"no_rope_layers": [1, 2, 1, 1]}, r"no_rope_layers is \[1, 2, 1, 1\]; each entry is 1 .* or 0"),
        *(
            ({name: 0}, rf"{name} is 0; it must be at least 1")
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
        ),
        ({"num_attention_heads": -4}, r"num_attention_heads is -4; it must be at least 1"),
        ({"rung_reach": -3, "base": "power_of_two"}, r"reach of a power-of-two base is -3"),
    ],
)
def test_bad_values_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


@pytest.mark.parametrize("changes", [{"window": "wide"}, {"window": 2.5}, {"layer_types": "full_attention"}])
def test_values_of_the_wrong_type_are_refused_with_the_fields_name(changes: dict) -> None:
    (name,) = changes
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        config(**changes)


def test_kv_heads_have_scales_of_their_own() -> None:
    made = config(stagger_heads=True, num_hidden_layers=3, window=4, rungs=8)
    ramp = [0.5 + slot / 5 for slot in range(6)]  # the layers of the first KV head, then those of the second
    expected = [
        [list(Pattern.fibonacci(4, ramp[layer], 8).offsets), list(Pattern.fibonacci(4, ramp[3 + layer], 8).offsets)]
        for layer in range(3)
    ]
    assert made.layer_offsets == expected
    with pytest.raises(InputError, match="learned scale is one for all heads"):
        config(stagger_heads=True, schedule="learned")


@pytest.mark.parametrize(
    ("name", "advice"), [("windw", "did you mean 'window'"), ("full_layers", "the fields are vocab_size, ")]
)
def test_a_field_that_there_is_not_is_refused_by_its_name(name: str, advice: str) -> None:
    with pytest.raises(InputError, match=f"FibAttnConfig has no '{name}': {advice}"):
        FibAttnConfig(**{name: 3})


@pytest.mark.parametrize("kind", [FibAttnConfig, AutoConfig])
def test_loading_refuses_what_is_nearly_a_field_and_takes_the_loaders_options(kind: type, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="FibAttnConfig has no 'windw': did you mean 'window'"):
        kind.from_pretrained(tmp_path, windw=3)
    # What `transformers serve` gives a configuration that it loads, among others.
    options = {"trust_remote_code": True, "device_map": "cpu", "tqdm_class": None, "local_files_only": True}
    assert kind.from_pretrained(tmp_path, **options).window == config().window


def test_what_transformers_knows_is_taken() -> None:
    of_any_model = {"torch_dtype": "float16", "num_labels": 3, "attn_implementation": "eager", "name_or_path": "there"}
    written_in_code = {"temperature": 0.5, "rope_theta": 500.0, "is_decoder": True, "output_attentions": False}
    found = config(**of_any_model, **written_in_code, quantization_config={"quant_method": "int8"})
    assert (str(found.dtype), found.num_labels, found._attn_implementation) == ("torch.float16", 3, "eager")
    assert found.rope_parameters["rope_theta"] == 500.0
    assert FibAttnConfig(**found.to_dict()).quantization_config == {"quant_method": "int8"}


def test_a_file_may_have_fields_of_a_newer_transformers(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_next_year": 1, "transformers_version": "9.0.0"}))
    assert FibAttnConfig.from_pretrained(tmp_path).of_next_year == 1
    for flags in ({"attn_implementation": "eager"}, {"dtype": "bfloat16"}, {"torch_dtype": "auto"}):
        assert FibAttnForCausalLM.from_pretrained(tmp_path, **flags).config.of_next_year == 1
