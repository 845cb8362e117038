"""`python -m benchmarks decoding`: what is timed, and the size of the caches; not how fast it is."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main


def test_caches_are_as_large_as_their_models_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--contexts", "2048", "512", "--models", "hybrid", "dense", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["decoding", *words]) == 0
    result = json.loads((tmp_path / "decoding.json").read_text())
    rows = {(row["model"], row["context"]): row for row in result["models"]}
    assert list(rows) == [("hybrid", 512), ("hybrid", 2048), ("dense", 512), ("dense", 2048)]
    # Sixteen layers with two KV heads of 64, float32; some room for the steps that are timed.
    a_row = 2 * 2 * 64 * 4
    for context in (512, 2048):
        dense = rows["dense", context]
        assert 16 * context < dense["cache_rows"] <= 16 * (context + 256)
        assert dense["cache_bytes"] == dense["cache_rows"] * a_row
    # The bound of the default recipe: no layer has more rows than a training sequence has tokens.
    assert rows["hybrid", 512]["cache_rows"] == rows["hybrid", 2048]["cache_rows"] <= 16 * 1024
    assert [(row["window"], row["context"]) for row in result["operator"]] == [
        (window, context) for window in (12, 128) for context in (512, 2048)
    ]
    assert (tmp_path / "decoding.csv").read_text().startswith("model,context,ms,cache_mib\nhybrid,512,")
    assert "dense, 2,048 tokens: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decoding", "--contexts", "0"), "contexts (0,)"),
        (("training-step", "--models", "hybird"), "there is no model 'hybird': did you mean 'hybrid'"),
        (("training-step", "--timed", "15"), "timed is 15, sequence_length 1024; expected a multiple of 10"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
