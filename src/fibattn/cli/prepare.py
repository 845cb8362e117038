"""`fibattn prepare OUT SOURCE [SOURCE ...]`: text becomes a tokenizer, token shards and held-out sets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from fibattn.cli.flags import parse
from fibattn.data.plan import Plan
from fibattn.data.sources import PAPER_WEIGHTS, PRESETS, Source, parse_source
from fibattn.errors import InputError
from fibattn.progress import count, quantity

DESCRIPTION = """Turn text into a tokenizer, token shards and held-out sets.

A SOURCE is [NAME=]WHAT, where WHAT is
  a file           .txt .md .rst .py: one document; .jsonl: one document a row; these also .gz, .zst; .parquet
  a folder         all such files in it, at any depth
  a glob           in quotes, such as 'text/**/*.md'
  a data set       hf:owner/name[:config[:split]][@revision]
  a preset         fineweb-edu, wikipedia, tinystories, openmathinstruct-2
  paper            the four presets in the paper's proportions

  fibattn prepare data/books books.txt --vocab-size 8192
  fibattn prepare data/mix books=books.jsonl.zst docs=manuals/ --weights books=0.3 docs=0.7
  fibattn prepare data/paper paper --tokens 426M

Killed or stopped by an error, the same command goes on from the last finished shard.
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to make, or to go on with."""
    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="SOURCE [SOURCE ...]", help_behavior_hint="(required)"),
    ]
    """What to read, see above."""
    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NUMBER ...", help_behavior_hint="")] = ()
    """Each source's share of the training tokens. Without it everything is taken, or with --tokens as much of each."""
    tokens: Annotated[str | None, tyro.conf.arg(metavar="COUNT", help_behavior_hint="")] = None
    """Training tokens in all, such as 426M. Without it as many as there are, in --weights' proportions."""
    val: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=WHAT ...", help_behavior_hint="")] = ()
    """A held-out set for source NAME, in place of a part of its documents."""
    held_out: float = 0.02
    """The share of documents to hold out of each source that --val does not name; 0 for none."""
    held_out_tokens: Annotated[str, tyro.conf.arg(metavar="COUNT")] = "1048577"
    """The most tokens in one held-out set; what is held out beyond them is in no set."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FIELD[+FIELD] ...", help_behavior_hint="")] = ()
    """The fields of a row that hold the text; otherwise the field `text`."""
    key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FIELD ...", help_behavior_hint="")] = ()
    """Rows with the same FIELD are held out together; otherwise the text is the key."""
    vocab_size: int = 32_768
    """Size of the tokenizer to train."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """A tokenizer folder, or an id of the Hub, to use instead of training one."""
    shard_tokens: Annotated[str, tyro.conf.arg(metavar="COUNT")] = "100M"
    """Tokens in a shard; also the most that a killed run loses."""
    seed: int = 0
    """Which documents are held out."""


def run(arguments: list[str]) -> None:
    """Prepare what `arguments` say and print what came of it."""
    given = parse(Arguments, arguments, "fibattn prepare", description=DESCRIPTION)
    plan = plan_of(given)
    from fibattn.data.prepare import prepare

    data = prepare(given.out, plan)
    _print_table(data.sources)
    print(f"{given.out}: vocabulary {data.vocab_size:,}, fingerprint {data.fingerprint[:16]}")


def plan_of(given: Arguments) -> Plan:
    """The plan that the command line describes."""
    sources: list[Source] = []
    weights = _pairs("--weights", given.weights, float)
    for spec in given.sources:
        if spec == "paper" and not Path(spec).exists():
            sources += [PRESETS[name] for name in PAPER_WEIGHTS]
            if not weights and len(given.sources) > 1:
                raise InputError(
                    f"paper has its own proportions, and {len(given.sources) - 1} further sources have none; give "
                    f"--weights NAME=NUMBER for all: {', '.join(PAPER_WEIGHTS)}, …"
                )
            weights = weights or dict(PAPER_WEIGHTS)
        else:
            sources.append(parse_source(spec))
    validation = {name: parse_source(f"{name}={what}") for name, what in _pairs("--val", given.val, str).items()}
    plan = Plan(
        sources=tuple(sources),
        validation=validation,
        weights=weights or None,
        tokens=None if given.tokens is None else count(given.tokens),
        held_out=given.held_out,
        held_out_tokens=count(given.held_out_tokens),
        vocab_size=given.vocab_size,
        tokenizer=given.tokenizer,
        shard_tokens=count(given.shard_tokens),
        seed=given.seed,
    )
    return _with_fields(plan, _pairs("--text", given.text, str), _pairs("--key", given.key, str))


def _with_fields(plan: Plan, text: dict[str, str], key: dict[str, str]) -> Plan:
    for flag, given in (("--text", text), ("--key", key)):
        for name in given:
            plan.check_name(f"{flag} field", name)

    def named(name: str, source: Source) -> Source:
        fields = tuple(text[name].split("+")) if name in text else source.text
        return replace(source, text=fields, key=key.get(name, source.key))

    return replace(
        plan,
        sources=tuple(named(source.name, source) for source in plan.sources),
        validation={name: named(name, source) for name, source in plan.validation.items()},
    )


def _pairs(flag: str, words: tuple[str, ...], convert: Callable[[str], T]) -> dict[str, T]:
    pairs: dict[str, T] = {}
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if not (name and equals and value):
                raise ValueError
            pairs[name] = convert(value)
        except ValueError:
            kind = "NAME=NUMBER" if convert is float else "NAME=VALUE"
            raise InputError(f"{flag} was given {word!r}; expected {kind}") from None
        if given.setdefault(name, value) != value:
            raise InputError(f"{flag} gives {name!r} twice: {given[name]!r} and {value!r}; leave one out")
    return pairs


def _print_table(sources: tuple[dict, ...]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    for heading in ("documents", "tokens", "bytes", "bytes/token", "held-out", "tokens"):
        table.add_column(heading, justify="right")
    for source in sources:
        train, held_out = source["train"], source["val"] or {"documents": 0, "tokens": 0}
        table.add_row(
            source["name"],
            f"{train['documents']:,}",
            f"{train['tokens']:,}",
            quantity(train["bytes"]),
            f"{train['bytes'] / train['tokens']:.2f}",
            f"{held_out['documents']:,}",
            f"{held_out['tokens']:,}",
        )
    Console().print(table)
