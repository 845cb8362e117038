"""`python -m benchmarks decoding`: what is timed, and the size of the caches; not how fast it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.decoders import least_bytes
from fibattn import FibAttnConfig, FibAttnForCausalLM


def test_caches_are_as_large_as_their_models_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--contexts", "2048", "512", "--batches", "2", "--models", "hybrid", "dense", "--device", "cpu"]
    words += ["--prompts", "64"]
    assert main(["decoding", *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "decoding.json").read_text())
    rows = {(row["model"], row["context"]): row for row in result["models"]}
    assert list(rows) == [("hybrid", 512), ("hybrid", 2048), ("dense", 512), ("dense", 2048)]
    # Two sequences, sixteen layers with two KV heads of 64, float32; some room for the steps that are timed.
    a_row = 2 * 2 * 2 * 64 * 4
    for context in (512, 2048):
        dense = rows["dense", context]
        assert 16 * context < dense["cache_rows"] <= 16 * (context + 256)
        assert dense["cache_bytes"] == dense["cache_rows"] * a_row
    # The bound of the default recipe: no layer has more rows than a training sequence has tokens.
    assert rows["hybrid", 512]["cache_rows"] == rows["hybrid", 2048]["cache_rows"] <= 16 * 1024
    assert [(row["model"], row["prompt"]) for row in result["prompts"]] == [("hybrid", 64), ("dense", 64)]
    assert [(row["window"], row["context"]) for row in result["operator"]] == [
        (window, context) for window in (12, 128) for context in (512, 2048)
    ]
    assert (tmp_path / "decoding.csv").read_text().startswith("model,context,ms,cache_mib\nhybrid,512,")
    assert "dense, 2,048 tokens, 2 at once: " in capsys.readouterr().out


def test_what_a_step_must_read_is_the_weights_and_the_keys_it_attends_to() -> None:
    shape: Any = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers: Any = {"num_hidden_layers": 2, "layer_types": ["fibonacci_attention", "full_attention"], "window": 3}
    model = FibAttnForCausalLM(FibAttnConfig(vocab_size=100, rungs=6, schedule="fixed", **shape, **layers))
    weights = sum(one.numel() for one in model.parameters()) * 4
    # Distances 0 to 3, 5, 8 and 13; keys and values of two heads of 8.
    assert least_bytes(model, 50, 3) == weights + 3 * (7 + 51) * 2 * 2 * 8 * 4
    assert least_bytes(model, 2, 1) == weights + (3 + 3) * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decoding", "--contexts", "0"), "contexts (0,)"),
        (("training-step", "--models", "hybird"), "there is no model 'hybird': did you mean 'hybrid'"),
        (("training-step", "--vocab-size", "2"), "vocab_size is 2; expected 3 to 65,536"),
        (("training-step", "--timed", "15"), "timed is 15, sequence_length None; expected a multiple of 10"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
