"""`python -m study parts`: parts that the default recipe does not have, trained and measured."""

from study.commands.trials import run_verb
from study.parts.table import PARTS

_ABOUT = """Train the model of a step of the ladder with a part more, and write a file for each run into OUT/parts.

What is finished is skipped. With several processes a GPU they take turns. The parts:
"""


def run(arguments: list[str]) -> None:
    """Run the trials."""
    names = "".join(f"\n  {one.name:<18}{one.about}" for one in PARTS)
    run_verb("parts", _ABOUT, PARTS, names, arguments)
