"""`fibattn pattern` from the outside: its numbers against sets counted here, its files, what it refuses."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fibattn.cli.main import main

FIBONACCI = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)


def linear_distances(layers: int, window: int) -> list[set[int]]:
    alphas = [0.5 + layer / (layers - 1) for layer in range(layers)]
    return [{*range(window + 1), *(round(a * rung) for rung in FIBONACCI if round(a * rung) > window)} for a in alphas]


def sums_of_at_most_one_each(layers: list[set[int]]) -> dict[int, int]:
    """Every distance of some path and the fewest layers it takes, by trying all."""
    fewest = {0: 0}
    for distances in layers:
        for start, used in list(fewest.items()):
            for distance in distances:
                fewest[start + distance] = min(fewest.get(start + distance, 99), used + 1)
    return fewest


def test_table_and_csv_equal_what_is_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layers", "3", "--window", "4", "--context", "300", "--out", str(tmp_path / "stack.svg")]
    assert main(["pattern", *flags]) == 0
    printed = capsys.readouterr().out
    layers, seen = linear_distances(3, 4), set()
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s+\d ", line)]
    assert len(rows) == 3
    for number, (row, distances) in enumerate(zip(rows, layers, strict=True)):
        inside = {d for d in distances if d < 300}
        expected = [number, 0.5 + number / 2, len(distances), max(distances), len(inside - seen)]
        seen |= inside
        expected += [len(seen), *sorted(d for d in distances if d > 4)]
        assert [float(word.replace(",", "")) for word in row] == expected
    assert f"union coverage: {len(seen)} of the 300 distances ({len(seen) - 5} beyond the window of 5 keys)" in printed
    fewest = sums_of_at_most_one_each(layers)
    gap = next(d for d in range(max(fewest)) if d not in fewest)
    assert f"{len(fewest):,} of the distances up to {max(fewest):,} are reached" in printed
    assert f"the first that no path reaches is {gap:,}" in printed
    with (tmp_path / "stack.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    attended = {(int(row["value"]), int(row["distance"])) for row in table if row["what"] == "layer that attends"}
    assert attended == {(layer, d) for layer, distances in enumerate(layers) for d in distances}
    found = {int(row["distance"]): row["value"] for row in table if row["what"] == "fewest layers"}
    assert found == {d: str(fewest.get(d, "")) for d in range(max(fewest) + 1)}
    assert (tmp_path / "stack.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "stack.svg").read_text()


NO_MATPLOTLIB = """
import sys
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
def find(name, *rest):
    return None if name.partition(".")[0] == "matplotlib" else found(name, *rest)
importlib.machinery.PathFinder.find_spec = find
from fibattn.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_only_a_drawing_needs_matplotlib_and_says_how_to_get_it(tmp_path: Path) -> None:
    def pattern(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", NO_MATPLOTLIB, "pattern", "--layers", "2", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    printed = pattern()
    assert printed.returncode == 0, printed.stderr
    assert "union coverage: " in printed.stdout
    asked = pattern("--out", "stack.svg")
    assert (asked.returncode, asked.stdout, asked.stderr.count("\n")) == (2, "", 1)
    assert "--out draws with matplotlib, which is not installed; install it: pip install" in asked.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("schedule", "union", "beyond"), [("fixed", 19, 10), ("linear", 133, 124)])
def test_coverage_of_the_papers_stack(
    schedule: str, union: int, beyond: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "stack.svg")
    assert main(["pattern", "--schedule", schedule, "--window", "8", "--farthest", "1023", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert f"union coverage: {union} of the 1,024 distances ({beyond} beyond the window of 9 keys)" in printed
    assert "every distance up to 1,023 is reached" in printed


def test_rungs_of_two_go_up_to_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base", "power_of_two", "--schedule", "fixed", "--layers", "1", "--window", "8", "--context", "300"]
    assert main(["pattern", *flags, "--out", str(tmp_path / "a.svg")]) == 0
    assert "16 32 64 128 256" in capsys.readouterr().out
    assert main(["pattern", *flags, "--max-offset", "100", "--out", str(tmp_path / "a.svg")]) == 0
    assert "16 32 64\n" in re.sub(" +\n", "\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "-1"], "window is -1; it must be 0 or more"),
        (["--layers", "0"], "the number of layers is 0; it must be at least 1"),
        (["--layers", "1000000", "--farthest", "9"], "layers is 1,000,000; at most 1,000 are shown"),
        (["--rungs", "-3"], "the number of rungs is -3"),
        (["--context", "1"], "context is 1; it must be at least 2 tokens"),
        (["--max-offset", "-2"], "max_offset is -2; it must be 0 or more"),
        (["--farthest", "-2"], "limit is -2; it must be 0 or more"),
        (["--rungs", "2000"], "the number of rungs is 2000; it must be from 0 to 90"),
        (["--rungs", "90"], "are too many; ask with --farthest for at most 200,000"),
    ],
)
def test_bad_flags_give_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pattern", *flags, "--out", str(tmp_path / "a.svg")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fibattn pattern: ")
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


def test_a_figure_that_could_not_be_written_is_refused_before_it_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pattern", "--layers", "2", "--out", "/proc/stack.svg"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fibattn pattern: /proc/stack.svg cannot be written")
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_the_smallest_stacks_are_drawn(tmp_path: Path) -> None:
    for name, flags in (("a", ["--layers", "1", "--window", "0", "--rungs", "0"]), ("b", ["--farthest", "0"])):
        assert main(["pattern", *flags, "--out", str(tmp_path / f"{name}.svg")]) == 0
        assert (tmp_path / f"{name}.csv").exists()
