"""Text that every Python has: the sources of its standard library."""

import sysconfig
from pathlib import Path

from fibattn.data.plan import Plan
from fibattn.data.sources import Source
from fibattn.errors import InputError


def standard_library(vocab_size: int, held_out_tokens: int) -> Plan:
    """What to prepare: the sources of Python's standard library, a twentieth of the files held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    texts = tuple(path for path in paths if _is_text(path))
    if not texts:
        raise InputError(f"there are no Python sources in {root}; install the standard library's sources")
    source = Source("stdlib", paths=texts)
    return Plan((source,), vocab_size=vocab_size, held_out=0.05, held_out_tokens=2 * held_out_tokens)


def _is_text(path: Path) -> bool:
    """Whether the file has text in UTF-8; a few of the library's own are empty or in other encodings on purpose."""
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False
