import json

import numpy as np
import pytest

from fibattn.data.order import load_order, make_order
from fibattn.errors import InputError


def test_random_is_what_the_reference_draws_batch_by_batch(tmp_path):
    order = make_order(tmp_path / "o.npy", "random", 42, 96, 5000, 64)
    generator = np.random.RandomState(42)
    batches = [generator.randint(0, 5000 - 64, size=32) for _ in range(3)]
    assert order.tolist() == np.concatenate(batches).tolist()
    assert order[:4].tolist() == [860, 3772, 3092, 466]  # numpy's MT19937 does not change


def test_random_reaches_both_ends_and_no_further(tmp_path):
    order = make_order(tmp_path / "o.npy", "random", 0, 2000, 20, 10)
    assert set(order.tolist()) == set(range(10))  # 0 … tokens-length-1: the last reads tokens 9 … 19


def test_exactly_one_sequence_is_enough(tmp_path):
    for mode in ("random", "epochs"):
        assert make_order(tmp_path / "o.npy", mode, 0, 3, 11, 10).tolist() == [0, 0, 0]


def test_epochs_see_every_disjoint_sequence_once_an_epoch(tmp_path):
    order = make_order(tmp_path / "o.npy", "epochs", 3, 25, 105, 10)
    sequences = set(range(0, 100, 10))
    assert set(order[:10].tolist()) == set(order[10:20].tolist()) == sequences
    assert order[:10].tolist() != order[10:20].tolist()
    assert len(order) == 25


def test_loading_checks_bytes_and_parameters(tmp_path):
    path = tmp_path / "o.npy"
    made = make_order(path, "random", 1, 10, 500, 16, data="abc")
    loaded = load_order(path, tokens=500, length=16, data="abc")
    assert isinstance(loaded, np.memmap)
    assert loaded.tolist() == made.tolist()
    with pytest.raises(InputError, match=r"o.npy has length = 16, expected 32; make the order anew"):
        load_order(path, length=32)
    with pytest.raises(InputError, match="has data = abc, expected xyz"):
        load_order(path, data="xyz")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
    with pytest.raises(InputError, match=rf"o.npy was altered: SHA-256 .*, expected {expected}"):
        load_order(path)
    path.unlink()
    with pytest.raises(InputError, match=r"order file .* is missing"):
        load_order(path)


def test_bad_orders(tmp_path):
    with pytest.raises(InputError, match="has 10 tokens, one sequence of 10 needs 11; prepare more text"):
        make_order(tmp_path / "o.npy", "random", 0, 3, 10, 10)
    with pytest.raises(InputError, match="unknown order 'shuffled'; expected 'random' or 'epochs'"):
        make_order(tmp_path / "o.npy", "shuffled", 0, 3, 100, 10)
