"""Which parameters go where, and Muon against PyTorch's own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fibattn.training.optimizers import build_optimizer, orthogonalized
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.run import build_model


def model(**changes: Any) -> nn.Module:
    shape = ModelRecipe(hidden_size=32, intermediate_size=40, num_hidden_layers=2, **changes)
    return build_model(Recipe(model=shape), vocab_size=64, separator=0)


def give_gradients(*models: nn.Module) -> None:
    for ours, others in zip(*(one.parameters() for one in models), strict=True):
        ours.grad = torch.randn_like(ours)
        others.grad = ours.grad.clone()


@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_weight_decay_is_for_matrices_alone(schedule: Any) -> None:
    made = model(schedule=schedule)
    decayed, plain = build_optimizer(made, OptimizerRecipe()).param_groups
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(one)].endswith(("_proj.weight", "embed_tokens.weight")) for one in decayed["params"])
    assert all(names[id(one)].endswith(("norm.weight", "theta")) for one in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_muon_is_for_the_matrices_of_the_layers_alone() -> None:
    made = model(qk_norm=True, embedding_skip=True, head_gates=True)
    decayed, plain, matrices = build_optimizer(made, OptimizerRecipe(muon=True)).param_groups
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    gates = [f"model.layers.{layer}.self_attn.head_gate.weight" for layer in (0, 1)]
    assert [names[id(one)] for one in decayed["params"]] == ["model.embed_tokens.weight", *gates]
    assert all(names[id(one)].endswith(("norm.weight", "skip")) for one in plain["params"])
    assert all(".layers." in names[id(one)] and one.dim() == 2 for one in matrices["params"])
    assert sum(len(group["params"]) for group in (decayed, plain, matrices)) == len(names)


@pytest.mark.parametrize("muon", [False, True])
def test_value_embeddings_learn_faster_by_adamw_and_decay_as_the_rest(muon: bool) -> None:
    made = model(value_embeddings=True)
    chosen = OptimizerRecipe(muon=muon, learning_rate=0.002, weight_decay=0.2, value_embedding_pace=4.0)
    optimizer = build_optimizer(made, chosen)
    decayed, plain, tables = optimizer.param_groups[:3]
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    layer = "model.layers.1.self_attn"
    assert [names[id(one)] for one in tables["params"]] == [f"{layer}.value_embedding.weight"]
    assert f"{layer}.value_gate.weight" in [names[id(one)] for one in decayed["params"]]
    assert (tables["lr"], tables["weight_decay"]) == (0.008, 0.05)
    assert (decayed["lr"], plain["lr"], decayed["weight_decay"]) == (0.002, 0.002, 0.2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert len(build_optimizer(model(), chosen).param_groups) == 2 + muon, "as in checkpoints from before"


def test_the_updates_are_those_of_pytorchs_muon_and_adamw() -> None:
    torch.manual_seed(0)
    ours = model()
    theirs = copy.deepcopy(ours)
    chosen = OptimizerRecipe(muon=True, muon_learning_rate=0.01, learning_rate=0.002, weight_decay=0.1)
    optimizer = build_optimizer(ours, chosen)
    matrices = [one for name, one in theirs.named_parameters() if ".layers." in name and one.dim() == 2]
    rest = [one for name, one in theirs.named_parameters() if one.dim() == 1]
    embedding = [theirs.get_parameter("model.embed_tokens.weight")]
    others = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(embedding, lr=0.002, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(rest, lr=0.002, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    before = {name: one.detach().clone() for name, one in ours.named_parameters()}
    for _ in range(4):
        give_gradients(ours, theirs)
        for one in (optimizer, *others):
            one.step()
    for name, found in ours.named_parameters():
        expected = theirs.get_parameter(name)
        moved = (expected - before[name]).norm()
        # PyTorch's products are in bfloat16 everywhere.
        assert (found - expected).norm() < (0.02 if ".layers." in name and found.dim() == 2 else 1e-5) * moved


def test_matrices_have_a_weight_decay_of_their_own() -> None:
    def step(decay: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        made = nn.ModuleDict({"layers": nn.Linear(6, 4, bias=False)})
        before = made["layers"].weight.detach().clone()  # pyright: ignore
        give_gradients(made, copy.deepcopy(made))
        chosen = OptimizerRecipe(muon=True, muon_learning_rate=0.1, weight_decay=0.9, muon_weight_decay=decay)
        build_optimizer(made, chosen).step()
        return before, made["layers"].weight.detach()  # pyright: ignore

    before, bare = step(0.0)
    torch.testing.assert_close(step(0.5)[1], bare - 0.05 * before)


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonalized(torch.randn(3, 20, 50)))
    assert bool(((found > 0.6) & (found < 1.25)).all())
    tall = torch.randn(2, 50, 20)
    torch.testing.assert_close(orthogonalized(tall), orthogonalized(tall.mT).mT)


def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    torch.manual_seed(0)
    chosen = OptimizerRecipe(muon=True)
    whole, cut = model(), model()
    optimizers = [build_optimizer(one, chosen) for one in (whole, cut)]
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = build_optimizer(cut, chosen)
            optimizers[1].load_state_dict(saved)
        give_gradients(whole, cut)
        for optimizer in optimizers:
            optimizer.step()
    for found, expected in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
