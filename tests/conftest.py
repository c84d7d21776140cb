"""Fixtures that several test modules share."""

from pathlib import Path

import pytest
from tiny_run import make_tiny_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and train, validation and test corpora of receipt lines; read only."""
    return make_tiny_world(tmp_path_factory.mktemp("tiny-world"))
