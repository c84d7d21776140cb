"""Start ranks with torchrun or accelerate, and end as they end.

    python launch/start_ranks.py torchrun --standalone --nproc-per-node 2 -m vlmdist train RUN.yaml
    python launch/start_ranks.py accelerate launch --num_processes 2 --multi_gpu -m vlmdist evaluate RUN.yaml

Everything after the first word goes to that launcher as it is. Two things are added. The exit code is that of the rank
that failed first (2: wrong input; 85: stopped with a checkpoint), where the launchers themselves print a traceback and
end with 1. SIGUSR1 and SIGTERM go to every rank, which then finishes its step, saves and ends; torchrun alone would
die of the first and kill its ranks 30 seconds after the second.
"""

import argparse
import logging
import signal
import subprocess
import sys
from types import FrameType

FORWARDED = (signal.SIGUSR1, signal.SIGTERM)


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in ("torchrun", "accelerate"):
        print("usage: python launch/start_ranks.py torchrun|accelerate ARGUMENTS...", file=sys.stderr)
        return 2
    # the launchers name a failed rank in a screenful; explain says it in a line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for signum in FORWARDED:
        signal.signal(signum, _forward_to_ranks)
    _keep_torchrun_from(FORWARDED)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        _run_torchrun(argv[1:]) if argv[0] == "torchrun" else _run_accelerate(argv[1:])
    except ChildFailedError as e:
        _, first = e.get_first_failure()
        return explain(first.exitcode, f"rank {first.local_rank}")
    except subprocess.CalledProcessError as e:  # accelerate with one rank
        return explain(e.returncode, "the process")
    except SignalException as e:
        return 128 + e.sigval.value
    except KeyboardInterrupt:
        return 130
    return 0


def _run_torchrun(arguments: list[str]) -> None:
    from torch.distributed import run

    run.run(run.parse_args(arguments))


def _run_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(arguments[1:]))


def _keep_torchrun_from(signals: tuple[signal.Signals, ...]) -> None:
    """torchrun takes SIGTERM for itself unless --signals-to-handle says otherwise; accelerate has no such option."""
    from torch.distributed import run

    original = run.get_args_parser
    left = ",".join(s.name for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if s not in signals)

    def get_args_parser() -> argparse.ArgumentParser:
        parser = original()
        parser.set_defaults(signals_to_handle=left)  # torch before 2.8 does not read it, and keeps SIGTERM
        return parser

    run.get_args_parser = get_args_parser


def _forward_to_ranks(signum: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        try:
            child.send_signal(signum)
        except psutil.NoSuchProcess:
            pass  # it ended meanwhile


def explain(exit_code: int, who: str) -> int:
    """Our exit code for a rank's; ranks speak for themselves unless a signal ended them."""
    if exit_code >= 0:
        return exit_code
    name = signal.Signals(-exit_code).name
    hint = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
    print(f"error: {who} was ended by {name}{hint}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
