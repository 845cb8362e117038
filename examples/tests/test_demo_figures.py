import csv
import re
from pathlib import Path

from examples.demo.figures import Curve, distances, extrapolation
from fibattn.pattern import Pattern, layer_patterns
from fibattn.plotting import COLOURS
from study.report.page import inline_svg


def rows(path: Path) -> list[list[str]]:
    with path.with_suffix(".csv").open() as file:
        return list(csv.reader(file))


def test_extrapolation_and_its_numbers(tmp_path: Path) -> None:
    curves = [Curve("dense", (8, 16), (3.25, 900.5)), Curve("stagger", (8, 16), (4.0, 4.125))]
    path = extrapolation(curves, 8, tmp_path / "figure.svg")
    assert rows(path) == [
        ["model", "length", "perplexity"],
        ["dense", "8", "3.25"],
        ["dense", "16", "900.5"],
        ["stagger", "8", "4.0"],
        ["stagger", "16", "4.125"],
    ]
    text = path.read_text()
    assert all(f">{label}<" in text for label in ("dense", "stagger", "2×", "perplexity"))
    assert all(f">{tick}<" in text for tick in ("5", "20", "100", "500"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_bounded_model_is_dashed_in_its_own_colour(tmp_path: Path) -> None:
    curves = [Curve(name, (8, 16), (3.0, end)) for name, end in (("dense", 4.0), ("dense, bounded", 4.001))]
    text = extrapolation(curves, 8, tmp_path / "figure.svg").read_text()
    dashed = [line for line in text.splitlines() if "stroke-dasharray" in line]
    assert len(dashed) == 1
    assert COLOURS["dense"] in dashed[0]


def test_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    curve = Curve("dense", (8, 16), (3.25, 4.5))
    first, second = (extrapolation([curve], 8, tmp_path / f"{name}.svg") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_distances_lists_every_layer(tmp_path: Path) -> None:
    patterns = layer_patterns("fibonacci", "linear", layers=3, window=4, max_offset=99)
    path = distances(patterns, 99, tmp_path / "figure.svg")
    expected = [[str(layer), str(d)] for layer in (1, 2, 3) for d in patterns[layer - 1].distances]
    assert rows(path)[1:] == expected
    assert "hybrid, layer 3" in path.read_text()


def test_distances_without_window_or_rungs(tmp_path: Path) -> None:
    path = distances([Pattern(0)], 4, tmp_path / "figure.svg")
    assert rows(path)[1:] == [["1", "0"]]


def test_names_in_an_inlined_figure_are_its_own(tmp_path: Path) -> None:
    path = distances([Pattern(4)], 16, tmp_path / "figure.svg")
    text = str(inline_svg(path))
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(names)) == len(names)
    assert all(name.startswith("figure-") for name in names)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(names)


def test_inlined_figure_scales_with_its_page(tmp_path: Path) -> None:
    path = distances([Pattern(4)], 16, tmp_path / "figure.svg")
    head = str(inline_svg(path)).split(">", 1)[0]
    assert head.startswith("<svg")
    assert "viewBox=" in head
    assert not any(f" {name}=" in head for name in ("width", "height"))
