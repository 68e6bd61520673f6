"""One run, from a composed config to its record, table, page and videos."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import hydra
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from harness.ab.callbacks import RolloutProgress
from harness.ab.conclude import conclude
from harness.ab.context import RunContext
from harness.ab.ending import Ending
from harness.ab.folder import RunFolder
from harness.ab.judged import export_run, header_of
from harness.ab.log import logged_to
from harness.ab.module import RolloutModule
from harness.ab.processes import Processes, check_clips, check_processes
from harness.ab.recorder import Recorder, arm_labels
from harness.ab.results import Results
from harness.ab.resume import Resumption, finished_before, plain_config, write_config
from harness.calib.clips import check_disjoint, open_clips
from harness.calib.plan import make_encoder
from harness.config import RunConf, RunPlan, plan_run
from harness.data.datamodule import ClipDataModule
from harness.export.layout import ExportError
from harness.export.read import Export
from harness.export.write import write_export
from harness.report.files import LOG
from harness.report.gates import check_comparable
from harness.report.journal import remove_journals
from harness.report.record import COMPLETE, RunRecord, load_record
from harness.report.table import bytes_text
from harness.signals import Signals
from harness.threads import usable_cores

log = logging.getLogger(__name__)
_UNTOUCHED = torch.get_num_threads()
"""Threads that torch chose by itself, for jobs of a sweep that come after one that asked for others."""


def execute(cfg: DictConfig, context: RunContext) -> RunRecord | None:
    """Run a composed config; needs nothing of Hydra's beside it.

    Returns:
        The record; ``None`` in a process whose clips another one records.

    Raises:
        ValueError: for anything a user can put right, a folder that another run has used among it.
        InstabilityError: if an arm became unstable and the run ends with that; clips finished before stay recorded.
        ProcessError: if another process of the run failed; likewise.
        Stopped: if a signal ended it; likewise.
        OSError: naming what could not be written.
    """
    started = datetime.now(UTC)
    with Signals() as signals, RunFolder(context.folder) as folder:
        plan = plan_run(cfg)
        check_processes(plan.conf, context.multirun)
        baseline = load_baseline(plan, cfg)
        set_threads(plan.conf)
        results = Results(context.folder, plan.conf.measure.videos, arm_labels(plan, context.choices))
        processes, recorder = Processes(context.folder, results), Recorder(cfg, context, results, started)
        resumption = Resumption(context.folder, results)
        callbacks = [resumption, results, recorder, RolloutProgress(), processes, _Retake(signals)]
        trainer = build_trainer(plan, context.folder, callbacks)
        plan = replace(plan, device=trainer.strategy.root_device)  # this process's own GPU
        if trainer.is_global_zero:
            folder.claim(plan.conf.resume, plan.conf.overwrite)
            if plan.conf.resume and (earlier := finished_before(context.folder, cfg)) is not None:
                for problem in conclude(earlier, plan.conf, baseline, context.folder):
                    raise problem
                if plan.conf.export is not None:
                    make_up_export(earlier, Path(plan.conf.export))
                remove_journals(context.folder)
                return earlier
            if plan.conf.export is not None and Path(plan.conf.export).exists():
                raise ExportError(f"export={plan.conf.export}: exists, and this run has not come to its end; delete it")
            write_config(cfg, context)
        with logged_to(context.folder / LOG) if trainer.is_global_zero else nullcontext():
            if folder.unlocked is not None:
                told = "%s: no lock keeps another run out of this folder (%s); see that none is started in it"
                log.warning(told, context.folder, folder.unlocked)
            log.info("run %s: %s", context.folder.name, " ".join(context.overrides) or "defaults")
            data = build_data(plan)
            if plan.conf.calib.enabled:
                check_disjoint(open_clips(plan.conf.calib, plan.clip_shape, make_encoder(plan)), data)
            resumption.prepare(plan, cfg, data, trainer)
            check_clips(len(data.remaining), trainer.world_size)
            module = RolloutModule(plan)

            def concluded(record: RunRecord) -> list[Exception]:
                problems = conclude(record, plan.conf, baseline, context.folder)
                if plan.conf.export is not None and record.status == COMPLETE:
                    problems += export_judged(plan, module, record, Path(plan.conf.export))
                return problems

            with Ending(trainer, module, data, processes, recorder, signals, concluded) as ending:
                trainer.predict(module, data, return_predictions=False)
    return ending.record


def make_up_export(record: RunRecord, path: Path) -> None:
    """Write the export of a finished run that was killed before it had, unless the file is there and holds it.

    Raises:
        ExportError: if the file is there and is another one, or the candidate cannot be set up as it was judged.
        OSError: if it cannot be written.
    """
    candidate = record.candidate
    if path.exists():
        held = Export(path).header.fingerprint
        if candidate is None or held != candidate.weights_sha256:
            raise ExportError(f"export={path}: exists, and holds other weights than this run judged; delete it")
        print(f"Exported: {path} is there (weights {held[:12]})")
        return
    header = export_run(record, path)
    print(f"Exported: {path} ({bytes_text(path.stat().st_size)}, weights {header.fingerprint[:12]})")


def export_judged(plan: RunPlan, module: RolloutModule, record: RunRecord, path: Path) -> list[Exception]:
    """Write what the candidate rolled out with; returns what went wrong, so that it takes nothing else with it."""
    arm = module.arms["candidate"]
    try:
        header = write_export(arm.core, header_of(plan, arm.quant, arm.kv, record), path)
    except (ExportError, OSError) as error:
        return [error]
    print(f"Exported: {path} ({bytes_text(path.stat().st_size)}, weights {header.fingerprint[:12]})")
    return []


class _Retake(Callback):
    """Takes the signals back from Lightning, which on SIGTERM would wait for the end of the batch."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After Lightning has taken them."""
        self.signals.install()
        assert isinstance(pl_module, RolloutModule)
        before = pl_module.on_frame

        def on_frame() -> None:
            before()
            self.signals.check()

        pl_module.on_frame = on_frame


def set_threads(conf: RunConf) -> None:
    """As many threads as the config says, or as this process's share of the cores it may use."""
    shared = max(1, usable_cores() // conf.trainer.devices)
    own = _UNTOUCHED if "OMP_NUM_THREADS" in os.environ else min(_UNTOUCHED, shared)
    torch.set_num_threads(conf.threads or own)
    if conf.trainer.devices > 1 and conf.threads is None:
        # Lightning would count cores without their quota.
        os.environ.setdefault("OMP_NUM_THREADS", str(own))


def build_data(plan: RunPlan) -> ClipDataModule:
    """The clips of a run, every one of them read and checked.

    Raises:
        ValueError: naming each clip that cannot be used, or the encoder's checkpoint.
    """
    encoder = make_encoder(plan) if plan.conf.data.source == "clips" else None
    data = ClipDataModule(plan.conf.data, plan.clip_shape, encoder)
    data.check()
    return data


def load_baseline(plan: RunPlan, cfg: DictConfig) -> RunRecord | None:
    """The record that the gates compare with, checked to be comparable before anything runs.

    Raises:
        ValueError: if it is no record, or its run had another model, other clips or other settings.
    """
    gates = plan.conf.gates
    if not gates.enabled or gates.baseline is None:
        return None
    baseline = load_record(Path(gates.baseline))
    check_comparable(plain_config(cfg), baseline)
    return baseline


def build_trainer(plan: RunPlan, folder: Path, callbacks: Sequence[Callback]) -> Trainer:
    """Lightning's trainer, which rolls nothing out yet and has started no other process."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # it advertises
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning against a newer torch
    return hydra.utils.instantiate(
        plan.conf.trainer,
        logger=hydra.utils.instantiate(plan.conf.logger),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )
