"""Numbers as a person reads them."""

_GIB = 2**30


def gibibytes(num_bytes: float) -> str:
    """GPU memory, as nvidia-smi and torch tell it."""
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def gigabytes(num_bytes: float) -> str:
    """Files, as disks are sold."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def duration(hours: float) -> str:
    """Of a run."""
    if hours >= 72:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.2g} s"
