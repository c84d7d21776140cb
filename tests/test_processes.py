"""Processes end with the one that started them, also with one that is dead before they run."""

import subprocess
import sys
import time

import psutil

CHILD = "import sys, time; from vlmdist.processes import die_with_parent; "
CHILD += "die_with_parent(int(sys.argv[1])); print('goes on', flush=True); time.sleep(600)"


def test_a_process_whose_parent_was_dead_before_ends_at_once() -> None:
    """Killed between fork and the child's first instruction: the child has another parent by then."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    done = subprocess.run([sys.executable, "-c", CHILD, str(dead.pid)], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_process_ends_with_its_parent() -> None:
    start = (
        "import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]); "
    )
    start += "print(child.pid, flush=True); child.wait()"
    parent = subprocess.Popen([sys.executable, "-c", start, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "goes on\n"
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
