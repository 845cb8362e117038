"""`fibattn heal MODEL --text FILE`: train a converted model to do what the dense one does, or go on where that was."""

import shlex

from fibattn.cli.flags import parse
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.training.healing_recipe import HealingRecipe


def run(arguments: list[str]) -> None:
    """Heal the model, and say where the healed one is."""
    recipe = parse(HealingRecipe, arguments, "fibattn heal")
    recipe.check()
    from fibattn.training.healing import heal  # takes seconds to import

    with locked(recipe.folder) as free:
        if not free:
            raise InputError(f"another process is healing in {recipe.folder}; wait for it, or give another --out")
        model = heal(recipe)
    print(f"the healed model is in {model}; try it: {shlex.join(['fibattn', 'sample', str(model)])} …")
