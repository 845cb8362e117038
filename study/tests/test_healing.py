"""The probe `healing`: rows of conversions and what healing gives back, kept as they come."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fibattn import FibAttnConfig, FibAttnForCausalLM, files, sealed
from fibattn.evaluation.placement import evenly_kept
from study.__main__ import main


@pytest.fixture(scope="module")
def dense(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = FibAttnConfig(
        vocab_size=len(tokenizer), layer_types=["full_attention"] * 4, max_position_embeddings=64, **shape
    )
    FibAttnForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sealed.seal(folder)
    return folder


def probe(dense: Path, prepared: Path, *words: object) -> int:
    command = ["healing", "--model", dense, "--data", prepared, "--window", 8, "--eval-tokens", 1024, "--factors", 1, 4]
    command += ["--search-tokens", 256, "--sequences-per-step", 4, "--counts", 1, *words]
    return main(["probe", *map(str, command)])


def test_rows_are_measured_kept_and_added_to(
    dense: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "healing.json"
    words = ["--tokens", 40_000, "--work", tmp_path / "work", "--out", out]
    assert probe(dense, prepared, *words, "--parts", 0, 0.02, "--placements", "evenly", "--shapes", "rungs") == 0
    first, plain, healed = files.read_json(out)["rows"]
    assert (first["shape"], first["rise"], first["layers"]) == ("dense", 0, "all")
    assert plain["layers"] == healed["layers"] == ", ".join(map(str, evenly_kept(4, 1))) == "3"
    assert (plain["part"], healed["part"]) == (0, 0.02)
    assert healed["perplexity"] < plain["perplexity"] < 1.2 * first["perplexity"]
    assert healed["rise"] == pytest.approx(100 * (healed["perplexity"] / first["perplexity"] - 1))
    assert {row["length"] for row in healed["sets"]} == {64, 256}
    assert healed["far"]["256"] == pytest.approx(
        next(row["perplexity"] for row in healed["sets"] if row["length"] == 256)
    )
    assert set(healed["copied"]) == {"copied 256", "copied 512"}
    assert not (tmp_path / "work").exists()
    words += ["--parts", 0, "--placements", "measured", "worst"]
    assert probe(dense, prepared, *words) == 0
    found = files.read_json(out)
    assert found["rows"][:3] == [first, plain, healed]
    added = [(row["placement"], row["shape"], row["keys"]) for row in found["rows"][3:]]
    assert added == [
        (place, shape, keys)
        for place in ("measured", "worst")
        for shape, keys in (("rungs", plain["keys"]), ("window", round(plain["keys"])))
    ]
    for shape in ("rungs", "window"):
        search = found["searches"][f"{shape}, 1"]
        rows = {row["placement"]: row["layers"] for row in found["rows"][3:] if row["shape"] == shape}
        assert rows["measured"] == str(search["search"][0]["layer"])
        assert rows["worst"] == str(min(range(4), key=lambda layer: search["alone"][layer]))
    capsys.readouterr()
    assert probe(dense, prepared, *words, "--learning-rate", 1) == 2
    assert "learning_rate was 0.001 and is now 1.0" in capsys.readouterr().err


def test_a_model_without_a_recipe_must_say_its_tokens(
    dense: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dense, tmp_path / "model")
    assert probe(tmp_path / "model", prepared, "--out", tmp_path / "found.json") == 2
    assert "which says how many tokens the model was trained on; give --tokens" in capsys.readouterr().err
