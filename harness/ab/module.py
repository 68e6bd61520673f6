"""The LightningModule of a run: sets both arms up, and rolls each batch of clips out through each arm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from harness.ab.arm import Arm, Rolled
from harness.ab.arms import load_arms
from harness.ab.fallback import Fallback
from harness.ab.guard import Guard
from harness.ab.kept import KeptFrames
from harness.ab.numerics import FRAMES, layer_numerics
from harness.config import RunPlan
from harness.data.datamodule import ClipBatch
from harness.data.noise import batch_noise
from harness.kv import KVConf
from harness.measure.appearance import appearance
from harness.measure.figures import Appearance, FrameScores
from harness.measure.pictures import Pictures, Shown
from harness.measure.quality import score_frames
from harness.measure.stability import Signs
from harness.models.dcae import to_frames
from harness.mx.conf import MXConf
from harness.report.journal import ArmFigures
from harness.report.sections import BatchTimes, ClipRecord
from harness.rollout import LatentDecoder, load_dcae
from harness.rollout.linears import unpack

OVERLAP_FRAMES = 64
"""Frames over which the throughput of overlapped decoding is measured, at most."""


@dataclass(frozen=True)
class ClipOutcome:
    """One finished clip.

    ``frames`` by arm, and ``recording`` where there is one, in [0, 1] on the CPU.
    """

    record: ClipRecord
    fps: float
    frames: dict[str, Shown]


@dataclass(frozen=True)
class BatchOutcome:
    """A batch that was rolled out: its clips that could be scored, the times of all its frames, each arm's counts."""

    clips: list[ClipOutcome]
    times: BatchTimes
    arms: dict[str, ArmFigures]


def pad_batch(batch: ClipBatch, size: int) -> ClipBatch:
    """Repeat the last clip until the batch holds ``size``: caches and graphs have a fixed batch."""
    missing = size - len(batch.clip_ids)
    if missing <= 0:
        return batch

    def pad(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat((value, value[-1:].expand(missing, *value.shape[1:])))
        return value if value is None else value + value[-1:] * missing

    return replace(batch, **{name: pad(value) for name, value in vars(batch).items()})


class RolloutModule(LightningModule):
    """BF16 and candidate arm over the same clips, noise, compile mode and process.

    Args:
        plan: the checked run.

    After ``setup``: ``decode``, which both arms share, and ``arms`` (``bf16``, and ``candidate`` unless that is BF16
    too), in the order they were built. ``first``: the run's first batch, on the device, padded. ``batches_before``:
    finished by an earlier run.
    """

    decode: LatentDecoder

    def __init__(self, plan: RunPlan) -> None:
        super().__init__()
        self.plan = plan
        self.arms: dict[str, Arm] = {}
        self.guard = Guard(plan)
        self.parameters_total = 0
        self.weights_choice: str | None = None
        self.decoder_cold_start_s = 0.0
        self.numerics: dict[str, Any] | None = None
        self.on_frame: Callable[[], None] = lambda: None
        self.first: ClipBatch | None = None
        self.batches_before = 0
        self.kept: KeptFrames | None = None

    def setup(self, stage: str) -> None:
        """Load the model and calibrate the candidate's weights; then per arm: MX Linears, KV cache, compile.

        Raises:
            ValueError: if a checkpoint does not fit, or a Linear that is to be MX cannot be.
        """
        plan, conf = self.plan, self.plan.conf
        loaded = load_arms(plan, plan.arm_names)
        last, _ = loaded[plan.arm_names[-1]]
        self.weights_choice = getattr(last, "weights_choice", None)
        self.parameters_total = sum(parameter.numel() for parameter in last.parameters())
        self._load_decoder()
        formats = {"bf16": (MXConf(), KVConf()), "candidate": (conf.quant, conf.kv)}
        arms = {name: Arm(core, *formats[name], plan, self.decode, source) for name, (core, source) in loaded.items()}
        self._warm_decoder()
        for arm in arms.values():
            arm.warm()
        if conf.quant.list and self.trainer.is_global_zero:
            print(arms[plan.arm_names[-1]].assembled.summary.listing())
        self.arms = arms
        if conf.measure.reuse_bf16 and "bf16" in arms:
            self.kept = KeptFrames(plan, arms["bf16"], self.decode, self.folder.name)

    def _load_decoder(self) -> None:
        """Load the decoder, which both arms share: the same frames for the same latents."""
        plan, conf = self.plan, self.plan.conf.decoder
        decoder = load_dcae(plan.dcae, conf.checkpoint, conf.seed, plan.device)
        self.decode = LatentDecoder(decoder, plan.vae_scale, conf.dtype_on(plan.device), plan.conf.compile, conf.groups)

    def _warm_decoder(self) -> None:
        plan, shape = self.plan, self.plan.clip_shape
        zeros = torch.zeros(plan.conf.data.batch_size, shape.channels, shape.side, shape.side, device=plan.device)
        self.decoder_cold_start_s = self.decode.warmup(zeros)

    def noise(self, clip_ids: list[str], future: int) -> tuple[Tensor, Tensor]:
        """The noise that every arm gets for these clips."""
        conf, shape = self.plan.conf.sampler, self.plan.clip_shape
        return batch_noise(conf.seed, clip_ids, conf.window, future, shape.channels, shape.side)

    def predict_step(self, batch: ClipBatch, batch_idx: int) -> BatchOutcome:
        """Roll a batch out through each arm and score its frames.

        Raises:
            InstabilityError: naming arm, clip and frame, if an arm became unstable and the run ends with that.
        """
        clips, batch = len(batch.clip_ids), pad_batch(batch, self.plan.conf.data.batch_size)
        noise = self.noise(batch.clip_ids, self.plan.conf.data.future_frames)
        if self.first is None:
            self.first = batch
        # The arms take turns at going first, so that a machine that slows down or warms up favours neither.
        order = list(self.arms) if (self.batches_before + batch_idx) % 2 == 0 else list(self.arms)[::-1]
        rolled: dict[str, Rolled] = {}
        for name in order:
            roll = self.kept.roll if self.kept is not None and name == "bf16" else self.arms[name].roll
            rolled[name] = roll(batch, noise, self.on_frame, self.guard.patient, self.folder)
            self.guard.check_finite(name, self.arms[name], rolled[name], batch, noise)
        recording = self._recording(batch)
        recorded = None if recording is None else [Signs.of(shown) for shown in recording[:clips]]
        if "bf16" in rolled:
            self.guard.note_baseline(rolled["bf16"], batch, clips, recorded)
        if "candidate" in self.arms:
            while fallback := self.guard.settle(self.arms["candidate"], rolled, batch, clips, noise, recorded):
                self.rebuild(fallback)
                rolled["candidate"] = self.arms["candidate"].roll(batch, noise, self.on_frame, folder=self.folder)
        # A clip with NaN (only if the run was told to go on) has no score to give.
        scored = [clip for clip in range(clips) if not any(clip in arm.non_finite for arm in rolled.values())]
        times = self._times(batch.clip_ids[:clips], order, rolled)
        outcomes = []
        for clip in scored:
            signs = {name: rolled[name].signs(clip) for name in self.arms}
            if recorded is not None:
                signs["recording"] = recorded[clip]
            change = {name: found.change.tolist() for name, found in signs.items() if len(found.change)}
            outcomes.append(self._outcome(batch, clip, rolled, recording, change))
        return BatchOutcome(outcomes, times, {name: arm.take() for name, arm in self.arms.items()})

    def _times(self, clips: list[str], order: list[str], rolled: dict[str, Rolled]) -> BatchTimes:
        now = [name for name in self.arms if rolled[name].kept is None]
        spans = {name: rolled[name].times for name in now}
        kept = rolled["bf16"].kept if "bf16" in rolled else None
        return BatchTimes(clips, [name for name in order if name in now], spans, self.guard.fallback, kept)

    def rebuild(self, fallback: Fallback) -> None:
        """Set the candidate up again, from the BF16 arm's weights; other formats than calibrated ones are rounded."""
        calibrated = self.arms["candidate"].calibrated if fallback.quant == self.plan.conf.quant else None
        with torch.inference_mode(False):  # what is built here outlives this step
            core = unpack(copy.deepcopy(self.arms["bf16"].core))
            self.arms["candidate"] = Arm(core, fallback.quant, fallback.kv, self.plan, self.decode, calibrated).warm()

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.trainer.default_root_dir)

    def _recording(self, batch: ClipBatch) -> list[Shown] | None:
        """What the rollout of each clip is compared with: recorded frames, or decoded latents."""
        if batch.frames is not None:
            return list(batch.frames.cpu())
        if batch.latents_future is None:
            return None
        decoded = Pictures(self.folder)
        for latent in batch.latents_future.unbind(1):
            decoded.append(self.decode(latent).cpu())
        return [decoded.clip(clip, to_frames) for clip in range(len(batch.clip_ids))]

    def _outcome(
        self,
        batch: ClipBatch,
        clip: int,
        rolled: dict[str, Rolled],
        recording: Sequence[Shown] | None,
        change: dict[str, list[float]],
    ) -> ClipOutcome:
        frames = {name: rolled[name].frames(clip) for name in self.arms}
        scores: dict[str, FrameScores] = {}
        looks: dict[str, Appearance] = {}
        if recording is not None:
            looks = {name: appearance(frames[name], recording[clip]) for name in self.arms}
            if len(looks) == 2:
                looks["drop"] = looks["candidate"].worse_than(looks["bf16"])
            scores = {name: score_frames(frames[name], recording[clip], self.plan.device) for name in self.arms}
            frames["recording"] = recording[clip]
        if len(self.arms) == 2:
            scores["fidelity"] = score_frames(frames["candidate"], frames["bf16"], self.plan.device)
        clip_id, fallback = batch.clip_ids[clip], self.guard.fallback
        record = ClipRecord.of(clip_id, batch.tags[clip], scores, change=change, fallback=fallback, appearance=looks)
        return ClipOutcome(record, batch.fps[clip], frames)

    def on_predict_epoch_end(self) -> None:
        """After all timed work: split a few frames into their parts, and measure the error of each MX Linear."""
        conf, batch = self.plan.conf.measure, self.first
        if batch is None or not self.trainer.is_global_zero:
            return
        frames = min(max(conf.parts_frames + 1, FRAMES), self.plan.conf.data.future_frames)
        noise = self.noise(batch.clip_ids, frames)
        if conf.parts_frames:
            for arm in self.arms.values():
                arm.measure_parts(batch, noise, conf.parts_frames)
        if self.plan.conf.compile.overlap_decode:
            noise = self.noise(batch.clip_ids, min(OVERLAP_FRAMES, self.plan.conf.data.future_frames))
            for arm in self.arms.values():
                arm.measure_overlap(batch, noise)
        if conf.numerics_rows and len(self.arms) == 2:
            bf16, candidate = self.arms["bf16"], self.arms["candidate"]
            self.numerics = layer_numerics(bf16, candidate, batch, noise, conf.numerics_rows)
