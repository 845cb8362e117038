"""The documentation: links lead somewhere, and the blocks of the pages that run as they stand do."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fibattn
from fibattn.cli.flags import parse
from fibattn.cli.main import main as cli
from fibattn.training.recipe import Recipe
from fibattn.training.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("study/*.md")])


def _prose(page: Path) -> str:
    """The page without its code, where brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", text)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_or_heading_leads_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("name", ["tutorial", "operator"])
def test_every_block_of_the_page_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == text.count("```python\n") > 3
    names: dict[str, Any] = {}
    for block in blocks:
        before = text.count("\n", 0, block.start(1))
        # The names of its lines are those of the page.
        exec(compile("\n" * before + block[1], str(page), "exec"), names)
    assert capsys.readouterr().out


def test_a_long_sequence_takes_the_two_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").split("\n## A sequence of a million tokens")[1]
    prepare, training = section.split("```")[1].replace("\\\n", "").strip().splitlines()
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    for index in range(3):
        Path("books", f"{index}.txt").write_text(f"document {index} says that " * 100, encoding="utf-8")
    assert cli([*shlex.split(prepare)[1:], "--vocab-size", "300"]) == 0
    words = shlex.split(training)
    flags = words[words.index("hybrid") + 1 :]
    full_layers = re.search(r"`(--model.layer-types[^`]*)` has no such", section)
    assert full_layers is not None
    for more in ([], full_layers[1].split()):
        recipe = parse(Recipe, [*flags, *more], "fibattn train", default=load_recipe("hybrid"))
        recipe.check()
        assert recipe.split(4) == (1, 1)
        assert recipe.optimizer.warmup_steps < recipe.steps > recipe.save_every


def test_the_site_builds_with_every_page_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in PAGES:
        inside = page.relative_to(ROOT / "docs" if page.parent.name == "docs" else ROOT).with_suffix(".html")
        found = tmp_path / inside.with_name(inside.name.replace("README", "index"))
        assert found.exists() or page == ROOT / "README.md", found
        if found.exists():
            assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"(https?:)?//", found.read_text(encoding="utf-8"))
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(f'id="fibattn.{name}"' in api for name in fibattn.__all__ if not name.startswith("_"))
