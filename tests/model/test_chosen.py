"""Layers whose queries choose blocks: what is refused, and documents that blocks do not fit."""

import pytest
import torch
from tiny_models import config, model, tokens

from fibattn import InputError


def test_a_block_that_begins_in_another_document_is_nobody_s() -> None:
    made, ids, cut = model("chosen"), tokens(1, 60), 21
    positions = torch.cat([torch.arange(cut), torch.arange(60 - cut)])[None]
    changed = ids.clone()
    changed[:, :cut] = (changed[:, :cut] + 1) % 60
    first, second = (made(one, position_ids=positions, use_cache=False).logits for one in (ids, changed))
    torch.testing.assert_close(first[:, cut:], second[:, cut:])
    torch.testing.assert_close(first[:, cut:], made(ids[:, cut:]).logits, rtol=2e-4, atol=2e-4)


def test_what_cannot_choose_says_so() -> None:
    made = model("chosen")
    choice, taps = "blocks that queries choose yet; without it the model", "a convolution over keys and values yet;"
    with pytest.raises(InputError, match=f"continuous batching does not do {choice}"):
        made.init_continuous_batching()
    for which, what in ((made, choice), (model(kv_convolution=2), taps)):
        with pytest.raises(InputError, match=f"the model for vLLM does not do {what}"):
            which.config.check_engine("the model for vLLM")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": 0}, r"blocks is 0; a query chooses 1 to 64"),
        ({"block_size": 8}, r"block is 8; blocks have 16, 32, 64 or 128 keys"),
        ({"block_reach": 1024}, r"reach is 1024; it must be at least the window, 4, and below 64 blocks, 1024"),
        ({"kv_convolution": -1}, r"kv_convolution is -1"),
        ({"layer_limits": [9] * 4}, r"layer_limits are given, but chosen_attention has block_reach"),
    ],
)
def test_numbers_that_cannot_be(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config("chosen", **wrong)
