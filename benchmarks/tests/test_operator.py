"""`python -m benchmarks operator`: its checks find wrong numbers, its counts are right, its files are whole."""

import csv
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.__main__ import main
from benchmarks.operator import check
from benchmarks.operator.cases import OURS, SUITES, Case, Grid
from benchmarks.operator.providers import PROVIDERS, Call, flex_blocks
from fibattn.attention import attend
from fibattn.pattern import Pattern


def case(length: int = 100, window: int = 12, dtype: str = "float32") -> Case:
    return Case("small", window, length, 2, dtype, "cpu")


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name not in ("flex", "dense-cudnn")])
@pytest.mark.parametrize("length", [1, 100])
def test_every_provider_computes_what_it_says(name: str, length: int) -> None:
    chosen, provider = case(length), PROVIDERS[name]
    assert provider.obstacle(chosen, True) is None
    found = check.errors(provider.setup(chosen), chosen, provider.computes(chosen), backward=True)
    assert found.keys() == {"out", "dq", "dk", "dv"}
    assert max(found.values()) < check.TOLERANCE["float32"]


def test_dense_and_sparse_are_not_the_same_thing() -> None:
    chosen = case()
    found = check.errors(PROVIDERS["dense-flash"].setup(chosen), chosen, chosen.pattern, backward=False)
    assert found["out"] > 0.05


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_a_wrong_gradient_is_found(wrong: str) -> None:
    chosen = case()

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        index = ("dq", "dk", "dv").index(wrong)
        halved = [x if i != index else 0.5 * x + 0.5 * x.detach() for i, x in enumerate(inputs)]
        return attend(*halved, chosen.pattern)  # pyright: ignore

    found = check.errors(Call(function), chosen, chosen.pattern, backward=True)
    assert [name for name, error in found.items() if error > check.TOLERANCE["float32"]] == [wrong]


def test_a_missing_distance_is_found() -> None:
    chosen = case()
    few = Pattern(chosen.window, chosen.pattern.offsets[1:])
    found = check.errors(Call(lambda q, k, v: attend(q, k, v, few)), chosen, chosen.pattern, backward=True)  # pyright: ignore
    assert all(error > check.TOLERANCE["float32"] for error in found.values())


def test_bytes_are_those_of_the_tensors() -> None:
    for dtype in ("float32", "bfloat16"):
        chosen = case(dtype=dtype)
        inputs = [x.requires_grad_() for x in chosen.inputs()]
        out, lse = attend(*inputs, chosen.pattern, return_lse=True)
        grads = torch.autograd.grad(out.sum(), inputs)
        assert chosen.forward_bytes == sum(x.nbytes for x in (*inputs, out))
        assert chosen.training_bytes == chosen.forward_bytes + sum(x.nbytes for x in (*inputs, out, out, *grads))
        assert chosen.tensor_bytes == sum(x.nbytes for x in (*inputs, out, out, *grads, lse))


@pytest.mark.parametrize("pattern", [Pattern(0), Pattern.fibonacci(12), Pattern(300, (301, 640, 5000))])
@pytest.mark.parametrize("length", [1, 128, 129, 1000])
def test_blocks_of_flex_attention_are_those_the_mask_touches(pattern: Pattern, length: int) -> None:
    blocks = -(-length // 128)
    own = torch.arange(blocks * 128)
    mask = torch.isin(own[:, None] - own, torch.tensor(pattern.distances))
    touched = mask.view(blocks, 128, blocks, 128).any(3).any(1)
    counts, indices = flex_blocks(pattern, length)
    assert counts.shape == (1, 1, blocks)
    assert indices.shape == (1, 1, blocks, blocks)
    for row in range(blocks):
        found = indices[0, 0, row, : counts[0, 0, row]].tolist()
        assert sorted(found) == touched[row].nonzero()[:, 0].tolist()


def test_times_are_medians_of_several_runs() -> None:
    calls = []
    times = timing.measure(lambda: calls.append(1), "cpu")
    assert len(calls) == times.runs + 1
    assert times.runs >= 3
    assert times.least <= times.median <= times.most


def test_suites_have_what_the_documentation_quotes() -> None:
    gpu = [one for grid in SUITES["cuda"] for one in grid.cases("cuda", "bfloat16")]
    assert Case("small", 12, 1024, 32, "bfloat16", "cuda") in gpu
    assert Case("large", 12, 131_072, 1, "bfloat16", "cuda") in gpu
    assert Case("small", 12, 2**20, 1, "bfloat16", "cuda") in gpu
    assert {one.length for one in SUITES["cpu"][1].cases("cpu", "float32")} == {65_536}
    assert [one.batch for one in Grid("small", (12,), (7,), tokens=20).cases("cpu", "float32")] == [3]


def test_a_run_writes_json_csv_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--lengths", "65", "--providers", OURS[0], "dense-cudnn", "--windows", "4"]
    assert main(["operator", *flags, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not run: dense-cudnn: needs an NVIDIA GPU, not cpu (small W=4 65 × 1)" in printed
    result = json.loads((tmp_path / "attention.json").read_text())
    assert result["environment"]["torch"] == version("torch")
    rows = {row["provider"]: row for row in result["rows"]}
    assert rows.keys() == {OURS[0], "dense-cudnn"}
    ours = rows[OURS[0]]
    floor = ours["floor_us"] / 1e6 * result["copy_bytes_per_second"]
    assert floor == pytest.approx(case(65).forward_bytes / 2)
    assert ours["right"]
    assert ours["forward"]["useful_gb_per_second"] == pytest.approx(floor / ours["forward"]["median"] / 1e3)
    assert ours["peak_bytes"] > 2**26
    assert "forward" not in rows["dense-cudnn"]
    with (tmp_path / "attention.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["length"], row["pass"]) for row in table] == [("65", "forward"), ("65", "forward_backward")]
    assert float(table[0]["median_us"]) == ours["forward"]["median"]
    figure = (tmp_path / "attention.svg").read_text()
    assert all(
        f">{words}<" in figure for words in ("fibattn, W = 4", "8/2 heads of 64: forward", "ms for a million tokens")
    )


def test_a_dry_run_says_who_can_run_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--lengths", "1024", "65536", "--dry-run", "--out", str(tmp_path)]
    assert main(["operator", *flags]) == 0
    printed = capsys.readouterr().out
    assert "fibattn: this project's operator\n  can run (small W=12 1,024 × 1; small W=12 65,536 × 1)" in printed
    assert "needs an NVIDIA GPU, not cpu" in printed
    assert "its scores would take 128 GiB, the limit here is 8 (small W=12 65,536 × 1)" in printed
    assert "forward only: FlexAttention has no backward on a CPU" in printed or "needs a C++ compiler" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--providers", "flash"], "there is no provider 'flash'; there are fibattn, "),
        (["--windows", "128"], "--shape, --windows and --tokens go with --lengths; say which lengths"),
        (["--lengths", "0"], "lengths and tokens must be at least 1"),
        (["--lengths", "8", "--windows", "-1"], "windows at least 0"),
        (["--lengths", "8", "--tokens", "0"], "tokens 0"),
    ],
)
def test_bad_flags_give_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operator", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operator", "--device", "cuda"]) == 2
    assert "PyTorch finds no NVIDIA GPU here; use --device cpu" in capsys.readouterr().err
