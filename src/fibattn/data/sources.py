"""Where documents come from: local files or a Hugging Face data set, streamed, and the paper's mixture."""

import glob
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fibattn.data import readers
from fibattn.errors import InputError, MissingExtraError

NAME = re.compile(r"[^\W_][\w.-]*")
HUB = re.compile(r"hf:(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """One body of text: either `paths` (local files) or `hub` (a Hugging Face data set id).

    `text` names the fields whose values, joined by a blank line, are the document. `key` names the field by
    which documents are held out: rows with the same key are all held out or all trained on; without it, the
    text itself is the key. `held_out_split` is the split of the data set that was made for validation.
    """

    name: str
    paths: tuple[Path, ...] = ()
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text: tuple[str, ...] = ("text",)
    key: str | None = None
    held_out_split: str | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InputError(f"source name {self.name!r} must be letters, digits, '.', '_' and '-'; it names a folder")

    def __str__(self) -> str:
        if self.hub is None:
            return str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} files, {self.paths[0]} first"
        name = f"hf:{self.hub}:{self.config or ''}:{self.split}"
        return name + (f"@{self.revision}" if self.revision else "")

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield (key, text) for each document, always in the same order; blank documents are left out."""
        if self.hub is not None:
            yield from _stream(self)
        for path in self.paths:
            yield from readers.read_file(path, self.text, self.key)


# The paper's four domains. Preparation resolves the newest revision and records it.
PRESETS = {
    source.name: source
    for source in (
        Source("fineweb-edu", hub="HuggingFaceFW/fineweb-edu", config="sample-10BT"),
        Source("wikipedia", hub="wikimedia/wikipedia", config="20231101.en"),
        Source("tinystories", hub="roneneldan/TinyStories", held_out_split="validation"),
        # problems repeat with different solutions, so whole problems are held out
        Source(
            "openmathinstruct-2", hub="nvidia/OpenMathInstruct-2", text=("problem", "generated_solution"), key="problem"
        ),
    )
}
PAPER_WEIGHTS = {"fineweb-edu": 0.35, "wikipedia": 0.22, "tinystories": 0.20, "openmathinstruct-2": 0.23}


def parse_source(spec: str) -> Source:
    """Read `[name=]what`: a file, folder, glob, preset or `hf:owner/name[:config[:split]][@revision]`.

    A folder stands for every known text file in it, at any depth and in sorted order, hidden ones left out.
    """
    name, equals, what = spec.partition("=")
    if not equals or not NAME.fullmatch(name) or Path(spec).exists():
        name, what = "", spec
    if what in PRESETS and not Path(what).exists():
        return replace(PRESETS[what], name=name or what)
    if what.startswith("hf:"):
        match = HUB.fullmatch(what)
        if match is None:
            raise InputError(f"{what!r} is not a data set id; expected hf:owner/name[:config[:split]][@revision]")
        name = name or match["id"].split("/")[1]
        split = match["split"] or "train"
        return Source(name, hub=match["id"], config=match["config"] or None, split=split, revision=match["revision"])
    paths = _expand(what)
    return Source(name or _default_name(what), paths=paths)


def _default_name(what: str) -> str:
    path = Path(what).resolve()
    while glob.has_magic(path.name):
        path = path.parent
    stem = unicodedata.normalize("NFC", path.name.split(".")[0])  # some systems take accents and letters apart
    name = re.sub(r"[^\w-]+", "", stem).lstrip("_-")
    if not name:
        raise InputError(f"no name can be made from {what!r}; give one: NAME={what}")
    return name


def _expand(what: str) -> tuple[Path, ...]:
    path = Path(what).expanduser()
    known = ", ".join((*readers.PLAIN, *readers.ROWS)) + " (also .gz, .zst)"
    if path.is_file():
        if readers.kind(path) is None:
            raise InputError(f"{path} is of no known kind; expected {known}")
        return (path,)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        found = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    elif glob.has_magic(what):
        found = [Path(file) for file in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - pathlib cannot take an absolute one
    else:
        raise InputError(
            f"{what} does not exist; expected a file, folder, glob, hf:owner/name or one of {', '.join(PRESETS)}, paper"
        )
    files = sorted((file for file in found if file.is_file() and readers.kind(file)), key=Path.as_posix)
    if not files:
        raise InputError(f"{what} holds no file of a known kind; expected {known}")
    return tuple(files)


def resolve(source: Source) -> Source:
    """The same source with its revision as a commit; asks the Hub, so it needs the network."""
    if source.hub is None:
        return source
    try:
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(source.hub, revision=source.revision, timeout=30).sha
    except Exception as error:  # the Hub's client has changed its family of errors more than once
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the data set {source.hub} (revision {source.revision or 'newest'}) cannot be had: {reason}. "
            "Check the id and the network (HF_HUB_OFFLINE must not be set, a gated data set needs HF_TOKEN), "
            "or give local files instead"
        ) from None
    return replace(source, revision=commit)


def _stream(source: Source) -> Iterator[tuple[str, str]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError(f"{source} needs the package datasets", "hub") from None

    assert source.hub is not None
    try:
        rows = load_dataset(source.hub, source.config, split=source.split, revision=source.revision, streaming=True)
        wanted = readers.wanted_fields(source.text, source.key)
        if rows.column_names and set(wanted) <= set(rows.column_names):
            rows = rows.select_columns(wanted)  # of Parquet, only these are fetched
        for number, row in enumerate(rows, start=1):
            document = readers.from_row(row, source.text, source.key, f"row {number} of {source}")
            if document[1].strip():
                yield document
    except InputError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source} stopped ({reason}); check the config, the split and the network, and run the same "
            "command again: it goes on from the last whole shard"
        ) from None
