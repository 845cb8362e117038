"""The report: one self-contained page, the same tables in Markdown, and the figures with their numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from fibattn import files
from fibattn.plotting import STYLE
from fibattn.progress import quantity
from study.report import charts
from study.report.claims import Claims, Finding
from study.report.far_table import far_records, far_table
from study.report.five_minutes_table import five_minutes_table
from study.report.headline import Headline, paper_headline, tuned_headline
from study.report.ladder_table import ladder_table
from study.report.long_table import long_tables
from study.report.own_claims import OWN, recalls_farther
from study.report.own_tables import asked_tables, beyond_tables, cost_table, failures_table, other_budget
from study.report.page import inline_svg, write_page
from study.report.paper_claims import PAPERS
from study.report.paper_tables import papers_tables
from study.report.parts_table import parts_table
from study.report.probe_tables import other_probes, retrieval_table, unbounded_recall
from study.report.provenance import provenance
from study.report.results import Group, Results
from study.report.rivals_tables import rivals_tables
from study.report.tables import findings_table
from study.report.tuned import tuned_groups
from study.rivals import DEFAULTS, FINALISTS, RIVALS, Rivals

_RECIPES = (
    (DEFAULTS, "the default recipe"),
    (FINALISTS, "the default recipe drawn with replacement"),
    (RIVALS, "the recipe of the step muon8"),
)
"""Rivals and the recipe that they share, in words; the newest first."""
_TOY = 10_000_000
"""Trained on fewer tokens than this, a model bears no claim."""

_CAPTIONS = {
    "positions": "Loss over the training sequence, and what the stagger gains over fixed distances in each part of it, "
    "at the largest budget that has both.",
    "alphas": "Where learned scales end, beside the ramp that the stagger sets.",
    "coverage": "The distances that some layer attends to (16 layers, W = 8, context 1,024): what staggering is for. "
    "The paper counts 19 for fixed and about 75 for linear; the latter is what 8 layers give (74), not 16.",
    "recall": "How often a value is found again that stands so far back; small models, trained for it: the median of "
    "their seeds, which are the thin lines.",
    "frontier": "Quality at the training length, against cost there and in the longest sequences; each point is the "
    "first seed of a model, its full layers unbounded; down and to the left is better. The line joins those that no "
    "other beats in both.",
}


def write_report(folder: Path) -> Path:
    """Read a results folder and write `report/` in it: index.html, tables.md and the figures; returns the page.

    Of a folder with studies at tuned rates alone tables.md is all.

    Raises:
        InputError: when the folder holds no finished run.
    """
    results = Results.load(folder)
    tuned = [
        *five_minutes_table(results.tuned["five-minutes"], results.outside),
        *ladder_table(results.tuned["ladder"]),
        *(one for rivals, recipe in _RECIPES for one in rivals_tables(rivals, results.tuned[rivals.study], recipe)),
        *long_tables(results.tuned["long"]),
    ]
    tuned += parts_table(folder, (one for records in results.tuned.values() for one in records))
    tuned += far_table(far_records(folder), results.tuned[RIVALS.study])
    leading, shown = _leading(results)
    groups = tuned_groups(leading, results.tuned[leading.study])
    met = [one for one in _at_every_budget(OWN, groups) if one.verdict != "not run"]
    note = "Of runs that were looked at from 1 to 16 times the training length."
    tuned += [findings_table("Past the paper, in the tuned recipe", met, note)] if met else []
    if not results.groups:
        tables = folder / "report" / "tables.md"
        files.write_text(tables, "\n".join(table.markdown() for table in tuned))
        return tables
    group, *others = results.groups
    papers = [*papers_tables(group), retrieval_table(results.probes), cost_table(results.groups)]
    beyond = [*beyond_tables(group), *asked_tables(results.groups)]
    probes = other_probes(results.probes)
    other = [table for one in others for table in other_budget(one)]
    budgets = _budgets(results)
    findings = _at_every_budget(PAPERS, budgets)
    goals = _at_every_budget(OWN, budgets)
    goals += [recalls_farther(results.probes)] if budgets else []
    about = provenance(results.groups)
    at_rate = f"At a learning rate of {group.runs['rate'].iloc[0]:g}; what holds in a tuned recipe is told above."
    note = at_rate if tuned else ""
    checked = [findings_table("The paper's findings", findings, note), findings_table("Past the paper", goals, note)]
    told = [*tuned, *(checked if budgets else []), *papers, *beyond, *probes, *other]
    source = "\n".join(f"- {name}: {value}" for name, value in about.items())
    markdown = [*(table.markdown() for table in told), f"### Where this comes from\n\n{source}\n"]
    out = folder / "report"
    files.write_text(out / "tables.md", "\n".join(markdown))
    return write_page(
        out / "index.html",
        "report.html.j2",
        headline=_headline(results, shown, budgets),
        toys=not budgets,
        group=group,
        trained=_trained(results),
        sections={
            **({"tuned": "The recipe, its rivals, and other far reading"} if tuned else {}),
            **({"papers-claims": "What the paper found, and what came out here"} if budgets else {}),
            **({"own-claims": "What the project set out to do"} if budgets else {}),
            "past": "Past the paper",
            "papers": "The paper's tables",
            **({"probes": "Beside perplexity"} if probes else {}),
            **({"others": "Other budgets"} if other else {}),
            "source": "Where this comes from",
        },
        figures=_figures(results, shown, out),
        findings=findings,
        goals=goals,
        tuned=tuned,
        note=note,
        papers=papers,
        beyond=beyond,
        probes=probes,
        others=other,
        failed=failures_table(results.failures),
        provenance=about,
    )


def _leading(results: Results) -> tuple[Rivals, Headline | None]:
    """The newest recipe in which the one of the project was looked at far out beside dense; until then the oldest."""
    shown = [(rivals, tuned_headline(rivals, results.tuned[rivals.study])) for rivals, _ in _RECIPES]
    far_out = (pair for pair in shown if pair[1] is not None and pair[1].shows_ours_far_out)
    return next(far_out, shown[-1])


def _figures(results: Results, tuned: Headline | None, out: Path) -> dict[str, dict[str, Any]]:
    """The figures that the results allow, by name, each with its picture and caption.

    Tuned models lead. Where other models were trained for longer than the main group's, theirs over evaluation length
    comes before.
    """
    group, as_long = results.groups[0], _same_length(results)
    untuned = paper_headline(as_long[0]) if _budgets(results) else None
    recall = unbounded_recall(results.probes)
    over_length = {"extrapolation": group}
    if as_long[0].tokens > group.tokens:
        over_length = {"extrapolation-longest": as_long[0]} | over_length
    drawn: dict[str, Callable[[Path], Path | None]] = {
        "headline": lambda path: charts.headline(tuned, path) if tuned else None,
        "reproduction": lambda path: charts.headline(untuned, path) if untuned else None,
        **{name: partial(charts.extrapolation, one) for name, one in over_length.items()},
        "positions": lambda path: next(filter(None, (charts.positions(one, path) for one in as_long)), None),
        "alphas": partial(charts.alphas, group),
        "coverage": charts.coverage,
        "frontier": partial(charts.frontier, group),
        "recall": lambda path: charts.recall(recall, path) if recall else None,
    }
    captions = _CAPTIONS | {name: _over_length(one) for name, one in over_length.items()}
    captions |= {"headline": tuned and _told(tuned, "in the tuned recipe")}
    captions |= {"reproduction": untuned and _told(untuned, f"at a rate of {as_long[0].runs['rate'].iloc[0]:g}")}
    found = {}
    for name, draw in drawn.items():
        with plt.rc_context(STYLE):
            path = draw(out / f"{name}.svg")
        if path is not None:
            found[name] = {"svg": inline_svg(path), "caption": captions[name], "csv": f"{name}.csv"}
    return found


def _told(shown: Headline, how: str) -> str:
    """The caption of a figure of few curves over evaluation length."""
    return (
        f"Perplexity in longer and longer sequences of the same text, after {quantity(shown.tokens)} training tokens "
        f"{how}, {shown.of_seeds}: dense, dense with its rotary positions stretched by YaRN or bounded to the training "
        "length, and the hybrid as it is saved, its full layers bounded likewise, as far as each was looked at."
        " Lower is better."
    )


def _over_length(group: Group) -> str:
    """The caption of a group's figure over evaluation length."""
    return (
        f"After {quantity(group.tokens)} training tokens: perplexity in longer and longer sequences of the same text, "
        "against dense of the same seed at the training length. At the right each curve's name and end, also where it "
        "leaves the figure; thin lines are further seeds; bounded: full layers see the last so many tokens alone; "
        "trained on: with a tenth more tokens, in sequences so long. Lower is better."
    )


def _same_length(results: Results) -> list[Group]:
    """The groups with the main group's training length, most training first."""
    length = results.groups[0].trained_at
    return sorted((one for one in results.groups if one.trained_at == length), key=lambda one: -one.tokens)


def _budgets(results: Results) -> list[Group]:
    """Those of them whose models may bear a claim."""
    return [one for one in _same_length(results) if one.tokens >= _TOY]


def _at_every_budget(claims: Claims, groups: Sequence[Group]) -> list[Finding]:
    """The findings of every budget, claim by claim; what one budget leaves out is said once."""
    found: list[Finding] = []
    for claim in claims if groups else []:
        same = [(group, claim.of(group)) for group in groups]
        told = [(group, one) for group, one in same if one.verdict != "not run"]
        if len({one.evidence for _, one in told}) < 2:
            found.append((told or same)[0][1])
        else:
            found += [replace(one, claim=f"{one.claim} ({quantity(group.tokens)} tokens)") for group, one in told]
    return found


def _trained(results: Results) -> str:
    """How long the main group was trained, how many models also otherwise, and at which rate."""
    main, *others = results.groups
    also = [f"{len(one.models)} of {quantity(one.tokens)}" for one in others if one.trained_at == main.trained_at]
    rate = f"at a learning rate of {main.runs['rate'].iloc[0]:g}"
    return f"{quantity(main.tokens)} training tokens" + (f" (and {', '.join(also)})" if also else "") + f" {rate}"


def _headline(results: Results, tuned: Headline | None, budgets: Sequence[Group]) -> str:
    """What the numbers say of the hybrid, tuned ones before those of the largest budget at another rate."""
    if tuned is not None:
        return tuned.words
    if not budgets:
        return f"{len(results.groups[0].models)} toy models: does everything run?"
    for group in budgets:
        better, longer = (claim.of(group) for claim in OWN[:2])
        if "not run" not in (better.verdict, longer.verdict):
            here = {"holds": "lower than dense's on every domain", "partly": "lower than dense's on some domains"}
            there = {"holds": "no higher", "partly": "no higher on some"}
            return (
                f"After {quantity(group.tokens)} tokens at a learning rate of {group.runs['rate'].iloc[0]:g} "
                "the hybrid's perplexity is "
                f"{here.get(better.verdict, 'above that of dense')}, and "
                f"{there.get(longer.verdict, 'higher')} at {group.factor} times the training length"
            )
    main = max(budgets, key=lambda one: len(one.models))
    return f"The perplexity of {len(main.models)} models, {quantity(main.tokens)} training tokens each"
