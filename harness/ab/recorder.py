"""Turns a finished (or broken off) run into its record: the one place that reads live objects for the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from harness.ab.arm import Arm
from harness.ab.context import RunContext
from harness.ab.module import RolloutModule
from harness.ab.results import Results
from harness.config import RunConf, RunPlan
from harness.config.flags import ignored
from harness.config.labels import label
from harness.data.datamodule import ClipDataModule
from harness.kv import describe as describe_kv
from harness.measure.environment import environment
from harness.measure.figures import Stats, summarise
from harness.measure.stability import InstabilityError
from harness.report.codec import read
from harness.report.drift import summarise_drift
from harness.report.files import FRAMES, RECORD, FileRecord
from harness.report.journal import clips_summary
from harness.report.quality import summarise_quality
from harness.report.record import COMPLETE, FAILED, INTERRUPTED, RUNNING, RunRecord, save_record
from harness.report.sections import (
    PARTS,
    ArmRecord,
    BatchTimes,
    Calibration,
    Compilation,
    Data,
    Environment,
    FallbackRecord,
    IncidentRecord,
    KVStored,
    Memory,
    Model,
    NumericPath,
    Numerics,
    Overlapped,
    Parts,
    Speed,
    Transform,
    timed,
)
from harness.rollout import AttentionKind, CompileConf
from harness.signals import Stopped

SHARE = 0.05
"""Of a run's time that saving its record while it lasts may take."""

RANDOM_WEIGHTS = "Random weights: speed is real, quality is not."


def arm_labels(plan: RunPlan, choices: dict[str, str]) -> dict[str, str]:
    """What to call each arm: the config groups that make the candidate differ."""
    if plan.export is not None:
        return {"bf16": "BF16", "candidate": f"{plan.export.header.label} (exported)"}
    parts = []
    if plan.conf.quant.enabled:
        by = f" by {plan.conf.calib.method}" if plan.conf.calib.enabled else ""
        parts.append(label("quant", plan.conf.quant, choices.get("quant", "")) + by)
    if plan.conf.kv.enabled:
        parts.append(label("kv", plan.conf.kv, choices.get("kv", "")))
    return {"bf16": "BF16", "candidate": " + ".join(parts)}


def _speed(arm: Arm, blocks: Sequence[BatchTimes], name: str, conf: RunConf) -> Speed:
    """Of the batches rolled out in the formats now in force."""
    batch, skipped = conf.data.batch_size, conf.measure.skip_frames
    spans = {span: summarise(values) for span, values in timed(blocks, name, skipped).items()}
    prefill = [times.prefill_ms for block in blocks if (times := block.arms.get(name)) and times.prefill_ms is not None]

    def fps(stats: Stats | None) -> float | None:
        return None if stats is None else batch * 1000 / stats.median

    return Speed(
        batch=batch,
        skipped_frames_per_clip=skipped,
        pipeline_fps=fps(spans["dit"]),
        total_fps=fps(spans["total"]),
        dit_ms=spans["dit"],
        decoder_ms=spans["decoder"],
        total_ms=spans["total"],
        prefill_ms=summarise(prefill),
        overlapped=None if arm.overlap is None else Overlapped(**asdict(arm.overlap)),
    )


def _parts(arm: Arm) -> Parts | None:
    if not arm.parts:
        return None
    count = len(arm.parts)
    method = f"a separate, instrumented eager pass of {count} frames; inside a compiled frame there are no parts"
    sampled = {part: summarise([row[part] for row in arm.parts]) for part in PARTS}
    return Parts(method, count, {part: stats for part, stats in sampled.items() if stats is not None})


def _memory(arm: Arm) -> Memory:
    cache = arm.cache.nbytes()
    # The fused kernels read the rings as they are stored: no layer is ever dequantised.
    fused = arm.rollout.attention is AttentionKind.fused
    return Memory(
        weight_bytes=arm.assembled.weight_bytes,
        kv_window_bytes=cache.allocated,
        kv_window_bytes_computed=cache.computed,
        kv_window_bytes_unquantised=cache.plain,
        kv_bytes_by_format=cache.by_format,
        kv_scratch_bytes=cache.scratch,
        kv_peak_bytes=cache.allocated if fused else cache.peak,
        kv_dequantised_bytes_per_step=cache.dequantised_per_step,
        cache_and_graph_allocated=arm.assembled.allocated_bytes,
        **asdict(arm.probe.result()),
        peaks=arm.probe.peaks,
    )


def _compilation(arm: Arm, conf: CompileConf) -> Compilation:
    return Compilation(
        enabled=conf.enabled,
        mode=conf.mode,
        scope=conf.scope_on(arm.device),
        packed_linears=arm.assembled.packed,
        cuda_graph=arm.assembled.warmup.cuda_graph,
        cold_start_s=arm.assembled.warmup.seconds,
        graphs=arm.assembled.warmup.graphs,
        graph_breaks=arm.assembled.warmup.graph_breaks + arm.graph_breaks,
        recompiles_after_warmup=arm.recompiles,
    )


def arm_record(name: str, arm: Arm, label: str, plan: RunPlan, blocks: Sequence[BatchTimes]) -> ArmRecord:
    """One arm's section of the record, its times from ``blocks``."""
    summary, conf = arm.assembled.summary, plan.conf
    return ArmRecord(
        label=label,
        numeric_path=NumericPath(
            linears=summary.numeric_path,
            kv=describe_kv(arm.kv, arm.cache.layers),
            attention=conf.attention.kind.value,
            architecture=summary.architecture,
            emulated=summary.emulated,
        ),
        speed_is_meaningful=not summary.emulated,
        transform=Transform(**summary.to_dict()) if summary.enabled else None,
        speed=_speed(arm, blocks, name, conf),
        parts=_parts(arm),
        memory=_memory(arm),
        kv_stats=read(KVStored, arm.kv_stats.report()),
        weights_sha256=arm.weights_sha256,
        compile=_compilation(arm, conf.compile),
        calibration=_calibration(arm),
    )


def _calibration(arm: Arm) -> Calibration | None:
    if (made := arm.calibrated) is None:
        return None
    return Calibration(**asdict(made.facts), fingerprint=made.fingerprint, found=made.found)


def _model(module: RolloutModule, plan: RunPlan) -> Model:
    conf = plan.conf
    return Model(
        parameters=module.parameters_total,
        weights="checkpoint" if conf.model.checkpoint else "random",
        checkpoint=conf.model.checkpoint,
        arch=asdict(plan.arch),
        decoder_weights="checkpoint" if conf.decoder.checkpoint else "random",
        decoder_checkpoint=conf.decoder.checkpoint,
        decoder_arch=asdict(plan.dcae),
        decoder_cold_start_s=module.decoder_cold_start_s,
        decoder_groups=module.decode.groups,
        decoder_dtype=str(module.decode.dtype).removeprefix("torch."),
        vae_scale=plan.vae_scale,
    )


def _data(data: ClipDataModule, done: int) -> Data:
    described = data.describe()
    found = read(Data, {**described, "name": described["source"], "summary": ""})
    found.summary = clips_summary(found, done)
    return found


def _plain(conf: Any) -> Any:
    """A config dataclass as a record holds it."""
    return OmegaConf.to_container(OmegaConf.structured(conf), enum_to_str=True)


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


def _kept_notes(blocks: Sequence[BatchTimes]) -> list[str]:
    """Which batches' BF16 frames an earlier run rolled out."""
    found: dict[str, list[str]] = {}
    for kept in (block.bf16_from for block in blocks):
        if kept is not None:
            found.setdefault(kept.run, []).append(kept.rolled)
    return [
        f"BF16's frames of {len(rolled)} of {len(blocks)} batches are reused from run {run}, rolled out at "
        f"{min(rolled)} with the same weights, clips, noise, settings and code here; BF16 was not timed there."
        for run, rolled in found.items()
    ]


def _broken_off(error: BaseException | None) -> list[IncidentRecord]:
    """What broke the run off, unless the guard has told of it."""
    if error is None or isinstance(error, InstabilityError):
        return []
    if isinstance(error, Stopped):
        return [IncidentRecord("Interrupted", str(error))]
    return [IncidentRecord(type(error).__name__, str(error))]


class Recorder(Callback):
    """Builds a run's record, and saves it now and then while the run lasts: what a run that is killed leaves.

    Between two saves the journal has what was finished since (:func:`harness.report.journal.load_run`), so saving may
    take its time: it grows with the clips, and is done so seldom that it stays below :data:`SHARE` of the run.

    Args:
        cfg: the composed config.
        context: the run's folder, and what was asked for.
        results: what is finished.
        started: when the run began, UTC.
    """

    def __init__(self, cfg: DictConfig, context: RunContext, results: Results, started: datetime) -> None:
        self.cfg, self.context, self.results, self.started = cfg, context, results, started
        self._environment: Environment | None = None
        self._next_save = 0.0

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save what is known so far, if it is time."""
        start = time.monotonic()
        if trainer.is_global_zero and start >= self._next_save:
            assert isinstance(pl_module, RolloutModule)
            record = self.build(pl_module, getattr(trainer, "datamodule"), RUNNING)  # noqa: B009  (not in its types)
            save_record(record, self.results.folder / RECORD)
            now = time.monotonic()
            self._next_save = now + (now - start) / SHARE

    def finished(self, module: RolloutModule, data: ClipDataModule, error: BaseException | None) -> RunRecord:
        """The record of a run that is over; ``error`` is what broke it off, if anything did."""
        status = COMPLETE if error is None else INTERRUPTED if isinstance(error, Stopped) else FAILED
        record = self.build(module, data, status)
        record.incidents += _broken_off(error)
        if (frames := self.results.folder / FRAMES).is_file():
            record.files[FRAMES] = FileRecord.of(frames)
        return record

    def build(self, module: RolloutModule, data: ClipDataModule, status: str) -> RunRecord:
        """The record as things stand."""
        plan, context, results = module.plan, self.context, self.results
        now, clips = datetime.now(UTC), results.clips
        config: Any = OmegaConf.to_container(self.cfg, resolve=True, enum_to_str=True)
        if plan.export is not None:  # formats are the file's, whatever was typed
            config |= {name: _plain(getattr(plan.conf, name)) for name in ("quant", "kv")}
        return RunRecord(
            run_id=context.folder.name,
            started=self.started.isoformat(timespec="seconds"),
            seconds=(now - self.started).total_seconds(),
            status=status,
            command=context.command,
            overrides=context.overrides,
            choices=context.choices,
            config={str(key): value for key, value in config.items()},
            environment=self._where(module),
            model=_model(module, plan),
            data=_data(data, len(clips)),
            arms=self._arms(module),
            quality=summarise_quality(clips),
            clips=clips,
            notes=[
                *_notes(plan, context.choices, module.arms, module.weights_choice),
                *_kept_notes(results.times),
            ],
            incidents=[IncidentRecord(**asdict(incident)) for incident in module.guard.incidents],
            drift=summarise_drift(clips, plan.conf.drift) if clips else None,
            fallbacks=read(list[FallbackRecord], module.guard.taken),
            timings=results.times,
            files=results.files,
        )

    def _where(self, module: RolloutModule) -> Environment:
        if self._environment is None:
            found = environment(module.plan.device) | {"processes": module.trainer.world_size}
            self._environment = read(Environment, found)
        return self._environment

    def _arms(self, module: RolloutModule) -> dict[str, ArmRecord]:
        plan, fallback = module.plan, module.guard.fallback
        labels = arm_labels(plan, self.context.choices)
        if fallback:
            labels["candidate"] += f" ({fallback})"
        # Times in formats that the candidate has since fallen back from are not those of what it is now.
        blocks = {
            "bf16": self.results.times,
            "candidate": [one for one in self.results.times if one.fallback == fallback],
        }
        arms = {name: arm_record(name, arm, labels[name], plan, blocks[name]) for name, arm in module.arms.items()}
        if "candidate" in arms and module.numerics is not None:
            arms["candidate"].numerics = read(Numerics, module.numerics)
        return arms
