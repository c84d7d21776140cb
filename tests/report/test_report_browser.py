"""The page in a real browser, where one is installed: no request, no error, by pointer and keyboard, dark mode."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_up_run import add_evaluation, make_run, receipt_rows

from vlmdist.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to open the page in")


class Browser:
    """A headless Chromium, spoken to over two pipes by the DevTools protocol (messages end in a zero byte).

    https://chromedevtools.github.io/devtools-protocol/
    """

    def __init__(self, profile: Path):
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        quiet = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
        # the protocol is spoken on descriptors 3 (in) and 4 (out)
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", str(BROWSER), *options, *quiet, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, file: Path) -> None:
        self.call("Page.navigate", url=file.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser went away"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


SHOWN = "[...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => c.querySelector('h3').textContent)"


def test_the_page_works_and_asks_nothing_of_anyone(tmp_path, browser):
    run = make_run(tmp_path / "run")
    hostile = '<script>window.hurt = 1</script><img src=http://127.0.0.1:9/ onerror="window.hurt = 2">\x00\x1b'
    rows = receipt_rows(30)
    rows[4]["prediction"] = hostile
    rows[8]["prediction"] = "A" * 1_000_000
    add_evaluation(run, "base", [{**row, "prediction": hostile} for row in rows])
    add_evaluation(run, "step-000060", rows)
    file = write_report([run])
    browser.open(file)

    assert browser.ask("window.hurt === undefined && document.scripts.length === 1")
    assert browser.ask("document.querySelectorAll('.card').length") == 30

    # sort and filter
    first = browser.ask(f"{SHOWN}[0]")
    assert first in ("R00004", "R00008")
    browser.ask("document.querySelector('select').value = '-score'")
    browser.ask("document.querySelector('select').dispatchEvent(new Event('change'))")
    assert browser.ask(f"{SHOWN}[0]") == "R00001"
    browser.ask("document.querySelector('input[type=search]').focus()")
    browser.call("Input.insertText", text="shop 17")
    assert browser.ask(SHOWN) == ["R00017"]
    assert browser.ask("document.querySelector('output').textContent") == "1 of 30 samples"

    # a curve read by keyboard
    browser.ask("document.querySelector('.plot').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    reading = browser.ask("document.querySelector('.plot .reading').innerText")
    assert reading.startswith("step 2\n")
    assert "training loss" in reading

    # dark mode and a phone
    light = browser.ask("getComputedStyle(document.body).backgroundColor")
    dark_mode = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", features=dark_mode)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") != light
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.ask("document.documentElement.scrollWidth") <= 360

    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith(("data:", "about:"))] == [file.as_uri()]
    told = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert told == []
