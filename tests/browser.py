"""Debian's Chromium without a window, driven through a pipe by its DevTools protocol: what a reader would see."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_PATIENCE = 120
# Chromium reads commands from file 3 and answers on file 4.
_LAUNCH = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
_NOISE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

_UNREADABLE = """[...document.querySelectorAll('figure')].flatMap(figure => {
  const drawings = [...figure.querySelectorAll('svg')].filter(one => one.getClientRects().length)
  if (drawings.length != 1) return [`${figure.id}: ${drawings.length} drawings`]
  const frames = [figure, drawings[0]].map(one => one.getBoundingClientRect())
  const texts = [...drawings[0].querySelectorAll('text')].map(text => {
    const matrix = text.getScreenCTM(), size = parseFloat(getComputedStyle(text).fontSize)
    return {words: text.textContent, box: text.getBoundingClientRect(), size: size * Math.hypot(matrix.a, matrix.b)}
  })
  const inside = (box, frame) => box.left >= frame.left - 1 && box.right <= frame.right + 1 &&
    box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4
  return texts.flatMap((one, index) => [
    ...(frames.every(frame => inside(one.box, frame)) ? [] : [`${figure.id}: ${one.words} is cut off`]),
    ...(one.size >= 9 ? [] : [`${figure.id}: ${one.words} has ${one.size} px`]),
    ...texts.slice(index + 1).filter(other => meet(one.box, other.box))
      .map(other => `${figure.id}: ${one.words} is on ${other.words}`)])
})"""


class Browser:
    """One page at a time; a context manager. `profile` is a new, empty folder."""

    def __init__(self, profile: Path):
        assert CHROMIUM is not None
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        launch = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), CHROMIUM]
        self._process = subprocess.Popen(
            [*launch, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for room in ("Page", "Runtime", "Log"):
            self._call(f"{room}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, page: Path, width: int) -> None:
        """Load a file in a viewport of `width` CSS pixels."""
        self._events.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def console(self) -> list[dict[str, Any]]:
        """Everything that the page, or the browser about it, has said since it was opened."""
        return [event for event in self._events if event["method"] in _NOISE]

    def overflowing(self) -> list[str]:
        """Elements that stick out of the viewport to the right, less those in a box made for scrolling."""
        return self.evaluate(
            "[...document.querySelectorAll('body, body *')].filter(e => !e.parentElement.closest('.scroll') && "
            "(e.getBoundingClientRect().right > innerWidth + 0.5 || (e.matches('body') && e.scrollWidth > innerWidth)))"
            ".map(e => e.outerHTML.slice(0, 80))"
        )

    def unreadable(self) -> list[str]:
        """What of the figures cannot be read without scrolling: words cut off, on top of each other or below 9 px."""
        return self.evaluate(_UNREADABLE)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number, message = self._number, {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        """The first message that is `wanted`; those before it are kept as events."""
        until = time.monotonic() + _PATIENCE
        while True:
            while b"\0" in self._buffer:
                line, self._buffer = self._buffer.split(b"\0", 1)
                message = json.loads(line)
                if "method" in message:
                    self._events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._in], [], [], max(until - time.monotonic(), 0))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"Chromium said nothing for {_PATIENCE} s, or ended: {self._process.poll()}")
            self._buffer += data


def _pipe() -> tuple[int, int]:
    """A pipe whose two ends are not files 3 and 4."""
    ends = os.pipe()
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reading, writing
