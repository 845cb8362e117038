"""Training on packed and on padded documents, as Transformers' collators give them, against the documents alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import model, tokens
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_either_implementation_of_the_full_layers_keeps_documents_apart(implementation: str) -> None:
    made = model("mixture")
    made.set_attn_implementation(implementation)
    expected = torch.cat([made(ids[None]).logits for ids in documents()], dim=1)
    for way in ("position_ids", "cu_seq_lens"):
        torch.testing.assert_close(made(**WAYS[way]()).logits, expected, rtol=1e-3, atol=1e-3)


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
    made = model("mixture").train()
    for way in ("position_ids", "cu_seq_lens"):
        batch = WAYS[way]()
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
