"""One self-contained HTML page: styles and figures inside, nothing fetched, readable on a phone."""

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fibattn import files


def inline_svg(path: Path) -> Markup:
    """An SVG file as an element that scales with the page.

    The prologue, the metadata and the fixed size are cut, and names in it made its own in the page.
    """
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{path.stem}-", text)
    head, rest = text.split(">", 1)
    return Markup(re.sub(r'\s(?:width|height)="[^"]*"', "", head) + f">{rest}")


def write_page(path: Path, template: str, package: str = "study.report", **values: Any) -> Path:
    """Fill a template of `package`, or of this one, and write the page, whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("study.report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clauses": _clauses, "code": _code, "unbroken": _unbroken}
    files.write_text(path, environment.get_template(template).render(**values))
    return path


def _clauses(text: str) -> list[str]:
    """The parts of a sentence between semicolons, those in brackets left alone."""
    return re.split(r"; (?![^(]*\))", text)


def _code(text: str) -> Markup:
    """What Markdown has between backticks, as code; the rest is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _unbroken(text: str) -> str:
    """Numbers on one line with their units and names."""
    return re.sub(r" (?=%)|(?<=\bW) (?==)|(?<=\bW =) (?=\d)", "\N{NO-BREAK SPACE}", text)
