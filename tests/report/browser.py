"""A headless Chromium over the WebDriver protocol, spoken with the standard library (Debian: chromium-driver)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing() -> str:
    """Which program is not there; empty when a browser can be driven."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return "" if chromium and shutil.which("chromedriver") else "chromium and chromedriver are not installed"


class Browser:
    """One window."""

    def __init__(self, port: int, *, width: int, height: int, dark: bool) -> None:
        self.root = f"http://127.0.0.1:{port}"
        wait_for(self.root)
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--no-first-run", "--hide-scrollbars",
        ]  # fmt: skip
        if dark:
            arguments.append("--force-dark-mode")
        options = {
            "args": arguments,
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1.0}},
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        asked = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": asked}})
        self.session = f"/session/{session['sessionId']}"

    def open(self, page: Path) -> None:
        self._call("POST", f"{self.session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._call("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, selector: str, key: str) -> None:
        """Focus an element and press a key on it."""
        element = self._call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self._call("POST", f"{self.session}/element/{element[ELEMENT]}/value", {"text": key})

    def complaints(self) -> list[str]:
        """What the console says since it was last asked."""
        return [entry["message"] for entry in self._log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since it was last asked."""
        events = (json.loads(entry["message"])["message"] for entry in self._log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, target: Path) -> None:
        """The visible part as PNG."""
        target.write_bytes(base64.b64decode(self._call("GET", f"{self.session}/screenshot")))

    def close(self) -> None:
        self._call("DELETE", self.session)

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("POST", f"{self.session}/se/log", {"type": kind})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.root + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:500]}") from None


def wait_for(root: str, seconds: float = 60) -> None:
    """Until the driver answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{root}/status", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def window(*, width: int = 1280, height: int = 800, dark: bool = False) -> Iterator[Browser]:
    """A new browser with one window."""
    driver = shutil.which("chromedriver")
    assert driver is not None
    command = [driver, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            started = next(line for line in process.stdout if "successfully on port" in line)
            port = int(started.rstrip(".\n").split()[-1])
            browser = Browser(port, width=width, height=height, dark=dark)
            try:
                yield browser
            finally:
                browser.close()
        finally:
            process.terminate()
