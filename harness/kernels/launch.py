"""Programmatic dependent launch: our kernels begin before the one in front of them has ended.

Each lets the next one begin at once, does what depends on nothing (fetching weights, mostly), and then waits until the
one in front is over, whose own wait comes before its end: so everything before it is over too. Nothing that another
kernel computes is read or written before the wait. Kernels of others, not launched so, wait for all before them as
ever. (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".)
"""

from __future__ import annotations

import functools
import importlib.util

import torch

ENABLED = True
"""Set to False to measure what it gains (docs/performance.md)."""


@functools.cache
def _possible(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device)[0] >= 9


def dependent(device: torch.device) -> bool:
    """Whether kernels on ``device`` are launched so: Hopper and newer."""
    return ENABLED and _possible(device)
