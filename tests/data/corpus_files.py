"""Files of a corpus: written, prepared, read again, and told apart byte by byte."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.prepared import PreparedData
from fibattn.data.sources import Source
from fibattn.data.tokenizer import load_tokenizer

SMALL = {"vocab_size": 300, "shard_tokens": 3000, "held_out_tokens": 2500, "held_out": 0.2}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, and the hash of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(out: Path, sources: Iterable[Source], **change: Any) -> PreparedData:
    """The prepared folder of a small plan."""
    return prepare(out, Plan(tuple(sources), **{**SMALL, **change}), quiet=True)


def documents(data: PreparedData, name: str, split: str) -> list[str]:
    """The texts of one source's shards, by plain numpy and transformers."""
    tokenizer = load_tokenizer(data.tokenizer_path)
    found = []
    for path in sorted((data.folder / "shards" / name).glob(f"{split}-*.bin")):
        tokens = np.fromfile(path, "<u2", offset=1024)
        starts = np.load(path.with_suffix(".starts.npy")).astype(np.int64)
        assert (tokens[starts] == tokenizer.bos_token_id).all()
        assert (tokens == tokenizer.bos_token_id).sum() == len(starts)
        found += [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
    return found
