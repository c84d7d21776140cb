"""Tiny worlds that the tests of this folder share, and a cluster of stand-ins."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from tiny_families import make_llava
from tiny_run import make_tiny_world, tiny_run, write_run

from vlmdist.data.convert.corpora import question_and_answer
from vlmdist.data.shards.writer import ShardWriter


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


@dataclass(frozen=True)
class World:
    """A corpus, a model and a run file that would train."""

    folder: Path
    run_file: Path


@pytest.fixture(scope="session")
def text_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = make_tiny_world(tmp_path_factory.mktemp("text"))
    tree = tiny_run(folder, folder / "run")
    tree["model"]["precision"] = "auto"
    return World(folder, write_run(tree, folder / "run.yaml"))


@pytest.fixture(scope="session")
def image_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("images")
    buffer = io.BytesIO()
    Image.new("RGB", (60, 44), (90, 140, 20)).save(buffer, "PNG")
    for split in ("train", "validation", "test"):
        with ShardWriter(folder / split) as writer:
            for n in range(20):
                messages = question_and_answer(f"What is picture {n}?", f"Noise {n}.", num_images=1)
                writer.write(f"{n:03d}", messages, [buffer.getvalue()])
    make_llava(folder / "model")
    return World(folder, write_run(tiny_run(folder, folder / "run"), folder / "run.yaml"))


_SCONTROL = """\
#!/bin/sh
case "$2" in
partition) cat {folder}/partitions ;;
node) cat {folder}/nodes ;;
esac
"""
_SBATCH = """\
#!/bin/sh
echo "$@" >> {folder}/asked
if [ -e {folder}/refusal ]; then cat {folder}/refusal >&2; exit 1; fi
echo "sbatch: Job 7 to start at 2026-01-01T00:00:00" >&2
"""
PARTITIONS = """\
PartitionName=gpu AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 Nodes=g[01-03] State=UP
PartitionName=lab AllowAccounts=lab,vision Default=NO MaxNodes=1 MaxTime=UNLIMITED Nodes=g01 State=UP
PartitionName=old AllowAccounts=ALL DenyAccounts=guests Default=NO MaxNodes=UNLIMITED MaxTime=01:00:00 State=DOWN
"""
NODES = """\
NodeName=g01 CPUTot=16 ActiveFeatures=v100 Gres=gpu:v100:2 RealMemory=128000 State=IDLE Partitions=gpu,lab OS=Linux 5 x
NodeName=g02 CPUTot=16 ActiveFeatures=v100 Gres=gpu:v100:2 RealMemory=128000 State=MIXED Partitions=gpu,old OS=Linux 5 x
NodeName=g03 CPUTot=16 ActiveFeatures=a100 Gres=gpu:a100:4 RealMemory=128000 State=DOWN+DRAIN Partitions=gpu,old
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scontrol and sbatch on the PATH that tell of three nodes; what they say lies in the folder."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "partitions").write_text(PARTITIONS)
    (folder / "nodes").write_text(NODES)
    for name, text in (("scontrol", _SCONTROL), ("sbatch", _SBATCH)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("PARTITION", "ACCOUNT", "CONSTRAINT", "QOS"):
        monkeypatch.delenv(f"SBATCH_{name}", raising=False)
    return folder
