"""The model in the hands of other libraries: sharded files, placement on devices, adapters."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import torch
from tiny_models import model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import fibattn
from fibattn import FibAttnForCausalLM, InputError


def answer(made: PreTrainedModel, ids: Tensor, **how: Any) -> Tensor:
    mask = torch.ones_like(ids)
    how = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0, **how}
    return made.generate(ids, attention_mask=mask, **how)  # pyright: ignore[reportCallIssue]


# Files and devices


def test_sharded_files_come_back_whole(tmp_path: Path) -> None:
    made, ids = model("learned mixture"), tokens()
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, made(ids).logits)


def spread(made: FibAttnForCausalLM) -> OrderedDict[str, str]:
    """Two layers on disk, all else on the CPU."""
    names = [name for name, _ in made.model.named_children() if name != "layers"]
    layers = {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(len(made.model.layers))}
    return OrderedDict({f"model.{name}": "cpu" for name in names} | layers | {"lm_head": "cpu"})


@pytest.mark.parametrize("where", ["auto", "spread"])
def test_accelerate_places_the_layers(where: str, tmp_path: Path) -> None:
    made, ids = model("learned mixture"), tokens()
    made.save_pretrained(tmp_path / "model")
    device_map = spread(made) if where == "spread" else where
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    ).eval()
    if where == "spread":
        assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
        assert placed.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    elif torch.cuda.is_available():
        made, ids = made.cuda(), ids.cuda()
    assert torch.equal(placed(ids).logits, made(ids).logits)
    assert torch.equal(answer(placed, ids), answer(made, ids))


# Adapters


def test_lora_trains_merges_and_comes_back(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made, ids = model("learned mixture"), tokens()
    made.save_pretrained(tmp_path / "base")
    expected = made(ids).logits
    chosen = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "o_proj"])
    adapted = peft.get_peft_model(made, chosen)
    assert torch.equal(adapted(ids).logits, expected)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 3 * 4
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(8):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    found = adapted.eval()(ids).logits
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(loaded.eval()(ids).logits, found)
    merged = loaded.merge_and_unload()
    assert type(merged) is FibAttnForCausalLM
    torch.testing.assert_close(merged(ids).logits, found, rtol=1e-3, atol=1e-3)


def adapted(kind: str, chosen: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made: Any = converted() if kind == "converted" else model(kind)
    return peft.get_peft_model(made, getattr(peft, chosen)(task_type="CAUSAL_LM", num_virtual_tokens=5))


def converted() -> PreTrainedModel:
    return fibattn.convert(foreign_decoders.model(), window=3, rungs=7, keep_layers=[1])


@pytest.mark.parametrize("kind", ["linear", "learned mixture", "bounded mixture", "converted"])
def test_prefix_tuning_is_refused_by_its_name(kind: str) -> None:
    ids = tokens(2, 20)
    made = adapted(kind, "PrefixTuningConfig")
    with pytest.raises(InputError, match=r"prefix tuning .* take LoRA"):
        made(input_ids=ids, labels=ids)


def test_prefix_tuning_is_refused_where_its_prefix_would_be_dropped() -> None:
    made, ids = model("full"), tokens(2, 20)
    first, second = (DynamicCache(config=made.config) for _ in range(2))
    with pytest.raises(InputError, match=r"two different caches; give one.*prefix tuning"):
        made(ids, cache=first, past_key_values=second)
    assert torch.equal(made(ids, cache=first, past_key_values=first).logits, made(ids).logits)


@pytest.mark.parametrize("chosen", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("kind", ["linear", "learned mixture", "bounded mixture", "converted"])
def test_prompt_tuning_trains(kind: str, chosen: str) -> None:
    ids = tokens(2, 20)
    made = adapted(kind, chosen).train()
    optimizer = torch.optim.AdamW([one for one in made.parameters() if one.requires_grad], lr=0.1)
    losses = []
    for _ in range(12):
        loss = made(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
