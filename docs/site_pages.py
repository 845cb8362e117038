"""For `make docs`: the pages that lie beside `docs/`, with the links between the two as the site has them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BESIDE = ("study/README.md", "study/tables.md", "CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of `docs/`, under their paths from the root."""
    root = Path(config.docs_dir).parent
    for path in BESIDE:
        text = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", (root / path).read_text(encoding="utf-8"))
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let the pages of `docs/`, which is the root of the site, link to those that were added."""
    for path in BESIDE:
        markdown = markdown.replace(f"](../{path}", f"]({path}")
    return markdown
