"""What the healing of a converted model is told. No torch here: `fibattn heal --help` reads this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fibattn.errors import InputError


@dataclass(frozen=True)
class HealingRecipe:
    """Train a converted model to do what the dense one does: first each layer's attention, then the whole.

    Killed or stopped, the same command goes on from the last checkpoint.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """The folder that `fibattn convert` wrote."""
    text: tuple[Path, ...] = ()
    """Files of text like the model's use (.txt, .jsonl, .parquet, …), read with the model's own tokenizer."""
    data: Path | None = None
    """Instead of text: a folder made by `fibattn prepare … --tokenizer MODEL`."""
    out: Path | None = None
    """The run's folder; the healed model is in OUT/model. MODEL-healed when left out."""
    teacher: str | None = None
    """The dense model: a folder or a name of the Hub. What MODEL was converted from when left out."""
    tokens: int = 4_000_000
    """Tokens of training in all; text that is shorter is read again and again."""
    matching: float = 0.1
    """The part of them in which each sparse layer learns the output of the dense model's attention."""
    text_weight: float = 0.25
    """Of the loss in the rest: this part is the text's cross entropy, the other the distance to the dense model."""
    lora: int | None = None
    """Train adapters of this rank at the attention's projections, and merge them; all weights when left out."""
    learning_rate: float = 1e-4
    """The highest, of AdamW, after the warm-up; it falls to 0 in each part."""
    sequence_length: int | None = None
    """Tokens of a sequence; as many as the model was trained at, 2,048 at most, when left out."""
    sequences_per_step: int = 16
    """Sequences of one step."""
    micro_batch: int = 4
    """The most sequences that are taken at once; fewer need less memory."""
    save_every: int = 200
    """Steps from one checkpoint to the next."""
    seed: int = 0
    """Of the order of the sequences."""

    def check(self) -> None:
        """Refuse what cannot be."""
        if bool(self.text) == (self.data is not None):
            raise InputError("which text? Give --text FILE …, or --data FOLDER, a folder made by `fibattn prepare`")
        for name in ("tokens", "sequence_length", "sequences_per_step", "micro_batch", "save_every", "lora"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        for name in ("matching", "text_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")

    @property
    def folder(self) -> Path:
        """Where the run is."""
        model = self.model if self.model.name not in ("", "..") else self.model.resolve()
        return self.out or model.with_name(f"{model.name}-healed")
