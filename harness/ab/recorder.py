"""Turns a finished (or broken off) run into its record: the one place that reads live objects for the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from harness.ab.arm import PARTS, Arm
from harness.ab.callbacks import ClipOutputs
from harness.ab.module import RolloutModule
from harness.config import RunPlan
from harness.config.flags import ignored
from harness.data.datamodule import ClipDataModule
from harness.kv import describe as describe_kv
from harness.measure.environment import environment
from harness.measure.quality import clip_row, summarise_quality
from harness.measure.stability import InstabilityError
from harness.measure.timing import Stats, summarise
from harness.report.drift import summarise_drift
from harness.report.record import ArmRecord, RunRecord, save_record
from harness.rollout import AttentionKind

RANDOM_WEIGHTS = "Random weights: speed is real, quality is not."


def arm_labels(plan: RunPlan, choices: dict[str, str]) -> dict[str, str]:
    """What to call each arm: the config groups that make the candidate differ."""
    parts = []
    if plan.conf.quant.enabled:
        parts.append(choices.get("quant", "quant"))
    if plan.conf.kv.enabled:
        parts.append(choices.get("kv", "kv"))
    return {"bf16": "BF16", "candidate": " + ".join(parts)}


def _stats(values: Sequence[float]) -> dict[str, float] | None:
    stats = summarise(values)
    return None if stats is None else asdict(stats)


def _speed(arm: Arm, batch: int, skipped: int) -> dict[str, Any]:
    spans: dict[str, Stats | None] = {
        span: summarise([row[span] for row in arm.timed]) for span in ("dit", "decoder", "total")
    }

    def fps(stats: Stats | None) -> float | None:
        return None if stats is None else batch * 1000 / stats.median

    return {
        "batch": batch,
        "skipped_frames_per_clip": skipped,
        "pipeline_fps": fps(spans["dit"]),
        "total_fps": fps(spans["total"]),
        **{f"{span}_ms": None if stats is None else asdict(stats) for span, stats in spans.items()},
        "prefill_ms": _stats(arm.prefill_ms),
        "overlapped": None if arm.overlap is None else asdict(arm.overlap),
    }


def _parts(arm: Arm) -> dict[str, Any] | None:
    if not arm.parts:
        return None
    count = len(arm.parts)
    return {
        "method": f"a separate, instrumented eager pass of {count} frames; inside a compiled frame there are no parts",
        "frames": count,
        "ms": {part: _stats([row[part] for row in arm.parts]) for part in PARTS},
    }


def _memory(arm: Arm) -> dict[str, Any]:
    cache = arm.cache.nbytes()
    # The fused kernels read the rings as they are stored: no layer is ever dequantised.
    fused = arm.rollout.attention is AttentionKind.fused
    return {
        "weight_bytes": arm.assembled.weight_bytes,
        "kv_window_bytes": cache.allocated,
        "kv_window_bytes_computed": cache.computed,
        "kv_window_bytes_unquantised": cache.plain,
        "kv_bytes_by_format": cache.by_format,
        "kv_scratch_bytes": cache.scratch,
        "kv_peak_bytes": cache.allocated if fused else cache.peak,
        "kv_dequantised_bytes_per_step": cache.dequantised_per_step,
        "cache_and_graph_allocated": arm.assembled.allocated_bytes,
        **asdict(arm.probe.result()),
    }


def arm_record(arm: Arm, label: str, plan: RunPlan) -> ArmRecord:
    """One arm's section of the record."""
    summary, warmup, conf = arm.assembled.summary, arm.assembled.warmup, plan.conf
    return ArmRecord(
        label=label,
        numeric_path={
            "linears": summary.numeric_path,
            "kv": describe_kv(arm.kv, arm.cache.layers),
            "attention": conf.attention.kind.value,
            "architecture": summary.architecture,
            "emulated": summary.emulated,
        },
        speed_is_meaningful=not summary.emulated,
        transform=summary.to_dict() if summary.enabled else None,
        speed=_speed(arm, conf.data.batch_size, conf.measure.skip_frames),
        parts=_parts(arm),
        memory=_memory(arm),
        kv_stats=arm.kv_stats.report(),
        compile={
            "enabled": conf.compile.enabled,
            "mode": conf.compile.mode,
            "scope": conf.compile.scope_on(arm.device),
            "packed_linears": arm.assembled.packed,
            "cuda_graph": warmup.cuda_graph,
            "cold_start_s": warmup.seconds,
            "graphs": warmup.graphs,
            "graph_breaks": warmup.graph_breaks + arm.graph_breaks,
            "recompiles_after_warmup": arm.recompiles,
        },
    )


def _model(module: RolloutModule, plan: RunPlan) -> dict[str, Any]:
    conf = plan.conf
    return {
        "parameters": module.parameters_total,
        "weights": "checkpoint" if conf.model.checkpoint else "random",
        "checkpoint": conf.model.checkpoint,
        "arch": asdict(plan.arch),
        "decoder_weights": "checkpoint" if conf.decoder.checkpoint else "random",
        "decoder_checkpoint": conf.decoder.checkpoint,
        "decoder_arch": asdict(plan.dcae),
        "decoder_cold_start_s": module.decoder_cold_start_s,
        "decoder_groups": module.decode.groups,
        "decoder_dtype": str(module.decode.dtype).removeprefix("torch."),
        "vae_scale": plan.vae_scale,
    }


def _data(data: ClipDataModule, done: int) -> dict[str, Any]:
    described = data.describe()
    return {
        **described,
        "name": described["source"],
        "summary": f"{done} of {len(described['clips'])} clips, {described['context_frames']} context + "
        f"{described['future_frames']} generated frames, reference: {described['reference']}",
    }


def _notes(plan: RunPlan, choices: dict[str, str], arms: dict[str, Arm], weights_choice: str | None) -> list[str]:
    notes = []
    if not plan.conf.model.checkpoint:
        notes.append(RANDOM_WEIGHTS)
    elif not plan.conf.decoder.checkpoint:
        notes.append("Random decoder weights: PSNR and SSIM mean nothing.")
    if weights_choice is not None:
        notes.append(f"{plan.conf.model.checkpoint}: {weights_choice}; model.weights chooses.")
    if plan.device.type == "cpu":
        notes.append("A CPU run: its times do not say which format is faster on a GPU.")
    if plan.conf.compile.overlap_decode:
        notes.append("FPS with decoding overlapped is throughput: a single frame is ready no sooner than without.")
    notes += [
        f"Arm {name}: overlapped decoding gave other pixels; its throughput does not count."
        for name, arm in arms.items()
        if arm.overlap is not None and not arm.overlap.same_pixels
    ]
    if (unheard := ignored(plan.conf.flags, choices)) is not None:
        notes.append(unheard)
    return notes


def _broken_off(error: BaseException | None) -> list[dict[str, Any]]:
    """What broke the run off, unless the guard has told of it."""
    if error is None or isinstance(error, InstabilityError):
        return []
    if isinstance(error, SystemExit | KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit
        return [{"kind": "Interrupted", "message": "stopped by the user; finished clips are kept"}]
    return [{"kind": type(error).__name__, "message": str(error)}]


class Recorder(Callback):
    """Builds a run's record, and saves one after every batch: a run that is killed leaves what it has finished.

    Args:
        cfg: the composed config.
        hydra: Hydra's own.
        outputs: the finished clips.
        started: when the run began, UTC.
    """

    def __init__(self, cfg: DictConfig, hydra: HydraConf, outputs: ClipOutputs, started: datetime) -> None:
        self.cfg, self.hydra, self.outputs, self.started = cfg, hydra, outputs, started
        self._environment: dict[str, Any] | None = None

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save what is known so far."""
        if trainer.is_global_zero:
            assert isinstance(pl_module, RolloutModule)
            record = self.build(pl_module, getattr(trainer, "datamodule"), "running")  # noqa: B009  (not in its types)
            save_record(record, self.outputs.folder / "record.json")

    def finished(self, module: RolloutModule, data: ClipDataModule, error: BaseException | None) -> RunRecord:
        """The record of a run that is over; ``error`` is what broke it off, if anything did."""
        record = self.build(module, data, "complete" if error is None else "failed")
        record.incidents += _broken_off(error)
        return record

    def build(self, module: RolloutModule, data: ClipDataModule, status: str) -> RunRecord:
        """The record as things stand."""
        if self._environment is None:
            self._environment = environment(module.plan.device) | {"processes": module.trainer.world_size}
        return build_record(module, data, self, status, self._environment)


def build_record(
    module: RolloutModule, data: ClipDataModule, run: Recorder, status: str, environment: dict[str, Any]
) -> RunRecord:
    """The record of what ``module`` has done so far."""
    plan, hydra, outputs = module.plan, run.hydra, run.outputs
    choices = {str(group): str(choice) for group, choice in hydra.runtime.choices.items() if "hydra/" not in str(group)}
    labels = arm_labels(plan, choices)
    if module.guard.fallback:
        labels["candidate"] += f" ({module.guard.fallback})"
    clips = [clip_row(clip) for clip in outputs.clips]
    for row in clips:
        video = outputs.video_path(row["clip_id"])
        row["video"] = str(video.relative_to(outputs.folder)) if video.is_file() else None
    arms = {name: arm_record(arm, labels[name], plan) for name, arm in module.arms.items()}
    if "candidate" in arms:
        arms["candidate"].numerics = module.numerics
    now = datetime.now(UTC)
    config = OmegaConf.to_container(run.cfg, resolve=True, enum_to_str=True)
    assert isinstance(config, dict)
    return RunRecord(
        run_id=Path(hydra.runtime.output_dir).name,
        started=run.started.isoformat(timespec="seconds"),
        seconds=(now - run.started).total_seconds(),
        status=status,
        command=sys.argv,
        overrides=list(hydra.overrides.task),
        choices=choices,
        config={str(key): value for key, value in config.items()},
        environment=environment,
        model=_model(module, plan),
        data=_data(data, len(clips)),
        arms=arms,
        quality=summarise_quality(outputs.clips) if outputs.clips else None,
        clips=clips,
        notes=_notes(plan, choices, module.arms, module.weights_choice),
        incidents=[asdict(incident) for incident in module.guard.incidents],
        drift=summarise_drift(clips, plan.conf.drift) if clips else None,
        fallbacks=module.guard.taken,
    )
