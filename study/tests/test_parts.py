"""Parts in trial form: what each computes, that all of it learns, and one run of each kind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import HYBRID
from torch.nn import functional

from fibattn import FibAttnConfig, FibAttnForCausalLM, InputError, files
from fibattn.data.prepared import PreparedData
from fibattn.evaluation.sweep import sweep
from fibattn.training.optimizers import build_optimizer
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.run import model_config
from study.commands.parts import run
from study.parts.table import PARTS, Part
from study.report.parts_table import parts_table
from study.store import digest
from study.trial import Trials, run_trials

IDS = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(1))


def model_of(part: Part) -> FibAttnForCausalLM:
    shape = ModelRecipe(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        window=8, layer_types=("fibonacci_attention",) * 3 + ("full_attention",),
    )  # fmt: skip
    torch.manual_seed(0)
    model = FibAttnForCausalLM(model_config(part.like(Recipe(model=shape, sequence_length=64), 63), 64, 0))
    part.use(model, 63)
    return model.double()


def logits(model: FibAttnForCausalLM) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


PLAIN = Part("plain", "")


def test_what_the_library_has_is_asked_of_it() -> None:
    found = Part("", "", gate=True, values=True, pace=3.0).like(Recipe(), 63)
    model = replace(Recipe().model, head_gates=True, value_embeddings=True)
    assert found == replace(Recipe(), model=model, optimizer=replace(Recipe().optimizer, value_embedding_pace=3.0))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_no_token_sees_what_comes_after_it_and_all_weights_learn(part: Part) -> None:
    model = model_of(part).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or name == "lm_head.weight":
                weight += 0.1 * torch.randn_like(weight)
    other = IDS.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 64
    first, second = (model(input_ids=one, use_cache=False).logits for one in (IDS, other))
    torch.testing.assert_close(first[:, :30], second[:, :30])
    assert not torch.equal(first[:, 30:], second[:, 30:])
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()] == []


def test_a_cap_bends_the_logits_in_training_too() -> None:
    plain, capped = model_of(PLAIN), model_of(Part("", "", cap=0.01))
    right = 0.01 * torch.tanh(logits(plain) / 0.01)
    torch.testing.assert_close(logits(capped), right.float().to(right.dtype), check_dtype=False, rtol=1e-5, atol=1e-7)
    expected = functional.cross_entropy(right[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    found = capped.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-6)


def test_a_faster_embedding_begins_as_the_slow_one() -> None:
    slow, fast = (model_of(Part("", "", untied=True, pace=pace)) for pace in (1.0, 10.0))
    embedded = [model.model.embed_tokens(IDS) for model in (slow, fast)]
    torch.testing.assert_close(*embedded)
    torch.testing.assert_close(10 * fast.model.embed_tokens.weight, slow.model.embed_tokens.weight)


def test_one_product_makes_what_three_make_and_muon_has_its_matrices_one_by_one() -> None:
    three, one = model_of(PLAIN), model_of(Part("", "", joined=True))
    torch.testing.assert_close(logits(one), logits(three))
    for model in (three, one):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer = build_optimizer(model, OptimizerRecipe(muon=True))
        assert sum(len(group["params"]) for group in optimizer.param_groups if group.get("muon")) == 4 * 7
    mine, theirs = one.model.layers[1].self_attn.q_proj.projections[2], three.model.layers[1].self_attn.v_proj  # pyright: ignore
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)


def test_a_convolution_is_in_full_layers_only_where_it_is_asked_for() -> None:
    every, sparse = (model_of(Part("", "", convolution=3, everywhere=where)) for where in (True, False))
    torch.testing.assert_close(logits(every), logits(model_of(PLAIN)))  # it begins at zero
    weights = [model.model.layers[3].self_attn.kv_convolution for model in (every, sparse)]
    assert weights[1] is None
    assert weights[0] is not None
    before = logits(every)
    with torch.no_grad():
        weights[0][:, 1] = 0.5  # pyright: ignore
    changed = (logits(every) - before).abs().amax(dim=(0, 2))
    assert changed[0] == 0
    assert changed[1] > 0


def test_a_head_of_its_own_begins_at_zero() -> None:
    model = model_of(Part("", "", untied=True))
    assert not logits(model).any()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_parts_are_trained_measured_and_told(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = tuple(one for one in PARTS if one.name in ("cap", "gate", "values-untied"))
    assert run_trials(Trials("parts", wanted, prepared, out, tmp_path / "work", HYBRID, 1024, 2048)) == ()
    found = {path.stem: files.read_json(path) for path in (out / "parts").glob("*.json")}
    assert set(found) == {"cap", "gate", "values-untied"}
    assert "python -m study parts" in found["cap"]["command"]
    assert found["values-untied"]["model"]["parameters"] > found["cap"]["model"]["parameters"] + 2 * 64 * 16
    rival = found["cap"] | {"key": digest(found["cap"]["recipe"], found["cap"]["inputs"]["data_fingerprint"])}
    [table] = parts_table(out, [rival, rival | {"key": "another"}])
    rows = [dict(zip(table.frame.columns, row, strict=True)) for row in table.rows]
    assert [row["part"] for row in rows] == ["cap", "gate", "values-untied"]
    assert rows[0]["against the recipe"] == "+0.0 %"
    assert rows[1]["against the recipe"] not in ("+0.0 %", "–")
    assert parts_table(tmp_path, [rival]) == []


def test_a_part_is_put_into_the_recipe_of_a_step(prepared: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "out", replace(HYBRID, steps=1)
    assert (
        run_trials(Trials("parts", PARTS[:1], prepared, out, tmp_path / "work", base, 1024, 2048, step="batch")) == ()
    )
    found = files.read_json(out / "parts" / "cap@batch.json")
    assert found["command"].endswith("--recipe batch")
    assert found["model"]["full_layers"] == HYBRID.resolved().model.layer_types.count("full_attention")
    [table] = parts_table(out, [])
    row = dict(zip(table.frame.columns, table.rows[0], strict=True))
    assert (row["part"], row["recipe"], row["against the recipe"]) == ("cap", "batch", "–")
    with pytest.raises(InputError, match=r"no step of the ladder is named 'bach'.*'batch'"):
        run(["--data", str(prepared), "--only", "cap", "--recipe", "bach"])


def test_the_evaluation_takes_capped_logits(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    config = FibAttnConfig(
        vocab_size=data.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, window=8
    )
    losses = []
    for part in (PLAIN, Part("", "", cap=1e-6)):
        torch.manual_seed(0)
        model = FibAttnForCausalLM(config)
        part.use(model, 63)
        sets = sweep(model, data, lengths=[64], sets=[], tokens=1024, quiet=True)["sets"]
        losses.append(next(iter(sets.values()))["64"]["nll"])
    assert losses[1] == pytest.approx(float(torch.tensor(data.vocab_size).log()), abs=1e-4)
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)
