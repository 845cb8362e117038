"""The rivals as groups: so that what the project set out to do is judged in a tuned recipe, too."""

from collections.abc import Iterable
from typing import Any

from study.presets import STUDIES
from study.report.results import Group, grouped
from study.rivals import OURS, Rivals


def tuned_groups(rivals: Rivals, records: Iterable[dict[str, Any]]) -> list[Group]:
    """Finished runs of them by budget, most training first, without those not looked at far out.

    The one that stands for the project has its name in them.
    """
    study = STUDIES[rivals.study]
    wanted = {str(factor * study.recipe.sequence_length) for factor in study.factors}
    whole = (one for one in records if all(wanted <= set(rows) for rows in one["evaluation"].values()))
    groups = grouped({**one, "run": one["run"].replace(rivals.ours, OURS)} for one in whole)
    return sorted(groups, key=lambda group: -group.tokens)
