"""Roll clips out in BF16 and in the candidate formats, and report what it cost and what it gained.

python harness/run.py quant=mxfp8_all kv=mx_v_only
python harness/run.py -m quant=bf16,mxfp8_all,mxfp4_mlp kv=bf16,mx_v_only data.limit=2
"""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it first, where our rooms would pass for top-level packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.ab.callbacks import ClipOutputs, RolloutProgress
from harness.ab.module import RolloutModule
from harness.ab.processes import ProcessError, ProcessParts, check_clips, check_processes, stop_others
from harness.ab.recorder import Recorder, arm_labels
from harness.config import ROOT, RunConf, RunPlan, plan_run
from harness.config.extras import missing_launcher
from harness.data.datamodule import ClipDataModule
from harness.measure.stability import InstabilityError
from harness.models.checkpoint import load_encoder
from harness.report import incidents
from harness.report.gates import EXIT_CODES, check_comparable, evaluate
from harness.report.page.run_page import write_run_page
from harness.report.record import RunRecord, load_record, save_record, write_atomically
from harness.report.table import WIDTH, build, render

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the signal's number."""

AFTER_BREAK = (
    "Each job's folder keeps what it had finished (record.json, videos, frames.csv); the sweep's report.html shows "
    "which jobs those are. Run the others again."
)


class UserError(CompactHydraException):
    """An error that the user can put right: shown as it is, without a traceback."""


def build_data(plan: RunPlan) -> ClipDataModule:
    """The clips of a run, every one of them read and checked.

    Raises:
        ValueError: naming each clip that cannot be used, or the encoder's checkpoint.
    """
    encoder = None
    if plan.conf.data.source == "clips":
        assert plan.encoder_file is not None
        encoder = load_encoder(plan.encoder_file, plan.dcae).to(plan.device)
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


def run(cfg: DictConfig) -> str | None:
    """One run, from a composed config to its record, table and videos.

    Returns:
        The gates' verdict; ``None`` without gates.

    Raises:
        ValueError: for anything a user can put right.
        InstabilityError: if an arm became unstable and the run ends with that; clips finished before stay recorded.
        ProcessError: if another process of the run failed; likewise.
    """
    started, hydra_cfg = datetime.now(UTC), HydraConfig.get()
    plan = plan_run(cfg)
    if plan.conf.threads is not None:
        torch.set_num_threads(plan.conf.threads)
    check_processes(plan.conf, hydra_cfg.mode)
    baseline = load_baseline(plan, cfg)
    folder = Path(hydra_cfg.runtime.output_dir)
    outputs = ClipOutputs(folder, plan.conf.measure.videos, arm_labels(plan, hydra_cfg.runtime.choices))
    parts, recorder = ProcessParts(folder, outputs), Recorder(cfg, hydra_cfg, outputs, started)
    trainer = build_trainer(plan, folder, [outputs, recorder, parts, RolloutProgress()])
    plan = replace(plan, device=trainer.strategy.root_device)  # this process's own GPU
    data = build_data(plan)
    check_clips(len(data.entries), trainer.world_size)
    module = RolloutModule(plan)
    record: RunRecord | None = None
    error: BaseException | None = None
    try:
        parts.clean()
        trainer.predict(module, data, return_predictions=False)
    except BaseException as caught:
        error = caught
        if not trainer.is_global_zero and parts.started and isinstance(caught, Exception):
            parts.write(trainer, module, "failed", caught)
            return None  # the first process tells
        raise
    finally:
        # Whatever ended the run, Ctrl-C included: what was finished is recorded.
        if trainer.is_global_zero:
            if error is not None:
                stop_others(trainer)
            if module.arms:
                parts.merge(trainer, module)
                record = recorder.finished(module, data, error)
                conclude(record, plan.conf, baseline, folder)
            parts.clean()
    return record.gates["verdict"] if record and record.gates else None


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


def conclude(record: RunRecord, conf: RunConf, baseline: dict[str, Any] | None, folder: Path) -> None:
    """Save the record, judge it, show its table, and write what is made from it.

    Saved before it is judged and shown before anything more is written: neither a gate that cannot be evaluated nor a
    full disk takes a finished run with it.

    Raises:
        GateError: if the gate cannot be evaluated.
        OSError: naming the file that could not be written.
    """
    try:
        save_record(record, folder / "record.json")
        if conf.gates.enabled:
            record.gates = evaluate(asdict(record), conf.gates, baseline)
            save_record(record, folder / "record.json")
    finally:
        show(record)
    write_report(record, folder, conf.stability.incident_log)


def show(record: RunRecord) -> None:
    """Print the table."""
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(build(record))


def write_report(record: RunRecord, folder: Path, incident_log: str | None) -> None:
    """Write the record's table, its line of the incident log and its page."""
    write_atomically(folder / "table.txt", render(record))
    if incident_log:
        incidents.append(Path(incident_log), asdict(record))
    write_run_page(folder)
    print(f"Record, table, report.html and videos: {folder}")


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="run")
def main(cfg: DictConfig) -> None:
    """One job of Hydra's: errors that the user can put right end with their message, not a traceback."""
    try:
        verdict = run(cfg)
        if verdict is not None and HydraConfig.get().mode is not RunMode.MULTIRUN:
            sys.exit(EXIT_CODES[verdict])
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit with code 1
            sys.exit(INTERRUPTED)
        raise
    except (ValueError, OSError, InstabilityError, ProcessError) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise UserError(f"error: {error}") from error  # Hydra goes on with the other jobs and ends with this
        rank = getattr(rank_zero_only, "rank", 0)
        who = f"process {rank}: " if rank else ""
        print(f"{who}error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, InstabilityError | ProcessError) else 2)
    finally:
        # A sweep runs its jobs in one process: hand back what this one held.
        gc.collect()
        torch.cuda.empty_cache()


def cli() -> None:
    """The command.

    Exit code 0: done, and with gates: ship; 1: the run broke; 2: something in the command, config or files is wrong;
    3: do not ship; 4: undecided; 130: Ctrl-C. A sweep's verdicts are in its records: it ends with 0 if its runs ran.
    """
    if (missing := missing_launcher(sys.argv[1:])) is not None:
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.__context__, CompactHydraException):
            sys.exit(2)
        if stop.__context__ is not None and {"-m", "--multirun"} & set(sys.argv) and stop.code != INTERRUPTED:
            print(f"error: the sweep broke off: {stop.__context__}\n{AFTER_BREAK}", file=sys.stderr)
        raise


if __name__ == "__main__":
    cli()
