"""The loss that never holds all logits, against the one that does."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import config, model, tokens
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import prune

from fibattn.errors import InputError
from fibattn.model import loss
from fibattn.model.loss import IGNORED, linear_cross_entropy


def data(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 11, (count,), generator=generator)


@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("slice_logits", [1, 50, 1 << 27])
@pytest.mark.parametrize("ignored", [(), (0,), (0, 3, 6)])
def test_values_and_gradients_are_those_of_torch(
    count: int, slice_logits: int, ignored: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "SLICE_LOGITS", slice_logits)
    hidden, weight, targets = data(count)
    targets[[index for index in ignored if index < count]] = IGNORED
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    found = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(2.5 * expected, (hidden, weight))
    for got, right in zip(torch.autograd.grad(2.5 * found, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


def test_a_compiled_loss_has_few_slices_and_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SLICE_LOGITS", 1)
    slices = []

    def counting(graph: Any, given: Any) -> Any:
        slices.append(sum(node.target is torch.ops.aten._log_softmax.default for node in graph.graph.nodes))
        return graph

    hidden, weight, targets = data(100)
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, backend=aot_autograd(fw_compiler=counting), fullgraph=True)
    found = compiled(hidden, weight, targets)
    torch.testing.assert_close(found, functional.cross_entropy(hidden @ weight.T, targets, reduction="sum"))
    assert slices == [25]


def test_gradcheck() -> None:
    hidden, weight, targets = data(5)
    targets[2] = IGNORED
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = data(9, torch.float32)
    found = linear_cross_entropy(1000 * hidden, weight, targets)
    expected = functional.cross_entropy(1000 * hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(found, expected)


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, _ = data(4)
    found = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORED))
    assert found == 0
    assert all(not grad.any() for grad in torch.autograd.grad(found, (hidden, weight)))


def test_bf16_autocast_is_as_good_as_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(200, 64, generator=generator).requires_grad_()
    weight = (torch.randn(500, 64, generator=generator) / 4).requires_grad_()
    targets = torch.randint(0, 500, (200,), generator=generator)

    def gradients(value: Tensor) -> list[Tensor]:
        return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, (hidden, weight)))]

    exact = gradients(functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
        plain = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
    assert found.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(found, (hidden, weight), retain_graph=True)] == [torch.float32] * 2
    for name, got, other, right in zip(
        ("loss", "hidden", "weight"), gradients(found), gradients(plain), exact, strict=True
    ):
        error, allowed = float((got - right).norm()), float((other - right).norm())
        assert error <= 2 * allowed + 1e-6 * float(right.norm()), f"{name}: {error} against {allowed}"


@pytest.mark.parametrize("scaler", [1.0, 65_536.0])
@pytest.mark.parametrize("slice_logits", [1 << 10, 1 << 27])
def test_fp16_autocast_overflows_no_sooner_than_the_mean(
    scaler: float, slice_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of a weight's gradient over these tokens is far beyond 65,504; their mean is about 30."""
    monkeypatch.setattr(loss, "SLICE_LOGITS", slice_logits)
    generator = torch.Generator().manual_seed(1)
    hidden = (30 + torch.randn(6000, 16, generator=generator)).requires_grad_()
    weight = (torch.randn(50, 16, generator=generator) / 16).requires_grad_()
    targets = torch.zeros(6000, dtype=torch.long)

    def gradients(mean: Tensor) -> list[Tensor]:
        return [grad / scaler for grad in torch.autograd.grad(scaler * mean, (hidden, weight))]

    with torch.autocast("cpu", dtype=torch.float16):
        found = gradients(linear_cross_entropy(hidden, weight, targets) / 6000)
    right = gradients(functional.cross_entropy(functional.linear(hidden, weight), targets))
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_fp16_autocast_of_a_model_overflows_no_sooner_than_the_mean() -> None:
    made, ids = model("linear", initializer_range=0.1).train(), tokens(8, 60)
    plain = copy.deepcopy(made)
    with torch.no_grad():
        for one in (made, plain):
            one.model.norm.weight.fill_(300.0)
    with torch.autocast("cpu", dtype=torch.float16):
        made(ids, labels=ids, use_cache=False).loss.backward()
    logits = plain(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    found, right = (one.model.embed_tokens.weight.grad for one in (made, plain))
    assert (found - right).norm() < 0.05 * right.norm()


def test_the_scale_of_a_gradient_is_not_rounded_to_16_bits() -> None:
    hidden, weight, targets = data(64, torch.bfloat16)
    whole = linear_cross_entropy(hidden, weight, targets)
    # 1 / 3 is 0.3340 in bfloat16: what came out would all be too long by 2 in a thousand.
    third, one = (torch.autograd.grad(total, hidden, retain_graph=True)[0] for total in (whole / 3, whole))
    torch.testing.assert_close(third, (one.float() / 3).bfloat16(), rtol=0, atol=0)


def test_a_frozen_head_needs_no_gradient() -> None:
    hidden, weight, targets = data(6)
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None


# In the model


def test_labels_are_shifted_inside() -> None:
    made, ids = model(), tokens()
    out = made(ids, labels=ids)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_shift_labels_are_taken_as_they_are_and_all_count() -> None:
    made, ids, targets = model(), tokens(), tokens(seed=1)
    out = made(ids, shift_labels=targets)
    torch.testing.assert_close(out.loss, functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(made(ids, labels=ids, shift_labels=targets).loss, out.loss)


def test_ignored_labels_do_not_count() -> None:
    made, ids = model(), tokens()
    labels = ids.clone()
    labels[0, :20] = labels[1, 40:] = IGNORED
    out = made(ids, labels=labels)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(out.loss, expected)


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    made, ids = model(), tokens()
    for wrong in (-1, made.config.vocab_size):
        labels = ids.clone()
        labels[0, 3] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            made(ids, labels=labels)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_in_batch_divides_the_sum(count: int | Tensor) -> None:
    made, ids, targets = model(), tokens(), tokens(seed=1)
    out = made(ids, shift_labels=targets, num_items_in_batch=count)
    torch.testing.assert_close(out.loss, made(ids, shift_labels=targets).loss * targets.numel() / 7)


def test_training_keeps_no_logits_and_the_same_loss_and_gradients() -> None:
    made, ids = model(), tokens()
    out = made(ids)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(made.parameters()))
    trained = made.train()(ids, labels=ids)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, expected)
    for got, right in zip(torch.autograd.grad(trained.loss, list(made.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, targets = data(64)
    with_gradients = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), with_gradients)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets)
    right = torch.autograd.grad(with_gradients, hidden)[0]
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], right)
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


class Adapted(nn.Module):
    """A head with something added to it, as adapters do; `weight` is still that of the base."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


def test_a_replaced_head_counts() -> None:
    made, ids = model(tie_word_embeddings=False), tokens()
    made.lm_head = Adapted(made.lm_head)
    out = made(ids, labels=ids)
    torch.testing.assert_close(
        out.loss, functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    out.loss.backward()
    assert made.lm_head.extra.weight.grad.any()


def test_a_pruned_head_counts() -> None:
    made, ids = model(tie_word_embeddings=False), tokens()
    prune.random_unstructured(made.lm_head, "weight", amount=0.5)
    out = made.train()(ids, labels=ids)
    logits = made(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, functional.cross_entropy(logits, ids[:, 1:].flatten()))
    out.loss.backward()
    assert made.lm_head.weight_orig.grad.any()


def test_a_head_that_something_is_hooked_into_counts() -> None:
    made, ids = model(), tokens()
    made.lm_head.register_forward_hook(lambda module, given, found: found / 2)
    out = made(ids, labels=ids)
    logits = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, functional.cross_entropy(logits, ids[:, 1:].flatten()))


class Packed8(Tensor):
    """A weight in 8 bits that only a linear layer knows how to use, as quantisation libraries have it."""

    whole: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Packed8":
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)  # pyright: ignore

    def __init__(self, weight: Tensor):
        self.step = weight.abs().amax(1, keepdim=True) / 127
        self.whole = (weight / self.step).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            given, weight = args[:2]
            return functional.linear(given, weight.whole * weight.step, *args[2:])
        if function in (Tensor.detach, Tensor.requires_grad_) or "__get__" in str(function):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(f"{function} of a weight in 8 bits")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a weight in 8 bits")


@pytest.mark.parametrize("library", ["a subclass", "torchao"])
@pytest.mark.parametrize("kind", ["linear", "mixture", "learned"])
def test_weights_in_8_bits_have_a_loss(kind: str, library: str) -> None:
    made, ids = model(kind, tie_word_embeddings=False), tokens()
    right = made(ids, labels=ids).loss
    if library == "torchao":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(made, torchao.Int8WeightOnlyConfig())
    else:
        made.lm_head.weight = nn.Parameter(Packed8(made.lm_head.weight.detach()), requires_grad=False)
    for mode in (True, False):
        out = made.train(mode)(ids, labels=ids)
        logits = made(ids).logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(out.loss, functional.cross_entropy(logits, ids[:, 1:].flatten()))
        assert abs(out.loss - right) < 0.1 * right


def test_an_offloaded_head_counts() -> None:
    made, ids = model(), tokens()
    right = made(ids, labels=ids).loss
    cpu_offload(made, execution_device=torch.device("cpu"))
    torch.testing.assert_close(made(ids, labels=ids).loss, right)


def test_functional_gradients_equal_autograd() -> None:
    hidden, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, IGNORED, 1, 1, 2, IGNORED, 5])
    expected = torch.func.grad(
        lambda h, w: functional.cross_entropy(h @ w.T, targets, reduction="sum", ignore_index=IGNORED), argnums=(0, 1)
    )(hidden, weight)
    found = torch.func.grad(lambda h, w: linear_cross_entropy(h, w, targets), argnums=(0, 1))(hidden, weight)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("kind", ["linear", "mixture", "bounded mixture"])
@pytest.mark.parametrize("training", [True, False])
def test_the_gradients_of_every_sequence_alone(kind: str, training: bool) -> None:
    """As differential privacy and influence functions take them: `vmap` over `grad` over `functional_call`."""
    made, ids = model(kind).train(training), tokens(3, 20)
    ids[1, 12:] = 0
    labels = ids.masked_fill(ids == 0, IGNORED)
    weights = {name: one.detach() for name, one in made.named_parameters()}

    def one(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return torch.func.functional_call(made, weights, (ids[None],), {"labels": labels[None]}).loss

    found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weights, ids, labels)
    for row in range(3):
        made.zero_grad()
        made(ids[row : row + 1], labels=labels[row : row + 1]).loss.backward()
        for name, parameter in made.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-4, atol=1e-5)


def test_masks_may_be_mapped_over() -> None:
    made, ids = model(), tokens(2, 20)
    masks = torch.ones_like(ids)
    masks[0, :7] = 0
    mapped = torch.func.vmap(lambda x, mask: made(x[None], attention_mask=mask[None], use_cache=False).logits[0])
    torch.testing.assert_close(mapped(ids, masks), made(ids, attention_mask=masks).logits)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_loss_without_data_has_a_shape(where: str) -> None:
    """For who counts memory or operations beforehand."""
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        made, ids = type(model())(config()), torch.ones(2, 20, dtype=torch.long)
        out = made(ids, attention_mask=torch.ones_like(ids), labels=ids)
        out.loss.backward()
    assert out.loss.shape == ()
    assert made.lm_head.weight.grad.shape == made.lm_head.weight.shape


def test_second_derivatives_are_refused_rather_than_left_out() -> None:
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.arange(9) % 7)
    first = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for gradient, leaf in zip(first, (hidden, weight), strict=True):
        penalty = gradient.square().sum() + leaf.square().sum()
        with pytest.raises(InputError, match=r"the loss has no second derivatives; take .*cross_entropy of the logits"):
            torch.autograd.grad(penalty, leaf, retain_graph=True)
