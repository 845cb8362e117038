"""`python -m study far`: candidates of far reading, trained and measured."""

from study.commands.trials import run_verb
from study.far.candidates import CANDIDATES

_ABOUT = """Train the recipe of the step muon8 with other sparse layers, and write a file for each run into OUT/far.

What is finished is skipped. With several processes a GPU they take turns. The candidates; all but dense also with
"-beside", beside two full layers:
"""


def run(arguments: list[str]) -> None:
    """Run the trials."""
    names = "".join(f"\n  {one.name:<16}{one.about}" for one in CANDIDATES if not one.name.endswith("-beside"))
    run_verb("far", _ABOUT, CANDIDATES, names, arguments)
