"""What a preparation has finished, on disk: `unfinished.json` while it works, `data.json` once it is done."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fibattn import files
from fibattn.data.shards import Shard, cut_shard, is_intact, listed, remove_shard
from fibattn.errors import InputError

UNFINISHED, DATA = "unfinished.json", "data.json"


@dataclass
class Record:
    """The finished shards of every stream ("books/train"), the streams that are complete, the settings."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, int] | None = None
    tokenizer: str | None = None  # SHA-256 of tokenizer.json
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    published: bool = False

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """The record of a folder, empty for a new one; leftovers of a killed preparation are removed.

        Raises:
            InputError: when the folder holds something else, or its record is damaged.
        """
        found = next((folder / name for name in (UNFINISHED, DATA) if (folder / name).exists()), None)
        if found is None:
            if folder.exists() and set(folder.iterdir()) - set(files.leftovers(folder)):
                raise InputError(f"{folder} holds other files; expected a new, an empty or an earlier prepared folder")
            return cls(folder)
        saved = files.read_json(found)
        try:
            record = cls._of(folder, saved, published=found.name == DATA)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{found} is not what `fibattn prepare` wrote ({error!r}); restore it or delete {folder}"
            ) from None
        for place in (folder, *(folder / "shards").glob("*"), folder / "order"):
            for path in files.leftovers(place):
                path.unlink()
        return record

    @classmethod
    def _of(cls, folder: Path, saved: dict[str, Any], *, published: bool) -> "Record":
        if published:
            shards = {f"{name}/{split}": found for (name, split), found in listed(saved["sources"]).items()}
        else:
            shards = {stream: [Shard(**shard) for shard in found] for stream, found in saved["shards"].items()}
        tokenizer, complete = saved["tokenizer_sha256"], set(shards if published else saved["complete"])
        return cls(folder, saved["settings"], saved["limits"], tokenizer, shards, complete, published)

    def save(self) -> None:
        """Write `unfinished.json`."""
        value = {
            "settings": self.settings,
            "limits": self.limits,
            "tokenizer_sha256": self.tokenizer,
            "complete": sorted(self.complete),
            "shards": {stream: [asdict(shard) for shard in found] for stream, found in self.shards.items()},
        }
        files.write_json(self.folder / UNFINISHED, value)

    def forget(self, stream: str) -> None:
        """Forget a stream, so that it is written again from its beginning."""
        self.shards.pop(stream, None)
        self.complete.discard(stream)

    def use_tokenizer(self, sha256: str) -> None:
        """Note the tokenizer; tokens made with another one (whose file was lost, say) are written again."""
        if self.tokenizer not in (None, sha256):
            for stream in list(self.shards):
                self.forget(stream)
        self.tokenizer = sha256
        self.save()

    def adopt(self, settings: dict[str, Any]) -> None:
        """Go on under `settings`; they must be those the folder was begun with.

        Only the budget of an unfinished folder may change: its shards are then kept where they are still
        right.
        """
        settings = json.loads(json.dumps(settings))
        if self.settings:
            free = () if self.published else ("tokens",)
            for name, value in settings.items():
                if name not in free and value != self.settings.get(name):
                    raise InputError(_difference(self.folder, name, self.settings.get(name), value))
            if settings["tokens"] != self.settings["tokens"]:
                self._forget_ends()
        self.settings = settings

    def _forget_ends(self) -> None:
        """Drop the last training shard of each source if the former budget ended it."""
        self.limits = None
        for stream, found in self.shards.items():
            if stream.endswith("/train"):
                self.complete.discard(stream)
                if found and (found[-1].cut or found[-1].tokens < self.settings["shard_tokens"]):
                    found.pop()

    def drop_damaged(self) -> bool:
        """Forget every shard from the first damaged one of its stream on; says whether there was any."""
        damaged = False
        for stream, found in self.shards.items():
            folder = self.stream_path(stream, 0).parent
            whole = next((i for i, shard in enumerate(found) if not is_intact(folder, shard)), len(found))
            if whole < len(found):
                del found[whole:]
                self.complete.discard(stream)
                damaged = True
        return damaged

    def stream_path(self, stream: str, index: int) -> Path:
        """The path of shard `index` of a stream."""
        return self.folder / "shards" / f"{stream}-{index:05d}.bin"

    def tokens(self, stream: str) -> int:
        """The tokens of a stream that are on disk."""
        return sum(shard.tokens for shard in self.shards.get(stream, ()))

    def documents(self, stream: str) -> int:
        """The documents of a stream that are on disk."""
        return sum(shard.documents for shard in self.shards.get(stream, ()))

    def sweep(self) -> None:
        """Remove shards that are no part of the record: those of a larger budget, or after a damaged one."""
        for found in (self.folder / "shards").glob("*/*.bin"):
            stream, _, index = found.with_suffix("").name.rpartition("-")
            if int(index) >= len(self.shards.get(f"{found.parent.name}/{stream}", ())):
                remove_shard(found)

    def fit(self, stream: str, limit: int, sizes: np.ndarray) -> None:
        """Cut a stream to its first `limit` tokens; killed in between, it can be done again."""
        kept, total = [], 0
        for index, shard in enumerate(self.shards.get(stream, ())):
            path = self.stream_path(stream, index)
            if total >= limit:
                remove_shard(path)
                continue
            kept.append(cut_shard(path, sizes, limit - total) if total + shard.tokens > limit else shard)
            total += kept[-1].tokens
        self.shards[stream] = kept
        self.save()


def _difference(folder: Path, name: str, before: Any, now: Any) -> str:
    choose = f"give the same again, choose another folder, or delete {folder} to begin anew"
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        changed = [(old, new) for old, new in zip(before, now, strict=True) if old != new]
        old, new = changed[0]
        keys = [key for key in new if old.get(key) != new[key]]
        parts = ", ".join(f"{key} was {old.get(key)}, is {new[key]}" for key in keys)
        return f"{folder} was prepared from another {new['name']!r} ({parts}); {choose}"
    return f"{folder} was prepared with {name} = {before}, now it is {now}; {choose}"
