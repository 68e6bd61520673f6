"""Several processes, each with its own GPU (or share of the CPUs) and its own clips: what they found becomes one run.

Lightning starts the processes and deals the clips out, none twice. Rollouts need nothing of each other, so the
processes exchange nothing while they run: each keeps a journal in the run's folder, and the first process puts them
together. So a process that fails or is killed takes no finished clip with it, and nobody waits for it in a collective
operation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from harness.ab.module import RolloutModule
from harness.ab.results import Results, log_clips
from harness.config import RunConf
from harness.measure.conf import RUN_ENDED, OnInstability
from harness.measure.stability import Incident, InstabilityError
from harness.report.journal import End, FinishedBatch, Journal, Line
from harness.report.record import COMPLETE, FAILED
from harness.report.sections import IncidentRecord
from harness.signals import Stopped

POLL_S = 0.1
"""Seconds between two looks at the other processes' files."""

PATIENCE_S = 1800.0
"""Seconds without a finished batch after which a process counts as hung; as long as torch's collectives wait."""

GRACE_S = 10.0
"""Seconds that a process has to end after it was told to."""


class ProcessError(RuntimeError):
    """Another process of the run failed, was killed or hung."""


class Processes(Callback):
    """Collects what all processes finish in the first one, and ends them together.

    Args:
        folder: of the run, which every process can reach.
        results: of this process; the first process's receive all others'.

    In a run of one process it does nothing.
    """

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self.started = False
        self._parent = os.getppid()
        self._children: list[subprocess.Popen[bytes]] = []
        self._journals: dict[int, Journal] = {}
        self._batches: list[FinishedBatch] = []
        self._ends: dict[int, End] = {}

    @property
    def orphaned(self) -> bool:
        """Whether the process that started this one, of others than the first, is gone."""
        return os.getppid() != self._parent

    def adopt(self, trainer: Trainer) -> None:
        """Take over the processes that Lightning started, whose own watch would kill this one without a word."""
        procs = getattr(trainer.strategy.launcher, "procs", [])
        self._children += procs
        procs.clear()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an error of this process is told through its journal, not by dying."""
        self.started = True
        self.adopt(trainer)
        assert isinstance(pl_module, RolloutModule)
        before = pl_module.on_frame

        def on_frame() -> None:
            before()
            self._look_around(trainer)

        if trainer.world_size > 1:
            pl_module.on_frame = on_frame

    def _look_around(self, trainer: Trainer) -> None:
        """After each frame: nobody goes on alone. Raises ``ProcessError``; if the first process died, ``Stopped``."""
        if trainer.is_global_zero:
            for rank, child in enumerate(self._children, 1):
                if child.poll() not in (None, 0):
                    self._read(rank)
                    self._raise_failure(rank)
                    raise ProcessError(f"process {rank} ended before it was done; its finished clips are kept")
        elif self.orphaned:
            raise Stopped(signal.SIGTERM)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """In the first process, stop if another one has failed."""
        if trainer.is_global_zero:
            for rank in range(1, trainer.world_size):
                self._read(rank)
                self._raise_failure(rank)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that this process is done; the first one waits for the others and takes over what they have."""
        if not trainer.is_global_zero:
            self.tell(trainer, End(COMPLETE))
            return
        for rank in range(1, trainer.world_size):
            self._wait(rank)
        self.merge(trainer, pl_module)
        if trainer.world_size > 1:
            log_clips(trainer, self.results.clips)

    def tell(self, trainer: Trainer, end: End) -> None:
        """Tell the first process how this one ended."""
        Journal(self.folder, trainer.global_rank).append(Line(end=end))

    def fail(self, trainer: Trainer, module: RolloutModule, error: BaseException) -> None:
        """Tell the first process that this one failed, and of its last incidents."""
        incidents = [IncidentRecord(**asdict(one)) for one in module.guard.incidents[self.results.incidents_told :]]
        self.tell(trainer, End(FAILED, f"{type(error).__name__}: {error}", incidents))

    def _read(self, rank: int) -> int:
        """Take note of what process ``rank`` has written since the last look; returns how many lines that is."""
        lines = self._journals.setdefault(rank, Journal(self.folder, rank)).new_lines()
        for line in lines:
            if line.batch is not None:
                self._batches.append(line.batch)
            if line.end is not None:
                self._ends[rank] = line.end
        return len(lines)

    def _raise_failure(self, rank: int) -> None:
        """As the process did: a candidate that is unstable in its clips is unstable, not a process that broke."""
        end = self._ends.get(rank)
        if end is None or end.status != FAILED:
            return
        for one in end.incidents:
            if one.action == RUN_ENDED:
                raise InstabilityError(Incident(**asdict(one)))
        raise ProcessError(f"process {rank}: {end.error}")

    def _wait(self, rank: int) -> None:
        """Until process ``rank`` is done.

        Raises:
            ProcessError: if it failed, died, or finished no batch for ``PATIENCE_S`` seconds.
        """
        last = time.monotonic()
        while True:
            alive = not self._children or self._children[rank - 1].poll() is None  # before reading its last line
            if self._read(rank):
                last = time.monotonic()
            self._raise_failure(rank)
            if rank in self._ends:
                return
            if not alive:
                raise ProcessError(f"process {rank} ended before it was done; its finished clips are kept")
            if time.monotonic() - last > PATIENCE_S:
                raise ProcessError(f"process {rank} finished no clip for {PATIENCE_S:.0f} s; it counts as hung")
            time.sleep(POLL_S)

    def merge(self, trainer: Trainer, module: LightningModule) -> None:
        """Take over what the other processes have finished so far; each once."""
        assert isinstance(module, RolloutModule)
        if trainer.world_size == 1:
            return
        for rank in range(1, trainer.world_size):
            self._read(rank)
        batches, self._batches = self._batches, []
        ids = [entry.id for entry in getattr(trainer, "datamodule").entries]  # noqa: B009  (not in Lightning's types)
        self.results.take_over(module, batches, ids)
        for end in self._ends.values():
            module.guard.take_over(end.incidents, [])
            end.incidents = []

    def stop(self, trainer: Trainer) -> None:
        """End the processes that this one started, before it ends itself: the run is over."""
        self.adopt(trainer)
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        for child in self._children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def check_processes(conf: RunConf, multirun: bool) -> None:
    """Check what several processes can do together, before they are started.

    Raises:
        ValueError: in a sweep, whose jobs share one command line; and where each process could fall back by itself.
    """
    devices = conf.trainer.devices
    if devices * conf.trainer.num_nodes == 1:
        return
    if multirun:
        raise ValueError(
            f"trainer.devices={devices} in a sweep (-m): Lightning starts its processes by repeating the command, "
            "which is the whole sweep. Give each job one device and let a launcher run jobs side by side, "
            "see docs/sweeps.md; or run the configurations one after another without -m"
        )
    if conf.on_instability is OnInstability["fallback"]:
        raise ValueError(
            f"on_instability=fallback with trainer.devices={devices}: each process would fall back by itself, to "
            "formats of its own; use one device, or on_instability=raise or record"
        )


def check_clips(clips: int, processes: int) -> None:
    """Raise ``ValueError`` if a process would have no clip."""
    if clips < processes:
        raise ValueError(
            f"{processes} processes for {clips} clips: every process needs one; use trainer.devices={clips}"
        )
