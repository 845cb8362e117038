"""The report: one self-contained page, the same tables in Markdown, and the figures with their numbers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.progress import quantity
from study.report import charts
from study.report.findings import Finding
from study.report.own_goals import own_goals
from study.report.own_tables import asked_tables, beyond_tables, cost_table, failures_table, other_budget
from study.report.page import inline_svg, write_page
from study.report.paper_findings import papers_findings
from study.report.paper_tables import papers_tables
from study.report.probe_tables import other_probes, retrieval_table
from study.report.provenance import provenance
from study.report.results import Group, Results
from study.report.tables import Table
from study.store import Store

_CAPTIONS = {
    "positions": "Loss over the training window, and what the stagger gains over fixed distances in each part of it, "
    "at the largest budget that has both.",
    "alphas": "Where learned scales end, beside the ramp that the stagger sets.",
    "coverage": "The distances that some layer attends to (16 layers, W = 8, context 1,024): what staggering is for. "
    "The paper counts 19 for fixed and about 75 for linear; the latter is what 8 layers give (74), not 16.",
    "recall": "How often a value is found again that stands so far back; small models, trained for it: the median of "
    "their seeds, which are the thin lines.",
    "frontier": "Quality at the training length, against cost there and in the longest windows; each point is the "
    "first seed of a model, its full layers unbounded; down and to the left is better. The line joins those that no "
    "other beats in both; numbers name its steps of 2 % and more, dense and the default recipe.",
}


def write_report(folder: Path) -> Path:
    """Read a results folder and write `report/` in it: index.html, tables.md and the figures; returns the page.

    Raises:
        InputError: when the folder holds no finished run.
    """
    results = Results.load(folder)
    Store(folder).index()
    group, out = results.groups[0], folder / "report"
    figures = _figures(results, out)
    checked = _at_every_budget(_judged(results, papers_findings))
    judged = _judged(results, lambda one: own_goals(one, results.probes))
    goals = _at_every_budget(judged)
    papers = [*papers_tables(group), retrieval_table(results.probes), cost_table(results.groups)]
    beyond = [*beyond_tables(group), *asked_tables(results.groups)]
    probes = other_probes(results.probes)
    others = [table for one in results.groups[1:] for table in other_budget(one)]
    failed = failures_table(results)
    about = provenance(results.groups)
    files.write_text(out / "tables.md", _markdown(checked, goals, [*papers, *beyond, *probes, *others], about))
    return write_page(
        out / "index.html",
        "report.html.j2",
        headline=_headline(judged),
        group=group,
        budgets=_budgets(results),
        figures=figures,
        findings=checked,
        goals=goals,
        papers=papers,
        beyond=beyond,
        probes=probes,
        others=others,
        failed=failed,
        provenance=about,
    )


def _figures(results: Results, out: Path) -> dict[str, dict[str, Any]]:
    """The figures that the results allow, by name, each with its picture and caption.

    Where other models were trained for longer than the main group's, theirs over evaluation length leads.
    """
    group, trained_as_long = results.groups[0], _same_windows(results)
    longest = trained_as_long[0]
    recall = results.probes.get("recall", [])[-1:]
    over_length = {"extrapolation": group}
    if longest.tokens > group.tokens:
        over_length = {"extrapolation-longest": longest} | over_length
    drawn: dict[str, Callable[[Path], Path | None]] = {
        **{name: partial(charts.extrapolation, one) for name, one in over_length.items()},
        "positions": lambda path: next(filter(None, (charts.positions(one, path) for one in trained_as_long)), None),
        "alphas": lambda path: charts.alphas(group, path),
        "coverage": lambda path: charts.coverage(path),
        "frontier": lambda path: charts.frontier(group, path),
        "recall": lambda path: charts.recall(recall[0], path) if recall else None,
    }
    captions = _CAPTIONS | {name: _over_length(one) for name, one in over_length.items()}
    found = {}
    for name, draw in drawn.items():
        path = draw(out / f"{name}.svg")
        if path is not None:
            found[name] = {"svg": inline_svg(path), "caption": captions[name], "csv": f"{name}.csv"}
    return found


def _over_length(group: Group) -> str:
    """The caption of a group's figure over evaluation length."""
    return (
        f"After {quantity(group.tokens)} training tokens: perplexity in longer and longer windows of the same text, "
        "against dense of the same seed at the training length, and the grey part of it again, enlarged; thin lines "
        "are further seeds; bounded: full layers see the last so many tokens alone; a tenth more: trained on in "
        "windows so long. Lower is better."
    )


def _same_windows(results: Results) -> list[Group]:
    """The groups trained in windows as long as the main group's, most training first."""
    length = results.groups[0].trained_at
    return sorted((one for one in results.groups if one.trained_at == length), key=lambda one: -one.tokens)


def _judged(results: Results, check: Callable[[Group], list[Finding]]) -> list[tuple[Group, list[Finding]]]:
    """Those groups, each with the findings that `check` makes of it."""
    return [(group, check(group)) for group in _same_windows(results)]


def _at_every_budget(judged: list[tuple[Group, list[Finding]]]) -> list[Finding]:
    """The findings of every budget, claim by claim; what one budget leaves out is said once."""
    found: list[Finding] = []
    groups = [group for group, _ in judged]
    for same in zip(*(findings for _, findings in judged), strict=True):
        told = [(group, one) for group, one in zip(groups, same, strict=True) if one.verdict != "not run"]
        if len({one.evidence for _, one in told}) < 2:
            found.append(told[0][1] if told else same[0])
        else:
            found += [replace(one, claim=f"{one.claim} ({quantity(group.tokens)} tokens)") for group, one in told]
    return found


def _budgets(results: Results) -> str:
    """How long the main group was trained, and how many models also otherwise."""
    main, *others = results.groups
    also = [f"{len(one.models)} of {quantity(one.tokens)}" for one in others if one.trained_at == main.trained_at]
    return f"{quantity(main.tokens)} training tokens" + (f" (and {', '.join(also)})" if also else "")


def _headline(judged: list[tuple[Group, list[Finding]]]) -> str:
    """What the numbers of the largest budget say of the default recipe, whichever way they come out."""
    whole = [(group, goals) for group, goals in judged if "not run" not in {goal.verdict for goal in goals[:2]}]
    if not whole:
        main = max((group for group, _ in judged), key=lambda one: len(one.models))
        return f"{len(main.models)} models, {quantity(main.tokens)} training tokens each"
    group, (better, longer, *_) = whole[0]
    factor = group.lengths[-1] // group.trained_at
    at_length = {"holds": "ahead of dense on every domain", "partly": "partly ahead of dense"}
    past = {
        "holds": f"no worse at {factor} times the length",
        "partly": f"no worse on some at {factor} times the length",
    }
    return (
        f"After {quantity(group.tokens)} tokens the default recipe is "
        f"{at_length.get(better.verdict, 'behind dense at the training length')}, "
        f"and {past.get(longer.verdict, f'worse at {factor} times the length')}"
    )


def _markdown(checked: list[Finding], goals: list[Finding], tables: list[Table], about: dict[str, str]) -> str:
    parts = []
    for title, findings in (("The paper's findings", checked), ("Past the paper", goals)):
        rows = tuple((one.claim, one.verdict, one.evidence) for one in findings)
        lines = ["| " + " | ".join(row) + " |" for row in (("claim", "here", "evidence"), *rows)]
        parts.append("\n".join([f"### {title}", "", lines[0], "| --- | --- | --- |", *lines[1:], ""]))
    parts += [table.markdown() for table in tables]
    parts.append(
        "### Where this comes from\n\n" + "\n".join(f"- {name}: {value}" for name, value in about.items()) + "\n"
    )
    return "\n".join(parts)
