"""A real browser for tests of pages: Chromium without a window, spoken to over two pipes.

The DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), messages ending in a zero byte. Chromium is
the installed one, or Debian's headless shell unpacked into a folder of the project (debian_packages.py).
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from debian_packages import PackagesMissing, missing_libraries, unpack

UNPACKED = Path(os.environ.get("VLMDIST_TEST_CHROMIUM") or Path(__file__).resolve().parents[1] / ".cache" / "chromium")
_INSTALLED = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core")
_TIMEOUT_S = 120.0
_CODES = {
    "Backspace": 8, "Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Delete": 46,
}  # fmt: skip
_TEXTS = {"Enter": "\r"}


@dataclass(frozen=True)
class Chromium:
    program: Path
    environment: dict[str, str] = field(default_factory=dict)
    """What it needs in its environment."""


def find_chromium(folder: Path = UNPACKED) -> Chromium:
    """An installed Chromium, else one unpacked into ``folder`` (on the first call). Raises PackagesMissing."""
    installed = next(filter(None, map(shutil.which, _INSTALLED)), None)
    if installed is not None:
        return Chromium(Path(installed))
    root = unpack(folder, _PACKAGES, finish=_finish)
    fonts = root.parent / "fonts.conf"
    return Chromium(_program(root), {"LD_LIBRARY_PATH": _library_path(root), "FONTCONFIG_FILE": str(fonts)})


def _finish(root: Path) -> None:
    missing = missing_libraries([_program(root)], _library_path(root))
    if missing:
        raise PackagesMissing(f"the unpacked Chromium lacks {', '.join(missing)}: apt-get install {_PACKAGES[0]}")
    # paths of the system's own configuration lead out of the root
    text = f"<fontconfig><dir>{root}/usr/share/fonts</dir><cachedir>{root.parent}/fonts</cachedir></fontconfig>"
    (root.parent / "fonts.conf").write_text(text, encoding="utf-8")


def _program(root: Path) -> Path:
    found = [p for p in root.glob("usr/lib/*/chromium-headless-shell") if p.is_file()]
    if not found:
        raise PackagesMissing(f"{root} holds no chromium-headless-shell: remove that folder and try again")
    return found[0]


def _library_path(root: Path) -> str:
    folders = {p.parent for pattern in ("usr/lib/**/*.so*", "lib/**/*.so*") for p in root.glob(pattern)}
    return ":".join(map(str, sorted(folders)))


class Browser:
    """One tab. ``events`` holds what the page did since it was opened: requests, console, exceptions."""

    def __init__(self, chromium: Chromium, profile: Path):
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += ["--disable-dev-shm-usage", "--hide-scrollbars", "--enable-precise-memory-info"]
        quiet = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
        # the protocol is spoken on descriptors 3 (in) and 4 (out)
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "browser", str(chromium.program), *options, *quiet, "about:blank"],
            env={**os.environ, **chromium.environment},
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = bytearray(), 0, None
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str | Path) -> None:
        """Go to a URL or a file and wait until it is loaded; what was noted of an earlier page is forgotten."""
        self.events.clear()
        self.call("Page.navigate", url=url.absolute().as_uri() if isinstance(url, Path) else url)
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not self.noted("Page.loadEventFired"):
            self.events.append(self._next(deadline_s))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its result; AssertionError where the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._send(json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            answer = self._next(deadline_s)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        look = f"const look = () => {{ if ({condition}) yes(); else setTimeout(look, 10); }}; look();"
        self.ask(f"new Promise((yes) => {{ {look} }})")

    def press(self, key: str) -> None:
        """One key by its name in KeyboardEvent.key: "a", "Enter", "ArrowDown"."""
        code = _CODES.get(key) or ord(key.upper())
        text = _TEXTS.get(key, key if len(key) == 1 else "")
        facts = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def emulate(self, width: int = 1280, height: int = 900, *, dark: bool = False, media: str = "screen") -> None:
        """Size of the screen in CSS pixels (a phone below 500), colour scheme, and "screen" or "print"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path, *, whole_page: bool = False) -> None:
        """A PNG of what is on the screen, or of the whole page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(picture["data"]))

    def noted(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events of these names since the page was opened."""
        return [e["params"] for e in self.events if e.get("method") in methods]

    @property
    def requests(self) -> list[str]:
        """URLs that the page asked for, itself included; not those that name no place (data:, blob:, about:)."""
        urls = [str(e["request"]["url"]) for e in self.noted("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:", "about:"))]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, and what stands in the console."""
        return self.noted("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._read)
        os.close(self._write)

    def _send(self, message: bytes) -> None:
        while message:
            message = message[os.write(self._write, message) :]

    def _next(self, deadline_s: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\0")) < 0:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"the browser said nothing for {_TIMEOUT_S:.0f} s"
            data = os.read(self._read, 1 << 20)
            assert data, f"the browser went away (exit code {self.process.poll()})"
            self._buffer += data
        message = json.loads(self._buffer[:end])
        del self._buffer[: end + 1]
        found: dict[str, Any] = message
        return found
