"""``python -m vlmdist`` is the ``vlmdist`` command; this is what torchrun and srun start."""

import sys

from vlmdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
