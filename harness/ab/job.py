"""One run, from a composed config to its record, table, page and videos."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import Callback, Trainer
from omegaconf import DictConfig, OmegaConf

from harness.ab.callbacks import ClipOutputs, RolloutProgress
from harness.ab.conclude import conclude
from harness.ab.context import RunContext
from harness.ab.ending import Ending
from harness.ab.judged import header_of
from harness.ab.module import RolloutModule
from harness.ab.processes import ProcessParts, check_clips, check_processes
from harness.ab.recorder import Recorder, arm_labels
from harness.calib.clips import check_disjoint, open_clips
from harness.calib.plan import make_encoder
from harness.config import RunPlan, plan_run
from harness.data.datamodule import ClipDataModule
from harness.export.layout import ExportError
from harness.export.write import write_export
from harness.report.gates import check_comparable
from harness.report.record import COMPLETE, RunRecord, load_record
from harness.report.table import bytes_text
from harness.threads import usable_cores


def execute(cfg: DictConfig, context: RunContext) -> RunRecord | None:
    """Run a composed config; needs nothing of Hydra's beside it.

    Returns:
        The record; ``None`` in a process whose clips another one records.

    Raises:
        ValueError: for anything a user can put right.
        InstabilityError: if an arm became unstable and the run ends with that; clips finished before stay recorded.
        ProcessError: if another process of the run failed; likewise.
        OSError: naming what could not be written.
    """
    started = datetime.now(UTC)
    plan = plan_run(cfg)
    torch.set_num_threads(plan.conf.threads or min(torch.get_num_threads(), usable_cores()))
    check_processes(plan.conf, context.multirun)
    baseline = load_baseline(plan, cfg)
    outputs = ClipOutputs(context.folder, plan.conf.measure.videos, arm_labels(plan, context.choices))
    parts, recorder = ProcessParts(context.folder, outputs), Recorder(cfg, context, outputs, started)
    trainer = build_trainer(plan, context.folder, [outputs, recorder, parts, RolloutProgress()])
    plan = replace(plan, device=trainer.strategy.root_device)  # this process's own GPU
    data = build_data(plan)
    if plan.conf.calib.enabled:
        check_disjoint(open_clips(plan.conf.calib, plan.clip_shape, make_encoder(plan)), data)
    check_clips(len(data.entries), trainer.world_size)
    module = RolloutModule(plan)

    def concluded(record: RunRecord) -> list[Exception]:
        problems = conclude(record, plan.conf, baseline, context.folder)
        if plan.conf.export is not None and record.status == COMPLETE:
            problems += export_judged(plan, module, record, Path(plan.conf.export))
        return problems

    with Ending(trainer, module, data, parts, recorder, concluded) as ending:
        parts.clean()
        trainer.predict(module, data, return_predictions=False)
    return ending.record


def export_judged(plan: RunPlan, module: RolloutModule, record: RunRecord, path: Path) -> list[Exception]:
    """Write what the candidate rolled out with; returns what went wrong, so that it takes nothing else with it."""
    arm = module.arms["candidate"]
    try:
        header = write_export(arm.core, header_of(plan, arm.quant, arm.kv, record), path)
    except (ExportError, OSError) as error:
        return [error]
    print(f"Exported: {path} ({bytes_text(path.stat().st_size)}, weights {header.fingerprint[:12]})")
    return []


def build_data(plan: RunPlan) -> ClipDataModule:
    """The clips of a run, every one of them read and checked.

    Raises:
        ValueError: naming each clip that cannot be used, or the encoder's checkpoint.
    """
    encoder = make_encoder(plan) if plan.conf.data.source == "clips" else None
    data = ClipDataModule(plan.conf.data, plan.clip_shape, encoder)
    data.check()
    return data


def load_baseline(plan: RunPlan, cfg: DictConfig) -> dict[str, Any] | None:
    """The record that the gates compare with, checked to be comparable before anything runs.

    Raises:
        ValueError: if it is no record, or its run had another model, other clips or other settings.
    """
    gates = plan.conf.gates
    if not gates.enabled or gates.baseline is None:
        return None
    baseline = asdict(load_record(Path(gates.baseline)))
    config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    check_comparable(config, baseline)
    return baseline


def build_trainer(plan: RunPlan, folder: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer, which rolls nothing out yet and has started no other process."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # it advertises
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning against a newer torch
    return hydra.utils.instantiate(
        plan.conf.trainer,
        logger=hydra.utils.instantiate(plan.conf.logger),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )
