"""What the microbenchmark measures with: rows, a time limit, medians of CUDA-graph replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.measure.timing import samples_ms


@dataclass
class Row:
    """One measurement. Times in µs per call; ``error`` is relative, in the Euclidean norm, to float64."""

    part: str
    name: str
    shape: str
    variant: str
    n: int = 0
    us: float | None = None
    p90: float | None = None
    floor_us: float | None = None
    of_bf16: float | None = None
    gb_s: float | None = None
    error: float | None = None
    note: str = ""


class OutOfTimeError(Exception):
    """The time limit was reached."""


@dataclass
class Bench:
    """How to measure, and what was measured."""

    device: torch.device
    iterations: int
    warmup: int
    deadline: float
    bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the time limit was reached."""
        return time.perf_counter() > self.deadline

    def check_time(self) -> None:
        """Raise ``OutOfTimeError`` if it was."""
        if self.over:
            raise OutOfTimeError

    def synchronise(self) -> None:
        """Wait for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copies(self, size: int) -> int:
        """Copies of something of ``size`` bytes that together exceed twice the L2 cache (1 on a CPU)."""
        if self.device.type != "cuda":
            return 1
        return max(1, min(128, -(-2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size)))

    def time(self, calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
        """Median and 90th percentile in µs per call over ``iterations`` rounds of all ``calls``."""

        def round_of_calls() -> None:
            for call in calls:
                call()

        run: Callable[[], object] = round_of_calls
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):  # a first run builds what capturing must not
                round_of_calls()
            self.synchronise()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                round_of_calls()
            run = graph.replay
        times = sorted(1e3 * ms for ms in samples_ms(run, self.device, self.iterations, self.warmup))
        median, p90 = statistics.median(times), times[int(0.9 * (len(times) - 1))]
        return median / len(calls), p90 / len(calls)

    def measure_bandwidth(self) -> None:
        """GB/s of a copy on the device, bytes read plus bytes written."""
        size = 2**30 if self.device.type == "cuda" else 2**26
        a = torch.ones(size, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        self.bandwidth = 2 * size / self.time([lambda: b.copy_(a)])[0] / 1e3
