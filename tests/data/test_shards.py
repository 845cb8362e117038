from dataclasses import replace

import numpy as np
import pytest

from fibattn.data.shards import cut_shard, open_shard, starts_path, token_dtype, write_shard
from fibattn.errors import InputError

U2, U4 = np.dtype("<u2"), np.dtype("<u4")


def documents(*lengths, dtype=U2):
    return iter([np.arange(length, dtype=dtype) + 10 * i for i, length in enumerate(lengths)])


def test_a_uint16_shard_read_without_this_package(tmp_path):
    path = tmp_path / "x.bin"
    shard = write_shard(path, documents(3, 4, 5), np.full(100, 2, np.uint16), U2, full=6, limit=None)
    header = np.fromfile(path, "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, 7]
    assert not header[3:].any()
    assert np.fromfile(path, "<u2", offset=1024).tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert np.load(starts_path(path)).tolist() == [0, 3]
    assert (shard.tokens, shard.documents, shard.bytes, shard.cut) == (7, 2, 14, False)


def test_a_large_vocabulary_is_uint32(tmp_path):
    path = tmp_path / "x.bin"
    write_shard(path, documents(2, dtype=U4), np.ones(100, np.uint16), U4, full=6, limit=None)
    assert np.fromfile(path, "<i4", 3).tolist() == [20240801, 7, 2]
    assert np.fromfile(path, "<u4", offset=1024).tolist() == [0, 1]
    assert token_dtype(65_536) == U2
    assert token_dtype(65_537) == U4


def test_no_document_is_taken_that_does_not_go_in(tmp_path):
    rest = documents(3, 4, 5)
    shard = write_shard(tmp_path / "x.bin", rest, np.ones(100, np.uint16), U2, full=100, limit=5)
    assert (shard.tokens, shard.documents, shard.cut) == (5, 2, True)
    assert len(next(rest)) == 5


def test_cutting_equals_writing_less(tmp_path):
    sizes = np.arange(100, dtype=np.uint16)
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    for limit in (1, 3, 5, 7, 11, 12):
        write_shard(a, documents(3, 4, 5), sizes, U2, full=12, limit=None)
        cut = cut_shard(a, sizes, limit)
        written = write_shard(b, documents(3, 4, 5), sizes, U2, full=12, limit=limit)
        assert a.read_bytes() == b.read_bytes()
        assert starts_path(a).read_bytes() == starts_path(b).read_bytes()
        assert replace(cut, file="") == replace(written, file="")


def test_an_error_while_writing_leaves_no_shard(tmp_path):
    def failing():
        yield np.arange(3, dtype=U2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "x.bin", failing(), np.ones(100, np.uint16), U2, full=100, limit=None)
    assert not list(tmp_path.iterdir())


def test_bad_shards_are_named_with_both_numbers(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(InputError, match=r"x.bin is missing; run the same"):
        open_shard(path)
    write_shard(path, documents(30), np.ones(100, np.uint16), U2, full=6, limit=None)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"x.bin has 1074 bytes, expected 1084 for 30 tokens"):
        open_shard(path)
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="not a token shard"):
        open_shard(path)
