"""What a user's mistakes look like: one line that says what to do, status 2, and nothing finished is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Server
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from fibattn import FibAttnConfig, files
from fibattn.cli.main import main
from fibattn.training.presets import PRESETS
from fibattn.training.recipe_file import to_json

TINY = [
    "--sequence-length=32",
    "--sequences-per-step=2",
    "--micro-batch=2",
    "--steps=2",
    "--save-every=1",
    "--log-every=1",
    "--evaluate-tokens=256",
]
TINY += ["--model.hidden-size=32", "--model.intermediate-size=48", "--model.num-hidden-layers=3"]
TINY += ["--model.num-attention-heads=4", "--model.window=4"]


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "small", "--data", str(prepared), "--out", str(out), *TINY]) == 0
    return out


def says(capsys: pytest.CaptureFixture[str], *words: str | Path, status: int = 2) -> str:
    """Run a command that must fail, and return the one line it says last."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"fibattn {words[0]}: ")
    return last


def test_verb_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown verb 'trian': did you mean 'train'?" in says(capsys, "trian")


def test_flag_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "small", "--model.wndow", "3"])
    assert stopped.value.code == 2
    assert "--model.window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text; expected at least one document"),
        (b"text\0text" * 50, "is binary or UTF-16 (byte 0 at 4)"),
        (b"caf\xe9 au lait", "is not UTF-8: e9 at byte 3"),
        (b"one document only", "holds a single document"),
    ],
)
def test_text_that_cannot_be_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    line = says(capsys, "prepare", tmp_path / "out", tmp_path / "text.txt", "--vocab-size", "300")
    assert message in line
    assert str(tmp_path / "text.txt") in line or "'text'" in line
    assert not (tmp_path / "out" / "data.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.window -1", "window is -1; it must be 0 or more"),
        ("--model.num-key-value-heads 3", "4 attention heads do not divide into 3 KV heads"),
        ("--model.rungs -1", "the number of rungs is -1"),
        ("--model.rope-theta nan", "model.rope_theta is nan"),
        ("--model.no-rope-layers 1 1 0 1", "model.no_rope_layers has 4 entries for 3 layers"),
        ("--optimizer.learning-rate inf", "optimizer.learning_rate is inf"),
        ("--optimizer.beta2 1", "optimizer.beta2 is 1.0"),
        ("--data-seed -1", "data_seed is -1"),
        (f"--steps {10**15}", f"steps is {10**15}; it must be at most 2,147,483,647"),
        (f"--steps {10**9}", "1000000000 steps of 2 sequences are 2e+09, and the order of a run is a file of at most"),
        (f"--micro-batch {10**30}", "it must be at most 2,147,483,647"),
        (f"--optimizer.warmup-steps {10**30}", "it must be from 0 to 2,147,483,647"),
        (f"--sequence-length {10**27}", "it must be at most 2,147,483,647"),
        (f"--model.hidden-size {10**12}", "it must be at most 1,000,000"),
        (f"--model.num-hidden-layers {10**11}", "it must be at most 10,000"),
        ("--model.hidden-size 7", "hidden_size is 7, which does not divide by 4 attention heads"),
        ("--steps 0", "steps is 0; it must be at least 1"),
        ("--micro-batch 0", "micro_batch is 0; it must be at least 1"),
        ("--sequence-length 99999999", "one sequence of 99999999 needs 100000000; prepare more text"),
        ("--data nowhere", "nowhere holds no prepared data"),
    ],
)
def test_recipe_that_cannot_train_claims_no_folder(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    words = ["train", "small", "--data", prepared, "--out", tmp_path / "run", *TINY, *flags.split()]
    assert message in says(capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_lenght": 32}, "unknown key 'sequence_lenght': did you mean 'sequence_length'?"),
        ({"model": {"windw": 3}}, "unknown key 'windw': did you mean 'window'?"),
        ({"sequence_length": "32"}, "sequence_length is '32'; expected a whole number"),
        ({"order": "sorted"}, "order is 'sorted'; expected one of random, epochs"),
    ],
)
def test_recipe_file_with_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    files.write_json(tmp_path / "mine.json", to_json(PRESETS["small"]) | change)
    line = says(capsys, "train", tmp_path / "mine.json")
    assert message in line
    assert "mine.json" in line


def test_recipe_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.json").write_text('{"length":')
    assert "is not valid JSON" in says(capsys, "train", tmp_path / "cut.json")
    assert "did you mean 'small'?" in says(capsys, "train", "smal")


def test_the_default_recipe_is_the_hybrid(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--help"], ["train", "--data", "x", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert "hybrid when left out, small without a GPU. The defaults below are those of hybrid" in (
            capsys.readouterr().out
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the default is another")
def test_without_a_gpu_the_default_recipe_is_small(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(prepared), "--out", str(tmp_path / "run"), *TINY]) == 0
    assert "no GPU here: the recipe is small, a toy; for the full size name it: fibattn train hybrid" in (
        capsys.readouterr().out
    )
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())["optimizer"]
    assert (found["warmup_steps"], found["learning_rate"]) == (10, 0.024)


def test_altered_shard_is_named(
    prepared: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    shard = next(data.glob("shards/*/train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for words in (
        ["train", "small", "--data", data, "--out", tmp_path / "run", *TINY],
        ["eval", trained, "--data", data],
    ):
        assert f"the shard {shard} was altered" in says(capsys, *words)


def test_altered_order_is_named(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("order"))
    words = ["train", "small", "--data", data, *TINY]
    assert main([str(word) for word in [*words, "--out", tmp_path / "one"]]) == 0
    order = next(data.glob("order/*.npy"))
    order.write_bytes(order.read_bytes()[:-1] + b"\1")
    assert f"the order file {order} was altered" in says(capsys, *words, "--out", tmp_path / "two")


def test_model_cut_short_is_named(
    prepared: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words = ("eval", run, "--data", prepared, "--lengths", "32")
    assert f"{weights} has 1000 bytes" in says(capsys, *words)
    (run / "model" / "COMPLETE.json").unlink()
    assert str(run / "model") in says(capsys, *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lengths 0", "lengths (0,)"),
        ("--lengths 32 99999999", "fewer than one sequence of 99999999; evaluate shorter lengths"),
        ("--sets txts", "there is no held-out set 'txts': did you mean 'texts'?"),
        ("--data nowhere", "nowhere holds no prepared data"),
    ],
)
def test_evaluation_that_cannot_be(
    prepared: Path, trained: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert message in says(capsys, "eval", trained, "--data", prepared, *flags.split())


def test_model_that_is_none(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3" / "config.json").touch()
    line = says(capsys, "eval", tmp_path, "--data", prepared)
    assert "holds no model (config.json is missing)" in line
    assert line.endswith(f"finished run, or a checkpoint of this one, such as {tmp_path / 'checkpoint-3'}")


def test_disk_that_is_full_is_said_in_one_line(prepared: Path, forked: Server, tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk: a checkpoint's weights do not fit."""
    run = tmp_path / "run"
    words = ["train", "small", "--data", str(prepared), "--out", str(run), *TINY]
    code = (
        "import resource, sys\n"
        "from fibattn.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    stopped = forked.run([sys.executable, "-c", code, *words])
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert "fibattn train: a file grew larger than the system allows" in stopped.stderr.splitlines()[-1]
    assert not list(run.glob("checkpoint-*"))
    assert main(words) == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_a_checkpoint_is_sampled_and_evaluated(
    prepared: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    assert main(["sample", str(run / "checkpoint-1"), "so says", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("so says")
    assert main(["eval", str(run / "checkpoint-1"), "--data", str(prepared), "--lengths", "32"]) == 0
    assert list(json.loads((run / "evaluation-checkpoint-1-lengths-32.json").read_text())["sets"]) == ["texts"]
    (tmp_path / "other.txt").write_text("other words, 0123456789 of them, are read here and more of them there. " * 400)
    words = ["prepare", tmp_path / "other", tmp_path / "other.txt", "--tokenizer", run / "tokenizer", "--held-out", "0"]
    assert main([*map(str, words), "--val", f"other={prepared.parent / 'texts' / '00.txt'}"]) == 0
    assert main(["eval", str(run / "checkpoint-1"), "--data", str(tmp_path / "other"), "--lengths", "32"]) == 0
    assert "or a checkpoint of this one, such as" in says(capsys, "eval", run, "--data", prepared)


@pytest.mark.skipif(torch.cuda.is_available() or sys.prefix == sys.base_prefix, reason="needs a CPU and a venv")
def test_compiling_in_a_path_with_a_blank_is_refused_in_a_line(
    prepared: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my place").mkdir()
    (tmp_path / "my place" / "venv").symlink_to(sys.prefix)
    python = str(tmp_path / "my place" / "venv" / "bin" / "python")
    train = ["train", "small", "--data", str(prepared), "--out", str(tmp_path / "run"), *TINY, "--compile"]
    done = subprocess.run([python, "-m", "fibattn", *train], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    refused = f"PyTorch cannot compile for a CPU from or into '{tmp_path}/my place"
    assert f"{refused}/venv/" in done.stderr
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "my place"))
    if " " in sys.prefix:  # which is refused before
        refused = refused.replace(f"{tmp_path}/my place", str(Path(torch.__file__).parent))
    assert f"{refused}'" in says(capsys, "sample", trained, "--compile")


def test_a_tokenizer_with_gaps_between_its_ids_goes_all_the_way(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {letter: 2 * index for index, letter in enumerate(sorted(ByteLevel.alphabet()))} | {"<bos>": 700}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.add_special_tokens(["<bos>"])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>").save_pretrained(tmp_path / "gaps")
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    texts = str(prepared.parent / "texts")
    assert main(["prepare", data, texts, "--tokenizer", str(tmp_path / "gaps"), "--held-out", "0.15"]) == 0
    assert "vocabulary 701" in capsys.readouterr().out
    assert main(["train", "small", "--data", data, "--out", run, *TINY]) == 0
    assert FibAttnConfig.from_pretrained(Path(run) / "model").vocab_size == 701
    assert main(["eval", run, "--data", data]) == 0
    assert "| 32 (1×) |" in (Path(run) / "model" / "README.md").read_text()
    assert main(["sample", run, "so", "--max-new-tokens", "200", "--temperature", "3"]) == 0, "gaps are drawn, too"
