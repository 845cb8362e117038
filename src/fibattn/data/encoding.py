"""Turns documents into tokens, and says which bytes of a document each token stands for.

Long documents are encoded piece by piece, so that a book of any length takes bounded memory, and the result is that of
encoding the whole: pieces overlap, and are joined where both have the same tokens around the join. Where they have not
(a line of a million dashes), the pieces are encoded as one.
"""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

PIECE = 2**20  # characters of a piece
OVERLAP = 2**12  # characters that a piece reads on either side of its own
BATCH = 2**23  # characters that are encoded at once, on all cores
_AGREE = 16  # tokens that two pieces must have in common on either side of their join


def keeps_bytes(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether the tokens of a text, by the table of `token_bytes`, have its bytes, neither more nor fewer.

    They have not where a blank is put before the text, where it is normalised, or where there is not a token for every
    byte: the others are left out.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    settings, known = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab().keys()
    words_kept = all(_keeps_bytes(one) for one in _steps(settings["pre_tokenizer"]))
    strips = any(token["lstrip"] or token["rstrip"] for token in settings["added_tokens"] if not token["special"])
    marks = any(settings["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    every_byte = known >= set(ByteLevel.alphabet()) or known >= {f"<0x{byte:02X}>" for byte in range(256)}
    return settings["normalizer"] is None and words_kept and every_byte and not strips and not marks


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for one in step["pretokenizers"]:
            yield from _steps(one)
    elif step is not None:
        yield step


def _keeps_bytes(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Metaspace":
        return step["prepend_scheme"] == "never"
    return (step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed") or step["type"] == "Digits"


def encode(
    tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str], first: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Encode documents; yields an array for each, the token `first` before the others.

    What looks like a special token inside a text is encoded as ordinary text.

    Yields:
        (tokens,), `dtype`, for a tokenizer that keeps bytes; for another (2, tokens), uint32: the tokens above the
        bytes of text that each of them stands for, which sum to those of the document.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    exact = keeps_bytes(tokenizer)
    for batch in _batches(texts):
        short = [text for text in batch if len(text) <= PIECE]
        encode_all = backend.encode_batch_fast if exact else backend.encode_batch  # the fast one knows no places
        encoded = iter(encode_all(short, add_special_tokens=False))
        for text in batch:
            if len(text) > PIECE:
                ids, ends = _in_pieces(backend, text)
            else:
                found = next(encoded)
                ids, ends = np.array(found.ids, np.int64), np.zeros(0, np.int64) if exact else _ends(found)
            ids = np.concatenate([[first], ids])
            yield ids.astype(dtype) if exact else np.stack([ids, _bytes(text, ends)]).astype(np.uint32)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ends(encoded: "Encoding", start: int = 0) -> np.ndarray:
    """The character of the text before which each token ends; tokens of one character end together."""
    places = np.array(encoded.offsets, np.int64).reshape(-1, 2)
    return start + np.maximum.accumulate(places[:, 1])


def _bytes(text: str, ends: np.ndarray) -> np.ndarray:
    """The bytes of text that end with each token, the separator before them; what is left falls to the last."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    total = np.concatenate([[0], np.cumsum(lengths)])
    sizes = np.diff(total[np.concatenate([[0], ends])], prepend=0)
    sizes[-1] += total[-1] - sizes.sum()
    return sizes


def _in_pieces(backend: "Tokenizer", text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a long text, and where they end."""
    cuts = _cuts(text)
    while True:
        edges = [0, *cuts, len(text)]
        starts = [max(0, edge - OVERLAP) for edge in edges[:-1]]
        spans = [text[start : end + OVERLAP] for start, end in zip(starts, edges[1:], strict=True)]
        encoded = backend.encode_batch(spans, add_special_tokens=False)
        pieces = [(np.array(one.ids, np.int64), _ends(one, start)) for one, start in zip(encoded, starts, strict=True)]
        joins = [_join(*pieces[i], *pieces[i + 1], cut) for i, cut in enumerate(cuts)]
        if all(join is not None for join in joins):
            break
        cuts = [cut for cut, join in zip(cuts, joins, strict=True) if join is not None]
    firsts = [0, *(join[1] for join in joins if join)]
    lasts = [*(join[0] for join in joins if join), None]
    parts = [(i[a:b], e[a:b]) for (i, e), a, b in zip(pieces, firsts, lasts, strict=True)]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([ends for _, ends in parts])


def _cuts(text: str) -> list[int]:
    """Where to cut, at most PIECE characters apart: after a line's end if there is one."""
    cuts, start = [], 0
    while len(text) - start > PIECE:
        newline = text.rfind("\n", start + PIECE // 2, start + PIECE)
        start = newline + 1 if newline >= 0 else start + PIECE
        cuts.append(start)
    return cuts


def _join(
    ids: np.ndarray, ends: np.ndarray, next_ids: np.ndarray, next_ends: np.ndarray, cut: int
) -> tuple[int, int] | None:
    """Up to which token of a piece and from which of the next one they are the whole's; None where they disagree."""
    here, there = int(np.searchsorted(ends, cut, "right")), int(np.searchsorted(next_ends, cut, "right"))
    before, after = min(_AGREE, here), min(_AGREE, len(ids) - here)
    one, other = slice(here - before, here + after), slice(max(0, there - before), there + after)
    same = np.array_equal(ids[one], next_ids[other]) and np.array_equal(ends[one], next_ends[other])
    return (here, there) if same else None
