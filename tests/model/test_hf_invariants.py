"""What Transformers' own tests of a causal language model ask (`make hf-tests`), where no other file of ours does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, model, tokens
from torch import Tensor
from transformers import PreTrainedModel

from fibattn import FibAttnForCausalLM, FibAttnModel


def answer(made: PreTrainedModel, ids: Tensor, **how: Any) -> Tensor:
    mask = torch.ones_like(ids)
    how = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0, **how}
    return made.generate(ids, attention_mask=mask, **how)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", ["linear", "untied", "modern"])
def test_the_vocabulary_can_grow_and_shrink(kind: str) -> None:
    made, ids = model(kind), tokens()
    expected = made(ids).logits
    for size in (VOCABULARY + 9, VOCABULARY):
        made.resize_token_embeddings(size)
        assert made.config.vocab_size == made.vocab_size == size
        assert made.lm_head.weight.shape[0] == made.get_input_embeddings().num_embeddings == size
        assert (made.lm_head.weight is made.get_input_embeddings().weight) == (kind != "untied")
        found = made(ids).logits
        assert found.shape[-1] == size
        torch.testing.assert_close(found[..., :VOCABULARY], expected)
        made(torch.tensor([[size - 1]]))
    made(ids, labels=ids).loss.backward()


def test_body_and_head_load_from_each_others_files(tmp_path: Path) -> None:
    made, ids = model("mixture"), tokens()
    made.model.save_pretrained(tmp_path / "body")
    made.save_pretrained(tmp_path / "whole")
    assert torch.equal(FibAttnForCausalLM.from_pretrained(tmp_path / "body").eval()(ids).logits, made(ids).logits)
    body = FibAttnModel.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(body(ids).last_hidden_state, made.model(ids).last_hidden_state)


def test_evaluation_is_deterministic_and_needs_no_gradient() -> None:
    made, ids = model("mixture"), tokens()
    with torch.no_grad():
        assert torch.equal(made(ids).logits, made(ids).logits)
    with torch.inference_mode():
        made(ids)


def test_tuples_in_place_of_named_outputs() -> None:
    made, ids = model("mixture"), tokens()
    named = made(ids, labels=ids, output_hidden_states=True, use_cache=False)
    plain = made(ids, labels=ids, output_hidden_states=True, use_cache=False, return_dict=False)
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.logits)
    assert all(map(torch.equal, plain[2], named.hidden_states))


def test_gradients_reach_the_hidden_states_and_the_embeddings() -> None:
    made, ids = model("learned mixture"), tokens()
    embedded = made.get_input_embeddings()(ids).detach().requires_grad_()
    states = made(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
    kept = states.hidden_states[2]
    kept.retain_grad()
    states.logits.square().sum().backward()
    assert kept.grad.isfinite().all()
    assert embedded.grad.abs().sum() > 0


def test_generation_from_embeddings_and_its_scores() -> None:
    made, ids = model("mixture"), tokens(2, 12)
    expected = answer(made, ids)
    embedded = made.generate(
        inputs_embeds=made.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=20,
        max_new_tokens=20,
        pad_token_id=0,
    )
    assert torch.equal(embedded, expected[:, 12:])
    out: Any = answer(made, ids, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    with torch.no_grad():
        whole = made(out.sequences).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert [states[-1].shape[1] for states in out.hidden_states] == [12] + [1] * 19


def test_generation_with_penalties_and_forbidden_tokens() -> None:
    made, ids = model("mixture"), tokens(1, 12)
    forbidden = int(answer(made, ids)[0, 12])
    found = answer(made, ids, bad_words_ids=[[forbidden]], no_repeat_ngram_size=2)
    assert forbidden not in found[0, 12:]
    pairs = list(zip(found[0].tolist(), found[0, 1:].tolist(), strict=False))
    assert len(set(pairs[12:])) == len(pairs[12:])


def test_half_precision_models_run_and_generate() -> None:
    ids = tokens()
    for dtype in (torch.bfloat16, torch.float16):
        made = model("learned mixture").to(dtype)
        assert made(ids).logits.dtype == dtype
        assert answer(made, ids).shape == (2, 70)
