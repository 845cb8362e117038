"""What the report says of results, against the paper's own numbers: findings, goals and comparisons."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest

from fibattn.pattern import hybrid_layers
from study.report.findings import Finding, verdict_over
from study.report.own_goals import own_goals
from study.report.own_tables import beyond_tables, other_budget
from study.report.paper_findings import papers_findings
from study.report.paper_tables import papers_tables
from study.report.results import Group, Model, paper

SETS = ("fineweb_edu", "wikipedia")
PLAIN = {"max_offset": None, "no_rope_layers": [1] * 16, "stagger_heads": False}


def published_run(key: str, factor: float = 1.0, seed: int = 42) -> dict[str, Any]:
    """A run with the figures that the paper gives for `key`."""
    losses = {
        name: {n: math.log(values[name] * factor) for n, values in paper()["extrapolation_perplexity"][key].items()}
        for name in SETS
    }
    bins = paper()["position_nll_8_bins"].get(key)
    own = {name: bins[name] if bins else [losses[name]["1024"]] * 8 for name in SETS}
    return {
        "seed": seed,
        "trained_at": 1024,
        "evaluation": {
            name: {
                n: {"nll": loss, "bins": own[name], "last_256_perplexity": math.exp(loss)} for n, loss in rows.items()
            }
            for name, rows in losses.items()
        },
        "recipe": {"model": {"layer_types": ["full_attention"] * 16, **PLAIN} if key == "dense" else shape(key)},
        "model": {"learned_alphas": [0.97, 1.04] if "learned" in key else None},
        "rope_scaling": {},
        "hardware": {"processes_a_gpu": 2},
        "training": {},
    }


def shape(key: str) -> dict[str, Any]:
    base, schedule, window = key.split("/")
    return {
        "layer_types": ["fibonacci_attention"] * 16,
        "base": base,
        "schedule": schedule,
        "window": int(window[1:]),
        **PLAIN,
    }


def published() -> dict[str, Model]:
    """The paper's models by the names that the presets give them."""
    models = {}
    for key in paper()["extrapolation_perplexity"]:
        seeds = paper()["seeds_w12_fineweb_edu"].get(key.removesuffix("/w12"), [1.0]) if key.endswith("/w12") else [1.0]
        runs = tuple(published_run(key, value / seeds[0], 42 + index) for index, value in enumerate(seeds))
        name = key.replace("fibonacci/", "").replace("power_of_two/", "pow2-").replace("/", "-")
        models[name] = Model(name, runs)
    return models


def group(models: dict[str, Model]) -> Group:
    return Group(425_984_000, 1024, "the paper's", tuple(models.values()))


def verdicts(models: dict[str, Model]) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in papers_findings(group(models))}


def test_the_papers_own_figures_bear_out_its_findings() -> None:
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
    a, b = models[one], models[other]

    def measured(model: Model, source: Model) -> Model:
        return Model(model.name, tuple({**run, "evaluation": source.first["evaluation"]} for run in model.runs))

    models[one], models[other] = measured(a, b), measured(b, a)
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
    found = verdicts(dense)
    assert [claim for claim, verdict in found.items() if verdict != "not run"] == [
        "Dense degrades past its training length: +201 % at four times"
    ]
    assert {goal.verdict for goal in own_goals(group(dense), {})} == {"not run"}


def test_published_seed_spread_is_the_papers() -> None:
    spreads = [statistics.stdev(values) / 42 for values in paper()["seeds_w12_fineweb_edu"].values() if len(values) > 2]
    models = published()
    sigma = group(models).sigma(*models.values())
    assert sigma is not None
    assert min(spreads) < sigma < max(spreads)
    assert group(models).sigma(models["dense"]) is None


def test_the_default_recipe_must_win_with_every_seed() -> None:
    dense, ahead = published()["dense"], 0.99
    second = {**published_run("dense"), "seed": 43}

    def goal(*factors: float) -> Finding:
        runs = tuple({**published_run("dense", factor), "seed": 42 + n} for n, factor in enumerate(factors))
        models = {"dense": Model("dense", (dense.first, second)), "hybrid": Model("hybrid", runs)}
        return own_goals(group(models), {})[0]

    assert goal(ahead).verdict == goal(ahead, ahead).verdict == "holds"
    assert goal(ahead).evidence == "seed 42: fineweb_edu −1.0 %, wikipedia −1.0 %, together −1.0 % (one seed)"
    both = goal(ahead, 1.03)
    assert both.verdict == "partly"
    assert "seed 43: fineweb_edu +3.0 %" in both.evidence
    assert both.evidence.endswith("over all seeds +1.0 %")
    assert goal(1.01, 1.01).verdict == "does not hold"
    alone = {"dense": Model("dense", (dense.first,)), "hybrid": Model("hybrid", (second,))}
    assert own_goals(group(alone), {})[0].verdict == "not run"


def test_models_are_compared_by_the_seeds_that_they_share() -> None:
    models = published()
    later = {**published_run("fibonacci/linear/w12", 0.5), "seed": 43}
    models["linear-w12"] = Model("linear-w12", (*models["linear-w12"].runs[:1], later))
    models["coprime-w12"] = Model("coprime-w12", models["coprime-w12"].runs[:1])
    linear, coprime = models["linear-w12"], models["coprime-w12"]
    apart = math.log(42.09 * 37.75 / 42.02 / 37.59) / 2
    assert coprime.gap(linear, 1024) == pytest.approx(apart, abs=1e-3)
    assert coprime.gap(Model("late", (later,)), 1024) is None
    everything = group(models)
    assert list(everything.compared([coprime, linear])) == ["linear-w12", "coprime-w12"]
    assert everything.compared([coprime, Model("late", (later,))]) == {}
    table = next(one for one in papers_tables(everything) if one.title.startswith("Table 4"))
    row = next(row for row in table.rows if row[0] == "coprime, W = 12")
    assert row[3] == "+32.1 %"
    row = next(row for row in papers_tables(everything)[0].rows if row[0] == "linear, W = 12")
    assert row[3] == row[8] == "1.317", "the first seed against the first seed of dense, as the perplexities beside it"


def test_a_claim_about_all_of_the_papers_models_holds_at_most_in_part_for_some() -> None:
    models = {name: model for name, model in published().items() if name.endswith("w12") or name == "dense"}
    found = verdicts(models)
    assert found["The best of the 21 is linear, W = 12"] == "partly"
    assert found["At every window: linear ≈ coprime < learned < fixed"] == "partly"
    once = {name: Model(name, one.runs[:1]) if name != "linear-w12" else one for name, one in models.items()}
    seeds = next(one for one in papers_findings(group(once)) if one.claim.startswith("Seeds differ little"))
    assert (seeds.verdict, seeds.evidence[:13]) == ("partly", "1 of 5 models")


def test_what_happens_past_the_training_length_is_judged_in_every_seed() -> None:
    models = published()
    flat, key = models["linear-w12"].first["evaluation"], "coprime-w12"
    still = models[key].first | {"seed": 43, "evaluation": flat}
    models[key] = Model(key, (models[key].first, still))
    found = next(one for one in papers_findings(group(models)) if one.claim.startswith("Coprime, W = 12 loses"))
    assert (found.verdict, found.evidence) == ("partly", "+2.8 %, −1.5 % at four times (seeds 42, 43)")


def hybrid_and_window(bounded_gain: float) -> dict[str, Model]:
    """A plain window, and a hybrid 0.02 nats ahead at 1,024 tokens, level at 4,096 unless it is bounded."""

    def run(way: dict[str, Any], gains: dict[str, float], **more: Any) -> dict[str, Any]:
        evaluation = {
            name: {n: {"nll": 3 - gain, "bins": [3 - gain] * 8} for n, gain in gains.items()} for name in SETS
        }
        recipe = {"model": {"base": "fibonacci", "schedule": "linear", **PLAIN, **way}}
        return published_run("dense") | {"evaluation": evaluation, "recipe": recipe, **more}

    window = run(
        {"layer_types": ["sliding_attention"] * 16, "window": 132}, {"1024": 0.0, "4096": 0.0}, model={"keys": 124.0}
    )
    bounded = {name: {"4096": {"nll": 3 - bounded_gain, "bins": [3 - bounded_gain] * 8}} for name in SETS}
    hybrid = run(
        {"window": 64, **hybrid_layers(16, full=(7, 15))},
        {"1024": 0.02, "4096": 0.0},
        model={"keys": 122.0},
        bounded={"1024": bounded},
    )
    return {"window-w132": Model("window-w132", (window,)), "hybrid": Model("hybrid", (hybrid,))}


def changed_window(model: Model, window: int) -> Model:
    """The same numbers with another window."""
    changes = {
        "recipe": {"model": model.first["recipe"]["model"] | {"window": window}},
        "model": {"keys": float(window)},
    }
    return Model(f"window-w{window}", tuple(run | changes for run in model.runs))


def helped_dense(bounded: float, plain: float = 9.0, ours: float | None = None, **more: Any) -> Finding:
    """What is said of a hybrid of loss 3 beside a dense model, bounded and with YaRN, at 2,048 and 4,096 tokens.

    Of a hybrid of loss `ours` there, when it is bounded.
    """

    def sets(**losses: float) -> dict[str, dict[str, Any]]:
        return {name: {n.strip("_"): {"nll": loss} for n, loss in losses.items()} for name in SETS}

    run = published_run("dense")
    more |= {"rope_scaling": {"yarn": sets(_2048=5.0, _4096=4.0)}, "bounded": {"1024": sets(_2048=4.0, _4096=bounded)}}
    dense = run | {"evaluation": sets(_1024=3.0, _2048=9.0, _4096=plain)} | more
    hybrid = run | {"evaluation": sets(_1024=3.0, _2048=3.0, _4096=3.0)}
    if ours is not None:
        hybrid["bounded"] = {"1024": sets(_2048=ours, _4096=ours)}
    models = {"dense": Model("dense", (dense,)), "hybrid": Model("hybrid", (hybrid,))}
    return next(one for one in own_goals(group(models), {}) if one.claim.endswith("however dense is helped there"))


def test_dense_is_judged_at_its_best_at_every_length() -> None:
    longer = {"lengthened": {"4096": {}}}
    goal = helped_dense(4.5, **longer)
    assert goal.verdict == "holds"
    ways = "YaRN, bounded to 1,024, a tenth more at 4,096"
    assert goal.evidence == (
        f"against the best of {ways}: seed 42: plainly, 2×: −63.2 % (bounded to 1,024), 4×: −63.2 % (YaRN) (one seed)"
    )
    saved = helped_dense(4.5, ours=4.25, **longer)
    assert saved.verdict == "does not hold", "the default recipe is judged as it is saved, with its bound"
    assert "seed 42: bounded to 1,024, 2×: +28.4 % (bounded to 1,024), 4×: +28.4 % (YaRN)" in saved.evidence
    assert helped_dense(2.5, **longer).verdict == "partly"
    assert "4×: +64.9 % (bounded to 1,024)" in helped_dense(2.5, **longer).evidence
    unhelped = helped_dense(4.5, plain=2.5)
    assert (unhelped.verdict, "4×: +64.9 % (plainly)" in unhelped.evidence) == ("partly", True)


def test_a_dense_model_that_was_not_helped_in_every_way_proves_the_recipe_in_part() -> None:
    goal = helped_dense(4.5)
    assert goal.verdict == "partly"
    assert goal.evidence.endswith("; not every run of dense was trained on in longer windows")


@pytest.mark.parametrize(("gain", "verdict"), [(0.03, "holds"), (-0.01, "does not hold")])
def test_a_bound_is_judged_and_shown_beside_a_plain_window(gain: float, verdict: str) -> None:
    everything = group(hybrid_and_window(gain))
    goal = next(one for one in own_goals(everything, {}) if one.claim.startswith("In the longest windows"))
    assert goal.verdict == verdict
    assert f"1,024 tokens: {'−3.0' if gain > 0 else '+1.0'} %" in goal.evidence
    long = own_goals(everything, {})[1]
    change = "−1.0" if gain > 0 else "+3.0"
    words = f"fineweb_edu {change} %, wikipedia {change} %, best at "
    assert (long.verdict, long.evidence[:9]) == (verdict, "seed 42: ")
    assert long.evidence[9:].startswith(f"bounded to 1,024, {words}{'4× (one' if gain > 0 else '1×, +3.0 % from'}")
    narrow = changed_window(everything.models[0], 70)
    far = beyond_tables(replace(everything, models=(*everything.models, narrow)))[1]
    assert far.title.startswith("Far context: against window only, W = 132"), "the one that reads as many keys"
    label, sign = "hybrid: linear, W = 64, full 7, 15", "−" if gain > 0 else "+"
    plain, bounded = (
        (label, "−0.020", *["+0.000"] * 8),
        (f"{label}, bounded to 1,024", "−0.020", *[f"{sign}{abs(gain):.3f}"] * 8),
    )
    assert sorted(far.rows) == sorted((plain, bounded, ("window only, W = 70", *["+0.000"] * 9)))
    assert [sorted(table.rows) for table in other_budget(everything)[2:]] == [sorted((plain, bounded))]


@pytest.mark.parametrize(
    ("far", "verdict"),
    [((0.12, 0.08), "holds"), ((0.12, 0.004), "partly"), ((0.0, 0.0), "does not hold"), (None, "not run")],
)
def test_copying_is_judged_past_the_window_and_within_the_training_length(
    far: tuple[float, float] | None, verdict: str
) -> None:
    models = hybrid_and_window(0.0)
    ours, window = (models[name].first for name in ("hybrid", "window-w132"))
    window["copying"] = {"64": 0.05, "256": 0.003, "512": 0.0, "1024": 0.9}
    if far:
        ours["copying"] = {"64": 0.0, "256": far[0], "512": far[1], "1024": 0.0}
    second = ours | {"seed": 43, "copying": {"256": 0.14, "512": 0.08}} if far and far[1] else None
    models["hybrid"] = Model("hybrid", (ours, second) if second else (ours,))
    goal = next(one for one in own_goals(group(models), {}) if one.claim.startswith("From text alone"))
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
    goal = own_goals(group({"dense": published()["dense"]}), {"recall": [{"rows": rows}]})[-1]
    assert goal.verdict == verdict
    assert f"passkey: window 64, stagger {256 if passkey > 0.9 else 64}" in goal.evidence
    assert ("associative: window 64, stagger 64 to 256" in goal.evidence) == (verdict == "partly")


def test_speeds_are_compared_of_runs_that_trained_alone() -> None:
    had = [{"processes_a_gpu": 1}, {"processes_a_gpu": None}, {"processes_a_gpu": 2}, {"processes_a_gpu": 2}]
    training = [{}, {}, {}, {"alone": True}]
    runs = (
        published_run("dense", seed=n) | {"hardware": had[n], "training": training[n]} for n in range(len(training))
    )
    model = Model("dense", tuple(runs))
    assert [run["seed"] for run in model.alone()] == [0, 1, 3]


def test_deviations_are_those_of_the_compared() -> None:
    models = published()
    loud = Model("loud", tuple(published_run("dense", factor, 42 + n) for n, factor in enumerate((1.0, 1.2, 0.8))))
    with_loud = group({**models, "loud": loud})
    pair = models["linear-w12"], models["coprime-w12"]
    assert with_loud.sigma(*pair) == group(models).sigma(*pair)
    quiet, all_of_it = with_loud.sigma(*pair), with_loud.sigma(*pair, loud)
    assert quiet is not None
    assert all_of_it is not None
    assert all_of_it > 3 * quiet


def test_orders_are_compared_over_the_models_that_were_run() -> None:
    def note(models: dict[str, Model]) -> str:
        return papers_tables(group(models))[0].note

    def turned_round(name: str, model: Model) -> Model:
        perplexity = math.exp(model.loss(1024))
        return Model(name, (published_run(model.paper_key or "", perplexity**-2),))

    models = published()
    assert note(models).endswith("with the paper's over these 21 models: 1.00.")
    assert "Rank correlation" not in note({name: models[name] for name in ("dense", "linear-w12", "fixed-w12")})
    some = {name: model for name, model in models.items() if name.endswith("w12")}
    assert note({name: turned_round(name, model) for name, model in some.items()}).endswith("these 5 models: −1.00.")
