"""The Slurm clusters that the tests of this folder share."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from binaries import SlurmBinaries, SlurmMissing, find_slurm
from jobs import make_receipts
from rack import Rack, can_make_racks
from testbed import SlurmTestbed, remove

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def binaries() -> SlurmBinaries:
    unpacked = Path(os.environ.get("VLMDIST_TEST_SLURM") or REPOSITORY / ".cache" / "slurm")
    try:
        return find_slurm(unpacked)
    except SlurmMissing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def slurm(binaries: SlurmBinaries) -> Iterator[SlurmTestbed]:
    """A running cluster of four nodes with two GPUs each."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets, whose paths end at 108 characters
    try:
        with SlurmTestbed(binaries, folder) as cluster:
            yield cluster
    finally:
        remove(folder)


@pytest.fixture(scope="session")
def rack(binaries: SlurmBinaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    """The same, and each node has its own network, host name, processes, /tmp and /dev/shm."""
    if not can_make_racks():
        pytest.skip("nodes with networks of their own need root and unshare, nsenter and ip (util-linux, iproute2)")
    folder = Path(tempfile.mkdtemp(prefix="rack-"))
    try:
        # the project too, wherever it was checked out
        shared = [tmp_path_factory.getbasetemp(), REPOSITORY, Path(sys.prefix), binaries.programs["slurmd"].parents[2]]
        with Rack(binaries, folder, shared=[p for p in shared if p.is_relative_to("/tmp")]) as cluster:
            yield cluster
    finally:
        remove(folder)


@pytest.fixture(scope="session")
def receipts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model (``model``) and shards (``train``, ``validation``, ``test``)."""
    return make_receipts(tmp_path_factory.mktemp("receipts"))
