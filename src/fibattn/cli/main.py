"""`fibattn VERB`: what the library does from the command line."""

from collections.abc import Sequence

from fibattn._version import __version__
from fibattn.cli.door import Program, enter

PROGRAM = Program(
    name="fibattn",
    about=f"fixed-offset sparse attention, from text to an extrapolation table (version {__version__})",
    verbs={
        "prepare": "turn text into a tokenizer, token shards and held-out sets",
        "train": "train a model from a recipe",
        "eval": "perplexity, bits per byte and length extrapolation of a trained model",
        "sample": "continue a prompt, streamed, for as long as wanted",
        "convert": "give a Llama, Qwen, Gemma, ... this attention, or go back",
        "heal": "train a converted model to do what the dense one does",
        "pattern": "show which distances every layer attends to, and what the stack reaches",
    },
    package="fibattn.cli",
    resumed={
        "prepare": "; what was finished is kept, the same command goes on from there",
        "train": "; the same command goes on from the last checkpoint, or begins anew where there is none yet",
        "heal": "; the same command goes on from the last checkpoint, or begins anew where there is none yet",
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."""
    return enter(PROGRAM, arguments)
