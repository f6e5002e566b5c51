"""A page in headless Chromium, driven over its debugging pipe; what it logs is kept."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="there is no Chromium; on Debian and Ubuntu: apt-get install chromium"
)


class Page:
    """One tab. ``troubles``: errors and warnings of its console, and what it threw."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number, self._rest, self._session = 0, b"", ""
        self.troubles: list[str] = []
        self.asked: list[str] = []
        """Addresses that it fetched."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Network.emulateNetworkConditions",
            offline=True, latency=0, downloadThroughput=0, uploadThroughput=0,
        )  # fmt: skip

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self._hear(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _hear(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.troubles.append(json.dumps(given["exceptionDetails"]))
        if event.get("method") == "Runtime.consoleAPICalled" and given["type"] != "log":
            self.troubles.append(json.dumps(given["args"]))
        if event.get("method") == "Log.entryAdded" and given["entry"]["level"] != "verbose":
            self.troubles.append(given["entry"]["text"])
        if event.get("method") == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])

    def open(self, file: Path, ready: str) -> None:
        """Until an expression holds there."""
        self.call("Page.navigate", url=file.as_uri())
        assert self.ask(
            "new Promise(async done => { for (let n = 0; n < 600; n++) {"
            f"  if ({ready}) return done(true);"
            "  await new Promise(wait => setTimeout(wait, 50)); } done(false); })"
        ), self.troubles

    def ask(self, expression: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key,
                windowsVirtualKeyCode=codes.get(key, 0), **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def dark(self, wanted: bool) -> None:
        value = "dark" if wanted else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": value}],
        )

    def shoot(self, file: Path, width: int = 1200, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        shot = self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """profile: an empty folder of its own."""
    assert PROGRAM is not None
    to_read, write = os.pipe()
    read, to_write = os.pipe()

    def pipes() -> None:
        # Its ends are 3 and 4, whatever numbers they had.
        high = [os.dup(end) for end in (to_read, to_write)]
        for number, end in zip((3, 4), high, strict=True):
            os.dup2(end, number, inheritable=True)

    command = [
        PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
        "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", f"--user-data-dir={profile}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(write, read)
    finally:
        os.close(write)
        process.terminate()
        process.wait(30)
        os.close(read)
