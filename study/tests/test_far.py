"""Trials of far reading: each form against a loop over the keys that a query reads, and one run of each kind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import HYBRID
from torch import Tensor

from fibattn import FibAttnConfig, FibAttnForCausalLM, InputError, Pattern, files
from fibattn.attention import attend_chosen
from fibattn.cli.flags import parse
from fibattn.lock import locked
from fibattn.pattern import ChosenPattern
from fibattn.training.recipe import ModelRecipe, Recipe
from study.commands import trials as verbs
from study.commands.trials import Arguments
from study.far.candidates import CANDIDATES, Candidate, spans
from study.far.layer import use
from study.far.reading import Bands, Choice, at_distances, best_blocks, merged, near, span_means
from study.processes import as_flags
from study.report.far_table import far_table
from study.report.write import write_report
from study.trial import Trials, run_trials

HEADS, KV, SIZE, SCALE = 4, 2, 8, 0.3
Columns = list[tuple[Tensor, Tensor, float]]
"""Of one query and head: key, value, and what is added to the score."""


def chosen(names: list[str]) -> tuple[Candidate, ...]:
    return verbs.chosen(CANDIDATES, names)


def made(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, tokens, n, SIZE, dtype=torch.float64, generator=draws) for n in (HEADS, KV, KV))  # pyright: ignore


def by_loop(q: Tensor, columns: dict[tuple[int, int], Columns]) -> Tensor:
    """The softmax over each query's columns, (1, tokens, heads, size)."""
    out = torch.zeros_like(q)
    for (token, head), found in columns.items():
        scores = torch.stack([q[0, token, head] @ key * SCALE + bias for key, _, bias in found])
        out[0, token, head] = scores.softmax(0) @ torch.stack([value for _, value, _ in found])
    return out


def near_columns(k: Tensor, v: Tensor, token: int, kv: int, window: int) -> Columns:
    return [(k[0, j, kv], v[0, j, kv], 0.0) for j in range(max(0, token - window), token + 1)]


@pytest.mark.parametrize(("tokens", "far"), [(64, 64), (192, 64)])
def test_rungs_of_other_keys_beside_a_window(tokens: int, far: int) -> None:
    q, k, v = made(tokens)
    other, rungs, window = k.flip(-1), (9, 20, 63), 8
    parts = [
        near(q, k, v, window, Bands(tokens, 8), SCALE),
        at_distances(q, other, v, rungs, Bands(tokens, far), SCALE),
    ]
    columns = {
        (t, h): near_columns(k, v, t, h // 2, window)
        + [(other[0, t - d, h // 2], v[0, t - d, h // 2], 0.0) for d in rungs if d <= t]
        for t in range(tokens)
        for h in range(HEADS)
    }
    torch.testing.assert_close(merged(parts, None), by_loop(q, columns))


def test_means_of_spans_beside_a_window_and_a_sink() -> None:
    q, k, v = made(50)
    window, cuts = 8, ((8, 13), (13, 21), (21, 34))
    bias, sink = (torch.linspace(a, 1, HEADS, dtype=torch.float64) for a in (-1, 0))
    parts = [near(q, k, v, window, Bands(50, 50), SCALE), span_means(q, k, v, cuts, bias, SCALE)]
    columns = {}
    for t in range(50):
        for h in range(HEADS):
            found = near_columns(k, v, t, h // 2, window)
            for first, last in cuts:
                inside = [j for j in range(t + 1) if first < t - j <= last]
                if inside:
                    mean_key, mean_value = (x[0, inside, h // 2].mean(0) for x in (k, v))
                    found.append((mean_key, mean_value, float(bias[h])))
            columns[t, h] = [*found, (torch.zeros(SIZE).double(), torch.zeros(SIZE).double(), float(sink[h]))]
    torch.testing.assert_close(merged(parts, sink), by_loop(q, columns))


@pytest.mark.parametrize(("tokens", "far"), [(64, 64), (192, 64)])
@pytest.mark.parametrize("per_span", [False, True])
def test_the_best_blocks_beside_a_window(tokens: int, far: int, per_span: bool) -> None:
    q, k, v = made(tokens)
    window, reach, block, blocks = 6, 63, 4, 3
    cut = ((6, 20), (20, 63)) if per_span else None
    trust = torch.tensor([0.5, 2], dtype=torch.float64)
    choice = Choice(window, reach, block, blocks, cut)
    parts = [near(q, k, v, window, Bands(tokens, 8), SCALE)]
    parts += [best_blocks(q, k, v, choice, trust, Bands(tokens, far), SCALE)]
    columns: dict[tuple[int, int], Columns] = {}
    for t in range(tokens):
        for kv in range(KV):
            starts = [s for s in range(0, t + 1, block) if s + block - 1 <= t and window < t - s <= reach]
            heads = (2 * kv, 2 * kv + 1)
            own = {h: {s: float(q[0, t, h] @ k[0, s : s + block, kv].mean(0)) * SCALE for s in starts} for h in heads}
            shares = {s: sum(float(_softmax(own[h])[s]) for h in heads) for s in starts}
            ordered = sorted(starts, key=lambda s: -shares[s])
            taken = ordered[:blocks]
            if cut is not None:
                taken = [next((s for s in ordered if a < t - s <= b), None) for a, b in cut]
            for h in heads:
                found = near_columns(k, v, t, kv, window)
                for s in filter(lambda s: s is not None, taken):
                    extra = float(trust[kv]) * own[h][s]
                    found += [(k[0, j, kv], v[0, j, kv], extra) for j in range(s, s + block) if t - j > window]
                columns[t, h] = found
    torch.testing.assert_close(merged(parts, None), by_loop(q, columns))


def test_the_operator_reads_what_the_trial_reads() -> None:
    (q, k, v), (far_q, far_k, _) = made(128), [x.flip(-1) for x in made(128)]
    trust = torch.tensor([0.5, 2], dtype=torch.float64)
    parts = [near(q, k, v, 20, Bands(128, 64), SCALE)]
    parts += [best_blocks(far_q, far_k, v, Choice(20, 100, 16, 2), trust, Bands(128, 128), SCALE)]
    pattern = ChosenPattern(window=20, blocks=2, block=16, reach=100)
    out, lse = attend_chosen(q, k, v, pattern, far=(far_q, far_k), trust=trust, scale=SCALE)
    torch.testing.assert_close(out, merged(parts, None))
    sums = torch.stack([one.flatten(2).transpose(1, 2) for _, one in parts]).logsumexp(0)
    torch.testing.assert_close(lse, sums)


def test_sinks_beside_the_operator_are_those_of_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    sinking = replace(chosen(["best-sink"])[0], window=8)
    model, ids = model_of(sinking), torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(1))
    for layer in model.model.layers:
        layer.self_attn.sink.data += torch.linspace(-1, 2, HEADS)  # pyright: ignore
    by_operator = model(input_ids=ids, use_cache=False).logits
    monkeypatch.setattr(Candidate, "in_operator", False)
    torch.testing.assert_close(by_operator, model(input_ids=ids, use_cache=False).logits)


def test_a_configured_model_is_the_trial_s(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(chosen(["best"])[0], window=8)
    configured, ids = model_of(small), torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Candidate, "configured", False)
    trial = model_of(small)
    for mine, other in zip(configured.model.layers, trial.model.layers, strict=True):
        own, its = mine.self_attn, other.self_attn
        own.trust.data += 0.5  # pyright: ignore
        own.kv_convolution.data.uniform_(-1, 1)  # pyright: ignore
        for taps, name in zip(own.kv_convolution.data, ("k_proj", "v_proj"), strict=True):  # pyright: ignore
            getattr(its, name)[1].weight.data = taps.T[:, None]
            getattr(its, name)[0].load_state_dict(getattr(own, name).state_dict())
        its.trust.data = own.trust.data  # pyright: ignore
    expected = configured(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(trial(input_ids=ids, use_cache=False).logits, expected)


def _softmax(scores: dict[int, float]) -> dict[int, float]:
    weights = torch.tensor(list(scores.values()), dtype=torch.float64).softmax(0).tolist()
    return dict(zip(scores, weights, strict=True))


def model_of(candidate: Candidate, reach: int = 63) -> FibAttnForCausalLM:
    small = ModelRecipe(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    shape = candidate.like(Recipe(model=small), reach).model
    config = FibAttnConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        qk_norm=True,
        max_position_embeddings=64,
        layer_types=list(shape.layer_types) * (2 // len(shape.layer_types)),
        window=shape.window,
        max_offset=reach,
        blocks=shape.blocks,
        block_size=shape.block_size,
        block_reach=shape.block_reach,
        kv_convolution=shape.kv_convolution,
    )
    torch.manual_seed(0)
    model = FibAttnForCausalLM(config).double()
    use(candidate, model, reach)
    return model.double().eval()


ALONE = [one for one in CANDIDATES if not one.name.endswith("-beside")]


@pytest.mark.parametrize("candidate", ALONE, ids=lambda one: one.name)
def test_no_token_sees_what_comes_after_it_and_all_weights_learn(candidate: Candidate) -> None:
    small = replace(candidate, window=min(candidate.window, 8), block=4, full=tuple(range(2)) if candidate.full else ())
    model = model_of(small).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("1.weight", "kv_convolution", "trust", "bias", "sink")):
                weight += torch.rand_like(weight)
    ids = torch.randint(64, (2, 100), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, 70:] = (other[:, 70:] + 1) % 64
    first, second = ((torch.manual_seed(3), model(input_ids=one, use_cache=False).logits)[1] for one in (ids, other))
    torch.testing.assert_close(first[:, :70], second[:, :70])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()] == []


def test_a_candidate_without_anything_new_is_the_library_s_model() -> None:
    plain = Candidate("plain", "", window=8)
    written_out = replace(plain, sink=True)
    ids = torch.randint(64, (2, 100), generator=torch.Generator().manual_seed(1))
    expected, model = model_of(plain), model_of(written_out)
    for layer in model.model.layers:
        layer.self_attn.sink.data.fill_(-1e6)  # pyright: ignore
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_rungs_in_half_of_the_heads_leave_the_others_their_window() -> None:
    whole, half = (replace(one, window=8) for one in chosen(["rungs", "rungs-half"]))
    both, some = model_of(whole), model_of(half)
    for layer, other in zip(both.model.layers, some.model.layers, strict=True):
        [pattern] = layer.self_attn.pattern  # pyright: ignore
        assert pattern.offsets
        assert other.self_attn.pattern == (pattern, Pattern(8))
    assert both.state_dict().keys() == some.state_dict().keys()
    assert half.keys(1024, ModelRecipe()) == whole.keys(1024, ModelRecipe()) - 3


def test_spans_cover_what_is_past_the_window() -> None:
    assert spans(64, 1023) == ((64, 89), (89, 144), (144, 233), (233, 377), (377, 610), (610, 987), (987, 1023))
    assert spans(31, 1023, 4) == ((31, 89), (89, 233), (233, 610), (610, 1023))


def test_the_best_blocks_read_the_bytes_of_128_keys() -> None:
    names = ["best", "best-spans", "best-beside", "window-128"]
    assert {one.keys(1024, ModelRecipe()) for one in chosen(names)} == {128}


def test_trials_write_a_file_each_and_skip_what_is_there(prepared: Path, tmp_path: Path) -> None:
    small = [replace(one, window=8, block=4) for one in chosen(["best", "rungs-conv", "dense"])]
    small += [replace(small[0], name="beside", full=(1,))]
    trials = Trials("far", tuple(small), prepared, tmp_path / "out", tmp_path / "work", HYBRID, 1024, 2048)
    with locked(trials.work / "dense"):
        assert run_trials(trials) == ()
    assert not (tmp_path / "out" / "far" / "dense.json").exists()  # another process has it
    assert run_trials(trials) == ()
    results = sorted((tmp_path / "out" / "far").glob("*.json"))
    assert [path.stem for path in results] == ["beside", "best", "dense", "rungs-conv"]
    assert list(trials.work.glob("*/")) == []
    before = [path.stat().st_mtime_ns for path in results]
    found = files.read_json(results[0])
    assert found["candidate"] == "beside"
    assert found["model"]["full_layers"] == 1
    assert set(next(iter(found["evaluation"].values()))) == {"64", "128"}
    assert set(next(iter(found["bounded"].values()))) == {"1024"}
    assert set(found["copying"]) >= {"16", "256"}
    assert run_trials(trials) == ()
    assert [path.stat().st_mtime_ns for path in results] == before


def test_a_budget_below_a_step_is_refused(prepared: Path, tmp_path: Path) -> None:
    trials = Trials("far", chosen(["window"]), prepared, tmp_path / "out", tmp_path / "work", HYBRID, tokens=1)
    with pytest.raises(InputError, match=r"a budget of 1 tokens is less than one step of [\d,]+; give more"):
        run_trials(trials)
    assert not (tmp_path / "work").exists()


def made_up(candidate: str, full: int, keys: float, losses: tuple[float, float], seed: int = 42) -> dict:
    row = {"first": 256, "last": 511, "targets": 10, "nll": losses[1]}
    sets = {
        name: {"1024": {"nll": nll, "repeats": {"by_distance": [row, row | {"first": 8, "nll": 9.0}]}}}
        for name, nll in zip("ab", losses, strict=True)
    }
    return {
        "candidate": candidate,
        "about": "what",
        "seed": seed,
        "tokens": 106_000_000,
        "inputs": {"order_sha256": "same"},
        "trained_at": 1024,
        "hardware": {"device": "H200"},
        "versions": {"torch": "2.11"},
        "model": {"full_layers": full, "keys": keys, "bytes": 1e6},
        "evaluation": sets,
        "bounded": {name: {"16384": {"nll": 3.0}} for name in "ab"},
        "copying": {"256": 0.5},
        "training": {"tokens_per_second": 500_000},
    }


def test_the_table_holds_each_candidate_against_the_window_that_reads_as_much() -> None:
    records = [
        made_up("window", 0, 71, (4.0, 4.0)),
        made_up("window-128", 0, 128, (3.5, 3.5)),
        made_up("best", 0, 128, (3.0, 3.2)),
        made_up("best-beside", 2, 128, (2.0, 2.0)),
        made_up("best", 0, 128, (3.0, 3.2), seed=43),
    ]
    [table] = far_table(records)
    cells = [dict(zip(table.frame.columns, row, strict=True)) for row in table.rows]
    assert [row["against"] for row in cells] == ["–", "–", "−33.0 % (−39.3 %, −25.9 %)", "–", "–"]
    assert [row["against dense"] for row in cells] == ["–"] * 5
    assert cells[2]["far repeats"] == "24.53"
    assert cells[2]["16×"] == "20.09"
    [table] = far_table([*records, made_up("dense", 16, 1, (3.0, 3.0))])
    assert [row[8] for row in table.rows] == ["+171.8 %", "+64.9 %", "+10.5 %", "−63.2 %", "–", "–"]
    rival = made_up("", 16, 1, (3.0, 3.0)) | {"run": "dense"}
    others = [rival | {"run": "dense-rate2", "evaluation": {}}, rival | {"tokens": 4 * rival["tokens"]}]
    [table] = far_table(records, [rival, *others])
    assert [row[8] for row in table.rows] == ["+171.8 %", "+64.9 %", "+10.5 %", "−63.2 %", "–"]
    assert "1,024, H200, PyTorch 2.11; geometric means over 2 held-out sets" in table.note
    [table] = far_table([*records, made_up("best", 0, 128, (3.0, 3.2), seed=44) | {"versions": {"torch": "2.12"}}])
    assert "1,024, H200, PyTorch 2.11 and H200, PyTorch 2.12; geometric" in table.note
    assert far_table([]) == []


def test_a_process_is_told_what_the_first_was_told() -> None:
    given = Arguments(Path("a b"), ("best", "window*"), tokens="4M", seeds=(1, 2), work=Path("w"))
    assert parse(Arguments, as_flags(given), "far") == given


def test_the_report_has_the_table_where_there_are_results(tmp_path: Path) -> None:
    published = Path(__file__).parents[1] / "results" / "ladder" / "rate.jsonl"
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "rate.jsonl").write_bytes(published.read_bytes())
    files.write_json(tmp_path / "far" / "best.json", made_up("best", 0, 128, (3.0, 3.2)))
    assert "| best | what | 106 M | 0 | 128 |" in write_report(tmp_path).read_text(encoding="utf-8")
