"""Latency: what is timed and how often, not how fast it is."""

import pytest
import torch

from fibattn import FibAttnConfig
from fibattn.errors import InputError
from fibattn.training.presets import DEFAULT, PRESETS
from fibattn.training.run import model_config
from study.probes.latency import latency, models, time_calls
from study.probes.settings import Latency

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_models_differ_in_their_attention_alone() -> None:
    static, learned, hybrid, dense = models(**SHAPE).values()
    assert (static.schedule, learned.schedule) == ("linear", "learned")
    assert dense.layer_types == ["full_attention"] * 2
    ignored = {"schedule", "layer_types", "layer_offsets"}
    plain = [{k: v for k, v in one.to_dict().items() if k not in ignored} for one in (static, learned, dense)]
    assert plain[0] == plain[1] == plain[2]
    assert models()["static"] == FibAttnConfig()
    assert hybrid.layer_types == ["full_attention"] * 2
    default = model_config(PRESETS[DEFAULT], FibAttnConfig.vocab_size, separator=0)
    default.full_reach = PRESETS[DEFAULT].full_reach
    assert default.full_reach == 1023
    attention = ("layer_types", "no_rope_layers", "layer_offsets", "full_reach", "head_dim", "num_key_value_heads")
    assert all(getattr(models()["hybrid"], name) == getattr(default, name) for name in attention)


def test_warmup_is_not_counted() -> None:
    calls: list[int] = []
    taken = time_calls(lambda: calls.append(torch.zeros(1).numel()), warmup=3, repeats=4)
    assert len(calls) == 7
    assert len(taken) == 4
    assert min(taken) > 0


def test_every_model_and_length_has_its_row() -> None:
    result = latency(Latency(lengths=(16, 40), tokens=64, warmup=1, repeats=3), models(**SHAPE, vocab_size=64))
    assert [(row["model"], row["batch"], row["length"]) for row in result["rows"]] == [
        (name, batch, length)
        for name in ("static", "learned", "hybrid", "dense")
        for batch, length in ((4, 16), (1, 40))
    ]
    for row in result["rows"]:
        assert row["quartile_low_ms"] <= row["median_ms"] <= row["quartile_high_ms"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * row["length"] / row["median_ms"])


@pytest.mark.parametrize("bad", [{"lengths": (0,)}, {"lengths": ()}, {"repeats": 0}, {"warmup": -1}])
def test_bad_numbers_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        latency(Latency(**bad))
