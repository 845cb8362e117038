"""`fibattn eval` from the outside: several held-out sets, the JSON and the tables, mistakes in one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Server

from fibattn import FibAttnConfig, FibAttnForCausalLM
from fibattn.cli.main import main
from fibattn.data.prepared import PreparedData
from fibattn.evaluation.sweep import default_output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with two sources, and so with two held-out sets."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("books", "docs"):
        (folder / name).mkdir()
        for number in range(12):
            words = (f"{name} {number * line % 17} and {line % 5}," for line in range(120))
            (folder / name / f"{number}.txt").write_text(" ".join(words))
    sources = [f"books={folder / 'books'}", f"docs={folder / 'docs'}"]
    flags = ["--vocab-size", "300", "--held-out", "0.3"]
    assert main(["prepare", str(folder / "data"), *sources, *flags]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FibAttnConfig(vocab_size=PreparedData.open(data).vocab_size, max_position_embeddings=32, window=4, **shape)
    folder = tmp_path_factory.mktemp("models") / "model"
    FibAttnForCausalLM(config).save_pretrained(folder)
    return folder


def test_all_sets_and_four_lengths_by_default(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "result.json"
    assert main(["eval", str(model), "--data", str(data), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["model"] == str(model)
    assert result["trained_at"] == 32
    assert list(result["sets"]) == ["books", "docs"]
    for name, rows in result["sets"].items():
        assert list(rows) == ["32", "64", "128", "256"]
        assert {row["targets"] for row in rows.values()} == {rows["256"]["targets"]}
        assert f"{name}: {rows['256']['targets']:,} tokens" in printed
        assert f"{rows['256']['perplexity']:.2f}" in printed
        assert f"{name}: perplexity of repeated pairs" in printed
        for row in rows.values():
            assert row["repeats"]["hits"]["targets"] + row["repeats"]["rest"]["targets"] == row["targets"]
        blocks = result["positions"][name]["blocks"]
        assert [block["last"] for block in blocks] == list(range(31, 256, 32))
        assert f"{blocks[-1]['cumulative_perplexity']:.2f}" in printed
    assert result["frequent_above"] == 1250
    assert "perplexity by position in a document" in printed
    assert "256 (8×)" in printed
    assert f"written to {out}" in printed


def test_without_lengths_it_goes_as_far_as_the_held_out_text(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert main(["eval", str(model), "--data", str(data), "--tokens", "200", "--out", str(out)]) == 0
    assert [list(rows) for rows in json.loads(out.read_text())["sets"].values()] == [["32", "64", "128"]] * 2


def test_chosen_sets_lengths_and_tokens(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    flags = [
        "--sets",
        "docs",
        "--lengths",
        "48",
        "16",
        "--tokens",
        "100",
        "--batch-tokens",
        str(10**30),
        "--out",
        str(out),
    ]
    assert main(["eval", str(model), "--data", str(data), *flags]) == 0
    rows = json.loads(out.read_text())["sets"]
    assert list(rows) == ["docs"]
    assert {length: row["targets"] for length, row in rows["docs"].items()} == {"16": 96, "48": 96}
    assert {name: one["documents"] for name, one in json.loads(out.read_text())["positions"].items()} == {"docs": 1}


def test_without_a_document_so_long_there_is_nothing_by_position(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = PreparedData.open(data).validation["books"]
    longest = int(np.diff(held_out.documents()).max())
    flags = ["--sets", "books", "--out", str(tmp_path / "result.json"), "--lengths"]
    for length, sets in ((longest - 1, ["books"]), (longest, [])):
        assert main(["eval", str(model), "--data", str(data), *flags, str(length)]) == 0
        assert list(json.loads((tmp_path / "result.json").read_text())["positions"]) == sets
        assert ("by position" in capsys.readouterr().out) == bool(sets)


def test_full_layers_can_be_bounded(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocab_size = PreparedData.open(data).vocab_size
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"layer_types": ["full_attention"] * 2, "no_rope_layers": [0, 0]}
    torch.manual_seed(0)
    made = FibAttnForCausalLM(
        FibAttnConfig(vocab_size=vocab_size, max_position_embeddings=16, initializer_range=0.3, **shape, **kinds)
    )
    made.save_pretrained(tmp_path / "full")

    def losses(*flags: str) -> list[float]:
        common = ["--data", str(data), "--sets", "docs", "--lengths", "16", "64", "--tokens", "128"]
        out = tmp_path / "result.json"
        assert main(["eval", str(tmp_path / "full"), *common, "--out", str(out), *flags]) == 0
        return [row["nll"] for row in json.loads(out.read_text())["sets"]["docs"].values()]

    whole, bounded = losses(), losses("--full-reach", "15")
    assert bounded[0] == pytest.approx(whole[0], abs=1e-5)
    assert abs(bounded[1] - whole[1]) > 1e-3
    assert json.loads((tmp_path / "result.json").read_text())["full_reach"] == 15
    made.config.full_reach = 15
    made.config.save_pretrained(tmp_path / "full")
    assert losses() == bounded, "as it was saved"
    assert json.loads((tmp_path / "result.json").read_text())["full_reach"] == 15
    assert losses("--full-reach", "None") == whole
    assert "full_reach" not in json.loads((tmp_path / "result.json").read_text())
    for wrong in (0, 2**63):
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "full"), "--data", str(data), "--full-reach", str(wrong)]) == 2
        printed = capsys.readouterr().err
        assert f"full_reach is {wrong}; it must be at least 1, below 2**63, or None" in printed
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sets", "boks"], "there is no held-out set 'boks': did you mean 'books'?"),
        (["--lengths", "0"], "each must be at least 1"),
        (["--tokens", "0"], "each must be at least 1"),
        (["--batch-tokens", "0"], "batch_tokens 0: each must be at least 1"),
        (["--full-reach", "0"], "full_reach is 0, but no layer of"),
        (
            ["--lengths", "9999999"],
            "fewer than one sequence of 9999999; evaluate shorter lengths, raise the limit, or hold out more text",
        ),
    ],
)
def test_bad_flags_give_one_line_and_no_file(
    flags: list[str], message: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert main(["eval", str(model), "--data", str(data), "--out", str(out), *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not out.exists()


def test_another_data_sets_vocabulary_is_refused(
    model: Path, data: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = (PreparedData.open(folder).vocab_size for folder in (data, prepared))
    assert own != other
    assert main(["eval", str(model), "--data", str(prepared)]) == 2
    assert f"the model has {own} token ids and the data {other}; use the data" in capsys.readouterr().err


def test_another_tokenizer_with_as_many_ids_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "a run" / "model")
    shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
    out = ["--out", str(tmp_path / "result.json"), "--lengths", "32"]
    assert main(["eval", str(folder), "--data", str(data), *out]) == 0
    (tmp_path / "other.txt").write_text("quite other words, 0123456789 of them, are read here. " * 400)
    ids = PreparedData.open(data).vocab_size
    flags = ["--vocab-size", str(ids), "--held-out", "0", "--val", f"other={tmp_path / 'other.txt'}"]
    (tmp_path / "more.txt").write_text("and still other words, 9876543210 of them, are read there. " * 400)
    assert main(["prepare", str(tmp_path / "data"), f"other={tmp_path / 'more.txt'}", *flags]) == 0
    assert PreparedData.open(tmp_path / "data").vocab_size == ids
    (tmp_path / "result.json").unlink()
    assert main(["eval", str(folder), "--data", str(tmp_path / "data"), *out]) == 2
    said = capsys.readouterr().err
    assert "was trained with another tokenizer than the data" in said
    assert f"fibattn prepare … --tokenizer '{folder}'" in said
    assert not (tmp_path / "result.json").exists()


def test_an_embedding_padded_past_the_tokenizer_is_evaluated(data: Path, model: Path, tmp_path: Path) -> None:
    padded = FibAttnForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(padded.config.vocab_size + 63)
    padded.save_pretrained(tmp_path / "padded")
    flags = ["--lengths", "16", "--out", str(tmp_path / "result.json")]
    assert main(["eval", str(tmp_path / "padded"), "--data", str(data), *flags]) == 0
    padded.resize_token_embeddings(256)
    padded.save_pretrained(tmp_path / "few")
    assert main(["eval", str(tmp_path / "few"), "--data", str(data), *flags]) == 2


def test_a_partial_evaluation_does_not_replace_the_whole_one(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = "--sequence-length 32 --sequences-per-step 2 --steps 1 --model.num-hidden-layers 3 --model.hidden-size 24"
    assert main(["train", "small", "--data", str(prepared), "--out", str(run), *small.split()]) == 0
    assert main(["eval", str(run), "--data", str(prepared)]) == 0
    whole, card = (run / "evaluation.json").read_bytes(), (run / "model" / "README.md").read_bytes()
    assert b"(8" in card
    for flags in (["--lengths", "16"], ["--tokens", "512"], ["--sets", "texts"]):
        assert main(["eval", str(run), "--data", str(prepared), *flags]) == 0
    assert (run / "evaluation.json").read_bytes() == whole
    assert (run / "model" / "README.md").read_bytes() == card
    names = ["evaluation-lengths-16.json", "evaluation-sets-texts.json", "evaluation-tokens-512.json"]
    assert sorted(path.name for path in run.glob("evaluation-*.json")) == names


def test_a_result_that_cannot_be_written_is_refused_before_the_evaluation(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "result.json"
    assert main(["eval", str(model), "--data", str(data), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert "cannot be written" in printed.err
    assert not printed.out


def test_without_a_run_a_result_is_only_printed(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(model), "--data", str(data), "--lengths", "16"]) == 0
    assert "not written, --out FILE keeps all" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own", [True, False])
def test_other_data_do_not_replace_the_result_of_a_runs_own(own: bool, model: Path, data: Path, tmp_path: Path) -> None:
    run, fingerprint = tmp_path / "run", PreparedData.open(data).fingerprint
    shutil.copytree(model, run / "model")
    (run / "recipe.json").write_text("{}")
    (run / "inputs.json").write_text(json.dumps({"data_fingerprint": fingerprint if own else "0" * 64}))
    assert main(["eval", str(run), "--data", str(data)]) == 0
    expected = "evaluation.json" if own else f"evaluation-data-{fingerprint[:8]}.json"
    assert [path.name for path in run.glob("evaluation*")] == [expected]


def test_a_runs_own_result_is_only_its_finished_models(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (tmp_path / "loose" / "model").mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    assert default_output(run / "model") == run / "evaluation.json"
    assert default_output(run / "model", "-full-reach-31") == run / "evaluation-full-reach-31.json"
    assert default_output(run / "checkpoint-56") == run / "evaluation-checkpoint-56.json"
    assert default_output(tmp_path / "loose" / "model") is default_output(tmp_path / "copied") is None


def test_lengths_that_never_end_together_are_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["eval", str(model), "--data", str(data), "--out", str(tmp_path / "r.json"), "--sets", "books", "--lengths"]
    assert main([*run, "32", "48"]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["sets"]["books"].values()
    assert {row["targets"] % 96 for row in rows} == {0}
    assert main([*run, "31", "101", "103"]) == 2
    assert "sequences of 31, 101, 103 end together only every 322,493 tokens" in capsys.readouterr().err


def test_folders_that_hold_nothing_are_named(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), "--data", str(data)]) == 2
    assert f"{tmp_path} holds no model (config.json is missing)" in capsys.readouterr().err
    assert main(["eval", str(model), "--data", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no prepared data" in capsys.readouterr().err


def test_the_command_prints_no_traceback(model: Path, data: Path, forked: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fibattn", "eval", model, "--data", data, "--sets", "none"]
    done = forked.run(command, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("fibattn eval: there is no held-out set 'none'")
    assert done.stderr.count("\n") == 1
