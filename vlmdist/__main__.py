"""``python -m vlmdist`` is the ``vlmdist`` command; this is what torchrun and srun start."""

from vlmdist.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
