"""The model as it trains: gradient checkpointing, compiled, in 16 bits, with a padded feed-forward."""

import sys
from typing import Any

import pytest
import torch
from tiny_models import close, config, model, tokens
from torch import Tensor, nn
from torch.nn import functional

from fibattn import FibAttnForCausalLM, InputError
from fibattn.model import attention, layers
from fibattn.model.feed_forward import padded_gated


def gradients(made: FibAttnForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    made(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def checkpoint_activations(made: FibAttnForCausalLM) -> None:
    """By the name that the installed Transformers does not warn about."""
    getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()


@pytest.mark.parametrize("kind", ["linear", "mixture", "learned", "modern"])
def test_gradient_checkpointing_has_the_same_gradients(kind: str) -> None:
    made, ids = model(kind).train(), tokens()
    expected = gradients(made, ids)
    checkpoint_activations(made)
    found = gradients(made, ids)
    assert found.keys() == expected.keys() == dict(made.named_parameters()).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_cache_under_gradient_checkpointing_is_refused() -> None:
    made, ids = model().eval(), tokens()
    out = made(ids, use_cache=True)
    checkpoint_activations(made.train())
    with pytest.raises(InputError, match=r"cache was given under gradient checkpointing; leave it out, or call eval"):
        made(ids, past_key_values=out.get("cache", out.get("past_key_values")))


@pytest.mark.parametrize(
    ("kind", "backend"), [("mixture", "inductor"), ("learned", "aot_eager"), ("modern", "aot_eager")]
)
def test_compiles_as_one_graph(kind: str, backend: str) -> None:
    """Loss and gradients of a training step, without a break."""
    if backend == "inductor" and " " in sys.prefix:
        pytest.skip("PyTorch's inductor does not quote the path of its headers, and this one has a space in it")
    torch.compiler.reset()
    layers = {"num_hidden_layers": 2, "layer_types": config(kind).layer_types[:2], "no_rope_layers": [1, 1]}
    made, ids = model(kind, **layers).train(), tokens(1, 40)
    expected, loss = gradients(made, ids), made(ids, labels=ids, use_cache=False).loss
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    made.zero_grad()
    found = compiled(ids, labels=ids, use_cache=False).loss
    close(found, loss, 1e-4)
    found.backward()
    for name, parameter in made.named_parameters():
        close(parameter.grad, expected[name], 1e-3)


@pytest.mark.parametrize(
    ("given", "training"),
    [("labels", True), ("labels", False), ("shift_labels", True), ("cache", True), ("cache", False)],
)
def test_texts_of_any_length_share_two_graphs(given: str, training: bool) -> None:
    """One for the first length, one for all others, as of any model in PyTorch; also beside a cache that is made."""
    torch.compiler.reset()
    graphs: list[Any] = []

    def count(graph: Any, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    kinds = ["fibonacci_attention", "full_attention", "sliding_attention"]
    mixture = {"num_hidden_layers": 3, "layer_types": kinds, "no_rope_layers": [0, 1, 1]}
    kind, layers = ("linear", {"num_hidden_layers": 2}) if given == "cache" else ("learned mixture", mixture)
    made = model(kind, **layers).train(training)
    compiled = torch.compile(made, fullgraph=True, backend=count)
    for length in (16, 24, 31, 57, 70):
        ids = tokens(2, length)
        how: dict[str, Any] = {"use_cache": True} if given == "cache" else {"use_cache": False, given: ids}
        found, right = (run(ids, **how)["logits" if given == "cache" else "loss"] for run in (compiled, made))
        if training:
            found.sum().backward()
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2


def test_a_compiled_full_layer_is_causal_without_a_mask() -> None:
    """A mask would cost it the fast path."""
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []
    made, ids = model("full"), tokens()
    compiled = torch.compile(made, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    close(compiled(ids, use_cache=False).logits, made(ids).logits, 1e-5)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.target is functional.scaled_dot_product_attention]
    assert [(node.kwargs["attn_mask"], node.kwargs["is_causal"]) for node in calls] == [(None, True)] * 4


@pytest.mark.parametrize("kind", ["linear", "learned"])
def test_autocast_reaches_the_operator_in_16_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = attention.attend, []

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **others: Any) -> Any:
        seen.append({q.dtype, k.dtype, v.dtype})
        return real(q, k, v, *rest, **others)

    monkeypatch.setattr(attention, "attend", watched)
    made, ids = model(kind).train(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(ids, labels=ids, use_cache=False)
    assert seen == [{torch.bfloat16}] * 4
    assert out.loss.dtype == torch.float32
    close(out.loss.detach(), made(ids, labels=ids, use_cache=False).loss.detach(), 0.05)


def test_the_residual_stream_in_the_autocast_dtype() -> None:
    made, ids = model(autocast_residual=True), tokens()
    exact = made(ids, labels=ids).loss.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(ids, labels=ids, output_hidden_states=True)
    assert {one.dtype for one in out.hidden_states[:-1]} == {torch.bfloat16}
    close(out.loss.detach(), exact, 0.05)
    assert made(ids, output_hidden_states=True).hidden_states[0].dtype == torch.float32


def test_layers_that_begin_at_zero_add_nothing() -> None:
    made, ids = FibAttnForCausalLM(config(zero_init_outputs=True)), tokens()
    close(made.model(ids).last_hidden_state, made.model.norm(made.get_input_embeddings()(ids)), 1e-6)


# The padded feed-forward


@pytest.mark.parametrize("multiple", [1, 8, 64])
@pytest.mark.parametrize("size", [64, 86])
def test_padding_the_feed_forward_changes_nothing(size: int, multiple: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, 5, 16), (size, 16), (size, 16), (16, size))
    hidden, gate, up, down = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    expected = functional.linear(functional.silu(functional.linear(hidden, gate)) * functional.linear(hidden, up), down)
    found = padded_gated(hidden, gate, up, down, functional.silu, multiple)
    close(found, expected, 1e-12)
    towards = torch.randn_like(expected)
    inputs = (hidden, gate, up, down)
    for got, right in zip(
        torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards), strict=True
    ):
        close(got, right, 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_with_the_padded_feed_forward(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = model().train(), tokens()
    names = set(made.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = gradients(made, ids)
        monkeypatch.setattr(layers, "gains_from_padding", lambda *_: True)
        found = gradients(made, ids)
    assert set(made.state_dict()) == names
    for name, right in expected.items():
        scale = float(right.abs().max())
        torch.testing.assert_close(found[name], right, rtol=0, atol=(0.05 if autocast else 1e-4) * scale, msg=name)


def test_on_the_cpu_the_feed_forward_is_not_padded() -> None:
    projections = (nn.Linear(8, 30), nn.Linear(8, 30), nn.Linear(30, 8))
    assert not layers.gains_from_padding(torch.zeros(1, 100, 8, dtype=torch.bfloat16), projections)
