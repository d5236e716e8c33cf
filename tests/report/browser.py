"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver) with the standard library."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no /usr/bin/chromium and chromedriver (Debian's chromium and chromium-driver)"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that fetches anything fails, whatever the machine can reach
]
START_SECONDS = 60


def is_there() -> bool:
    return CHROMIUM is not None and DRIVER is not None


class Browser:
    """One session; sizes and colours are emulated, since a window cannot be as narrow as a telephone."""

    def __init__(self, address: str, session: str) -> None:
        self._address = f"{address}/session/{session}"

    def command(self, path: str, **values: Any) -> Any:
        return send(f"{self._address}/{path}", values)

    def devtools(self, name: str, **values: Any) -> Any:
        return self.command("goog/cdp/execute", cmd=name, params=values)

    def show(self, page: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.command("url", url=page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.command("execute/sync", script=script, args=list(arguments))

    def until(self, script: str, *, seconds: float = 20.0) -> Any:
        """Wait for a script to return something true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"not true after {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def mouse(self, *moves: tuple[str, float, float]) -> None:
        """Move, press and release: ("mouseMoved" | "mousePressed" | "mouseReleased", x, y)."""
        is_down = False
        for kind, x, y in moves:
            is_down = kind == "mousePressed" or (is_down and kind == "mouseMoved")
            button = "left" if is_down or kind == "mouseReleased" else "none"
            held = {"button": button, "buttons": int(is_down), "clickCount": int(kind != "mouseMoved")}
            self.devtools("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def console(self) -> list[str]:
        """Messages since the last call: warnings and errors of the page."""
        return [entry["message"] for entry in self.command("se/log", type="browser")]

    def screenshot(self, path: Path) -> None:
        size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))


def send(url: str, values: dict[str, Any] | None, *, method: str = "POST") -> Any:
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{url}: {error.read().decode()[:500]}") from error


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start chromedriver and one Chromium, with a profile of its own in a folder; both end with the block."""
    assert CHROMIUM is not None and DRIVER is not None, MISSING
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen([DRIVER, f"--port={port}"], env=environment, **quiet) as driver:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, driver)
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = send(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            try:
                yield Browser(address, made["sessionId"])
            finally:
                send(f"{address}/session/{made['sessionId']}", None, method="DELETE")
        finally:
            driver.terminate()


def wait_for(address: str, driver: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            send(f"{address}/status", None, method="GET")
            return
        except OSError:
            assert driver.poll() is None and time.monotonic() < deadline, "chromedriver does not start"
            time.sleep(0.1)
