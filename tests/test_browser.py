"""The browser that tests of pages open: it tells what a page does, and its absence is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def test_it_tells_requests_complaints_and_keys(tmp_path, browser):
    page = tmp_path / "page.html"
    page.write_text(
        "<img src='missing.png'><input autofocus><button onclick='window.pressed = true'>yes</button>"
        "<script>console.error('an error'); undefined_function();</script>"
    )
    browser.open(page)
    assert browser.requests == [page.as_uri(), (tmp_path / "missing.png").as_uri()]
    assert "an error" in str(browser.complaints)
    assert "undefined_function" in str(browser.complaints)
    browser.ask("document.querySelector('input').focus()")
    browser.type("words")
    browser.press("Backspace")
    assert browser.ask("document.querySelector('input').value") == "word"
    browser.press("Tab")
    browser.press("Enter")
    assert browser.ask("window.pressed") is True
    with pytest.raises(AssertionError, match="no_such_thing"):
        browser.ask("no_such_thing")
    empty = tmp_path / "empty.html"
    empty.write_text("<p>nothing")
    browser.open(empty)
    assert (browser.requests, browser.complaints) == ([empty.as_uri()], [])


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_without_one_tests_are_skipped_and_fail_on_ci(tmp_path, ci, outcome):
    test = f"{TESTS / 'test_browser.py'}::test_it_tells_requests_complaints_and_keys"
    env = {**os.environ, "PATH": str(tmp_path), "VLMDIST_TEST_CHROMIUM": str(tmp_path / "chromium"), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True, timeout=300)
    assert outcome in done.stdout
    assert "no browser: no apt here to unpack chromium-headless-shell fonts-dejavu-core with" in done.stdout
