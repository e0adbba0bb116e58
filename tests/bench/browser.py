"""Debian's headless Chromium, spoken to over two pipes in the DevTools protocol.

Messages are JSON, each ended by a zero byte; the browser reads file descriptor 3 and writes 4.
"""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

Json = dict[str, Any]
TIMEOUT = 60.0  # seconds for any answer, on a busy machine


def executable() -> str | None:
    """Where Chromium is, None if it is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page. Requests of the page are kept in ``requests``."""

    def __init__(self, path: str, profile: Path) -> None:
        self.requests: list[str] = []
        self._buffer = b""
        self._sent = 0
        self._loaded = False
        reads, self._write = (_high(fd) for fd in os.pipe())
        self._read, writes = (_high(fd) for fd in os.pipe())
        arguments = [
            path,
            "--headless",
            "--no-sandbox",  # containers have no user namespaces for it
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self._process = os.posix_spawn(
            path,
            arguments,
            {**os.environ, "HOME": str(profile)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, reads, 3),
                (os.POSIX_SPAWN_DUP2, writes, 4),
            ],
            setpgroup=0,
        )
        os.close(reads)
        os.close(writes)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)

    def show(self, url: str, width: int, scheme: str) -> None:
        """Load a page on a screen of so many CSS pixels, in a ``light`` or ``dark`` scheme."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setEmulatedMedia", features=media)
        self._loaded = False
        self.call("Page.navigate", url=url)
        until = time.monotonic() + TIMEOUT
        while not self._loaded:
            self._message(until)
        # loaded is not drawn: the second frame begins when the first is on the screen
        drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.call("Runtime.evaluate", expression=drawn, awaitPromise=True)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def picture(self) -> Image.Image:
        """The whole page, as long as it is."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")

    def call(self, method: str, **parameters: Any) -> Json:
        """The result of a method of the protocol."""
        self._sent += 1
        message: Json = {"id": self._sent, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + TIMEOUT
        while True:
            found = self._message(until)
            if found.get("id") == self._sent:
                if "error" in found:
                    raise AssertionError(f"{method}: {found['error']}")
                result: Json = found["result"]
                return result

    def _message(self, until: float) -> Json:
        """The next one; what a page did is noted on the way."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise AssertionError(f"the browser {'ended' if ready else 'did not answer'}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: Json = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message


def _high(descriptor: int) -> int:
    """The same pipe on a number that is neither 3 nor 4, and not passed on."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
