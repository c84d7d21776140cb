"""The Slurm cluster that the tests of this folder share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from binaries import SlurmMissing, find_slurm
from testbed import SlurmTestbed, remove

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmTestbed]:
    """A running cluster of four nodes with two GPUs each."""
    unpacked = Path(os.environ.get("VLMDIST_TEST_SLURM") or REPOSITORY / ".cache" / "slurm")
    try:
        binaries = find_slurm(unpacked)
    except SlurmMissing as e:
        pytest.skip(str(e))
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets, whose paths end at 108 characters
    try:
        with SlurmTestbed(binaries, folder) as cluster:
            yield cluster
    finally:
        remove(folder)
