"""The report: its judgements against the paper's own numbers, its page against the results, and a look at it."""

import csv
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

from fibattn import InputError, files
from fibattn.study.findings import Finding, own_goals, papers_findings
from fibattn.study.own_tables import asked_tables, beyond_tables, copying_table, cost_table
from fibattn.study.paper_tables import papers_tables
from fibattn.study.probe_tables import other_probes, retrieval_table
from fibattn.study.report import insert_tables, write_report
from fibattn.study.results import Group, Model, Results, paper
from fibattn.study.runner import Job
from fibattn.study.store import Store

SETS = ("fineweb_edu", "wikipedia")
PLAIN = {"clip_offsets": False, "full_layers": [], "stagger_heads": False}


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
        "evaluation": {
            name: {
                n: {"nll": loss, "bins": own[name], "last_256_perplexity": math.exp(loss)} for n, loss in rows.items()
            }
            for name, rows in losses.items()
        },
        "recipe": {"model": {"attention": "full", **PLAIN} if key == "dense" else shape(key)},
        "model": {"learned_alphas": [0.97, 1.04] if "learned" in key else None},
        "rope_scaling": {},
        "hardware": {"processes_a_gpu": 2},
        "training": {},
    }


def shape(key: str) -> dict[str, Any]:
    base, schedule, window = key.split("/")
    return {"attention": "fibonacci", "base": base, "schedule": schedule, "window": int(window[1:]), **PLAIN}


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


def test_a_claim_about_all_of_the_papers_models_holds_at_most_in_part_for_some() -> None:
    models = {name: model for name, model in published().items() if name.endswith("w12") or name == "dense"}
    found = verdicts(models)
    assert found["The best of the 21 is linear, W = 12"] == "partly"
    assert found["At every window: linear ≈ coprime < learned < fixed"] == "partly"


def hybrid_and_window(bounded_gain: float) -> dict[str, Model]:
    """A plain window, and a hybrid 0.02 nats ahead at 1,024 tokens, level at 4,096 unless it is bounded."""

    def run(way: dict[str, Any], gains: dict[str, float], **more: Any) -> dict[str, Any]:
        evaluation = {
            name: {n: {"nll": 3 - gain, "bins": [3 - gain] * 8} for n, gain in gains.items()} for name in SETS
        }
        recipe = {"model": {"base": "fibonacci", "schedule": "linear", "full_layers_rope": False, **PLAIN, **way}}
        return published_run("dense") | {"evaluation": evaluation, "recipe": recipe, "model": {"keys": 133.0}, **more}

    window = run({"attention": "sliding", "window": 132}, {"1024": 0.0, "4096": 0.0})
    bounded = {name: {"4096": {"nll": 3 - bounded_gain, "bins": [3 - bounded_gain] * 8}} for name in SETS}
    hybrid = run(
        {"attention": "fibonacci", "window": 128, "full_layers": [7, 15]},
        {"1024": 0.02, "4096": 0.0},
        bounded={"1024": bounded},
    )
    return {"window-w132": Model("window-w132", (window,)), "hybrid": Model("hybrid", (hybrid,))}


@pytest.mark.parametrize(("gain", "verdict"), [(0.03, "holds"), (-0.01, "does not hold")])
def test_a_bound_is_judged_and_shown_beside_a_plain_window(gain: float, verdict: str) -> None:
    everything = group(hybrid_and_window(gain))
    goal = next(one for one in own_goals(everything, {}) if one.claim.startswith("With bounded full layers"))
    assert goal.verdict == verdict
    assert f"1,024 tokens: {'−3.0' if gain > 0 else '+1.0'} %" in goal.evidence
    far = beyond_tables(everything)[1]
    label, sign = "hybrid: linear, W = 128, full 7, 15", "−" if gain > 0 else "+"
    plain, bounded = (
        (label, "−0.020", *["+0.000"] * 8),
        (f"{label}, bounded to 1,024", "−0.020", *[f"{sign}{abs(gain):.3f}"] * 8),
    )
    assert sorted(far.rows) == sorted((plain, bounded))


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


def test_tables_have_every_row_of_the_paper(job: Job) -> None:
    results = Results.load(job.out)
    made = [*papers_tables(results.groups[0]), retrieval_table(results.probes), cost_table(results.groups)]
    tables = {table.title.split(".")[0]: table for table in made}
    assert len(tables["Table 1"].rows) == 22
    assert len(tables["Table 5"].rows) == len(paper()["retrieval_probe"])
    assert all(len(row) == len(table.heading) for table in tables.values() for row in table.rows)
    row = next(row for row in tables["Table 1"].rows if row[0] == "coprime, W = 12")
    (run,) = (one for one in Store(job.out).records() if one["run"] == "coprime-w12")
    ours = [rows["32"]["perplexity"] for rows in run["evaluation"].values()]
    assert row[1 : 1 + len(ours)] == tuple(f"{value:.2f}" for value in ours)
    assert "42.09" in row
    absent = next(row for row in tables["Table 1"].rows if row[0] == "coprime, W = 6")
    assert absent[1] == "not run"


def test_page_stands_alone_and_has_its_numbers_beside_it(job: Job) -> None:
    page = write_report(job.out)
    text = page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []
    assert "url(http" not in text
    for name in ("extrapolation", "positions", "alphas", "coverage", "frontier"):
        assert f'<figure id="{name}">' in text
        assert (page.parent / f"{name}.csv").read_text().count("\n") > 3
    markdown = (page.parent / "tables.md").read_text()
    assert all(f"Table {number}." in markdown for number in range(1, 6))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert Results.load(job.out).groups[0].data_fingerprint in text


def test_copying_is_shown_for_the_runs_that_have_it(job: Job, tmp_path: Path) -> None:
    for one in Store(job.out).records():
        assert set(one["copying"]) == {"2", "8", "16"}
        Store(tmp_path).append({**one, "copying": None} if one["run"].startswith("dense") else one)
    table = copying_table(Results.load(tmp_path).groups)
    assert table is not None
    assert table.heading == ("model", "training tokens", "seed", "2 tokens", "8 tokens", "16 tokens")
    runs = [run for model in Results.load(tmp_path).groups[0].models for run in model.runs if run["copying"]]
    assert len(table.rows) == len(runs)
    assert "dense" not in {row[0] for row in table.rows}
    ruler, lego = asked_tables(Results.load(tmp_path).groups)[1:]
    assert (ruler.title, lego.title) == ("RULER, variable tracking", "LEGO over Z/2")
    assert len(ruler.rows) == len(Store(tmp_path).finished())
    write_report(tmp_path)
    assert "### Copying" in (tmp_path / "report" / "tables.md").read_text()


def copied(job: Job, to: Path) -> list[dict[str, Any]]:
    """The study's records, put into another folder too."""
    records = Store(job.out).records()
    for one in records:
        Store(to).append(one)
    return records


def changed(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(record)), "time": "2099-01-01T00:00:00", "key": "other", **values}


def test_of_two_recipes_with_one_name_the_newest_has_it(job: Job, tmp_path: Path) -> None:
    record = next(one for one in copied(job, tmp_path) if one["run"] == "coprime-w12")
    recipe = json.loads(json.dumps(record["recipe"]))
    recipe["optimizer"]["peak_rate"] *= 2
    Store(tmp_path).append(changed(record, recipe=recipe))
    models = Results.load(tmp_path).groups[0].models
    newest, older = (
        next(one for one in models if one.name.startswith(name)) for name in ("coprime-w12", "coprime-w12@")
    )
    assert len(newest.runs) == len(older.runs) == 1
    assert newest.first["recipe"] == recipe
    assert "earlier recipe" in older.label
    again = changed(
        record,
        time="2100-01-01T00:00:00",
        key="again",
        recipe={**record["recipe"], "init_seed": 7, "data_seed": 7},
        seed=7,
    )
    Store(tmp_path).append(again)
    assert [len(one.runs) for one in Results.load(tmp_path).groups[0].models if one.name == "coprime-w12"] == [2]


def test_runs_evaluated_on_less_stand_apart(job: Job, tmp_path: Path) -> None:
    record = changed(copied(job, tmp_path)[0])
    for lengths in record["evaluation"].values():
        for row in lengths.values():
            row["targets"] //= 2
    Store(tmp_path).append(record)
    assert [len(one.models) for one in Results.load(tmp_path).groups][1:] == [1]


def test_the_longest_training_windows_lead_and_the_largest_budget_has_the_headline(job: Job, tmp_path: Path) -> None:
    records = copied(job, tmp_path)
    recipe = next(one["recipe"] for one in records if one["run"] == "hybrid")
    for name in ("dense", "hybrid"):
        record = changed(next(one for one in records if one["run"] == name), key=name, tokens=10**9)
        for lengths in record["evaluation"].values():
            for row in lengths.values():
                row["nll"] = 1.0 if name == "hybrid" else 2.0
        Store(tmp_path).append(record)
    text = write_report(tmp_path).read_text()
    assert "After 1G tokens the default recipe is ahead of dense on every domain, and no worse" in text
    assert recipe["length"] == Results.load(tmp_path).groups[0].trained_at
    Store(tmp_path).append(changed(records[0], key="longer", trained_at=4 * recipe["length"]))
    groups = Results.load(tmp_path).groups
    assert [one.trained_at for one in groups] == [4 * recipe["length"], recipe["length"], recipe["length"]]
    assert len(groups[0].models) < len(groups[1].models)


def test_other_budgets_and_failures_are_shown(job: Job, tmp_path: Path) -> None:
    record, store = copied(job, tmp_path)[-1], Store(tmp_path)
    store.append(changed(record, tokens=256))
    store.append(
        {"kind": "failure", "study": "smoke", "run": "linear-w6", "key": "x", "time": "2026", "error": "boom <b>"}
    )
    text = write_report(tmp_path).read_text()
    assert "Models at 256 training tokens" in text
    assert "boom &lt;b&gt;" in text


def test_probes_are_shown(job: Job, tmp_path: Path) -> None:
    copied(job, tmp_path)
    accuracies = {"acc200": 0.5, "acc350": 0.25, "rungs200": 0.125}
    rows = [{"depth": 4, "start": "staggered", **accuracies, "alpha_min": 0.6, "alpha_max": 1.4}]
    found = [
        {"variant": "stagger", "seed": seed, "keys": 23.0, "task": task, "accuracy": {"64": 1.0, "1024": right}}
        for seed, right in enumerate((0.5, 0.75, 0.0))
        for task in ("a", "b")
    ]
    probes = [
        {"probe": "retrieval", "rows": rows},
        {"probe": "recall", "trained_at": 128, "values": 64, "rows": found},
        {"probe": "lego", "model": "work/dense/model", "seed": 0, "rows": [{"length": 2, "accuracy": 0.5}]},
    ]
    for probe in probes:
        files.write_json(tmp_path / "probes" / f"{probe['probe']}.json", probe)
    loaded = Results.load(tmp_path).probes
    row = next(row for row in retrieval_table(loaded).rows if row[0] == "depth 4, staggered")
    assert row[1:6] == ("0.50", "0.25", "0.12", "–", "0.60 … 1.40")
    recall, lego = other_probes(loaded)
    assert recall.heading == ("model", "keys", "task", "seeds", "64", "1,024")
    assert recall.rows == tuple(("stagger", "23", task, "3", "1.00", "0.50") for task in ("a", "b"))
    assert lego.title == "LEGO over Z/2: dense"
    assert "The paper: 0.47-0.51" in lego.note
    assert '<figure id="recall">' in write_report(tmp_path).read_text()


def test_the_documentation_has_the_tables_of_the_results(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    results, document = tmp_path / "results", tmp_path / "results.md"
    shutil.copytree(root / "results", results, ignore=shutil.ignore_patterns("report", "index.sqlite", "work", "data"))
    shutil.copy(root / "docs" / "results.md", document)
    write_report(results)
    insert_tables(results, document)
    assert document.read_text() == (root / "docs" / "results.md").read_text()
    figure = root / "docs" / "figures" / "study-extrapolation.csv"
    assert figure.read_text() == (results / "report" / "extrapolation.csv").read_text()


def test_a_document_without_a_place_for_the_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    with pytest.raises(InputError, match=r"notes\.md has no line '<!-- written by fibattn report --into -->'"):
        insert_tables(tmp_path, tmp_path / "notes.md")
    with pytest.raises(InputError, match=r"missing\.md does not exist"):
        insert_tables(tmp_path, tmp_path / "missing.md")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run; make some with `fibattn study`"):
        write_report(tmp_path)


def numbers(job: Job, figure: str) -> list[dict[str, str]]:
    with (write_report(job.out).parent / f"{figure}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_headline_figure_has_every_seed_against_its_own_dense(job: Job) -> None:
    rows = numbers(job, "extrapolation")
    trained_at = Results.load(job.out).groups[0].trained_at
    near = {row["model"]: float(row["ratio"]) for row in rows if int(row["length"]) == trained_at}
    assert {name for name in near if "seed" in name} == {"dense, seed 43", "linear, W = 12, seed 43"}
    assert near["dense"] == near["dense, seed 43"] == 1


def test_costs_in_the_frontier_are_those_that_were_recorded(job: Job) -> None:
    group = Results.load(job.out).groups[0]
    rows = {row["model"]: row for row in numbers(job, "frontier")}
    for model in group.models:
        keys = [float(rows[model.label][f"keys at {n}"]) for n in (group.trained_at, group.lengths[-1])]
        assert keys[0] == pytest.approx(model.first["model"]["keys"])
        assert keys[0] < keys[1]


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(job: Job, browser: Browser, width: int) -> None:
    browser.open(write_report(job.out), width)
    names = ["extrapolation", "frontier", "coverage", "positions", "alphas"]
    assert browser.evaluate("[...document.querySelectorAll('figure')].map(e => e.id)") == names
    assert browser.unreadable() == []
    scrolling = "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth && e.clientWidth)"
    scrolling += ".filter(e => getComputedStyle(e).overflowX != 'visible')"
    assert browser.evaluate(f"{scrolling}.every(e => e.matches('[tabindex=\"0\"][role=region][aria-label]'))")
    assert browser.overflowing() == []
    assert browser.console() == []
