"""Going back in a bounded cache: what a crop takes away can be written anew, or the crop is refused."""

import pytest
import torch
from tiny_models import close_logits, model, tokens, whole
from transformers import DynamicCache, StaticCache

from fibattn import InputError

LENGTH = 70


@torch.no_grad()
def test_crop_after_recording():
    m, ids = model("linear"), tokens(1, 120)
    right = whole(m, ids)
    for before, wrong, back in ((10, 30, 25), (50, 9, 9), (50, 9, 4), (50, 60, 60), (50, 60, 3)):
        cache = DynamicCache(config=m.config)
        m(ids[:, :before], past_key_values=cache)
        cache.activate_past_recording()
        kept = before + wrong - back
        draft = torch.cat([ids[:, before:kept], tokens(1, back, seed=9)], 1)
        for piece in draft.split([1, 1, wrong - 2], dim=1):
            m(piece, past_key_values=cache)
        cache.crop(-back)
        assert cache.get_seq_length() == kept
        close_logits(m(ids[:, kept:], past_key_values=cache).logits, right[:, kept:])


@torch.no_grad()
def test_crop_without_recording():
    m, ids = model("linear"), tokens(1, LENGTH)
    cache = DynamicCache(config=m.config)
    m(ids[:, :60], past_key_values=cache)
    cache.crop(-1)
    close_logits(m(ids[:, 59:], past_key_values=cache).logits, whole(m, ids)[:, 59:])
    with pytest.raises(InputError, match=r"activate_past_recording\(\)"):
        cache.crop(-2)
    young = DynamicCache(config=m.config)
    m(ids[:, :9], past_key_values=young)
    reaches = [m.config.layer_reach(layer) for layer in range(4)]
    assert min(reaches) > 9
    young.crop(-4)
    close_logits(m(ids[:, 5:], past_key_values=young).logits, whole(m, ids)[:, 5:])
    with pytest.raises(InputError, match=r"crop\(3\)"):
        young.crop(3)


@pytest.mark.parametrize("recorded", [False, True])
@torch.no_grad()
def test_a_second_crop_is_right_or_refused(recorded: bool):
    m, ids = model("linear"), tokens(1, LENGTH)
    right = whole(m, ids)
    for crops in ((-1, -1), (-1, -4), (-3, -1), (-3, -3), (-1, 0)):
        cache = DynamicCache(config=m.config)
        if recorded:
            cache.activate_past_recording()
        m(ids[:, :60], past_key_values=cache)
        kept, refused = 60, False
        for back in crops:
            try:
                cache.crop(back)
                kept += back
            except InputError:
                refused = True
                break
        if refused:
            assert kept > 60 + sum(crops)
            continue
        assert recorded or crops == (-1, 0)
        for first in (kept, kept + 1):
            found = m(ids[:, first : first + 1], past_key_values=cache).logits
            close_logits(found, right[:, first : first + 1])


@torch.no_grad()
def test_a_cache_that_was_cropped_in_part_is_refused():
    kinds = ["full_attention", *["sliding_attention"] * 3]
    m, ids = model(layer_types=kinds), tokens(1, LENGTH)
    cache = DynamicCache(config=m.config)
    m(ids[:, :60], past_key_values=cache)
    with pytest.raises(InputError, match="cannot be removed"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [57, 60, 60, 60]
    for back in (0, -1):
        cache.crop(back)
        with pytest.raises(InputError, match="layer 1 of the cache refused a crop that layers before it made"):
            m(ids[:, 57:58], past_key_values=cache)


@torch.no_grad()
def test_a_cache_that_no_layer_cropped_goes_on():
    m, ids = model("linear"), tokens(1, LENGTH)
    cache = DynamicCache(config=m.config)
    m(ids[:, :60], past_key_values=cache)
    with pytest.raises(InputError, match="cannot be removed"):
        cache.crop(-3)
    close_logits(m(ids[:, 60:], past_key_values=cache).logits, whole(m, ids)[:, 60:])


@torch.no_grad()
def test_a_static_cache_cannot_be_cropped():
    m, ids = model("linear"), tokens(1, 20)
    cache = StaticCache(config=m.config, max_cache_len=30)
    m(ids, past_key_values=cache)
    cache.crop(0)
    with pytest.raises(InputError, match="static cache of sparse layers cannot be cropped"):
        cache.crop(-1)
