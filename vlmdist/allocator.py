"""Memory that is freed stays with the process, for the next sample.

By default glibc asks the system for every block over 128 KB and gives it back at once: each encoded picture and each
decoded one then costs page faults over all its bytes, half of the time of a raw read (28,000 reads of 196 kB a second
with a batch of 16 held, 62,000 so). See mallopt(3).
"""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_KEPT_BYTES = 32 << 20  # glibc's own upper limit
_FREE_KEPT_BYTES = 128 << 20
_ASKED_AT_ONCE_BYTES = 4 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Tell this process's allocator, once; forked processes inherit it. False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS
        return False
    settings = {
        _M_MMAP_THRESHOLD: _LARGEST_KEPT_BYTES,
        _M_TRIM_THRESHOLD: _FREE_KEPT_BYTES,
        _M_TOP_PAD: _ASKED_AT_ONCE_BYTES,
    }
    return min(mallopt(name, value) for name, value in settings.items()) == 1
