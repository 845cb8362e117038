"""One self-contained HTML page: styles and figures inside, nothing fetched, readable on a phone."""

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fibattn import files


def inline_svg(path: Path) -> Markup:
    """An SVG file as an element that scales with the page; the prologue, the metadata and the fixed size are cut."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return Markup(f"{head}>{rest}")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill a template of this package and write the page, whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fibattn.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files.write_text(path, environment.get_template(template).render(**values))
    return path
