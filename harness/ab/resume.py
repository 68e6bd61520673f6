"""Going on after the last clip that an earlier run of the same command finished, with the same figures to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from harness.ab.context import RunContext
from harness.ab.module import RolloutModule, pad_batch
from harness.ab.results import Results, log_clips
from harness.config import RunConf, RunPlan
from harness.data.datamodule import ClipDataModule
from harness.measure.environment import gpu
from harness.report.files import CONFIG, RECORD
from harness.report.journal import FinishedBatch, Head, Journal, Line, read_journals, remove_journals
from harness.report.record import COMPLETE, RunRecord, load_record

MAY_DIFFER = ("resume", "overwrite")
"""Fields of the config that change no figure."""


class ResumeError(ValueError):
    """What an earlier run left cannot be gone on with."""


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The composed config, resolved, as plain data."""
    found: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return {str(key): value for key, value in found.items()}


def write_config(cfg: DictConfig, context: RunContext) -> None:
    """Keep the config and what was typed in the run's folder, as Hydra does."""
    folder = context.folder / CONFIG
    folder.mkdir(exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    OmegaConf.save(OmegaConf.create(list(context.overrides)), folder / "overrides.yaml")


def finished_before(folder: Path, cfg: DictConfig) -> RunRecord | None:
    """The record of an earlier run in ``folder`` that came to its end; ``None`` if there is none.

    Raises:
        ResumeError: if it was another run.
    """
    if not (folder / RECORD).is_file():
        return None
    record = load_record(folder / RECORD)
    _check_same(folder, "", plain_config(cfg), record.config)
    return record if record.status == COMPLETE else None


def _check_same(folder: Path, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    different = list(_differences(ours, theirs))
    if different:
        raise ResumeError(
            f"{folder}: the run in it had {'; '.join(different[:5])}{what}. resume=true goes on with the same command "
            "only; overwrite=true replaces it"
        )


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            if name or key not in MAY_DIFFER:
                yield from _differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else str(key))
    elif ours != theirs:
        yield f"{name}={theirs}, not {ours}"


def machine(plan: RunPlan) -> dict[str, Any]:
    """What the last bit of a figure depends on beside the config: torch, the device, threads, the weights' files."""
    conf, device = plan.conf, plan.device
    name = (gpu(device.index or 0) or {}).get("name") if device.type == "cuda" else "cpu"
    files = {"model": conf.model.checkpoint, "decoder": conf.decoder.checkpoint, "encoder": conf.decoder.encoder}
    stats = {what: Path(file).stat() for what, file in files.items() if file is not None}
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "checkpoints": {what: [stat.st_size, stat.st_mtime_ns] for what, stat in stats.items()},
    }


class Resumption(Callback):
    """Begins a run's journal, or takes over what one holds.

    Args:
        folder: of the run.
        results: which an earlier run's are put into.

    ``batches``: finished by the earlier run; none without ``resume``.
    """

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self.batches: list[FinishedBatch] = []

    def prepare(self, plan: RunPlan, cfg: DictConfig, data: ClipDataModule, trainer: Trainer) -> None:
        """Leave out the clips that are finished, and begin the journal with what the run is.

        Raises:
            ResumeError: if the earlier run was another one, or computed otherwise.
            ValueError: if its journal is damaged.
            OSError: if the journal cannot be written.
        """
        head = Head(plain_config(cfg), [entry.id for entry in data.entries], machine(plan))
        if plan.conf.resume:
            self._look_back(plan.conf, head, data, trainer.world_size)
        if trainer.is_global_zero:
            remove_journals(self.folder)
            journal = Journal(self.folder, 0)
            for line in (Line(head=head), *(Line(batch=batch) for batch in self.batches)):
                journal.append(line)

    def _look_back(self, conf: RunConf, head: Head, data: ClipDataModule, processes: int) -> None:
        before, batches = read_journals(self.folder)
        if before is None:
            return
        _check_same(self.folder, "", head.config, before.config)
        _check_same(self.folder, " when it ran", head.machine, before.machine)
        _check_same(self.folder, " among its clips", {"clips": head.clips}, {"clips": before.clips})
        # Every process needs something to do; a clip that is rolled out again gives the same figures.
        while batches and len(head.clips) - sum(len(batch.done) for batch in batches) < processes:
            batches.pop()
        self.batches = batches
        data.done = frozenset(clip for batch in batches for clip in batch.done)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once the arms are built: make what the earlier run finished this one's."""
        assert isinstance(pl_module, RolloutModule)
        if not self.batches:
            return
        data: ClipDataModule = getattr(trainer, "datamodule")  # noqa: B009  (not in Lightning's types)
        pl_module.batches_before = len(self.batches)
        if not trainer.is_global_zero:
            return
        pl_module.first = pad_batch(data.first_batch(pl_module.plan.device), data.conf.batch_size)
        self.results.take_over(pl_module, self.batches, [entry.id for entry in data.entries])
        if trainer.world_size == 1:
            log_clips(trainer, self.results.clips)
