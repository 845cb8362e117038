"""The probe `healing`: rows of conversions and what healing gives back, kept as they come."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fibattn import FibAttnConfig, FibAttnForCausalLM, files, sealed
from fibattn.evaluation.placement import evenly_kept
from fibattn.training.recipe import ModelRecipe, Recipe
from fibattn.training.run import train
from study.__main__ import main
from study.probes import healing
from study.probes.copying import copying


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two sequences say whether random tokens are copied, not 32; what they say is tested in `test_copying.py`."""
    monkeypatch.setattr(healing, "copying", partial(copying, sequences=2))


@pytest.fixture(scope="module")
def dense(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = FibAttnConfig(
        vocab_size=len(tokenizer), layer_types=["full_attention"] * 4, max_position_embeddings=64, **shape
    )
    torch.manual_seed(0)
    FibAttnForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sealed.seal(folder)
    return folder


def probe(dense: Path, prepared: Path, *words: object) -> int:
    command = ["healing", "--model", dense, "--data", prepared, "--window", 8, "--eval-tokens", 1024, "--factors", 1, 4]
    command += ["--search-tokens", 256, "--sequences-per-step", 4, *words]
    return main(["probe", *map(str, command)])


def test_rows_are_measured_kept_and_added_to(
    dense: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "healing.json"
    words = ["--tokens", 40_000, "--work", tmp_path / "work", "--out", out]
    files.write_text(tmp_path / "work" / "thesis.txt", "not the probe's")
    assert probe(dense, prepared, *words, "--rows", "evenly:1:rungs:0", "evenly:1:rungs:0.02") == 0
    first, plain, healed = files.read_json(out)["rows"]
    assert (first["shape"], first["rise"], first["layers"]) == ("dense", 0, "all")
    assert plain["layers"] == healed["layers"] == ", ".join(map(str, evenly_kept(4, 1))) == "3"
    assert [(row["part"], row["learning_rate"]) for row in (plain, healed)] == [(0, None), (0.02, 3e-4)]
    assert healed["perplexity"] < plain["perplexity"] < 1.2 * first["perplexity"]
    assert healed["rise"] == pytest.approx(100 * (healed["perplexity"] / first["perplexity"] - 1))
    assert {row["length"] for row in healed["sets"]} == {64, 256}
    assert healed["far"]["256"] == pytest.approx(
        next(row["perplexity"] for row in healed["sets"] if row["length"] == 256)
    )
    assert set(healed["copied"]) == {"copied 256", "copied 512"}
    assert [one.name for one in (tmp_path / "work").iterdir()] == ["thesis.txt"]
    capsys.readouterr()
    added = [("measured", "rungs"), ("measured", "window"), ("worst", "rungs")]
    words += ["--rows", *(f"{placement}:1:{shape}:0" for placement, shape in added), "worst:1:rungs:1e-3"]
    assert probe(dense, prepared, *words) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "1 rows failed" in said.splitlines()[-1]
    found = files.read_json(out)
    assert found["rows"][:3] == [first, plain, healed]
    rows = {(row["placement"], row["shape"]): row for row in found["rows"][3:]}
    assert list(rows) == added
    assert [row["keys"] for row in rows.values()] == [plain["keys"], round(plain["keys"]), plain["keys"]]
    best = str(found["search"]["search"][0]["layer"])
    assert rows["measured", "rungs"]["layers"] == rows["measured", "window"]["layers"] == best
    alone = found["search"]["alone"]
    assert rows["worst", "rungs"]["layers"] == str(min(range(4), key=lambda layer: alone[layer]))
    capsys.readouterr()
    assert probe(dense, prepared, *words, "--matching", 1) == 2
    assert "matching was 0.1 and is now 1.0" in capsys.readouterr().err
    assert probe(dense, prepared, *words, "--rows", "measured:4:rungs") == 2
    assert "'measured:4:rungs' is no row; give PLACEMENT:COUNT:SHAPE:PART" in capsys.readouterr().err


def test_windows_by_their_width_and_blocks_have_places_of_their_own(
    dense: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "healing.json"
    rows = ["own:1:blocks-7-1:0", "own:1:blocks-15-4:0", "own:2:window-5:0", "own:1:blocks-7-1:0.02"]
    rows += ["evenly:1:window-23:0", "evenly:1:anchored-7-1:0"]
    words = ["--tokens", 40_000, "--work", tmp_path / "work", "--out", out, "--factors", 1, "--rows", *rows]
    assert probe(dense, prepared, *words) == 0
    found = files.read_json(out)
    first, few, all_of_them, narrow, healed, wide, anchored = found["rows"]
    assert found["search"] is None
    assert [row["keys"] for row in (few, all_of_them, narrow, wide, anchored)] == [24, 80, 6, 24, 24]
    for row, count in ((few, 1), (all_of_them, 1), (narrow, 2)):
        places = [step["layer"] for step in found["own"][row["shape"]]["search"]]
        assert row["layers"] == ", ".join(map(str, sorted(places[:count])))
    # Four blocks and a window of 16 are all that there is within 64 tokens, its training length.
    assert all_of_them["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert few["perplexity"] != pytest.approx(first["perplexity"], rel=1e-4)
    assert healed["part"] == 0.02
    assert healed["perplexity"] < few["perplexity"]


def test_fresh_models_have_a_converted_one_s_layers(prepared: Path, tmp_path: Path) -> None:
    shape = ModelRecipe(16, 24, 2, 2, 1, layer_types=("full_attention",))
    run = Recipe(prepared, tmp_path / "run", model=shape, sequence_length=64, sequences_per_step=4, steps=2)
    train(run)
    out, names = tmp_path / "healing.json", ("rungs", "blocks-7-1", "anchored-7-1")
    words = ["--out", out, "--work", tmp_path / "work", "--factors", 1, "--rows"]
    assert probe(run.out, prepared, *words, *(f"fresh:1:{name}:1" for name in names)) == 0
    _, rungs, free, anchored = files.read_json(out)["rows"]
    assert [row["keys"] for row in (free, anchored)] == [24, 24]
    assert len({row["perplexity"] for row in (rungs, free, anchored)}) == 3


def test_a_model_without_a_recipe_must_say_its_tokens(
    dense: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dense, tmp_path / "model")
    assert probe(tmp_path / "model", prepared, "--out", tmp_path / "found.json") == 2
    assert "which says what the model was trained on; give its run, or --tokens" in capsys.readouterr().err
