"""What becomes of freed memory: a process's setting, so for what owns the process (the console script, a benchmark)."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_memory() -> bool:
    """Have glibc keep freed memory for this process's next arrays; returns whether it does. To be called first.

    Each step makes and frees the same arrays. As glibc comes, large ones may go back to the system and return page by
    page, in one process more than in the next (docs/performance.md). Nothing is changed under another C library, or
    where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ in the environment says what to do. (mallopt(3))
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == mallopt(M_TRIM_THRESHOLD, -1) == 1
