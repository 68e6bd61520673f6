"""An arm of the benchmark of rollouts, set up, warm and prefilled, and its clocks."""

from __future__ import annotations

import copy
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from harness.bench.floors import floor_ms
from harness.bench.inputs import random_inputs
from harness.bench.rows import Result, Row
from harness.config import RunPlan
from harness.measure.figures import summarise
from harness.measure.memory import PeakProbe
from harness.measure.timing import FrameTimer
from harness.models.gamerft import GameRFTCore
from harness.rollout import OverlappedDecoding, assemble


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in this thread after ``seconds``."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not ready within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class ReadyArm:
    """An arm that arms ready: set up, warm and prefilled."""

    def __init__(self, row: Row, plan: RunPlan, core: GameRFTCore, decode: Callable[[Tensor], Tensor]) -> None:
        start = time.perf_counter()
        self.plan, self.decode = plan, decode
        assembled = assemble(copy.deepcopy(core), plan.conf.quant, plan.conf.kv, plan.setup)
        self.rollout, summary = assembled.rollout, assembled.summary
        self.context, self.frame = random_inputs(plan, row.batch)
        self.rollout.prefill(*self.context)
        self.timer = FrameTimer(plan.device, ("dit", "decoder"))
        self.probe = PeakProbe(plan.device)
        self.result = Result(row.name, clips=row.batch, numeric_path=summary.numeric_path, emulated=summary.emulated)
        self.result.weight_bytes = assembled.weight_bytes
        self.result.cache_bytes = assembled.cache.nbytes().allocated
        self.result.run_bytes = assembled.allocated_bytes
        warmup = assembled.warmup._asdict()
        self.result.extra = {"warmup": warmup, "kernel": summary.kernel, "packed": assembled.packed}
        self.result.setup_s = time.perf_counter() - start

    def play(self, frames: int) -> None:
        """Time ``frames`` frames, each waited for."""
        with self.probe:
            for _ in range(frames):
                self.timer.start()
                latent = self.rollout.next_frame(*self.frame)
                self.timer.lap()
                self.decode(latent)
                self.timer.lap()

    def overlapped_fps(self, frames: int) -> float | None:
        """Frames per second of all clips when decoding overlaps with the next frame; None on a CPU."""
        if self.plan.device.type != "cuda":
            return None
        pipeline = OverlappedDecoding(self.rollout, self.decode)
        for timed in (False, True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(frames if timed else 5):
                pipeline.next_frame(*self.frame)
            torch.cuda.synchronize()
        return frames * self.result.clips / (time.perf_counter() - start)

    def _prefill_ms(self, runs: int = 5) -> float:
        """Median ms of a prefill, waited for."""
        timer = FrameTimer(self.plan.device, ("prefill",))
        for _ in range(runs):
            timer.start()
            self.rollout.prefill(*self.context)
            timer.lap()
        return statistics.median(row["prefill"] for row in timer.rows)

    def _host_us(self, runs: int = 50) -> float:
        """What a frame takes beyond its graph's replay, in µs: medians of both, which take turns."""
        graph = self.rollout.graph
        assert graph is not None, "nothing was captured"
        frame, replay = (FrameTimer(self.plan.device, ("ms",)) for _ in range(2))
        for _ in range(runs):
            for timer, run in ((frame, partial(self.rollout.next_frame, *self.frame)), (replay, graph.replay)):
                timer.start()
                run()
                timer.lap()
        whole, graphs = (statistics.median(row["ms"] for row in timer.rows) for timer in (frame, replay))
        return 1e3 * (whole - graphs)

    def finish(self, bandwidth: float, frames: int) -> Result:
        """Fill the result in."""
        columns = {part: summarise([row[part] for row in self.timer.rows]) for part in ("dit", "decoder", "total")}
        dit, decoder, total = columns["dit"], columns["decoder"], columns["total"]
        assert dit is not None
        assert decoder is not None
        assert total is not None
        result = self.result
        result.dit, result.decoder = asdict(dit), asdict(decoder)
        result.fps = 1e3 * result.clips / total.median
        result.fps_overlapped = self.overlapped_fps(frames)
        result.floor_ms = floor_ms(self.rollout, bandwidth)
        result.prefill_ms = self._prefill_ms()
        if self.rollout.graph is not None:
            result.host_us = self._host_us()
        transient = self.probe.result().transient
        if result.run_bytes is not None and transient is not None:
            result.run_bytes += transient
        return result
