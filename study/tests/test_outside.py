"""The baseline from outside: what its program is given, and how it is measured."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Server

from fibattn.data.prepared import PreparedData
from fibattn.errors import InputError
from study.outside.autoresearch import run_outside
from study.outside.stand_ins.kernels import flash_attn_func, window_mask
from study.outside.stand_ins.prepare import MAX_SEQ_LEN, Tokenizer, make_dataloader

UNIFORM = """
import math, torch
from prepare import TIME_BUDGET, Tokenizer, evaluate_bpb, make_dataloader
tokenizer = Tokenizer.from_directory()
def model(inputs, targets, reduction):
    losses = torch.full(targets.shape, math.log(tokenizer.get_vocab_size()))
    return (losses * (targets != -1)).view(-1)
num_params, total_tokens, total_training_time = 0, 0, TIME_BUDGET
val_bpb = evaluate_bpb(model, tokenizer, 3, "cpu")
"""


def test_a_program_that_knows_nothing_needs_the_logarithm_of_the_vocabulary_for_a_token(
    prepared: Path, forked: Server, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(UNIFORM)
    out = tmp_path / "out" / "result.json"
    words = [str(tmp_path), "--data", str(prepared), "--like", str(prepared), "--out", str(out), "--seconds", "7"]
    forked.run([sys.executable, "-m", "study", "outside", *words], check=True)
    result, data = json.loads(out.read_text()), PreparedData.open(prepared)
    assert result["training_seconds"] == 7
    assert set(result["bits_per_byte"]) == set(data.validation)
    for name, stream in data.validation.items():
        targets = (min(524_288, len(stream) - 1) // MAX_SEQ_LEN) * MAX_SEQ_LEN
        size = stream.byte_counts(1, targets, data.token_bytes).sum()
        assert result["bits_per_byte"][name] == pytest.approx(math.log2(data.vocab_size) * targets / size)


def test_batches_are_disjoint_stretches_of_the_text_in_whole_passes(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    text = data.train.sequence(0, len(data.train))
    whole = (len(text) - 1) // 64 // 3
    batches = list(itertools.islice(make_dataloader(Tokenizer(data), 3, 64, "train", "cpu"), 2 * whole + 1))
    assert [epoch for _, _, epoch in batches] == [1] * whole + [2] * whole + [3]
    stretches = {text[start : start + 65].tobytes() for start in range(0, len(text) - 64, 64)}
    rows = [np.concatenate([a, b[-1:]]) for x, y, _ in batches for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    seen = [row.astype(text.dtype).tobytes() for row in rows]
    for first in (0, 3 * whole):
        passed = seen[first : first + 3 * whole]
        assert len(set(passed)) == len(passed)
        assert set(passed) <= stretches
    assert seen[: 3 * whole] != seen[3 * whole : 6 * whole]


def test_attention_sees_the_window_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from study.outside.stand_ins import kernels

    monkeypatch.setitem(kernels._MASKS, 4, window_mask(4, 128, "cpu"))
    q, k, v = torch.randn(3, 2, 128, 2, 16, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(128)[:, None] - torch.arange(128)
    for window, seen in ((4, (distance >= 0) & (distance <= 4)), (128, distance >= 0)):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
        expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
        torch.testing.assert_close(flash_attn_func(q, k, v, causal=True, window_size=(window, 0)), expected)


def test_a_folder_without_the_program_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no train\.py"):
        run_outside(tmp_path, prepared, prepared, seconds=1, targets=64)
