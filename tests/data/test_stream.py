import pickle

import numpy as np
import pytest

from fibattn.data.prepared import TokenStream
from fibattn.data.sequences import TrainingSequences, held_out_sequences
from fibattn.data.shards import write_shard
from fibattn.errors import InputError

U2 = np.dtype("<u2")


@pytest.fixture
def stream(tmp_path):
    """Tokens 0 … 99 in shards of 30, 1, 49 and 20."""
    paths, start = [], 0
    for length in (30, 1, 49, 20):
        paths.append(tmp_path / f"{start}.bin")
        tokens = np.arange(start, start + length, dtype=U2)
        write_shard(paths[-1], [tokens], np.ones(100, np.uint16), U2, full=100, limit=None)
        start += length
    return TokenStream(paths)


def test_windows_read_across_shards(stream):
    assert len(stream) == 100
    for length in (0, 1, 2, 35, 100):
        for start in range(100 - length + 1):
            sequence = stream.sequence(start, length)
            assert sequence.dtype == np.int64
            assert sequence.tolist() == list(range(start, start + length))
    for start, length in ((-1, 2), (99, 2), (0, 101)):
        with pytest.raises(InputError, match="of a stream of 100"):
            stream.sequence(start, length)


def test_a_worker_process_gets_paths_not_tokens(stream):
    stream.sequence(0, 100)
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.sequence(25, 10).tolist() == list(range(25, 35))
    assert copy._maps is not stream._maps


def test_training_items_have_all_their_targets(stream):
    sequences = TrainingSequences(stream, np.array([5, 89], np.uint32), 10)
    item = sequences[1]
    assert len(sequences) == 2
    assert item["input_ids"].tolist() == list(range(89, 99))
    assert item["shift_labels"].tolist() == list(range(90, 100))
    assert item["labels"].tolist() == item["input_ids"].tolist()
    assert str(item["input_ids"].dtype) == str(item["shift_labels"].dtype) == "torch.int64"


def test_held_out_sequences_are_disjoint_and_complete(stream):
    sequences = held_out_sequences(stream, 11)
    targets = [t for i in range(len(sequences)) for t in sequences[i]["shift_labels"].tolist()]
    assert targets == list(range(1, 100))  # 9 sequences of 11: every token but the first
    assert len(held_out_sequences(stream, 10)) == 9  # a tenth would need token 100
    assert len(held_out_sequences(stream, 10, limit_tokens=35)) == 3
    assert len(held_out_sequences(stream, 99)) == 1
    with pytest.raises(InputError, match="a sequence of 100 needs 101 tokens; the text has 100"):
        held_out_sequences(stream, 100)
    with pytest.raises(InputError, match="has 100 and a limit of 5"):
        held_out_sequences(stream, 10, limit_tokens=5)
