"""Start vlmdist on real gloo ranks from a test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def rank_environment(**changes: str) -> dict[str, str]:
    """The environment of a rank: one thread each, no hub, no trace of an outer launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def vlmdist_command(ranks: int, arguments: Sequence[str | Path]) -> list[str]:
    """``vlmdist ARGUMENTS`` on so many ranks, by torchrun as launch/train.sh does it."""
    start = [sys.executable, str(REPOSITORY / "launch" / "start_ranks.py"), "torchrun", "--standalone"]
    return [*start, "--nproc-per-node", str(ranks), "-m", "vlmdist", *map(str, arguments)]


def run_vlmdist(
    ranks: int, *arguments: str | Path, expect: int = 0, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the test fails with the whole output where the exit code is another one."""
    done = subprocess.run(
        vlmdist_command(ranks, arguments), capture_output=True, text=True, timeout=timeout_s, env=rank_environment()
    )
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == expect, f"exit code {done.returncode}, expected {expect}:\n{output[-6000:]}"
    assert "Traceback" not in output, output[-6000:]
    return done
