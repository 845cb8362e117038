"""The verb `probe`: tables, JSON files, mistakes."""

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fibattn import FibAttnConfig, FibAttnForCausalLM, files
from fibattn.machine import device_name
from study.__main__ import main

Output = pytest.CaptureFixture[str]


def probe(*words: object) -> int:
    return main(["probe", *map(str, words)])


@pytest.fixture(scope="module")
def model(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    FibAttnForCausalLM(
        FibAttnConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_trained_model_is_probed(model: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "new" / "lego.json"
    assert probe("lego", model, "--items", 4, "--out", out) == 0
    result = files.read_json(out)
    assert (result["probe"], result["model"]) == ("lego", str(model))
    assert [row["items"] for row in result["rows"]] == [4, 4, 4]
    assert {row["made"]["torch"] for row in result["rows"]} == {version("torch")}
    printed = capsys.readouterr().out
    for word in ("accuracy", "margin", "0.500", f"written to {out}"):
        assert word in printed


@pytest.mark.parametrize("name", ["lego", "ruler"])
def test_every_model_has_a_file_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("one", "two"):
        shutil.copytree(model, tmp_path / run / "model")
        assert probe(name, run, "--items", 1) == 0
    shutil.copytree(model, tmp_path / "three")
    monkeypatch.chdir(tmp_path / "three")
    assert probe(name, ".", "--items", 1) == 0
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("**/probes/*"))
    names = [f"{name}-{run}.json" for run in ("one", "two")]
    assert written == [
        *(Path("study/results/probes") / one for one in names),
        Path(f"three/study/results/probes/{name}-three.json"),
    ]


def test_small_models_are_trained_and_probed(tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "recall.json"
    shape = ("--length", 128, "--layers", 2, "--window", 4, "--distances", 20)
    short = (*shape, "--batch-tokens", 128, "--asked", 4, "--seeds", 0)
    assert probe("recall", "--names", "window", "stagger", *short, "--steps", 1, "--out", out) == 0
    assert [row["variant"] for row in files.read_json(out)["rows"]] == ["window", "window", "stagger", "stagger"]
    assert "passkey" in capsys.readouterr().out
    result = files.read_json(out)
    for row in result["rows"]:
        row["made"]["device"] = "another"
    files.write_json(out, result)
    before = result["rows"]
    assert probe("recall", "--names", "dense", *short, "--steps", 1, "--out", out) == 0
    rows = files.read_json(out)["rows"]
    assert rows[:4] == before
    assert [row["variant"] for row in rows[4:]] == ["dense", "dense"]
    assert "another" not in {row["made"]["device"] for row in rows[4:]}
    assert probe("recall", "--names", "dense", *short, "--steps", 2, "--out", out) == 2
    assert "steps was 1 and is now 2. Give a new --out" in capsys.readouterr().err
    assert files.read_json(out)["rows"] == rows


def test_a_result_that_is_there_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Results are published in the place where probes write by themselves."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "one")
    assert probe("lego", "one", "--items", 1) == 0
    (written,) = (tmp_path / "study" / "results" / "probes").iterdir()
    before = written.read_bytes()
    assert probe("lego", "one", "--items", 2) == 2
    out = written.relative_to(tmp_path)
    assert f"{out} is there already; give --out {out} to replace it, or another file" in capsys.readouterr().err
    assert written.read_bytes() == before
    assert probe("lego", "one", "--items", 2, "--out", out) == 0
    assert written.read_bytes() != before
    assert probe("flops") == 0
    assert probe("flops", "--study", "smoke") == 0
    assert sorted(path.name for path in written.parent.glob("flops*")) == ["flops-paper.json", "flops-smoke.json"]


def test_latency_leaves_the_published_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "study" / "results" / "probes" / "latency.json"
    files.write_json(published, {"probe": "latency", "device": "another"})
    assert probe("latency", "--lengths", 16, "--tokens", 16, "--warmup", 0, "--repeats", 1) == 0
    assert files.read_json(published) == {"probe": "latency", "device": "another"}
    (written,) = published.parent.glob("latency-*.json")
    assert files.read_json(written)["device"] == device_name()


def test_operations_of_every_model_of_a_study(tmp_path: Path) -> None:
    out = tmp_path / "flops.json"
    assert probe("flops", "--out", out) == 0
    rows = {row["model"]: row for row in files.read_json(out)["rows"]}
    assert len(rows) >= 22
    assert rows["dense"]["attention_share"] == pytest.approx(0.16, abs=0.001)
    assert probe("flops", "--study", "ladder", "--out", out) == 0
    rows = {row["model"]: row for row in files.read_json(out)["rows"]}
    few, long = rows["few-eight-64"], rows["long"]
    assert (few["vocabulary"], long["vocabulary"], few["length"], long["length"]) == (8192, 32_768, 1024, 2048)
    assert few["head"] == 2 * 8192 * 768
    assert long["attention"] > rows["batch"]["attention"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("leggo",), "there is no probe 'leggo': did you mean 'lego'?"),
        (("lego", "nowhere"), "nowhere holds no model"),
        (("flops", "--length", "0"), "length is 0; it must be at least 1"),
        (("flops", "--out", "/proc/flops.json"), "/proc/flops.json cannot be written"),
        (("retrieval", "--steps", "0"), "steps 0"),
        (("retrieval", "--seeds", "-1"), "none below 0"),
        (("recall", "--seeds", "-1"), "none below 0"),
        (("recall", "--learning-rate", "nan"), "optimizer.learning_rate is nan; it must be above 0"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys: Output) -> None:
    assert probe(*words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_probes_are_listed(capsys: Output) -> None:
    assert probe("--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("retrieval", "recall", "ruler", "lego", "harness", "latency", "flops"))
