"""The page in a real browser: a picture is dropped and answered; nobody but the server is asked; it ends cleanly."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import Browser
from ranks import rank_environment
from trained import INSTRUCTION, Trained

from vlmdist.errors import UserError
from vlmdist.predict import serve

GRADIO = Path(sys.prefix) / "gradio"
"""Where launch/test.sh puts it: what comes with it is kept away from the other tests."""
needs_gradio = pytest.mark.skipif(
    not GRADIO.is_dir() and importlib.util.find_spec("gradio") is None,
    reason="Gradio is not installed: bash launch/test.sh does it",
)
END_S = 60  # of a busy machine; the server gives open connections 2 s


@dataclass
class Page:
    process: subprocess.Popen[str]
    url: str
    folder: Path
    """Home, working folder and temporary files of the server are inside."""

    def end(self, number: signal.Signals) -> str:
        """Standard error, when the server has ended by a signal, with exit code 0, and left nothing behind."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=END_S)
        assert self.process.returncode == 0, errors
        assert [p for p in self.folder.rglob("*") if p.is_file()] == []
        return errors

    def status_of(self, path: str, body: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(f"{self.url}{path}", body, headers)  # noqa: S310 - http
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return int(answer.status)
        except urllib.error.HTTPError as e:
            return e.code


@contextmanager
def started(folder: Path, *arguments: str | Path) -> Iterator[Page]:
    for name in ("home", "work", "tmp"):
        (folder / name).mkdir(parents=True)
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmdist", "predict", *map(str, arguments), "--serve", "--port", "0"],
        cwd=folder / "work",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=rank_environment(**places, PYTHONPATH=os.pathsep.join([*filter(None, sys.path), str(GRADIO)])),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://"), process.communicate(timeout=END_S)[1]
        yield Page(process, line.split()[0], folder)
    finally:
        process.kill()
        process.communicate()


# -- what a person does ------------------------------------------------------------------------------------------------


def value(name: str) -> str:
    return f"document.querySelector('#{name} textarea, #{name} input').value"


def look_at(browser: Browser, page: Page) -> None:
    browser.open(page.url)
    browser.wait_for("document.querySelector('#ask') && document.querySelector('#question textarea')")


def drop(browser: Browser, file: Path) -> None:
    browser.wait_for("document.querySelector('#images input[type=file]')")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    place = browser.call("DOM.querySelector", nodeId=root, selector="#images input[type=file]")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=place, files=[str(file)])
    browser.wait_for("document.querySelector('#images img')?.naturalWidth")


def write(browser: Browser, question: str) -> None:
    browser.ask("document.querySelector('#question textarea').select()")
    browser.type(question)


def press(browser: Browser, name: str) -> None:
    browser.ask(f"document.querySelector('button#{name}, #{name} button').click()")


def wait_for_status(browser: Browser, pattern: str) -> str:
    browser.wait_for(f"/{pattern}/.test({value('status')})")
    return str(browser.ask(value("status")))


# -- tests -------------------------------------------------------------------------------------------------------------


@needs_gradio
def test_a_dropped_picture_is_answered_as_by_the_evaluator(
    pictures_run: Trained, browser: Browser, tmp_path: Path
) -> None:
    expected = pictures_run.answers[1]
    file = tmp_path / "receipt.png"
    file.write_bytes(pictures_run.samples[1].images[0])
    with started(tmp_path / "page", pictures_run.run) as page:
        look_at(browser, page)
        assert browser.ask(value("question")) == INSTRUCTION
        assert "step-000050 of run" in browser.ask("document.body.innerText")
        drop(browser, file)
        browser.ask(f"window.seen = []; setInterval(() => seen.push({value('answer')}), 5)")
        press(browser, "ask")
        wait_for_status(browser, "tokens in")
        assert browser.ask(value("answer")) == expected
        assert [text for text in browser.ask("seen") if not expected.startswith(text)] == []

        # its JSON, in which the HTML is text
        browser.wait_for("document.querySelector('#fields [role=gridcell]') && document.querySelector('#json')")
        assert json.loads(browser.ask(value("json"))) == json.loads(expected)
        cells = browser.ask("[...document.querySelectorAll('#fields [role=gridcell]')].map(c => c.innerText.trim())")
        assert cells == ["<b>", json.loads(expected)["<b>"]]
        assert browser.ask("document.querySelectorAll('b').length") == 0

        # what can't be asked
        write(browser, "an <image> more")
        press(browser, "ask")
        told = wait_for_status(browser, "^error")
        assert "image tag without image" in told
        assert browser.ask("document.querySelector('#fields')?.offsetParent ?? null") is None

        assert [url for url in browser.requests if not url.startswith(f"{page.url}/")] == []
        assert browser.noted("Runtime.exceptionThrown", "Log.entryAdded") == []
        assert page.end(signal.SIGTERM).count("predict:") == 1  # that it is loaded


@needs_gradio
def test_stop_and_the_end_come_in_the_middle_of_an_answer(lines_run: Trained, browser: Browser, tmp_path: Path) -> None:
    """An untrained model that talks for minutes."""
    with started(tmp_path / "page", lines_run.run.parent / "model", "--max-new-tokens", "100000") as page:
        look_at(browser, page)
        for question in ("first", "second"):
            write(browser, question)
            press(browser, "ask")
            browser.wait_for(f"{value('status')} == 'answering' && {value('answer')} != ''")
            press(browser, "stop")
            wait_for_status(browser, "stopped")
        press(browser, "ask")
        browser.wait_for(f"{value('status')} == 'answering' && {value('answer')} != ''")
        page.end(signal.SIGINT)


@needs_gradio
def test_strangers_get_nothing(lines_run: Trained, tmp_path: Path) -> None:
    with started(tmp_path / "page", lines_run.run) as page:
        assert page.status_of("/") == 200
        assert page.status_of("/", Host="evil.example") == 421
        assert page.status_of("/", Host="localhost") == 200
        assert page.status_of(f"/gradio_api/file={lines_run.file}") == 403
        assert page.status_of(f"/gradio_api/file={page.folder / 'work'}/../../x") in (403, 404)
        small, headers = _form(b"x")
        assert page.status_of("/gradio_api/upload", small, **headers) == 200
        assert page.status_of("/gradio_api/upload", small, **headers, Origin="http://evil.example") == 403
        too_large, headers = _form(bytes(serve.MAX_UPLOAD_BYTES + 1))
        assert page.status_of("/gradio_api/upload", too_large, **headers) == 413
        page.end(signal.SIGINT)


def _form(data: bytes) -> tuple[bytes, dict[str, str]]:
    """A form with one file, and its headers."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + data + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


@needs_gradio
def test_a_page_for_others_says_so(lines_run: Trained, tmp_path: Path) -> None:
    with started(tmp_path / "page", lines_run.run, "--host", "0.0.0.0") as page:  # noqa: S104
        assert f"http://{socket.gethostname()}:" in page.url
        assert "there is no password" in page.end(signal.SIGTERM)


@needs_gradio
def test_a_port_that_is_taken(lines_run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GRADIO)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: can't be had on 127.0.0.1: .*--port 0"):
            serve.serve(str(lines_run.run), port=port)
    with pytest.raises(UserError, match="--host nowhere.invalid .*no such address"):
        serve.serve(str(lines_run.run), host="nowhere.invalid")


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vlmdist\[serve\]'"):
        serve.serve("nowhere")
