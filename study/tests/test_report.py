"""The report: its tables and its page against the results, and a look at it."""

import csv
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

from fibattn import InputError, files
from study.report.claims import percent
from study.report.own_tables import asked_tables, cost_table
from study.report.paper_tables import extrapolation, papers_tables
from study.report.probe_tables import other_probes, retrieval_table
from study.report.results import Results, paper
from study.report.write import write_report
from study.runner import Job
from study.store import Store


@pytest.fixture(scope="module")
def page(job: Job) -> Path:
    """The page of the study as it is."""
    return write_report(job.out)


def test_tables_have_every_row_of_the_paper(job: Job) -> None:
    results = Results.load(job.out)
    made = [*papers_tables(results.groups[0]), retrieval_table(results.probes), cost_table(results.groups)]
    tables = {table.title.split(".")[0]: table for table in made}
    assert len(tables["Table 1"].rows) == 22
    assert len(tables["Table 5"].rows) == len(paper()["retrieval_probe"])
    row = next(row for row in tables["Table 1"].rows if row[0] == "coprime, W = 12")
    (run,) = (one for one in Store(job.out).records() if one["run"] == "coprime-w12")
    ours = [rows["32"]["perplexity"] for rows in run["evaluation"].values()]
    assert row[1 : 1 + len(ours)] == tuple(f"{value:.2f}" for value in ours)
    assert "42.09" in row
    absent = next(row for row in tables["Table 1"].rows if row[0] == "coprime, W = 6")
    assert absent[1] == "not run"


def test_page_stands_alone_and_has_its_numbers_beside_it(job: Job, page: Path) -> None:
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
    assert Results.load(job.out).groups[0].data in text


def test_copying_is_shown_for_the_runs_that_have_it(job: Job, tmp_path: Path) -> None:
    for one in Store(job.out).records():
        assert set(one["copying"]) == {"2", "8", "16", "32", "128"}
        if one["run"].startswith("dense"):
            one["copying"] = None
        elif one["run"] == "hybrid":  # as an earlier version measured it
            one["copying"] = {distance: one["copying"][distance] for distance in ("2", "8", "16")}
        Store(tmp_path).append(one)
    table = asked_tables(Results.load(tmp_path).groups)[0]
    distances = tuple(f"{distance} tokens" for distance in (2, 8, 16, 32, 128))
    assert tuple(table.frame) == ("model", "training tokens", "seed", *distances)
    assert len(table.rows) == sum(bool(one["copying"]) for one in Store(tmp_path).finished().values())
    assert "dense" not in {row[0] for row in table.rows}
    unasked = {row[0] for row in table.rows if row[-2:] == ("–", "–")}
    assert len(unasked) == 1
    assert unasked.pop().startswith("hybrid")
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
    recipe["optimizer"]["learning_rate"] *= 2
    Store(tmp_path).append(changed(record, recipe=recipe))
    runs = Results.load(tmp_path).groups[0].runs
    newest = runs[runs["model"] == "coprime-w12"]
    older = runs[runs["model"].str.startswith("coprime-w12@")]
    assert len(newest) == len(older) == 1
    assert newest["rate"].item() == recipe["optimizer"]["learning_rate"]
    assert "earlier recipe" in older["label"].item()
    again = changed(
        record,
        time="2100-01-01T00:00:00",
        key="again",
        recipe={**record["recipe"], "init_seed": 7, "data_seed": 7},
        seed=7,
    )
    Store(tmp_path).append(again)
    runs = Results.load(tmp_path).groups[0].runs
    assert sum(runs["model"] == "coprime-w12") == 2


def test_a_way_that_the_first_seed_was_not_tried_in_is_shown_with_its_own_seed(job: Job, tmp_path: Path) -> None:
    for one in Store(job.out).records():
        plainly = {"rope_scaling": {}, "bounded": {}, "lengthened": {}}
        Store(tmp_path).append(one | plainly if one["run"] == "dense" else one)
    group = Results.load(tmp_path).groups[0]
    rows = {row[0]: row for row in extrapolation(group).rows}
    assert {name for name in rows if name.startswith("dense")} == {
        "dense",
        "dense, YaRN, seed 43",
        "dense, linear scaling, seed 43",
        "dense, bounded to 32, seed 43",
        "dense, a tenth more at 64, seed 43",
    }
    (second,) = (one for one in Store(job.out).records() if one["run"] == "dense-seed43")
    yarn = {name: second["evaluation"][name] | rows for name, rows in second["rope_scaling"]["yarn"].items()}
    losses = {n: statistics.mean(rows[str(n)]["nll"] for rows in yarn.values()) for n in group.lengths}
    near, *far = losses.values()
    expected = (f"{math.exp(near):.2f}", *(percent(loss - near) for loss in far))
    assert rows["dense, YaRN, seed 43"][1 : 1 + len(expected)] == expected


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
        for lengths in (*record["evaluation"].values(), *record["bounded"]["32"].values()):
            for row in lengths.values():
                row["nll"] = 1.0 if name == "hybrid" else 2.0
        Store(tmp_path).append(record)
    text = write_report(tmp_path).read_text()
    headline = "After 1G tokens at a learning rate of 0.005 the hybrid's perplexity is lower than dense's"
    assert f"{headline} on every domain, and no higher at" in text.replace("&#39;", "'")
    figures = re.findall(r'<figure id="([a-z-]*)">', text)
    assert figures[:2] == ["extrapolation-longest", "extrapolation"]
    assert "After 1G training tokens: perplexity" in text
    assert len(re.findall("Dense degrades", text)) == 1, "the other budget makes toys, and is not judged"
    assert recipe["sequence_length"] == Results.load(tmp_path).groups[0].trained_at
    Store(tmp_path).append(changed(records[0], key="longer", trained_at=4 * recipe["sequence_length"]))
    groups = Results.load(tmp_path).groups
    assert [one.trained_at for one in groups] == [
        4 * recipe["sequence_length"],
        recipe["sequence_length"],
        recipe["sequence_length"],
    ]
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
    assert tuple(recall.frame) == ("model", "keys", "task", "seeds", "64", "1,024")
    assert recall.rows == [("stagger", "23", task, "3", "1.00", "0.50") for task in ("a", "b")]
    assert lego.title == "LEGO over Z/2: dense"
    assert "The paper: 0.47-0.51" in lego.note
    assert '<figure id="recall">' in write_report(tmp_path).read_text()


_NO_PROBE = "not a result of `python -m study probe`"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", _NO_PROBE), ("[]", "a list, expected an object"), ('{"probe": "recall", "rows": []}', _NO_PROBE)],
)
def test_a_file_that_is_no_probe_is_named(job: Job, tmp_path: Path, text: str, message: str) -> None:
    copied(job, tmp_path)
    files.write_text(tmp_path / "probes" / "a.json", text)
    with pytest.raises(InputError, match=rf"a\.json is {message}"):
        write_report(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run; make some with `python -m study run`"):
        write_report(tmp_path)


def numbers(page: Path, figure: str) -> list[dict[str, str]]:
    with (page.parent / f"{figure}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_headline_figure_has_every_seed_against_its_own_dense(job: Job, page: Path) -> None:
    rows = numbers(page, "extrapolation")
    trained_at = Results.load(job.out).groups[0].trained_at
    near = {row["model"]: float(row["ratio"]) for row in rows if int(row["length"]) == trained_at}
    assert {name for name in near if "seed" in name} == {"dense, seed 43", "linear, W = 12, seed 43"}
    assert near["dense"] == near["dense, seed 43"] == 1


def test_costs_in_the_frontier_are_those_that_were_recorded(job: Job, page: Path) -> None:
    group = Results.load(job.out).groups[0]
    rows = {row["model"]: row for row in numbers(page, "frontier")}
    for _, model in group.models.iterrows():
        keys = [float(rows[model["label"]][f"keys at {n}"]) for n in (group.trained_at, group.longest)]
        assert keys[0] == pytest.approx(model["keys"])
        assert keys[0] < keys[1]


def test_toys_are_said_to_be_toys_and_judged_by_no_claim(page: Path) -> None:
    text = re.sub("<style>.*?</style>", "", page.read_text(), flags=re.DOTALL)
    assert re.search(r"<h1>\d+ toy models: does everything run\?</h1>", text)
    assert "These models are toys" in text
    for words in (text, (page.parent / "tables.md").read_text()):
        assert not re.findall("does not hold|class=.verdict|undecided|default recipe", words)


def test_a_table_of_zeros_is_folded(job: Job, tmp_path: Path) -> None:
    for one in Store(job.out).records():
        one["copying"] = dict.fromkeys(one["copying"], 0.0)
        Store(tmp_path).append(one)
    text = write_report(tmp_path).read_text()
    folded = re.findall(r"<summary><h3>([^<]*)</h3>", text)
    assert "Copying" in folded
    assert "Table 1. Perplexity at the training length" not in folded


def test_the_contents_lead_to_every_section(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r'<li><a href="#([a-z-]*)">', text) == re.findall(r'<h2 id="([a-z-]*)">', text)


def test_the_flops_probe_has_a_table() -> None:
    row = {
        "model": "dense",
        "projections": 1.0,
        "attention": 20_000.0,
        "head": 2.0,
        "total": 3.0,
        "attention_share": 0.5,
    }
    (table,) = other_probes({"flops": [{"probe": "flops", "length": 1024, "rows": [row]}]})
    assert table.title == "Operations of a forward pass"
    assert table.rows == [("dense", "1.000", "20,000", "2.000", "3.000", "0.500")]


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width)
    names = ["extrapolation", "frontier", "coverage", "positions", "alphas"]
    assert browser.evaluate("[...document.querySelectorAll('figure')].map(e => e.id)") == names
    assert browser.unreadable() == []
    scrolling = "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth && e.clientWidth)"
    scrolling += ".filter(e => getComputedStyle(e).overflowX != 'visible')"
    assert browser.evaluate(f"{scrolling}.every(e => e.matches('[tabindex=\"0\"][role=region][aria-label]'))")
    assert browser.overflowing() == []
    cut = "[...document.querySelectorAll('svg text')].filter(e => e.getClientRects().length).filter(e => {"
    cut += "const own = e.getBoundingClientRect(), all = e.ownerSVGElement.getBoundingClientRect();"
    cut += "return own.right > all.right + 1 || own.left < all.left - 1}).map(e => e.textContent)"
    assert browser.evaluate(cut) == []
    assert browser.console() == []
