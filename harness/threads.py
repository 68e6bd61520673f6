"""CPU threads on a machine that others use too.

OpenMP's threads spin while they wait for one another, for milliseconds after each parallel loop. Where another process
holds one of the cores, the threads that wait take the time from the one they wait for: two busy cores turned frames of
50 ms into 2 s. So they sleep instead, and no more are started than this process may use cores.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU per period that a container gets (Linux, cgroup v2)."""


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait, unless the user chose otherwise.

    The library reads the variable when it is loaded: this must come before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


M_ARENA_MAX = -8
"""``mallopt``'s parameter in glibc's malloc.h."""


def share_arenas(most: int = 2) -> None:
    """Let all threads of this process allocate from at most ``most`` of glibc's arenas, unless the user chose a number.

    By default each thread may get one of its own, up to eight a core, and each keeps what its threads once held: an
    hour's play stood at 850 MiB with them and at 600 MiB with two. Elsewhere than under glibc nothing happens. Arenas
    that exist stay: this comes before the threads.
    """
    if "MALLOC_ARENA_MAX" in os.environ or sys.platform != "linux":
        return
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, most)


def usable_cores(quota: Path = QUOTA) -> int:
    """Cores that this process may use: its affinity, and its container's share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota.read_text(encoding="ascii").split()[:2]
        return max(1, min(cores, math.ceil(int(granted) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no container, or "max": no quota
        return cores


def threads_of_a_game(cores: int) -> int:
    """Threads of one operator where a frame is denoised while the one before it is decoded: half of the cores each.

    Two frames in flight need no barrier between cores, which a parallel operator needs at its end: of two cores each
    works for itself, which two threads an operator that sleep while they wait for one another do not come near.
    """
    return max(1, cores // 2)
