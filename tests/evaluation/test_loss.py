"""Per-position loss against plain Transformers: whole logits, PyTorch's cross entropy, a loop over sequences."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fibattn import FibAttnForCausalLM
from fibattn.data.prepared import PreparedData
from fibattn.data.sequences import held_out_sequences
from fibattn.errors import InputError
from fibattn.evaluation import loss
from fibattn.evaluation.loss import PositionLoss, token_losses

TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}


@pytest.fixture(scope="module")
def data(prepared) -> PreparedData:
    return PreparedData.open(prepared)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


@torch.no_grad()
def plainly(model: PreTrainedModel, tokens: np.ndarray, length: int) -> torch.Tensor:
    """Losses (sequences, length): sequence w reads tokens w·length … and is asked for each next token."""
    rows = []
    for start in range(0, len(tokens) - 1 - length + 1, length):
        sequence = torch.from_numpy(tokens[start : start + length + 1])
        logits = model(input_ids=sequence[None, :-1]).logits[0].double()
        rows.append(functional.cross_entropy(logits, sequence[1:], reduction="none"))
    return torch.stack(rows)


def first_tokens(data: PreparedData, count: int) -> np.ndarray:
    (stream,) = data.validation.values()
    return stream.sequence(0, count)


def measured(model: PreTrainedModel, data: PreparedData, length: int, limit: int, **options: int) -> PositionLoss:
    (stream,) = data.validation.values()
    losses = token_losses(model, held_out_sequences(stream, length, limit), quiet=True, **options)
    return PositionLoss(losses, int(stream.byte_counts(1, losses.size, data.token_bytes).sum()))


@pytest.mark.parametrize("length", [1, 24, 64, 150])
@pytest.mark.parametrize("kind", ["fibattn", "llama"])
def test_losses_equal_those_of_plain_logits(
    kind: str, length: int, data: PreparedData, model: FibAttnForCausalLM
) -> None:
    chosen = model if kind == "fibattn" else llama()
    limit = 600 if length > 1 else 40
    found = measured(chosen, data, length, limit, batch_tokens=200)
    expected = plainly(chosen, first_tokens(data, limit // length * length + 1), length)
    assert found.losses.shape == (limit // length, length)
    np.testing.assert_allclose(found.losses, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.nll() == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.perplexity() == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)
    last = expected[:, -min(10, length) :].mean()
    assert found.perplexity(max(length - 10, 0)) == pytest.approx(math.exp(float(last)), rel=1e-5)


def test_bits_per_byte_are_bits_of_the_targets_over_their_bytes(data: PreparedData, model: FibAttnForCausalLM) -> None:
    found = measured(model, data, 50, 500)
    tokens = first_tokens(data, 501)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    text = tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=True)
    expected = float(plainly(model, tokens, 50).sum()) / math.log(2) / len(text.encode())
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert found.size == len(text.encode())


def test_the_size_of_batches_and_of_slices_of_the_head_changes_nothing(
    data: PreparedData, model: FibAttnForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(batch_tokens: int) -> np.ndarray:
        return measured(model, data, 40, 400, batch_tokens=batch_tokens).losses

    expected = losses(400)
    np.testing.assert_allclose(losses(1), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(loss, "SLICE_LOGITS", 7 * 512)
    np.testing.assert_allclose(losses(130), expected, rtol=1e-5, atol=1e-6)


def test_bins_partition_the_sequence() -> None:
    found = PositionLoss(np.array([np.zeros(10), np.arange(10)], np.float32), size=20)
    assert found.bins(5) == [0.25, 1.25, 2.25, 3.25, 4.25]
    assert found.bins(3) == pytest.approx([sum(range(3)) / 6, (3 + 4 + 5) / 6, (6 + 7 + 8 + 9) / 8])
    assert found.bins(1) == [found.nll()]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_sequence_shorter_than_the_bins_has_one_for_each_position(length: int) -> None:
    found = PositionLoss(np.arange(length, dtype=np.float32)[None], size=length)
    assert found.bins(8) == list(range(length))


def test_a_model_is_left_in_evaluation_mode_and_without_gradients(data: PreparedData) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY, attention_dropout=0.9)).train()
    twice = [measured(model, data, 20, 100).losses for _ in range(2)]
    assert not model.training
    assert np.array_equal(*twice)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_caps_its_logits_is_refused_rather_than_measured_wrong(data: PreparedData) -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=5.0))
    with pytest.raises(InputError, match=r"Gemma2ForCausalLM changes its logits after the output embedding"):
        measured(model, data, 20, 100)


def test_less_than_one_window_is_refused(data: PreparedData, model: FibAttnForCausalLM) -> None:
    with pytest.raises(InputError, match=r"a sequence of 50 needs 51 tokens; the text has \d+ and a limit of 49"):
        measured(model, data, 50, 49)
