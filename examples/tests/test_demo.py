"""The demonstration, tiny but whole, and its page as a reader's browser shows it."""

import contextlib
import csv
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from browser import Browser

from examples.demo.demo import DENSE, FACTORS, HYBRID, run_demo
from fibattn import InputError, files
from fibattn.data.prepared import PreparedData
from fibattn.training.presets import DEFAULT, ON_CPU, PRESETS


@dataclass
class Demo:
    page: Path
    printed: str


def demonstrate(out: Path) -> Demo:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        page = run_demo(out, steps=2, vocab_size=320, held_out_tokens=2048)
    return Demo(page, printed.getvalue())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return demonstrate(tmp_path_factory.mktemp("a folder") / "demo")


def test_no_steps_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps is 0; it must be at least 1"):
        run_demo(tmp_path / "demo", steps=0)
    assert not (tmp_path / "demo").exists()


def test_table_and_sample_are_printed(demo: Demo) -> None:
    for factor in FACTORS:
        assert f"{factor * DENSE.sequence_length:,} ({factor}×)" in demo.printed
    assert "the hybrid model writes:\ndef parse_" in demo.printed
    assert str(demo.page) in demo.printed


def test_figures_lie_beside_their_numbers(demo: Demo) -> None:
    folder = demo.page.parent
    for name in ("extrapolation", "distances"):
        assert all((folder / f"{name}{suffix}").stat().st_size for suffix in (".svg", ".png", ".csv"))
    with (folder / "extrapolation.csv").open() as file:
        drawn = {(row["model"], row["length"]): float(row["perplexity"]) for row in csv.DictReader(file)}
    measured = files.read_json(folder / "results.json")
    assert drawn == {
        (model, length): row["perplexity"]
        for model, result in measured.items()
        for length, row in result["sets"]["stdlib"].items()
    }
    assert len(drawn) == 3 * len(FACTORS)
    for factor in FACTORS:
        same, length = factor == 1, str(factor * DENSE.sequence_length)
        assert (drawn["dense", length] == pytest.approx(drawn["dense, bounded", length], rel=1e-6)) is same


def test_both_models_differ_in_attention_alone(demo: Demo) -> None:
    out = demo.page.parent.parent
    dense, hybrid = (files.read_json(out / name / "recipe.json") for name in ("dense", "hybrid"))
    assert {key for key in dense if dense[key] != hybrid[key]} == {"model", "out"}
    attention = {"layer_types", "no_rope_layers", "window", "full_reach"}
    assert {key for key in dense["model"] if dense["model"][key] != hybrid["model"][key]} == attention
    assert files.read_json(out / "dense" / "inputs.json") == files.read_json(out / "hybrid" / "inputs.json")


def test_it_shows_the_default_recipe() -> None:
    default = PRESETS[DEFAULT]
    same = ("layer_types", "full_reach", "rungs", "schedule", "base", "hidden_act", "gated_mlp", "qk_norm")
    shown = {name: getattr(HYBRID.model, name) for name in same[1:]}
    assert shown == {name: getattr(default.model, name) for name in same[1:]}
    assert set(HYBRID.model.layer_types) == set(default.model.layer_types)
    tuned = {"learning_rate": 2.4e-2, "muon_weight_decay": 0.7, "beta1": 0.8, "warmup_steps": 10}
    assert HYBRID.optimizer == replace(default.optimizer, **tuned) == PRESETS[ON_CPU].optimizer


def test_run_again_trains_nothing_and_writes_the_same_page(demo: Demo) -> None:
    out, text = demo.page.parent.parent, demo.page.read_text()
    models = [out / name / "model" / "model.safetensors" for name in ("dense", "hybrid")]
    before = [path.stat().st_mtime_ns for path in models]
    again = demonstrate(out)
    assert [path.stat().st_mtime_ns for path in models] == before
    assert again.page.read_text() == text


def test_page_says_what_it_rests_on(demo: Demo) -> None:
    text = demo.page.read_text()
    assert PreparedData.open(demo.page.parent.parent / "data").fingerprint in text
    assert re.search("<h1>[^<]*[Pp]erplexity", text)
    assert "src=" not in text
    assert "http" not in text.replace("http://www.w3.org/", "")


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(demo: Demo, browser: Browser, width: int) -> None:
    browser.open(demo.page, width)
    drawn = (
        "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    sizes = browser.evaluate(drawn)
    assert len(sizes) == 2
    assert all(0.75 * min(width, 700) < drawn_width < width and height > 100 for drawn_width, height in sizes)
    assert browser.unreadable() == []
    cells = "[...document.querySelectorAll('th, td')].map(e => e.getBoundingClientRect().right)"
    assert max(browser.evaluate(cells)) < width
    assert browser.overflowing() == []
    assert browser.console() == []


def test_browser_notices_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text('<meta charset="utf-8"><body><div style="width: 500px">wide</div><script>none()</script>')
    browser.open(page, 390)
    assert len(browser.overflowing()) == 2
    assert [event["method"] for event in browser.console()] == ["Runtime.exceptionThrown"]
