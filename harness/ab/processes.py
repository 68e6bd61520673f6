"""Several processes, each with its own GPU (or share of the CPUs) and its own clips: what they found becomes one run.

Lightning starts the processes and deals the clips out, none twice. Rollouts need nothing of each other, so the
processes exchange nothing while they run: each keeps what it has finished in a small file of the run's folder, and the
first process puts the files together. So a process that fails or is killed takes no finished clip with it, and nobody
waits for it in a collective operation.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from harness.ab.callbacks import ClipOutputs
from harness.ab.module import RolloutModule
from harness.config import RunConf
from harness.measure.stability import Incident, OnInstability
from harness.report import codec
from harness.report.record import write_atomically
from harness.report.sections import BatchTimes, ClipRecord

POLL_S = 0.1
"""Seconds between two looks at the other processes' files."""

PATIENCE_S = 1800.0
"""Seconds without a finished batch after which a process counts as hung; as long as torch's collectives wait."""

SUMMED = ("recompiles", "graph_breaks")
"""Attributes of an arm that are counts over all processes."""


class ProcessError(RuntimeError):
    """Another process of the run failed, was killed or hung."""


class ProcessParts(Callback):
    """Collects the clips, frame times and counters of all processes in the first one.

    Args:
        folder: of the run, which every process can reach.
        outputs: this process's finished clips; the first process's receives all others'.

    In a run of one process it does nothing.
    """

    def __init__(self, folder: Path, outputs: ClipOutputs) -> None:
        self.folder, self.outputs = folder / "processes", outputs
        self.started = False
        self._merged: set[int] = set()

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an error of this process is told through its file, not by dying."""
        self.started = True

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep what is finished; in the first process, stop if another one has failed."""
        if trainer.is_global_zero:
            for rank in range(1, trainer.world_size):
                self._raise_failure(rank, self._read(rank))
        else:
            self.write(trainer, pl_module, "running")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that this process is done; the first one waits for the others and takes over what they have."""
        if not trainer.is_global_zero:
            self.write(trainer, pl_module, "complete")
            return
        for rank in range(1, trainer.world_size):
            self._wait(trainer, rank)
        self.merge(trainer, pl_module)
        if trainer.world_size > 1:
            self.outputs.log_all(trainer)

    def write(self, trainer: Trainer, module: LightningModule, status: str, error: BaseException | None = None) -> None:
        """Write this process's file."""
        assert isinstance(module, RolloutModule)
        part = {
            "status": status,
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "clips": [asdict(clip) for clip in self.outputs.clips],
            "times": [asdict(times) for times in self.outputs.times],
            "rows": self.outputs.rows,
            "incidents": [asdict(incident) for incident in module.guard.incidents],
            "arms": {name: {field: getattr(arm, field) for field in SUMMED} for name, arm in module.arms.items()},
        }
        write_atomically(self._path(trainer.global_rank), codec.encode(part))

    def _read(self, rank: int) -> dict[str, Any] | None:
        path = self._path(rank)
        return json.loads(path.read_text()) if path.is_file() else None

    def _raise_failure(self, rank: int, part: dict[str, Any] | None) -> None:
        if part is not None and part["status"] == "failed":
            raise ProcessError(f"process {rank}: {part['error']}")

    def _wait(self, trainer: Trainer, rank: int) -> None:
        """Until process ``rank`` is done.

        Raises:
            ProcessError: if it failed, died, or finished no batch for ``PATIENCE_S`` seconds.
        """
        last, seen = time.monotonic(), None
        while True:
            alive = _alive(trainer, rank)  # before reading: what it wrote last is then there to be read
            part = self._read(rank)
            self._raise_failure(rank, part)
            if part is not None and part["status"] == "complete":
                return
            if not alive:
                raise ProcessError(f"process {rank} ended before it was done; its finished clips are kept")
            done = None if part is None else len(part["clips"])
            if done != seen:
                last, seen = time.monotonic(), done
            if time.monotonic() - last > PATIENCE_S:
                raise ProcessError(f"process {rank} finished no clip for {PATIENCE_S:.0f} s; it counts as hung")
            time.sleep(POLL_S)

    def merge(self, trainer: Trainer, module: LightningModule) -> None:
        """Take over what the other processes have finished so far; each once."""
        assert isinstance(module, RolloutModule)
        if trainer.world_size == 1:
            return
        for rank in range(1, trainer.world_size):
            part = None if rank in self._merged else self._read(rank)
            if part is None:
                continue
            self._merged.add(rank)
            self.outputs.clips += codec.read(list[ClipRecord], part["clips"])
            self.outputs.times += codec.read(list[BatchTimes], part["times"])
            self.outputs.rows += part["rows"]
            module.guard.incidents += [Incident(**incident) for incident in part["incidents"]]
            for name, figures in part["arms"].items():
                arm = module.arms[name]
                for field in SUMMED:
                    setattr(arm, field, getattr(arm, field) + figures[field])
        entries = getattr(trainer, "datamodule").entries  # noqa: B009  (Lightning's types do not know it)
        position = {entry.id: index for index, entry in enumerate(entries)}
        self.outputs.clips.sort(key=lambda clip: position[clip.clip_id])
        self.outputs.times.sort(key=lambda times: position[times.clips[0]])
        self.outputs.rows.sort(key=lambda row: position[row["clip_id"]])
        self.outputs.write_rows()

    def clean(self) -> None:
        """Remove the processes' files, once their content is in the record."""
        for path in self.folder.glob("*"):
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()


def _children(trainer: Trainer) -> list[Any]:
    """Processes that this one started, by rank from 1; none where something else (SLURM, torchrun) did."""
    return getattr(trainer.strategy.launcher, "procs", [])


def _alive(trainer: Trainer, rank: int) -> bool:
    children = _children(trainer)
    return not children or children[rank - 1].poll() is None


def stop_others(trainer: Trainer) -> None:
    """End the processes that this one started: the run is over."""
    for child in _children(trainer):
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)


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
