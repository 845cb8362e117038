"""What the report says of results, against the paper's own numbers: claims, tables and comparisons."""

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from made_up import SETS, Losses, group, published, published_run, record, sets

from study.presets import STUDIES
from study.report.claims import Finding, verdict_over
from study.report.own_claims import OWN, recalls_farther
from study.report.own_tables import beyond_tables, other_budget
from study.report.paper_claims import PAPERS
from study.report.paper_tables import papers_tables
from study.report.results import paper
from study.report.write import write_report
from study.rivals import RIVALS
from study.store import key_of, recipe_of

Models = dict[str, list[dict[str, Any]]]


def papers(models: Models) -> dict[str, Finding]:
    return {(found := claim.of(group(models))).claim: found for claim in PAPERS}


def verdicts(models: Models) -> dict[str, str]:
    return {words: found.verdict for words, found in papers(models).items()}


def own(models: Models, start: str) -> Finding:
    everything = group(models)
    return next(claim.of(everything) for claim in OWN if claim.words.startswith(start))


def test_the_papers_own_figures_bear_out_its_claims() -> None:
    assert set(verdicts(published()).values()) == {"holds"}


@pytest.mark.parametrize(
    ("one", "other", "claim"),
    [
        ("linear-w12", "fixed-w12", "At every window"),
        ("learned-w12", "coprime-w12", "At every window"),
        ("pow2-fixed-w8", "linear-w6", "Power-of-two fixed"),
        ("linear-w12", "linear-w6", "The best of the 21"),
        ("dense", "linear-w12", "Linear, W = 12 does not degrade"),
        ("dense", "linear-w12", "Dense degrades"),
        ("dense", "linear-w12", "At the training length"),
        ("linear-w8", "learned-w8", "A learned α"),
        ("linear-w12", "fixed-w12", "The stagger's gain"),
    ],
)
def test_exchanged_figures_do_not(one: str, other: str, claim: str) -> None:
    models = published()
    a, b = (models[name][0]["evaluation"] for name in (one, other))
    models |= {
        name: [run | {"evaluation": measured} for run in models[name]] for name, measured in ((one, b), (other, a))
    }
    found = next(verdict for words, verdict in verdicts(models).items() if words.startswith(claim))
    assert found in ("does not hold", "partly")


def test_of_nothing_nothing_is_said() -> None:
    assert [verdict_over(found) for found in ((), (True,), (True, False), (False,))] == [
        "not run",
        "holds",
        "partly",
        "does not hold",
    ]


def test_what_was_not_run_is_said() -> None:
    dense = {"dense": published()["dense"]}
    assert [claim for claim, verdict in verdicts(dense).items() if verdict != "not run"] == [
        "Dense degrades past its training length: +201 % at four times"
    ]
    assert {claim.of(group(dense)).verdict for claim in OWN} == {"not run"}
    assert recalls_farther({}).verdict == "not run"


def older(models: Models, name: str) -> dict[str, Any]:
    """A run of another recipe under a name, from before all others: half as good."""
    run = copy.deepcopy(models[name][0])
    run["recipe"]["weight_decay_of_old"] = 1.0
    for rows in run["evaluation"].values():
        for row in rows.values():
            row["nll"] += math.log(2)
    return run | {"time": "2025-01-01", "key": f"older {name}"}


def test_of_an_older_recipe_of_a_model_the_papers_tables_and_claims_know_nothing() -> None:
    models = published()
    tables, findings = papers_tables(group(models)), papers(models)
    models["old"] = [older(models, "linear-w12")]
    everything = group(models)
    assert sum(everything.models["label"].str.contains("earlier recipe")) == 1
    assert sorted(everything.papers) == sorted(name for name in published() if name != "dense")
    again = papers_tables(everything)
    assert again[0].rows == tables[0].rows
    assert again[0].note == tables[0].note
    assert papers(models) == findings
    assert not [found.evidence for found in papers(models).values() if "22" in found.evidence]


def test_of_an_older_recipe_nothing_is_compared() -> None:
    models = hybrid_and_window(0.0)
    before = [claim.of(group(models)) for claim in OWN]
    models["old"] = [older(models, "window-w132"), older(models, "hybrid")]
    everything = group(models)
    assert everything.plain_window == "window-w132"
    assert [claim.of(everything) for claim in OWN] == before
    assert len(everything.models) == 4


def test_another_name_for_a_model_of_the_papers_is_none_of_the_21() -> None:
    models = published()
    models["tuned"] = [models["linear-w12"][0] | {"run": "linear-w12-tuned", "key": "tuned"}]
    assert len(group(models).papers) == 21


def test_published_seed_spread_is_the_papers() -> None:
    spreads = [statistics.stdev(values) / 42 for values in paper()["seeds_w12_fineweb_edu"].values() if len(values) > 2]
    models = group(published())
    assert min(spreads) < models.sigma(*models.models.index) < max(spreads)
    assert math.isnan(models.sigma("dense"))


def test_the_default_recipe_must_win_with_every_seed() -> None:
    seeds = [published_run("dense"), published_run("dense", seed=43)]

    def goal(*factors: float, first: int = 42, dense: int = 2) -> Finding:
        ours = [
            record("hybrid", published_run("dense", factor)["evaluation"], first + n)
            for n, factor in enumerate(factors)
        ]
        return own({"dense": seeds[:dense], "hybrid": ours}, "The hybrid is better")

    ahead = 0.99
    assert goal(ahead).verdict == goal(ahead, ahead).verdict == "holds"
    assert goal(ahead).evidence == "seed 42: fineweb_edu −1.0 %, wikipedia −1.0 %, together −1.0 % (one seed)"
    both = goal(ahead, 1.03)
    assert both.verdict == "partly"
    assert "seed 43: fineweb_edu +3.0 %" in both.evidence
    assert both.evidence.endswith("over all seeds +1.0 %")
    assert goal(1.01, 1.01).verdict == "does not hold"
    assert goal(ahead, first=43, dense=1).verdict == "not run"


def test_models_are_compared_by_the_seeds_that_they_share() -> None:
    models = published()
    later = published_run("fibonacci/linear/w12", 0.5, 43)
    models |= {"linear-w12": [models["linear-w12"][0], later], "coprime-w12": models["coprime-w12"][:1]}
    everything = group(models)
    apart = math.log(42.09 * 37.75 / 42.02 / 37.59) / 2
    assert everything.gap("coprime-w12", "linear-w12") == pytest.approx(apart, abs=1e-3)
    assert list(everything.compared(["coprime-w12", "linear-w12"]).index) == ["linear-w12", "coprime-w12"]
    late = group(models | {"linear-w12": [later]})
    assert math.isnan(late.gap("coprime-w12", "linear-w12"))
    assert late.compared(["coprime-w12", "linear-w12"]).empty
    tables = papers_tables(everything)
    seeds = next(one for one in tables if one.title.startswith("Table 4"))
    assert next(row for row in seeds.rows if row[0] == "coprime, W = 12")[3] == "+32.1 %"
    row = next(row for row in tables[0].rows if row[0] == "linear, W = 12")
    assert row[3] == row[8] == "1.317", "the first seed against the first seed of dense, as the perplexities beside it"


def test_a_claim_about_all_of_the_papers_models_holds_at_most_in_part_for_some() -> None:
    models = {name: runs for name, runs in published().items() if name.endswith("w12") or name == "dense"}
    found = verdicts(models)
    assert found["The best of the 21 is linear, W = 12"] == "partly"
    assert found["At every window: linear ≈ coprime < learned < fixed"] == "partly"
    once = {name: runs if name == "linear-w12" else runs[:1] for name, runs in models.items()}
    seeds = next(one for words, one in papers(once).items() if words.startswith("Seeds differ little"))
    assert (seeds.verdict, seeds.evidence[:13]) == ("partly", "1 of 5 models")


def test_what_happens_past_the_training_length_is_judged_in_every_seed() -> None:
    models = published()
    flat = models["linear-w12"][0]["evaluation"]
    models["coprime-w12"] = [models["coprime-w12"][0], record("coprime-w12", flat, 43)]
    found = next(one for words, one in papers(models).items() if words.startswith("Coprime, W = 12 loses"))
    assert (found.verdict, found.evidence) == ("partly", "+2.8 %, −1.5 % at four times (seeds 42, 43)")


def level(keys: float) -> dict[str, Any]:
    return {"keys": keys, "parameters": 1, "coverage": 1, "learned_alphas": None}


def hybrid_and_window(bounded_gain: float, **more: Any) -> Models:
    """A plain window, and a hybrid 0.02 nats ahead at 1,024 tokens, level at 4,096 unless it is bounded."""
    bounded = {"1024": sets({4096: 3 - bounded_gain})}
    return {
        "hybrid": [record("hybrid", sets({1024: 2.98, 4096: 3.0}), model=level(122), bounded=bounded, **more)],
        "window-w132": [record("window-w132", sets({1024: 3.0, 4096: 3.0}), model=level(124))],
    }


def helped_dense(bounded: float, plain: float = 9.0, ours: float | None = None, **more: Any) -> Finding:
    """What is said of a hybrid of loss 3 beside a dense model, bounded and with YaRN, at 2,048 and 4,096 tokens.

    Of a hybrid of loss `ours` there, when it is bounded.
    """

    def far(two: float, four: float) -> dict[str, Any]:
        return sets({2048: two, 4096: four})

    near: Losses = {1024: 3.0}
    more = {"rope_scaling": {"yarn": far(5.0, 4.0)}, "bounded": {"1024": far(4.0, bounded)}, **more}
    dense = record("dense", sets({**near, 2048: 9.0, 4096: plain}), **more)
    saved = {} if ours is None else {"bounded": {"1024": far(ours, ours)}}
    hybrid = record("hybrid", sets({**near, 2048: 3.0, 4096: 3.0}), **saved)
    return own({"dense": [dense], "hybrid": [hybrid]}, "The hybrid is ahead of dense past")


def test_dense_is_judged_at_its_best_at_every_length() -> None:
    longer = {"lengthened": {"4096": {}}}
    goal = helped_dense(4.5, **longer)
    assert goal.verdict == "holds"
    ways = "YaRN, bounded to 1,024, a tenth more at 4,096"
    assert goal.evidence == (
        f"against the best of {ways}: seed 42: plainly, 2×: −63.2 % (bounded to 1,024), 4×: −63.2 % (YaRN) (one seed)"
    )
    saved = helped_dense(4.5, ours=4.25, **longer)
    assert saved.verdict == "does not hold", "the hybrid is judged as it is saved, with its bound"
    assert "seed 42: bounded to 1,024, 2×: +28.4 % (bounded to 1,024), 4×: +28.4 % (YaRN)" in saved.evidence
    assert helped_dense(2.5, **longer).verdict == "partly"
    assert "4×: +64.9 % (bounded to 1,024)" in helped_dense(2.5, **longer).evidence
    unhelped = helped_dense(4.5, plain=2.5)
    assert (unhelped.verdict, "4×: +64.9 % (plainly)" in unhelped.evidence) == ("partly", True)


def test_a_dense_model_that_was_not_helped_in_every_way_proves_the_recipe_in_part() -> None:
    goal = helped_dense(4.5)
    assert goal.verdict == "partly"
    assert goal.evidence.endswith("; not every run of dense was trained on in longer sequences")


@pytest.mark.parametrize(("gain", "verdict"), [(0.03, "holds"), (-0.01, "does not hold")])
def test_a_bound_is_judged_and_shown_beside_a_plain_window(gain: float, verdict: str) -> None:
    models = hybrid_and_window(gain)
    goal = own(models, "In the longest sequences")
    assert goal.verdict == verdict
    assert f"1,024 tokens: {'−3.0' if gain > 0 else '+1.0'} %" in goal.evidence
    long = own(models, "The hybrid gets no worse")
    change = "−1.0" if gain > 0 else "+3.0"
    words = f"fineweb_edu {change} %, wikipedia {change} %, best at "
    assert (long.verdict, long.evidence[:9]) == (verdict, "seed 42: ")
    assert long.evidence[9:].startswith(f"bounded to 1,024, {words}{'4× (one' if gain > 0 else '1×, +3.0 % from'}")
    models["window-w70"] = [record("window-w70", sets({1024: 3.0, 4096: 3.0}), model=level(70))]
    far = beyond_tables(group(models))[1]
    assert far.title.startswith("Far context: against window only, W = 132"), "the one that reads as many keys"
    label, sign = "hybrid: linear, W = 64, full 7, 15", "−" if gain > 0 else "+"
    plain, bounded = (
        (label, "−0.020", *["+0.000"] * 8),
        (f"{label}, bounded to 1,024", "−0.020", *[f"{sign}{abs(gain):.3f}"] * 8),
    )
    assert sorted(far.rows) == sorted((plain, bounded, ("window only, W = 70", *["+0.000"] * 9)))
    assert [sorted(table.rows) for table in other_budget(group(hybrid_and_window(gain)))[2:]] == [
        sorted((plain, bounded))
    ]


@pytest.mark.parametrize(
    ("far", "verdict"),
    [((0.12, 0.08), "holds"), ((0.12, 0.004), "partly"), ((0.0, 0.0), "does not hold"), (None, "not run")],
)
def test_copying_is_judged_past_the_window_and_within_the_training_length(
    far: tuple[float, float] | None, verdict: str
) -> None:
    models = hybrid_and_window(0.0)
    models["window-w132"][0]["copying"] = {"64": 0.05, "256": 0.003, "512": 0.0, "1024": 0.9}
    if far:
        models["hybrid"][0]["copying"] = {"64": 0.0, "256": far[0], "512": far[1], "1024": 0.0}
    if far and far[1]:
        second = record("hybrid", sets({1024: 3.0, 4096: 3.0}), 43, copying={"256": 0.14, "512": 0.08})
        models["hybrid"].append(second)
    goal = own(models, "From text alone")
    assert goal.verdict == verdict
    if verdict == "holds":
        assert goal.evidence == (
            "random tokens named, by distance in tokens: hybrid 12 to 14 % at 256, 8 % at 512; "
            "window-w132 0 % at 256, 0 % at 512"
        )


@pytest.mark.parametrize(
    ("passkey", "associative", "verdict"),
    [(0.95, (0.95, 0.95), "holds"), (0.95, (0.95, 0.5), "partly"), (0.5, (0.5, 0.5), "does not hold")],
)
def test_recall_is_judged_by_how_far_it_works(passkey: float, associative: tuple[float, float], verdict: str) -> None:
    found = {
        ("window", "passkey"): (0.2, 0.2),
        ("window", "associative"): (0.2, 0.2),
        ("stagger", "passkey"): (passkey, passkey),
        ("stagger", "associative"): associative,
    }
    rows = [
        {
            "variant": variant,
            "seed": seed,
            "task": task,
            "keys": 23.0,
            "accuracy": {"64": 1.0, "256": seeds[seed], "512": 0.2, "1024": 1.0},
        }
        for (variant, task), seeds in found.items()
        for seed in (0, 1)
    ]
    goal = recalls_farther({"recall": [{"rows": rows}]})
    assert goal.verdict == verdict
    assert f"passkey: window 64, stagger {256 if passkey > 0.9 else 64}" in goal.evidence
    assert ("associative: window 64, stagger 64 to 256" in goal.evidence) == (verdict == "partly")


def test_speeds_are_compared_of_runs_that_trained_alone() -> None:
    had = [{"processes_a_gpu": 1}, {"processes_a_gpu": None}, {"processes_a_gpu": 2}, {"processes_a_gpu": 2}]
    speed = {"tokens_per_second": 1.0, "peak_memory_gib": None}
    runs = [
        published_run(
            "dense", seed=n, hardware={"device": "GPU", **had[n]}, training=speed | ({"alone": True} if n == 3 else {})
        )
        for n in range(len(had))
    ]
    everything = group({"dense": runs}).runs
    assert list(everything.loc[everything["alone"], "seed"]) == [0, 1, 3]


def test_deviations_are_those_of_the_compared() -> None:
    models = published()
    pair = "linear-w12", "coprime-w12"
    quiet = group(models).sigma(*pair)
    models["hybrid"] = [
        record("hybrid", published_run("dense", factor)["evaluation"], 42 + n)
        for n, factor in enumerate((1.0, 1.2, 0.8))
    ]
    assert group(models).sigma(*pair) == quiet
    assert group(models).sigma(*pair, "hybrid") > 3 * quiet


def test_orders_are_compared_over_the_models_that_were_run() -> None:
    def note(models: Models) -> str:
        return papers_tables(group(models))[0].note

    models = published()
    assert note(models).endswith("with the paper's over these 21 models: 1.00.")
    assert "Rank correlation" not in note({name: models[name] for name in ("dense", "linear-w12", "fixed-w12")})
    turned = {
        name: [record(name, sets({1024: -statistics.mean(r["1024"]["nll"] for r in runs[0]["evaluation"].values())}))]
        for name, runs in models.items()
        if name.endswith("w12")
    }
    assert note(turned).endswith("these 5 models: −1.00.")


def test_sets_are_shown_in_the_order_of_the_evaluation() -> None:
    run = record("dense", sets({1024: 3.0}))
    run["evaluation"] = dict(reversed(run["evaluation"].items()))
    assert group({"dense": [run]}).sets == list(reversed(SETS))


def test_claims_are_judged_in_the_tuned_recipe_once_the_default_was_looked_at_far_out(tmp_path: Path) -> None:
    published = Path(__file__).parents[1] / "results" / "rivals" / "dense.jsonl"
    records = [json.loads(line) for line in published.read_text().splitlines()]
    dense = max(records, key=lambda one: one["tokens"])
    rivals = STUDIES["rivals"]
    (run,) = rivals.chosen([RIVALS.ours])
    recipe = rivals.resolved(run, data=Path("d"), out=Path("o"), tokens=dense["tokens"], compiled=True)
    key = key_of(recipe, dense["inputs"]["data_fingerprint"])
    ours = json.loads(json.dumps(dense)) | {"run": RIVALS.ours, "key": key, "recipe": recipe_of(recipe)}
    for rows in (one for way in (ours["evaluation"], *ours["bounded"].values()) for one in way.values()):
        for row in rows.values():
            row["nll"] -= 0.03
    (tmp_path / "rivals").mkdir()
    (tmp_path / "rivals" / "dense.jsonl").write_text(json.dumps(dense) + "\n")
    assert "Past the paper, in the tuned recipe" not in write_report(tmp_path).read_text()
    (tmp_path / "rivals" / f"{RIVALS.ours}.jsonl").write_text(json.dumps(ours) + "\n")
    told = write_report(tmp_path).read_text()
    (table,) = [part for part in told.split("### ") if part.startswith("Past the paper, in the tuned recipe")]
    verdicts = {row.split(" | ")[0].strip("| "): row.split(" | ")[1] for row in table.splitlines()[4:]}
    start = "The hybrid "
    assert verdicts[f"{start}is better than dense at the training length on every domain"] == "holds"
    assert verdicts[f"{start}gets no worse at 16 times the training length"] == "holds"
    assert verdicts[f"{start}is ahead of dense past the training length, however dense is helped there"] == "partly"
    assert not any("rungs" in words for words in verdicts)
