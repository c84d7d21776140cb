"""Send a signal to the ranks on this machine that DeepSpeed's launcher started for one run.

    python launch/signal_ranks.py MASTER_PORT SIGUSR1

start_hosts.py runs this text on every host. A rank that does not listen to the signal yet is left alone for its first
seconds: the signal would end it.
"""

import signal
import sys
import time
from pathlib import Path

import psutil

STARTS_WITHIN_S = 30


def main(port: str, number: signal.Signals) -> None:
    for launcher in psutil.process_iter():
        try:
            words = launcher.cmdline()
            if "deepspeed.launcher.launch" not in words or f"--master_port={port}" not in words:
                continue
            for rank in launcher.children():
                if _listens(rank.pid, number) or time.time() - rank.create_time() > STARTS_WITHIN_S:
                    rank.send_signal(number)
        except psutil.Error:
            pass  # it ended meanwhile, or is another user's


def _listens(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal: SigCgt in its status is a mask, bit 0 is signal 1."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


if __name__ == "__main__":
    main(sys.argv[1], signal.Signals[sys.argv[2]])
