"""What this process takes of the machine: threads and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time

import torch

from harness.session import Engine
from harness.threads import threads_of_a_game, usable_cores

PAGE = os.sysconf("SC_PAGE_SIZE")


def settle_threads(engine: Engine) -> None:
    """As many threads an operator as the config says, or as suit a game on this machine."""
    cores = min(torch.get_num_threads(), usable_cores())
    own = threads_of_a_game(usable_cores()) if engine.device.type == "cpu" else cores
    torch.set_num_threads(engine.plan.conf.threads or min(own, cores))


def resident_bytes() -> int:
    """Bytes in memory now; where the system does not tell (no ``/proc``), the most there ever were."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def give_memory_back() -> None:
    """Hand what is free in the allocator's arenas to the system (glibc; elsewhere nothing happens).

    Threads that come and go each leave an arena behind, up to eight a core, with all that they once held.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class Memory:
    """What this process and its GPU hold, as frames tell it: asked again once it is older than ``every_s``.

    Torch's allocator takes longer to say than a small part of a frame on a GPU.
    """

    def __init__(self, device: torch.device, every_s: float = 0.5) -> None:
        self._device, self._every = device, every_s
        self._known: dict[str, int] = {}
        self._at = -every_s

    def held(self) -> dict[str, int]:
        """Bytes: ``rss``, and on a GPU ``gpu``."""
        if (now := time.monotonic()) - self._at >= self._every:
            self._at, self._known = now, {"rss": resident_bytes()}
            if self._device.type == "cuda":
                self._known["gpu"] = torch.cuda.memory_allocated(self._device)
        return self._known
