"""The page about a run in a real browser: Chromium, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_page import add_session, write_run

from visionfm_jax.telemetry import page

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         "--remote-debugging-pipe")  # fmt: skip


class Browser:
    """A page of a browser; `events` are what it has told of."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive = send, os.fdopen(receive, "rb")
        self.count, self.session, self.events = 0, "", []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """What a command gives."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self.count:
            self.events.append(found)
        assert "error" not in found, found
        return found["result"]

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def open(self, path: Path, width: int) -> None:
        """Until all of it is loaded."""
        self.events = []
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """Of JavaScript."""
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of these events."""
        return [event["params"] for event in self.events if event.get("method") in methods]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for the tests of this file."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.fail(f"no browser ({', '.join(BROWSERS)}): apt-get install chromium-headless-shell")
    (read_here, send), (receive, write_here) = os.pipe(), os.pipe()
    command = [program, *QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "about:blank"]
    # It reads commands from descriptor 3 and writes to 4.
    script = f'exec "$0" "$@" 3<&{read_here} 4>&{write_here}'
    process = subprocess.Popen(
        ["bash", "-c", script, *command], pass_fds=(read_here, write_here),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_here)
    os.close(write_here)
    try:
        yield Browser(send, receive)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, and of two side by side."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name, name=name, lr=lr) for name, lr in (("first", 1e-3), ("second_" * 9, 2e-3))]
    add_session(runs[0], 0, 200, "finished", 2, processes=1, parameters=1234567, versions={"jax": "9.8.7"})
    classes = [{"name": f"class {i}", "top1": i / 10, "count": 100} for i in range(9)]
    details = {"protocol": "0a1b2c3d", "step": 200, "settings": {"crop": 0.875}, "classes": classes}
    (runs[0] / "eval_digits.json").write_text(json.dumps(details))
    ramp = np.broadcast_to(np.linspace(0, 255, 1200, dtype=np.uint8)[:, None], (600, 1200, 3))
    Image.fromarray(ramp).save(runs[0] / "predictions_digits.png")
    return {
        "one": page.write_page(runs[:1], folder / "one.html"),
        "two": page.write_page(runs, folder / "two.html"),
    }


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["one", "two"])
def test_the_page_in_a_browser(browser, pages, which, width, tmp_path):
    browser.open(pages[which], width)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    pictures = browser.value("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert pictures == [[True, 1200]] * (which == "one")
    curves = browser.value(
        "[...document.querySelectorAll('.chart')].map(c => Math.max(...[...c.querySelectorAll('path')]"
        ".map(p => p.getBoundingClientRect().width)))"
    )
    assert len(curves) >= {"one": 5, "two": 3}[which]
    assert min(curves) > 100, curves
    assert browser.value("getComputedStyle(document.querySelector('main')).paddingLeft") == "16px"  # it has its style
    requested = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [pages[which].as_uri()]
    assert not browser.told("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    clip = {"x": 0, "y": 0, "width": width, "height": browser.value("document.body.scrollHeight"), "scale": 1}
    shot = base64.b64decode(browser("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
    (tmp_path / "page.png").write_bytes(shot)
    with Image.open(tmp_path / "page.png") as image:
        assert len(image.getcolors(2**24)) > 10  # something is drawn
