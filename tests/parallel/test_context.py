"""Rows cut over processes: loss and gradients of whole ones; what cannot be cut is refused."""

import json
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from forked import Server
from launching import launch
from torch import Tensor

from fibattn import InputError
from fibattn.parallel.context import ContextParallel


def test_a_cut_row_has_the_loss_and_gradients_of_a_whole_one(forked: Server) -> None:
    found = [json.loads(line) for line in launch(forked, "cut_rows.py", 4).splitlines() if line.startswith("{")]
    for what in ("unlike", "unlike texts"):
        refused = [one[what] for one in found if what in one]
        assert len(refused) == 3 * 4
        assert all("the processes that share rows have different ones, here (" in message for message in refused)
    assert sum("46 tokens do not divide over cp_size 4" in one.get("undivided", "") for one in found) == 4
    assert sum("layers 1 attend to everything" in one.get("unread", "") for one in found) == 4
    assert sum("does not do blocks that queries choose" in one.get("unread blocks", "") for one in found) == 4
    assert sum("does not do blocks that queries choose" in one.get("unread converted", "") for one in found) == 4
    assert sum("does not do a convolution" in one.get("unread convolution", "") for one in found) == 4
    assert [one["page"] for one in found if "page" in one] == [True] * 4
    read = [one for one in found if "read" in one]
    assert {one["read"][2] for one in read} == {12, 48}
    assert len(read) == 4 * 6
    for one in read:
        assert one["same"], one
        # Gemma's norms are float32.
        assert one["off"] < (1e-5 if "gemma" in one["read"][0] else 1e-12), one
    found = [one for one in found if "case" in one]
    assert {tuple(one["case"][2:]) for one in found} == {
        (2, ""),
        (2, "compiled"),
        (4, ""),
        (4, "checkpointing"),
        (4, "sharded weights"),
        (4, "sharded weights, compiled layers"),
    }
    for one in found:
        # Gemma's norms, and what a learned scale is made of, are float32.
        bound = 1e-6 if "converted gemma3_text" in one["case"] else 1e-12
        assert one["loss"] < 1e-12, one
        assert one["gradients"] < bound, one
        assert one["alpha"] < 1e-6, one


@pytest.fixture(scope="module")
def alone() -> Any:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_cannot_be_cut_is_refused(alone: Any) -> None:
    model = tiny_models.model()
    cutter = ContextParallel(model, alone)
    ids = tiny_models.tokens()
    targets = torch.full_like(ids, 1)
    wrong: dict[str, dict[str, Tensor]] = {
        "give shift_labels": {"labels": ids},
        "past_key_values was given": {"past_key_values": model(ids, use_cache=True)[1]},
        "cu_seq_lens_q was given": {"shift_labels": targets, "cu_seq_lens_q": torch.tensor([0, 50])},
        "attention_mask is for 60 tokens, and this part of the row has 50": {"attention_mask": torch.ones(2, 60)},
        "shift_labels is for 60 tokens": {"shift_labels": torch.ones(2, 60)},
        "position_ids is for 60 tokens": {"position_ids": torch.arange(60)[None]},
        "zeros between ones": {"attention_mask": torch.tensor([[1, 0] * 25, [1] * 50])},
    }
    for message, given in wrong.items():
        with cutter.cut(), pytest.raises(InputError, match=message):
            model(input_ids=ids, **given)
    model(input_ids=ids, labels=ids)  # a whole row, outside
