"""The preloaded process that the tests of this folder share, and the run that they compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import Undisturbed, write_run_file
from nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("ranks")) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def whole_of_two(nursery: Nursery, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run of two ranks without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "two"
    return Undisturbed.make(nursery, write_run_file(tiny_world, folder), folder, 2)
