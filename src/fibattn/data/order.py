"""The order of training sequences is a file: the position in it is the only state a resumed run needs.

`x.npy` holds the first token of every sequence, `x.json` beside it how it was made and its SHA-256.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fibattn import files
from fibattn.data.shards import save_array
from fibattn.errors import InputError

Mode = Literal["random", "epochs"]


def make_order(
    path: Path, mode: Mode, seed: int, sequences: int, tokens: int, length: int, data: str | None = None
) -> np.ndarray:
    """Write and return the starts of `sequences` sequences over a stream of `tokens`: [sequences], uint32 or int64.

    A sequence reads `length` tokens and the one after. "random" draws starts uniformly with replacement from
    all 0 … tokens-length-1, by `numpy.random.RandomState(seed).randint`, as the paper's reference code
    does. "epochs" takes the disjoint sequences 0, length, 2·length, …, in a fresh permutation each epoch,
    from the same generator. `data` is the fingerprint of the tokens, checked when the order is loaded.
    """
    check_tokens(tokens, length)
    generator = np.random.RandomState(seed)
    if mode == "random":
        starts = generator.randint(0, tokens - length, size=sequences, dtype=np.int64)
    elif mode == "epochs":
        starts = _epochs(generator, sequences, (tokens - 1) // length) * length
    else:
        raise InputError(f"unknown order {mode!r}; expected 'random' or 'epochs'")
    starts = starts.astype(np.uint32 if tokens <= 2**32 else np.int64)
    save_array(path, starts)
    about = {"mode": mode, "seed": seed, "sequences": sequences, "tokens": tokens, "length": length, "data": data}
    files.write_json(path.with_suffix(".json"), about | {"sha256": files.sha256(path)})
    return starts


def check_tokens(tokens: int, length: int) -> None:
    """Refuse a stream of `tokens` that has no whole sequence of `length` inputs with their targets."""
    if tokens < length + 1:
        raise InputError(
            f"the training stream has {tokens} tokens, one sequence of {length} needs {length + 1}; prepare "
            "more text or train on shorter sequences"
        )


def _epochs(generator: np.random.RandomState, sequences: int, distinct: int) -> np.ndarray:
    permutations = [generator.permutation(distinct) for _ in range(math.ceil(sequences / distinct))]
    return np.concatenate([np.zeros(0, np.int64), *permutations])[:sequences]


def ensure_order(path: Path, mode: Mode, seed: int, sequences: int, tokens: int, length: int, data: str) -> np.ndarray:
    """The order in the file, made first where it is not whole, and checked; as `make_order`."""
    if not path.exists() or not path.with_suffix(".json").exists():
        make_order(path, mode, seed, sequences, tokens, length, data)
    return load_order(path, mode=mode, seed=seed, sequences=sequences, tokens=tokens, length=length, data=data)


def load_order(path: Path, **expected: Any) -> np.ndarray:
    """The starts in an order file, memory-mapped, after checking its SHA-256.

    `expected` are parameters of `make_order` that must be those it was made with, for instance
    `load_order(path, tokens=len(data.train), length=1024, data=data.fingerprint)`. `InputError` names what
    differs.
    """
    anew = f"make the order anew (delete {path.with_suffix('.*')}), or use the data and recipe it was made for"
    about = files.read_json(path.with_suffix(".json"))
    if not path.exists():
        raise InputError(f"the order file {path} is missing; {anew}")
    found = files.sha256(path)
    if found != about.get("sha256"):
        raise InputError(f"the order file {path} was altered: SHA-256 {found}, expected {about.get('sha256')}; {anew}")
    for name, value in expected.items():
        if about.get(name) != value:
            raise InputError(f"the order file {path} has {name} = {about.get(name)}, expected {value}; {anew}")
    return np.load(path, mmap_mode="r")
