"""Where the report's numbers come from: recipe, data, machines, versions."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fibattn.progress import duration, quantity
from study.report.results import Group


def provenance(groups: Sequence[Group]) -> dict[str, str]:
    """Where the numbers of the groups come from, in words."""
    runs = [run for group in groups for model in group.models for run in model.runs]
    recipe, training = runs[0]["recipe"], sum(run["seconds"]["training"] for run in runs)
    rates = sorted({f"{run['recipe']['optimizer']['learning_rate']:g}" for run in runs})
    budgets = (
        f"{sum(len(model.runs) for model in group.models)} of {quantity(group.tokens)} tokens" for group in groups
    )
    return {
        "runs": f"{', '.join(budgets)}; {recipe['sequences_per_step']} windows of "
        f"{recipe['sequence_length']:,} a step; {duration(training)} of training in all",
        "recipe": f"AdamW, peak rate {', '.join(rates)}, {recipe['optimizer']['warmup_steps']} warm-up steps, the same "
        "order of windows for all runs of a seed",
        "seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})),
        "evaluation": f"{runs[0]['convention']}; {_targets(runs)} targets a set",
        "data fingerprint": ", ".join(dict.fromkeys(group.data_fingerprint for group in groups)),
        "devices": ", ".join(sorted({run["hardware"]["device"] for run in runs})),
        "versions": _versions(runs),
        "from": f"{min(run['time'] for run in runs)[:16]} to {max(run['time'] for run in runs)[:16]} UTC",
    }


def _versions(runs: Sequence[dict[str, Any]]) -> str:
    """Every package with all versions that were used."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, version in run["versions"].items():
            found[name].add(version)
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items())


def _targets(runs: Sequence[dict[str, Any]]) -> str:
    counts = {row["targets"] for run in runs for lengths in run["evaluation"].values() for row in lengths.values()}
    return " or ".join(f"{count:,}" for count in sorted(counts))
