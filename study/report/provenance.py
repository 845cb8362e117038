"""Where the report's numbers come from: recipe, data, machines, versions."""

from collections.abc import Sequence

import pandas as pd

from fibattn.progress import duration, quantity
from study.report.results import Frame, Group


def provenance(groups: Sequence[Group]) -> dict[str, str]:
    """Where the numbers of the groups come from, in words."""
    runs: Frame = pd.concat([group.runs for group in groups])
    first, times = runs.iloc[0], runs["time"].str[:16]
    budgets = (f"{len(group.runs)} of {quantity(group.tokens)} tokens" for group in groups)
    rates = ", ".join(f"{rate:g}" for rate in sorted(runs["rate"].unique()))
    targets = " or ".join(f"{count:,}" for count in sorted(runs["targets"].unique()))
    versions = pd.DataFrame(list(runs["versions"]))
    used = {name: " and ".join(sorted(versions[name].dropna().unique())) for name in versions}
    return {
        "runs": f"{', '.join(budgets)}; {first['step']} a step; {duration(runs['seconds'].sum())} of training in all",
        "recipe": f"AdamW, peak rate {rates}, {first['warmup_steps']} warm-up steps, the same order of sequences for "
        "all runs of a seed",
        "seeds": ", ".join(str(seed) for seed in sorted(runs["seed"].unique())),
        "evaluation": f"{first['convention']}; {targets} targets a set",
        "data fingerprint": ", ".join(runs["data"].unique()),
        "devices": ", ".join(sorted(runs["device"].unique())),
        "versions": ", ".join(f"{name} {several}" for name, several in used.items()),
        "from": f"{times.min()} to {times.max()} UTC",
    }
