"""`fibattn train RECIPE`: train a model, or go on where the run was."""

from fibattn.cli.flags import parse
from fibattn.errors import InputError
from fibattn.training.recipe import PRESETS, Recipe, load_recipe


def run(arguments: list[str]) -> None:
    """Train the recipe (a preset or a recipe.json), with its fields overridden by flags."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: fibattn train RECIPE [flags]\n\nRECIPE is one of {', '.join(PRESETS)}, or a recipe.json.\n")
            parse(Recipe, ["--help"], "fibattn train RECIPE", default=PRESETS["paper"])
        raise InputError(f"which recipe? One of {', '.join(PRESETS)}, or a recipe.json: fibattn train small --data …")
    recipe = parse(Recipe, arguments[1:], f"fibattn train {arguments[0]}", default=load_recipe(arguments[0]))
    from accelerate import PartialState  # these take seconds to import

    from fibattn.training.run import train

    model = train(recipe)
    state = PartialState()
    state.print(f"\nthe model is in {model}\nevaluate it: fibattn eval {model} --data {recipe.data}")
    state.destroy_process_group()
