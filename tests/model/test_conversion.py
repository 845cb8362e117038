"""Converted decoders: against the same model with a dense mask for every layer, and against itself without a cache."""

import copy
import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_decoders import LAYERS, PATTERN, SLIDING, model, tokens
from tiny_models import close_logits
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

import fibattn
from fibattn import InputError, Pattern
from fibattn.model.conversion import ARCHITECTURES
from fibattn.model.loading import load_model
from fibattn.model.streaming import growing_layers, stream

KEPT = {"none": [], "one": [1], "two": [0, 3]}


def answer(m: Any, ids: Tensor, **how: Any) -> Tensor:
    return m.generate(ids, **{"max_new_tokens": 30, "do_sample": False, **how})


def sliding_window(architecture: str, layer: int) -> int | None:
    """What the configurations of `foreign_decoders` say, in words of their own."""
    slides = {"mistral": True, "qwen2": layer >= 2, "gemma3_text": layer % 2 == 0}.get(architecture, False)
    return SLIDING if slides else None


def with_dense_masks(m: PreTrainedModel, architecture: str, kept: list[int]) -> PreTrainedModel:
    """The original model with a mask of the pattern's distances given to every layer."""
    attentions = [module for name, module in m.named_modules() if name.endswith("self_attn")]
    for layer, module in enumerate(attentions):
        pattern = Pattern.fibonacci(3, 0.5 + layer / (LAYERS - 1), rungs=7)
        limit = sliding_window(architecture, layer) or 10**6
        distances = range(limit) if layer in kept else [d for d in pattern.distances if d < limit]
        module.register_forward_pre_hook(masking(torch.tensor(list(distances[:200]))), with_kwargs=True)
    return m


def masking(distances: Tensor) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        index = torch.arange(kwargs["hidden_states"].shape[1])
        mask = torch.isin(index[:, None] - index, distances)[None, None]
        return args, {**kwargs, "attention_mask": mask}

    return hook


# ---- what is attended to


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_original_with_masks(architecture: str, kept: str) -> None:
    made, ids = model(architecture), tokens()
    right = with_dense_masks(copy.deepcopy(made), architecture, KEPT[kept])
    fibattn.convert(made, **PATTERN, keep_layers=KEPT[kept])
    ours, theirs = (m(ids, labels=ids, use_cache=False) for m in (made, right))
    close_logits(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, one), other in zip(made.named_parameters(), right.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_window_as_long_as_the_input_changes_nothing(architecture: str) -> None:
    made, ids = model(architecture), tokens()
    with torch.no_grad():
        right, text = made(ids).logits, answer(made, ids[:, :20])
        assert fibattn.convert(made, window=49) is made
        close_logits(made(ids).logits, right)
        assert torch.equal(answer(made, ids[:, :20]), text)
        fibattn.restore(made)
        assert torch.equal(made(ids).logits, right)
        assert torch.equal(answer(made, ids[:, :20]), text)


def test_a_sliding_layer_never_sees_farther_than_it_did() -> None:
    made = fibattn.convert(model("gemma3_text"), **PATTERN)
    offsets = made.config.fibattn_pattern["layer_offsets"]
    assert max(offsets[0] + offsets[2]) < SLIDING < min(max(offsets[1]), max(offsets[3]))


def test_other_bases_schedules_and_limits() -> None:
    made = model()
    fibattn.convert(made, window=2, base="power_of_two", schedule="fixed", rung_reach=16, max_offset=8)
    assert made.config.fibattn_pattern["layer_offsets"] == [[4, 8]] * LAYERS


def test_any_head() -> None:
    made = model("qwen3", AutoModelForSequenceClassification, num_labels=3)
    ids = tokens()
    right = made(ids).logits
    close_logits(fibattn.convert(made, window=49)(ids).logits, right)
    fibattn.restore(made)
    body: Any = made.base_model
    close_logits(fibattn.convert(body, **PATTERN)(ids).last_hidden_state, body(ids, use_cache=False).last_hidden_state)


# ---- generating


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_cache_gives_the_same_text(architecture: str, kept: str) -> None:
    made, ids = fibattn.convert(model(architecture), **PATTERN, keep_layers=KEPT[kept]), tokens(2, 9)
    right = answer(made, ids, use_cache=False)
    assert torch.equal(answer(made, ids), right)
    assert torch.equal(answer(made, ids, cache_implementation="static", disable_compile=True), right)


@pytest.mark.parametrize("how", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@torch.no_grad()
def test_prompts_of_different_lengths(architecture: str, how: str) -> None:
    made, ids = fibattn.convert(model(architecture), **PATTERN, keep_layers=[1, 2]), tokens(2, 12)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :7], mask[0, :7] = 0, 0
    given = {} if how == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    both = answer(made, padded, attention_mask=mask, **given)
    assert torch.equal(both[0, 12:], answer(made, ids[:1, 7:])[0, 5:])
    assert torch.equal(both[1, 12:], answer(made, ids[1:])[0, 12:])


@pytest.mark.parametrize(
    "how",
    [{"do_sample": True, "temperature": 2.0}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=["sampling", "beams", "sampled beams"],
)
@torch.no_grad()
def test_ways_of_generating(how: dict[str, Any]) -> None:
    made, ids = fibattn.convert(model("qwen3"), **PATTERN, keep_layers=[2]), tokens(2, 9)
    texts = []
    for cached in (True, False):
        torch.manual_seed(3)
        texts.append(answer(made, ids, use_cache=cached, **how))
    assert torch.equal(*texts)


@torch.no_grad()
def test_looking_up_the_prompt_is_refused_before_it_goes_wrong() -> None:
    made, ids = fibattn.convert(model(), **PATTERN), tokens(1, 5).repeat(1, 4)
    with pytest.raises(ValueError, match=r"cache that can be cropped|cannot be removed"):
        answer(made, ids, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("made", [DynamicCache, lambda config: StaticCache(config, max_cache_len=50)])
@torch.no_grad()
def test_pieces_equal_the_whole_in_bounded_memory(made: Any) -> None:
    m, ids = fibattn.convert(model(), **PATTERN, keep_layers=[3]), tokens(2, 50)
    cache = made(config=m.config)
    pieces = [m(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([17, 1, 1, 20, 1, 10], 1)]
    close_logits(torch.cat(pieces, 1), m(ids, use_cache=False).logits)
    offsets = m.config.fibattn_pattern["layer_offsets"]
    rows = [layer.keys.shape[2] for layer in cache.layers]
    assert rows == [*(found[-1] + 1 for found in offsets[:3]), 50]


@torch.no_grad()
def test_a_compiled_step_equals_the_plain_one() -> None:
    m, ids = fibattn.convert(model(), **PATTERN, keep_layers=[2]), tokens(1, 30)
    step = torch.compile(m.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=m.config, max_cache_len=30)
    m(ids[:, :20], past_key_values=cache, use_cache=True)
    steps = [step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(20, 30)]
    close_logits(torch.cat(steps, 1), m(ids, use_cache=False).logits[:, 20:])


@torch.no_grad()
def test_streams() -> None:
    made, ids = fibattn.convert(model(), **PATTERN), tokens(1, 9)
    endless = stream(made, ids[0].tolist(), temperature=0)
    assert list(itertools.islice(endless, 30)) == answer(made, ids)[0, 9:].tolist()


@pytest.mark.skipif(" " in sys.prefix, reason="PyTorch's compiler for a CPU does not quote the blank in its own path")
@torch.no_grad()
def test_compiled_streams() -> None:
    """The first token comes before the step is compiled; a model that keeps a full layer is refused."""
    made, ids = fibattn.convert(model(), **PATTERN), tokens(1, 9)
    assert next(stream(made, ids[0].tolist(), temperature=0, compiled=True)) == answer(made, ids)[0, 9]
    fibattn.convert(fibattn.restore(made), **PATTERN, keep_layers=[1])
    with pytest.raises(InputError, match="needs a limit"):
        next(stream(made, ids[0].tolist(), compiled=True))


@pytest.mark.skipif(" " in sys.prefix, reason="PyTorch's compiler for a CPU does not quote the blank in its own path")
@pytest.mark.parametrize("prompt", [3, 20])
@pytest.mark.parametrize(("architecture", "kept"), [("mistral", None), ("mistral", [1, 3]), ("gemma3_text", [0, 2])])
@torch.no_grad()
def test_a_compiled_stream_without_a_limit_has_the_whole_sliding_windows(
    architecture: str, kept: list[int] | None, prompt: int
) -> None:
    """With the step as it is, since compiling it takes minutes: what could differ is the static cache."""
    made, ids = model(architecture), tokens(1, prompt)[0].tolist()
    if kept is not None:
        fibattn.convert(made, **PATTERN, keep_layers=kept)
    with torch.compiler.set_stance("force_eager"):
        found = list(itertools.islice(stream(made, ids, temperature=0, compiled=True), 40))
    assert found == list(stream(made, ids, temperature=0, max_new_tokens=40))


@pytest.mark.parametrize(
    ("architecture", "before", "after"), [("llama", 4, 1), ("mistral", 0, 0), ("qwen2", 2, 1), ("gemma3_text", 2, 1)]
)
def test_layers_whose_cache_grows_are_counted(architecture: str, before: int, after: int) -> None:
    made = model(architecture)
    assert growing_layers(made) == before
    assert growing_layers(fibattn.convert(made, **PATTERN, keep_layers=[1])) == after


# ---- padding, packing, training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["mistral", "smollm3"])
@torch.no_grad()
def test_padding_does_not_show(architecture: str, side: str) -> None:
    made, ids = fibattn.convert(model(architecture), **PATTERN, keep_layers=[1]), tokens(2, 40)
    mask = torch.ones_like(ids)
    real = slice(15, None) if side == "left" else slice(0, 25)
    mask[0] = 0
    mask[0, real] = 1
    logits = made(ids.where(mask > 0, 0), attention_mask=mask, use_cache=False).logits
    close_logits(logits[:1, real], made(ids[:1, real]).logits)
    close_logits(logits[1:], made(ids[1:]).logits)


@pytest.mark.parametrize("how", ["plain", "cached", "checkpointed", "by lengths"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_packed_documents_train_like_separate_ones(architecture: str, how: str) -> None:
    made, ids = fibattn.convert(model(architecture), **PATTERN, keep_layers=[1, 2]).train(), tokens(1, 48)
    if how == "checkpointed":
        made.gradient_checkpointing_enable()
    ends = [(0, 20), (20, 23), (23, 48)]
    given: dict[str, Any] = {"position_ids": torch.cat([torch.arange(last - first) for first, last in ends])[None]}
    if how == "by lengths":
        given = {"cu_seq_lens_q": torch.tensor([0, 20, 23, 48], dtype=torch.int32)}
    packed = made(ids, use_cache=how == "cached", **given).logits
    apart = torch.cat([made(ids[:, first:last], use_cache=False).logits for first, last in ends], 1)
    close_logits(packed, apart)
    weight = made.get_parameter("model.layers.0.self_attn.k_proj.weight")
    grads = [torch.autograd.grad(logits.square().mean(), weight)[0] for logits in (packed, apart)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    assert grads[0].abs().max() > 0


def test_autocast() -> None:
    made, ids = fibattn.convert(model("qwen3"), **PATTERN), tokens()
    right = made(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = made(ids, labels=ids)
    out.loss.backward()
    assert (out.logits - right).std() < 0.05 * right.std()


def test_a_short_training_learns() -> None:
    made, ids = fibattn.convert(model(), **PATTERN).train(), tokens(4, 32)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = made(ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


# ---- saving


@torch.no_grad()
def test_the_command_line_loads_what_was_saved(tmp_path: Any) -> None:
    made, ids = fibattn.convert(model("gemma3_text"), **PATTERN), tokens()
    made.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    close_logits(loaded(ids.to(loaded.device)).logits.cpu(), made(ids).logits)


def test_whole_numbers_of_other_kinds_can_be_saved(tmp_path: Any) -> None:
    made = fibattn.convert(model(), window=np.int64(3), rungs=np.int32(5), keep_layers=np.arange(2))  # pyright: ignore
    made.save_pretrained(tmp_path)
    assert made.config.fibattn_pattern["keep_layers"] == [0, 1]


def test_a_restored_model_saves_no_pattern(tmp_path: Any) -> None:
    made = fibattn.restore(fibattn.convert(model(), **PATTERN))
    made.save_pretrained(tmp_path)
    assert "fibattn" not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_copies_are_their_own() -> None:
    made, ids = model(), tokens()
    dense = made(ids).logits
    sparse = fibattn.convert(made, **PATTERN)(ids).logits
    other = fibattn.restore(copy.deepcopy(made))
    assert torch.equal(other(ids).logits, dense)
    assert torch.equal(made(ids).logits, sparse)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "convert_a_decoder.py"
    monkeypatch.setattr("sys.argv", [str(example)])
    runpy.run_path(str(example))
    said = capsys.readouterr().out
    assert "restored: logits differ by 0.0e+00" in said
    assert "[343, 75, 65, 83]" in said
