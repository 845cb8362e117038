"""Files of a corpus: written, and told apart byte by byte."""

import hashlib
import json
from pathlib import Path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, and the hash of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
