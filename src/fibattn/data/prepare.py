"""Turns a plan into a folder: tokenizer, held-out sets, training shards, and `data.json` over all of them.

The folder says what is finished after every shard, so a killed preparation goes on from the last whole one
and ends with the bytes of one that was never killed. Documents are counted, not remembered: going on reads
the source again up to where it was, which is far quicker than encoding it.
"""

import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fibattn import files
from fibattn.data import held_out as split
from fibattn.data import tokenizer as tokenization
from fibattn.data.encoding import encode
from fibattn.data.plan import Plan, largest_shares, shares
from fibattn.data.prepared import PreparedData, fingerprint
from fibattn.data.record import DATA, UNFINISHED, Record
from fibattn.data.shards import byte_count, save_array, token_dtype, write_shard
from fibattn.data.sources import Source, resolve
from fibattn.errors import InputError
from fibattn.lock import locked
from fibattn.progress import Meter

TOKENIZER_CHARACTERS = 200_000_000  # of the mixture, to train the tokenizer on
DOCUMENT_CHARACTERS = 250_000  # of one document, so that none dominates the vocabulary; more where there are few
FEWEST_DOCUMENTS = 100  # that a source is thinned to


def prepare(out: Path, plan: Plan, *, quiet: bool = False) -> PreparedData:
    """Prepare `plan` in the folder `out`, or go on where an earlier run was stopped; returns the opened data.

    `InputError`: something in the texts or the plan is wrong, `out` was begun with another plan, or another process
    works on it. Shards finished before an error are kept.
    """
    with locked(Path(out)) as free:
        if not free:
            raise InputError(f"another process is preparing {out}; wait for it, or give another folder")
        work = _Preparation(Path(out), plan, quiet)
        if not work.begin():
            work.make_tokenizer()
            for source in work.sources:
                work.hold_out(source)
            for source in work.sources:
                work.train(source)
            work.balance()
            work.publish()
    return PreparedData.open(out)


class _Preparation:
    """The steps of one preparation and what they share."""

    def __init__(self, out: Path, plan: Plan, quiet: bool):
        self.out, self.plan, self.quiet = out, plan, quiet
        self.record = Record.load(out)
        self.sources = tuple(self._pin(source.name, source) for source in plan.sources)
        self.validation = self._validation_sources()
        self.surveys: dict[str, split.Survey] = {}
        self.held_out_texts: dict[str, array] = {}
        self.excluded: set[int] = set()
        self.excluded_at_first: set[int] = set()
        """What is excluded when the tokenizer is trained the first time; training it again must exclude no more."""
        self.thresholds: dict[str, int] = {}

    def _pin(self, name: str, source: Source) -> Source:
        """Fix the revision of a data set: the one this folder was begun with, else the newest."""
        settings = self.record.settings
        for earlier in (*settings.get("sources", ()), *settings.get("validation", ())):
            if source.revision is None and earlier["name"] == name and earlier.get("hub") == source.hub:
                return replace(source, revision=earlier.get("revision"))
        return resolve(source)

    def _validation_sources(self) -> dict[str, Source]:
        given = {name: self._pin(f"{name}/val", source) for name, source in self.plan.validation.items()}
        made = {s.name: replace(s, split=s.held_out_split) for s in self.sources if s.held_out_split}
        return made | given

    def begin(self) -> bool:
        """Read what is local, compare it with what the folder was begun with; says whether all is done."""
        damaged = self.record.drop_damaged()
        for name, source in self.validation.items():
            if source.hub is None or self._held_out(name) is None:
                self.held_out_texts[name] = self._survey(f"{name}/val", source).texts
                self.excluded.update(self.held_out_texts[name])
        for source in self.sources:
            found = self._survey(source.name, source) if source.hub is None else None
            share = 0.0 if source.name in self.validation else self.plan.held_out
            self.thresholds[source.name] = split.threshold(source.name, share, found)
            held_out = self._held_out(source.name)
            if source.name in self.validation:
                self.excluded_at_first.update(self.held_out_texts.get(source.name, held_out or ()))
            self.excluded.update(held_out or ())
        self.record.adopt(self._settings())
        if self.record.published and not damaged and self._is_whole():
            return True
        self.record.save()
        # Only now: a folder with neither file would not be recognised as one that was begun.
        (self.out / DATA).unlink(missing_ok=True)
        return False

    def _held_out_path(self, name: str) -> Path:
        return self.out / "shards" / name / "held-out.npy"

    def _held_out(self, name: str) -> list[int] | None:
        """The hashes of the held-out texts of a source; None where they are still to be noted, or damaged."""
        if f"{name}/val" not in self.record.complete:
            return None
        try:
            return np.load(self._held_out_path(name)).tolist()
        except (OSError, ValueError, EOFError):
            return None

    def _survey(self, name: str, source: Source) -> split.Survey:
        self.surveys[name] = split.survey(name, source, self.plan.seed, quiet=self.quiet)
        return self.surveys[name]

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        self.tokenizer = tokenization.load_tokenizer(plan.tokenizer) if plan.tokenizer else None
        given = tokenization.tokenizer_sha256(self.tokenizer) if self.tokenizer else None
        return {
            "sources": [self._identity(source.name, source) for source in self.sources],
            "validation": [self._identity(f"{name}/val", source) for name, source in self.validation.items()],
            "weights": dict(plan.weights) if plan.weights else None,
            "tokens": plan.tokens,
            "held_out": plan.held_out,
            "held_out_tokens": plan.held_out_tokens,
            "vocab_size": None if given else plan.vocab_size,
            "tokenizer": given,
            "shard_tokens": plan.shard_tokens,
            "seed": plan.seed,
        }

    def _identity(self, name: str, source: Source) -> dict[str, Any]:
        """What makes a source the same: a commit, or the texts themselves wherever they lie."""
        identity: dict[str, Any] = {"name": name, "text": source.text, "key": source.key}
        if source.key is not None and name.endswith("/val"):
            identity["keys"] = "left out of training"  # folders of before trained on them
        if source.hub is not None:
            hub = {"hub": source.hub, "config": source.config, "split": source.split}
            return identity | hub | {"revision": source.revision}
        found = self.surveys[name]
        return identity | {"documents": found.documents, "bytes": found.bytes, "sha256": found.sha256}

    def _is_whole(self) -> bool:
        """Whether the tokenizer of a published folder is what was written; a damaged one is removed."""
        data = files.read_json(self.out / DATA)
        folder, table = self.out / "tokenizer", self.out / "token_bytes.npy"
        path = folder / "tokenizer.json"
        if not path.exists() or files.sha256(path) != data["tokenizer_sha256"] or not _loads(folder):
            shutil.rmtree(folder, ignore_errors=True)
            return False
        held_out = [name.removesuffix("/val") for name in self.record.complete if name.endswith("/val")]
        return (
            table.exists()
            and files.sha256(table) == data["token_bytes_sha256"]
            and all(self._held_out(name) is not None for name in held_out)
        )

    def make_tokenizer(self) -> None:
        """Train the tokenizer, or take the given one, into `tokenizer/`; an earlier run's stays."""
        folder = self.out / "tokenizer"
        if not folder.exists():  # it appears whole
            if self.tokenizer is None:
                with Meter("train tokenizer", None, "characters", quiet=self.quiet) as meter:
                    self.tokenizer = tokenization.train_tokenizer(self._sample(meter), self.plan.vocab_size)
            tokenization.save_tokenizer(self.tokenizer, folder)
        self.tokenizer = tokenization.load_tokenizer(folder)
        self.record.use_tokenizer(files.sha256(folder / "tokenizer.json"))
        self.dtype = token_dtype(tokenization.vocabulary_size(self.tokenizer))
        self.sizes = tokenization.token_bytes(self.tokenizer)
        save_array(self.out / "token_bytes.npy", self.sizes)

    def _sample(self, meter: Meter) -> Iterator[str]:
        """Training texts in the mixture's proportions, each cut; a surveyed source of many is thinned evenly."""
        for source in self.sources:
            budget = TOKENIZER_CHARACTERS * self._fractions()[source.name]
            found, taken, cut, limit = self.surveys.get(source.name), 0, DOCUMENT_CHARACTERS, split.SPAN
            if found:
                cut = max(cut, int(budget / found.documents))
                limit = min(1.0, max(budget / found.bytes, FEWEST_DOCUMENTS / found.documents)) * split.SPAN
            for text in self._training_texts(source, self.excluded_at_first):
                if split.text_hash(text) >= limit:
                    continue
                text = text[:cut]
                yield text
                taken += len(text)
                meter.update(len(text), source.name)
                if taken >= budget:
                    break

    def _fractions(self) -> dict[str, float]:
        if self.plan.fractions:
            return self.plan.fractions
        sizes = {source.name: self.surveys[source.name].bytes for source in self.sources if source.hub is None}
        if len(sizes) < len(self.sources):
            return {source.name: 1 / len(self.sources) for source in self.sources}
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}

    def _training_texts(self, source: Source, excluded: set[int]) -> Iterator[str]:
        return split.training_documents(source, self.plan.seed, self.thresholds[source.name], excluded)

    def hold_out(self, source: Source) -> None:
        """Write the held-out set of a source, and remember its texts so that no source trains on them."""
        name, stream, limit = source.name, f"{source.name}/val", self.thresholds[source.name]
        if self._held_out(name) is not None or (name not in self.validation and limit == 0):
            return
        self.record.forget(stream)  # begun but not complete: written again from its first document, to note its texts
        if name in self.validation:
            texts = self.held_out_texts[name]
            documents = (text for _, text in self.validation[name].documents())
        else:
            texts = array("Q")
            below = (text for key, text in source.documents() if split.key_hash(key, self.plan.seed) < limit)
            documents = _noting(below, texts)
        self._write(stream, documents, self.plan.held_out_tokens, None)
        count = len(texts) if name in self.validation else self.record.documents(stream)
        if count == 0:
            raise InputError(f"no document of {name!r} fell into held_out = {self.plan.held_out}; raise it")
        save_array(self._held_out_path(name), np.array(texts[:count], np.uint64))
        self.excluded.update(texts[:count])
        self.record.complete.add(stream)
        self.record.save()

    def train(self, source: Source) -> None:
        """Write the training shards of a source, as many tokens as its share, or all it has."""
        stream = f"{source.name}/train"
        if self.plan.tokens is not None and self.plan.fractions is not None:
            self.record.limits = shares(self.plan.tokens, self.plan.fractions)
        limit = self.record.limits[source.name] if self.record.limits else None
        if limit is not None and self.record.tokens(stream) > limit:
            self.record.fit(stream, limit, self.sizes)
        if stream not in self.record.complete:
            size = self.surveys[source.name].bytes if source.name in self.surveys else None
            self._write(stream, self._training_texts(source, self.excluded), limit, size)
            if limit is None or self.record.tokens(stream) >= limit:
                self.record.complete.add(stream)
            self.record.save()
        self._check_enough(source, limit)

    def _check_enough(self, source: Source, limit: int | None) -> None:
        have = self.record.tokens(f"{source.name}/train")
        if limit == 0:
            of, change = "", "its weight"
            if self.plan.tokens is not None:
                of, change = f" in {self.plan.tokens:,} tokens", "--tokens or its weight"
            raise InputError(f"the share of source {source.name!r}{of} rounds to 0; raise {change}, or leave it out")
        if have == 0:
            raise InputError(f"source {source.name!r} has no document left to train on: all of them are held out too")
        if limit is not None and have < limit:
            fraction = (self.plan.fractions or {})[source.name]
            raise InputError(
                f"source {source.name!r} has {have:,} training tokens, fewer than its share of {limit:,} "
                f"({fraction:.3g} of {self.plan.tokens:,}); lower --tokens to {int(have / fraction):,}, lower "
                "its weight, or leave --tokens out to take as many as fit; what is finished is kept"
            )

    def _write(self, stream: str, documents: Iterator[str], limit: int | None, size: int | None) -> None:
        """Add shards to a stream until it has `limit` tokens or the documents end."""
        shards = self.record.shards.setdefault(stream, [])
        documents = islice(documents, self.record.documents(stream), None)
        assert self.tokenizer is not None
        arrays = encode(self.tokenizer, documents, tokenization.separator(self.tokenizer), self.dtype)
        in_bytes = limit is None and size is not None
        done = sum(shard.bytes for shard in shards) if in_bytes else self.record.tokens(stream)
        total, unit = (size, "B") if in_bytes else (limit, "tokens")
        with Meter(f"encode {stream}", total, unit, quiet=self.quiet) as meter:
            meter.resume(done)
            arrays = _metered(arrays, meter, self.sizes if in_bytes else None)
            while limit is None or self.record.tokens(stream) < limit:
                first = next(arrays, None)
                if first is None:
                    break
                path = self.record.stream_path(stream, len(shards))
                room = None if limit is None else limit - self.record.tokens(stream)
                rest = chain([first], arrays)
                shards.append(write_shard(path, rest, self.sizes, self.dtype, self.plan.shard_tokens, room))
                self.record.save()

    def balance(self) -> None:
        """With weights and no budget: cut every source to its part of the largest mixture all can fill."""
        fractions = self.plan.fractions
        if fractions is None or self.record.limits is not None:
            return
        available = {name: self.record.tokens(f"{name}/train") for name in fractions}
        self.record.limits = largest_shares(available, fractions)
        self.record.save()
        for source in self.sources:
            self.train(source)

    def publish(self) -> None:
        """Write `data.json`, which makes the folder whole, and remove what only unfinished work needs."""
        self.record.sweep()
        assert self.tokenizer is not None
        data: dict[str, Any] = {
            "format": 1,
            "vocab_size": tokenization.vocabulary_size(self.tokenizer),
            "separator": tokenization.separator(self.tokenizer),
            "tokenizer_sha256": self.record.tokenizer,
            "token_bytes_sha256": files.sha256(self.out / "token_bytes.npy"),
            "sources": [self._entry(source) for source in self.sources],
            "settings": self.record.settings,
            "limits": self.record.limits,
        }
        files.write_json(self.out / DATA, {"fingerprint": fingerprint(data)} | data)
        (self.out / UNFINISHED).unlink(missing_ok=True)

    def _entry(self, source: Source) -> dict[str, Any]:
        """What `data.json` says of a source."""
        entry: dict[str, Any] = {"name": source.name, "from": str(source)}
        explicit = self.validation.get(source.name)
        entry["held_out_from"] = str(explicit) if explicit else None
        for kind in ("train", "val"):
            shards = self.record.shards.get(f"{source.name}/{kind}")
            totals = ("tokens", "documents", "bytes")
            entry[kind] = shards and {
                **{total: sum(getattr(shard, total) for shard in shards) for total in totals},
                "shards": [asdict(shard) for shard in shards],
            }
        return entry


def _loads(tokenizer: Path) -> bool:
    try:
        tokenization.load_tokenizer(tokenizer)
    except InputError:
        return False
    return True


def _noting(documents: Iterator[str], texts: array) -> Iterator[str]:
    for text in documents:
        texts.append(split.text_hash(text))
        yield text


def _metered(arrays: Iterator[np.ndarray], meter: Meter, sizes: np.ndarray | None) -> Iterator[np.ndarray]:
    for ids in arrays:
        meter.update(ids.shape[-1] if sizes is None else byte_count(ids, sizes))
        yield ids
