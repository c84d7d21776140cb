"""The README's copy-paste blocks, run as a reader would: by bash, one after the other, in a copy of the repository.

A block is a fence behind a mark in the Markdown, which the reader doesn't see:

    <!-- journey: NAME -->
    ```bash
    ...
    ```

Blocks of one name are one journey. They run in one shell, so a variable of the first is there in the last; the first
command that fails ends the journey. What is big in the README is made small by the environment alone: by the variables
that the blocks themselves offer (``${SOURCE:-...}``), and by a cluster whose ``sbatch`` asks for fewer nodes.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ranks import REPOSITORY, rank_environment

WHAT_A_READER_HAS = ("setup.py", "launch", "dsconfigs", "vlmdist", "shards", "slurm")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"<!-- journey: ([\w-]+) -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
JOURNEYS: dict[str, list[str]] = {}
"""The blocks of each journey, in order."""
for _name, _block in _BLOCK.findall(README):
    JOURNEYS.setdefault(_name, []).append(_block)
_NEXT_BLOCK = "== the next block"
_WAIT_FOR_JOBS = """\
while [[ -n "$(squeue --noheader)" ]]; do sleep 0.3; done
if scontrol show jobs | grep -q 'JobState=\\(FAILED\\|CANCELLED\\|TIMEOUT\\)'; then echo "a job failed" && exit 1; fi
"""


def copy_of_the_repository(folder: Path) -> Path:
    """A fresh checkout with its ``.venv``, which is this one; returns its folder."""
    for name in WHAT_A_READER_HAS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cluster.env"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def write_small_sbatch(folder: Path, sbatch: Path, options: Sequence[str], settings: Sequence[str]) -> Path:
    """``folder/sbatch``: the real one with options behind the reader's, so that they win, and settings for training."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "sbatch"
    script.write_text(
        "#!/usr/bin/env bash\n"
        "asked=() settings=()\n"
        'while [[ ${1:-} == -* ]]; do asked+=("$1") && shift; done\n'
        f"[[ $1 != */train_* ]] || settings=({shlex.join(settings)})\n"
        f'exec {shlex.quote(str(sbatch))} "${{asked[@]}}" {shlex.join(options)} "$@" "${{settings[@]}}"\n'
    )
    script.chmod(0o755)
    return folder


def reader_environment(**more: str) -> dict[str, str]:
    """The caller's without what launchers, Slurm, vlmdist's own scripts and pytest have put there."""
    ours = ("VLMDIST_", "SLURM", "SBATCH", "PYTEST")
    return {**{k: v for k, v in rank_environment().items() if not k.startswith(ours)}, **more}


def travel(blocks: list[str], checkout: Path, environment: Mapping[str, str], timeout_s: float = 800) -> list[str]:
    """Run the blocks in ``checkout``; after each, wait until no job is left in the queue, as a reader does.

    environment: all of it. SLURM_CONF in it: there is a cluster.

    Returns what each block said. Where a command ends with another exit code than 0 the test fails, and shows it all.
    """
    wait = _WAIT_FOR_JOBS if "SLURM_CONF" in environment else ""
    script = "\n".join(["set -eo pipefail", *[f"{block}\n{wait}echo '{_NEXT_BLOCK}'" for block in blocks]])
    log = checkout.parent / "said.txt"
    with log.open("w") as said:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=checkout,
            env=dict(environment),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = shell.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout_s} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    output = log.read_text(encoding="utf-8")
    assert code == 0, f"exit code {code}:\n{output[-8000:]}{_logs(checkout)}"
    assert "Traceback" not in output, output[-8000:]
    return output.split(_NEXT_BLOCK + "\n")[:-1]


def _logs(checkout: Path) -> str:
    return "".join(f"\n--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(checkout.glob("*.out")))
