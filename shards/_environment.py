"""Imported first by every script here: go on in the repository's .venv where the Python at hand has no vlmdist.

So `python shards/sroie.py ...` works in any shell once launch/demo.sh or launch/test.sh has made the environment.
"""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("vlmdist") is None:
    _venv = Path(os.environ.get("VLMDIST_VENV") or Path(__file__).resolve().parents[1] / ".venv")
    _python = _venv / "bin" / "python"
    if not _python.exists() or Path(sys.prefix).resolve() == _venv.resolve():
        print(f"error: {sys.executable} has no vlmdist: set it up with bash launch/test.sh", file=sys.stderr)
        sys.exit(2)
    os.execv(_python, [str(_python), *sys.argv])  # noqa: S606 - no shell on purpose
