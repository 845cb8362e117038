"""Which documents are held out: it depends on the document's key alone, so every run decides the same.

A document whose key hashes below the share is held out and never trained on. Since identical text has an
identical key, duplicates fall on one side. Where keys are separate from texts, and between sources, the
hashes of the texts that were held out are kept beside the shards and training leaves those texts out.
"""

import hashlib
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass

from fibattn.data.sources import Source
from fibattn.errors import InputError
from fibattn.progress import Meter

SPAN = 2**64


def text_hash(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key_hash(key: str, seed: int) -> int:
    """64 uniform bits that place a key above or below the held-out share."""
    salt = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest(), "little")


@dataclass(frozen=True)
class Survey:
    """What one pass over a source finds: how much it holds, its fingerprint, and the hashes of its texts and keys."""

    documents: int
    bytes: int
    sha256: str
    lowest_key: int
    highest_key: int
    texts: array  # of uint64: one for each document, and one for its key where that is another


def survey(label: str, source: Source, seed: int, *, quiet: bool = False) -> Survey:
    """Read a source once, so that whatever is wrong with its files is reported before any long work begins."""
    digest, texts = hashlib.sha256(), array("Q")
    count, size, lowest, highest = 0, 0, SPAN, -1
    with Meter(f"read {label}", None, "B", quiet=quiet) as meter:
        for key, text in source.documents():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
            if key != text:
                digest.update(key.encode())
                texts.append(_own_key(source, key))
            place = key_hash(key, seed)
            lowest, highest, size = min(lowest, place), max(highest, place), size + len(data)
            texts.append(text_hash(text))
            count += 1
            meter.update(len(data))
    if not texts:
        raise InputError(f"source {source.name!r} ({source}) holds no text; expected at least one document")
    return Survey(count, size, digest.hexdigest(), lowest, highest, texts)


def threshold(name: str, share: float, found: Survey | None) -> int:
    """Documents whose key hashes below this are held out.

    That is `share` of the keys; of a surveyed source at least one document and never all of them.
    """
    limit = round(share * SPAN)
    if found is None or limit == 0:
        return limit
    if found.lowest_key == found.highest_key:
        raise InputError(
            f"source {name!r} holds a single document, and held-out sets are made of whole documents: name a "
            f"held-out set with --val {name}=FILE, or go without one with --held-out 0"
        )
    return min(max(limit, found.lowest_key + 1), found.highest_key)


def training_documents(source: Source, seed: int, limit: int, excluded: Container[int]) -> Iterator[str]:
    """The texts of a source that are neither below the threshold nor held out under another key or source.

    Nor those whose key the source's own held-out set has.
    """
    for key, text in source.documents():
        held_out = key_hash(key, seed) < limit or text_hash(text) in excluded
        if not (held_out or (key != text and _own_key(source, key) in excluded)):
            yield text


def _own_key(source: Source, key: str) -> int:
    """64 bits that stand for a key of this source, and for no text or other source's key."""
    return text_hash(f"{source.name}\0{key}")
