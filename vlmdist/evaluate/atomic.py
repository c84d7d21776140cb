"""Write a file so that a kill leaves either the old one or the new one, never a part."""

import os
from pathlib import Path


def replace_file_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 beside ``path``, then move it there. One writer a path."""
    staging = path.with_name(f".staging-{path.name}")
    with open(staging, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(staging, path)
