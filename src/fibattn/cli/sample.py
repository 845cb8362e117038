"""`fibattn sample MODEL PROMPT`: text from a model, as it is made, for as long as wanted."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fibattn.cli.flags import parse
from fibattn.errors import InputError


@dataclass(frozen=True)
class Arguments:
    """Continue a prompt; the text goes to standard output as it is made, the speed and memory to standard error."""

    model: Annotated[Path, tyro.conf.Positional]
    """A model folder, a finished run, or a checkpoint."""
    prompt: Annotated[str, tyro.conf.Positional] = ""
    """The text to continue, printed first; - reads it from standard input. Without one, a document of its own."""
    prompt_file: Path | None = None
    """Read the prompt from this file instead."""
    max_new_tokens: str = "256"
    """How many tokens; 0 or inf goes on until interrupted, past the ends of documents."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 0.95
    """Draw from the fewest tokens that together have this probability."""
    seed: int = 0
    """For the random draws: the same seed gives the same text on the same machine."""
    full_reach: int | Literal["saved"] | None = "saved"
    """Let full-attention layers look back only so far: constant memory, and often better text past the training
    length. None lets them see everything; left out: as the model was saved."""
    compile: bool = False
    """Compile the step: takes a while to begin, then runs faster."""


def run(arguments: list[str]) -> None:
    """Stream the continuation of the prompt."""
    chosen = parse(Arguments, arguments, "fibattn sample")
    limit, prompt = _limit(chosen.max_new_tokens), _prompt(chosen)
    from fibattn.data.tokenizer import load_tokenizer, separator, tokenizer_folder
    from fibattn.model.loading import find_model, load_bounded
    from fibattn.model.streaming import growing_layers, pieces, stream

    folder = find_model(chosen.model)
    model = load_bounded(folder, chosen.full_reach).eval()
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    growing = growing_layers(model)
    if growing and limit is None:
        print(
            f"{growing} layers attend to everything: memory grows with every token (--full-reach bounds it)",
            file=sys.stderr,
        )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    tokens = stream(
        model,
        [separator(tokenizer), *ids],
        max_new_tokens=limit,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=chosen.seed,
        stop=() if limit is None else _ends(model, separator(tokenizer)),
        compiled=chosen.compile,
    )
    meter = _Meter(tokens)
    print(prompt, end="", flush=True)
    try:
        for text in pieces(tokenizer, meter):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    print(meter.report(), file=sys.stderr)


def _limit(words: str) -> int | None:
    if words in ("0", "inf"):
        return None
    if not words.isdecimal() or not 0 < len(words) < 10:
        raise InputError(f"--max-new-tokens is {words!r}; expected a whole number below 1e9, 0 or inf for no limit")
    return int(words)


def _prompt(chosen: Arguments) -> str:
    if chosen.prompt_file is not None:
        if chosen.prompt:
            raise InputError("a prompt and --prompt-file were given; give one of them")
        try:
            return chosen.prompt_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{chosen.prompt_file} cannot be read as UTF-8 text ({error}); check the path") from None
    text = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape") if chosen.prompt == "-" else chosen.prompt
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text; convert it first, for example with iconv") from None
    return text


def _ends(model: Any, separator: int) -> tuple[int, ...]:
    """The ids that end a text: what the model says, which may be several, else the separator of its documents."""
    ends = model.generation_config.eos_token_id
    return (separator,) if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


class _Meter:
    """Counts tokens as they pass. The first, which waits for the prompt, is not part of the speed."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens, self.count, self.seconds = tokens, 0, 0.0

    def __iter__(self) -> Iterator[int]:
        began = 0.0
        for token in self.tokens:
            now = time.perf_counter()
            began = began or now
            self.count, self.seconds = self.count + 1, now - began
            yield token

    def report(self) -> str:
        """One line: tokens, speed, memory."""
        import torch

        from fibattn.machine import peak_memory

        speed = f"{(self.count - 1) / self.seconds:.1f} tokens/s, " if self.count > 1 else ""
        kind = "GPU memory" if torch.cuda.is_available() else "memory"
        return f"{self.count} tokens, {speed}{peak_memory() / 2**20:.0f} MiB of {kind} at most"
