"""Bytes an arm holds (weights, cache) and needs on top while it runs.

On a GPU transient figures come from the CUDA caching allocator; on a CPU there is no such account, so the
process's peak resident set is given instead, under a name that says so.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _plain_tensors(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that really hold memory: quantised tensor subclasses are opened up."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``; views and shared tensors count once."""
    storages = {}
    for tensor in tensors:
        for plain in _plain_tensors(tensor):
            storage = plain.untyped_storage()
            storages[(plain.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as stored, packed formats included."""
    return storage_bytes([*module.parameters(), *module.buffers()])


@dataclass(frozen=True)
class Transient:
    """What running an arm needed at its peak.

    ``peak_allocated`` and ``peak_reserved`` are the CUDA allocator's maxima while the arm ran, other
    residents (the other arm) included; ``transient`` is the peak above what was allocated when it started.
    On a CPU these are ``None`` and ``process_peak_rss`` is the process's peak resident set so far, all arms
    and imports included.
    """

    peak_allocated: int | None
    peak_reserved: int | None
    transient: int | None
    process_peak_rss: int


def process_peak_rss() -> int:
    """Peak resident set of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakProbe:
    """Tracks the peak over several stretches of one arm's work: ``with probe: ...`` around each.

    ``peaks``: those of each stretch, bytes, under the names of :class:`Transient`; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: list[dict[str, int]] = []
        self._start = 0

    def __enter__(self) -> PeakProbe:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            self.peaks.append({"peak_allocated": peak, "peak_reserved": reserved, "transient": peak - self._start})

    def result(self) -> Transient:
        """The peaks so far."""
        if self.device.type != "cuda":
            return Transient(None, None, None, process_peak_rss())
        names = ("peak_allocated", "peak_reserved", "transient")
        most = {name: max((peaks[name] for peaks in self.peaks), default=0) for name in names}
        return Transient(**most, process_peak_rss=process_peak_rss())


class AllocationMeter:
    """Bytes the CUDA allocator hands out during set-up and that stay allocated; ``None`` on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = self._now()

    def _now(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def taken(self) -> int | None:
        """Bytes allocated since the meter was made (or last read) and still held."""
        now = self._now()
        taken = None if now is None or self._start is None else now - self._start
        self._start = now
        return taken
