"""A finished model trained on in longer sequences."""

from dataclasses import dataclass, replace

from fibattn.training.recipe import Recipe


@dataclass(frozen=True)
class Lengthening:
    """In which sequences a copy of a finished model is trained on, and for how long."""

    factor: int | None = None
    """Their length in those of the training; None takes the longest of the evaluation."""
    share: float = 0.1
    """The tokens, as a part of those of the training."""
    sequences: int | None = None
    """Of a step; None keeps a step's tokens."""
    rate: float = 1.0
    """The highest rates, AdamW's and Muon's, in those of the training."""

    def of(self, recipe: Recipe, longest: int) -> Recipe:
        """The recipe that goes on from a finished run of `recipe`; `longest` is the evaluation's longest factor.

        The rate warms up and falls anew. Where a full layer has RoPE its base grows as "NTK-aware" scaling has it
        (arXiv 2309.00071, section 3.1): the slowest pair of dimensions turns as far over a longer sequence as over a
        shorter one. Windows and rungs stay near, and full layers without RoPE have nothing to turn.
        """
        factor, shape = self.factor or longest, recipe.resolved().model
        sequences = self.sequences or max(recipe.sequences_per_step // factor, 1)
        length = recipe.sequence_length * factor
        steps = max(round(self.share * recipe.tokens / (sequences * length)), 1)
        size = shape.head_dim or shape.hidden_size // shape.num_attention_heads
        turned = ("full_attention", 1) in zip(shape.layer_types, shape.no_rope_layers, strict=True)
        theta = shape.rope_theta * factor ** (size / (size - 2)) if turned else shape.rope_theta
        return replace(
            recipe,
            start=recipe.out / "model",
            out=recipe.out / "lengthened",
            model=replace(recipe.model, rope_theta=theta),
            optimizer=replace(recipe.optimizer.at(self.rate), warmup_steps=warmup(recipe, steps)),
            sequence_length=length,
            sequences_per_step=sequences,
            micro_batch=max(recipe.micro_batch // factor, 1),
            steps=steps,
        )


def warmup(recipe: Recipe, steps: int) -> int:
    """The warm-up of `recipe` in a run of so many steps: a tenth of them at most."""
    return min(recipe.optimizer.warmup_steps, max(steps // 10, 1))
