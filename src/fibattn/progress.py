"""Progress of long work: a bar on a terminal, one line that can be grepped every so often elsewhere."""

import re
import sys
import time

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fibattn.errors import InputError


def duration(seconds: float) -> str:
    """`seconds` as people read it: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def quantity(value: float) -> str:
    """`value` to three places, with a decimal prefix: 950, 12.3k, 4.56M, 1.2G."""
    rounded = float(f"{value:.3g}")
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= factor:
            return f"{rounded / factor:.3g}{suffix}"
    return f"{value:.3g}"


def count(text: str) -> int:
    """The number that `text` is, whole, with a decimal prefix or without: 1048577, 426M, 1.5G.

    Raises:
        InputError: for a text that is none.
    """
    match = re.fullmatch(r"((?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d+)?)([kKmMgGbB]?)", text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a count; expected a number such as 1048577, 426M or 1.5G")
    factor = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[match[2].lower()]
    return round(float(match[1].replace(",", "").replace("_", "")) * factor)


class Meter:
    """Shows how far a piece of work is, its rate and the time left.

    On a terminal it draws a bar; elsewhere it prints `label done/total unit rate left note` at most every
    `every` seconds, and once at the end. Used as a context manager. The first update, which may have compiled or warmed
    up, counts neither for the speed that is shown meanwhile nor for the time left.
    """

    def __init__(self, label: str, total: float | None, unit: str, *, every: float = 10.0, quiet: bool = False):
        self.label, self.total, self.unit, self.every, self.quiet = label, total, unit, every, quiet
        self.done = 0.0
        self.note = ""
        self._start = self._last = self._warm = time.monotonic()
        self._resumed_at = self._cold = 0.0
        self._updates = 0
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty() and not self.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            bar = Progress(*columns, TextColumn("{task.fields[note]}"), transient=True)
            self._task = bar.add_task(self.label, total=self.total, note="")
            bar.start()
            self._bar = bar
        return self

    def resume(self, done: float) -> None:
        """Say that `done` units were finished earlier; they count as progress, not as speed."""
        self.done = self._resumed_at = self._cold = done

    def update(self, amount: float, note: str = "") -> None:
        """Add `amount` units of finished work; `note` stays beside the rate until the next one."""
        self.done += amount
        self.note = note
        now = time.monotonic()
        self._updates += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._rate(now) + (f" · {note}" if note else ""))
        elif now - self._last >= self.every:
            self._last = now
            self._print(now)
        if self._updates == 1:
            self._warm, self._cold = now, self.done

    def _rate(self, now: float) -> str:
        return f"{quantity((self.done - self._cold) / max(now - self._warm, 1e-9))} {self.unit}/s"

    def _print(self, now: float) -> None:
        if self.quiet:
            return
        done = quantity(self.done) + (f"/{quantity(self.total)}" if self.total else "")
        line = f"{self.label}: {done} {self.unit}, {self._rate(now)}"
        fresh = self.done - self._cold
        if self.total and fresh > 0 and self._updates > 1:
            line += f", {duration((self.total - self.done) * (now - self._warm) / fresh)} left"
        print(line + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.stop()
        if kind is None and not self.quiet:
            self._warm, self._cold = self._start, self._resumed_at
            took, done = duration(now - self._start), quantity(self.done)
            print(f"{self.label}: {done} {self.unit} in {took} ({self._rate(now)})", file=sys.stderr, flush=True)
