"""Training on packed and on padded documents, as Transformers' collators give them, against the documents alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import torch
from tiny_models import config, model, tokens
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

import fibattn
from fibattn import FibAttnForCausalLM, InputError

LENGTHS = [23, 2, 30, 1, 6]
IGNORED = -100


def documents() -> list[Tensor]:
    return list(tokens(1, sum(LENGTHS))[0].split(LENGTHS))


def gradients(made: FibAttnForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def alone(made: FibAttnForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the documents one by one, each target weighing the same."""
    made.zero_grad()
    targets = sum(LENGTHS) - len(LENGTHS)
    total = torch.zeros(())
    for ids in documents():
        loss = made(ids[None], labels=ids[None], num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    return total, gradients(made)


def packed(**options: bool) -> dict[str, Any]:
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    return dict(collate([{"input_ids": ids.tolist()} for ids in documents()]))


def padded(side: str) -> dict[str, Tensor]:
    """On the left the first token of a document would be a target of padding, as in every Transformers model."""

    def pad(parts: list[Tensor], value: int) -> Tensor:
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    mask = pad([torch.ones_like(ids) for ids in documents()], 0)
    targets = [torch.cat([torch.tensor([IGNORED]), ids[1:]]) for ids in documents()]
    return {"input_ids": pad(documents(), 0), "labels": pad(targets, IGNORED), "attention_mask": mask}


WAYS = {
    "position_ids": lambda: packed(),
    "position_ids and cu_seq_lens": lambda: packed(return_flash_attn_kwargs=True),
    "cu_seq_lens": lambda: packed(return_flash_attn_kwargs=True, return_position_ids=False),
    "padding on the right": lambda: padded("right"),
    "padding on the left": lambda: padded("left"),
}


@pytest.mark.parametrize("kind", ["linear", "learned", "power_of_two", "sliding", "full, linear RoPE", "mixture"])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_the_documents_alone(kind: str, way: str) -> None:
    made = model(kind).train()
    loss, expected = alone(made)
    made.zero_grad()
    found = made(**WAYS[way]())
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(made).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-4 * scale + 1e-6, msg=f"{name}, {way}")


def like_flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any) -> tuple[Tensor, None]:
    """Told what FlashAttention is told, in the order in which Transformers looks: padding, lengths, positions."""
    batch, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    lengths = [given.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None].bool()
    elif all(one is not None for one in lengths):
        assert torch.equal(lengths[0], lengths[1])
        assert lengths[0].dtype == torch.int32
        assert lengths[2] == lengths[3] == lengths[0].diff().max()
        document = (torch.arange(batch * tokens)[:, None] >= lengths[0][1:]).sum(1).view(batch, tokens)
        seen = seen & (document[:, None, :, None] == document[:, None, None])
    elif _is_packed_sequence(given.get("position_ids"), batch):
        boundaries = prepare_fa_kwargs_from_position_ids(given["position_ids"])[0][0]
        document = (torch.arange(tokens)[:, None] >= boundaries[1:]).sum(1)
        seen = seen & (document[:, None] == document)
    seen = seen | ~seen.any(-1, keepdim=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=given["scaling"])
    return out.transpose(1, 2), None


AttentionInterface.register("varlen", like_flash)
AttentionInterface.register("varlen, padded", like_flash)
AttentionMaskInterface.register("varlen, padded", flash_attention_mask)


@contextmanager
def attending(made: Any, implementation: str) -> Iterator[None]:
    """The full layers' attention; FlexAttention uncompiled, which Inductor cannot build for every CPU."""
    made.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager" if implementation == "flex_attention" else "default"):
        yield


IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", "varlen", "varlen, padded"]
MARKED: dict[str, dict[str, Any]] = {
    "position_ids": {},
    "position_ids and cu_seq_lens": {"return_flash_attn_kwargs": True},
    "cu_seq_lens": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "cu_seq_lens_q alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "position_ids beside a mask of ones": {},
    "shifted position_ids": {},
}


def marked(way: str) -> dict[str, Any]:
    batch = packed(**MARKED[way])
    if way == "cu_seq_lens_q alone":
        batch = {name: batch[name] for name in ("input_ids", "cu_seq_lens_q")}
    if way == "position_ids beside a mask of ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if way == "shifted position_ids":
        # What RoPE sees is differences; every document begins somewhere else.
        shifts = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        batch["position_ids"] = batch["position_ids"] + 7 * shifts
    return batch


def with_kept_layer() -> Any:
    return fibattn.convert(foreign_decoders.model(), window=3, rungs=7, keep_layers=[1, 2])


@pytest.mark.parametrize("way", MARKED)
@pytest.mark.parametrize("kind", ["mixture", "learned mixture", "bounded mixture", "converted"])
@torch.no_grad()
def test_every_implementation_of_the_full_layers_keeps_documents_apart(kind: str, way: str) -> None:
    made: Any = with_kept_layer() if kind == "converted" else model(kind)
    expected = torch.cat([made(ids[None]).logits for ids in documents()], dim=1)
    for implementation in ["fibattn"] if kind == "converted" else IMPLEMENTATIONS:
        with attending(made, implementation):
            found = made(**marked(way)).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=lambda m, i=implementation: f"{i}: {m}")


def padded_rows(side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Two rows of packed documents, padded to one length; and the documents row by row."""
    rows, lengths = [documents()[:2], documents()[2:]], 45

    def pad(parts: list[Tensor]) -> Tensor:
        blank = torch.zeros(lengths - sum(map(len, parts)), dtype=torch.long)
        return torch.cat([blank, *parts] if side == "left" else [*parts, blank])

    batch = {
        "input_ids": torch.stack([pad(row) for row in rows]),
        "attention_mask": torch.stack([pad([torch.ones_like(ids) for ids in row]) for row in rows]),
        "position_ids": torch.stack([pad([torch.arange(len(ids)) for ids in row]) for row in rows]),
    }
    return batch, [ids for row in rows for ids in row]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["linear", "mixture", "learned mixture", "converted"])
@torch.no_grad()
def test_documents_packed_into_padded_rows_are_those_documents_alone(kind: str, side: str) -> None:
    made: Any = with_kept_layer() if kind == "converted" else model(kind)
    batch, parts = padded_rows(side)
    expected = torch.cat([made(ids[None]).logits[0] for ids in parts])
    for implementation in ["fibattn"] if kind == "converted" else IMPLEMENTATIONS:
        with attending(made, implementation):
            found = made(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=lambda m, i=implementation: f"{i}: {m}")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_several_packed_rows_agree_between_implementations(side: str) -> None:
    made, batch = model("mixture"), padded_rows(side)[0]
    del batch["attention_mask"]
    found = []
    for implementation in IMPLEMENTATIONS:
        with attending(made, implementation):
            found.append(made(**batch).logits)
        torch.testing.assert_close(found[-1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", ["varlen, padded", "flex_attention"])
@torch.no_grad()
def test_generating_from_padded_prompts_is_the_same_in_every_implementation(implementation: str) -> None:
    made, ids = model("mixture"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = made.generate(ids, **how)  # pyright: ignore[reportCallIssue]
    with attending(made, implementation):
        assert torch.equal(made.generate(ids, **how), expected)  # pyright: ignore[reportCallIssue]


def test_a_cache_made_by_the_way_changes_nothing() -> None:
    """The default of the configuration is to keep one, also while training."""
    made, batch = model("mixture").train(), packed()
    losses = [made(**batch, use_cache=use_cache).loss for use_cache in (None, True, False)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], losses[2])


def test_empty_documents_and_no_boundaries() -> None:
    made, ids = model("mixture"), tokens(1, 20)
    expected = made(ids).logits
    lengths = torch.tensor([0, 0, 20, 20], dtype=torch.int32)
    torch.testing.assert_close(made(ids, cu_seq_lens_q=lengths).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[0, 9], [1, 20], [0, 12, 8, 20], [0, 40]])
def test_lengths_that_do_not_fill_the_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=r"cu_seq_lens_q is \[.*\]; expected to rise from 0 to the 20 tokens"):
        model()(tokens(1, 20), cu_seq_lens_q=torch.tensor(lengths))


def test_lengths_beside_what_they_exclude_are_refused() -> None:
    made, ids, lengths = model(), tokens(1, 20), torch.tensor([0, 12, 20])
    with pytest.raises(InputError, match=r"shape \(3,\) for a batch of 2; expected \(documents \+ 1,\) and one row"):
        made(tokens(2, 20), cu_seq_lens_q=lengths)
    with pytest.raises(InputError, match=r"shape \(1, 3\) for a batch of 1"):
        made(ids, cu_seq_lens_q=lengths[None])
    with pytest.raises(InputError, match=r"cu_seq_lens_q came with attention_mask; packed documents have none"):
        made(ids, cu_seq_lens_q=lengths, attention_mask=torch.ones_like(ids))
    out = made(ids, use_cache=True)
    with pytest.raises(InputError, match="cu_seq_lens_q came with cache"):
        made(ids, cu_seq_lens_q=lengths, past_key_values=out.get("cache", out.get("past_key_values")))


def test_packing_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    kinds = config("mixture").layer_types[:3]
    made = model("mixture", num_hidden_layers=3, layer_types=kinds, no_rope_layers=[1, 0, 1]).train()
    for way in ("position_ids", "cu_seq_lens", "position_ids beside a mask of ones"):
        batch = marked(way)
        compiled = torch.compile(made, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**batch).loss, made(**batch).loss, rtol=1e-5, atol=1e-5)


def test_the_plain_trainer_gets_the_same_weights_from_packed_and_padded_documents(tmp_path: Path) -> None:
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in documents() * 2]

    def pad(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        parts = [torch.tensor(feature["input_ids"]) for feature in features]
        mask = pad_sequence([torch.ones_like(ids) for ids in parts], batch_first=True)
        ids = pad_sequence(parts, batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}

    weights = []
    for collate in (pad, DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        made = model("mixture")
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.01,
            optim="sgd",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model=made, args=arguments, train_dataset=rows, data_collator=collate).train()
        weights.append(made.state_dict())
    assert not torch.equal(weights[0]["lm_head.weight"], model("mixture").lm_head.weight)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4, msg=name)
