"""Fixtures that several test modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from debian_packages import PackagesMissing
from tiny_run import make_tiny_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and train, validation and test corpora of receipt lines; read only."""
    return make_tiny_world(tmp_path_factory.mktemp("tiny-world"))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A headless Chromium. Without one, tests are skipped; on CI they fail."""
    try:
        chromium = find_chromium()
    except PackagesMissing as e:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no browser: {e}")
        pytest.skip(f"no browser: {e}")
    browser = Browser(chromium, tmp_path / "profile")
    yield browser
    browser.close()
