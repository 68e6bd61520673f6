"""One side of the A/B: a model in its formats, its cache, its compiled rollout, and what is measured while it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.calib.source import CalibratedWeights
from harness.config import RunPlan
from harness.data.datamodule import ClipBatch
from harness.export.write import weights_fingerprint
from harness.kv import KVConf, KVStats
from harness.kv.stats import KVSamples
from harness.measure.memory import PeakProbe
from harness.measure.pictures import Pictures, Shown
from harness.measure.stability import Signs, finite_clips, watch_non_finite
from harness.measure.timing import FrameTimer, PartTimer
from harness.models.dcae import to_frames
from harness.models.world import WorldModel
from harness.mx.conf import MXConf
from harness.mx.weights import WeightSource
from harness.report.journal import ArmFigures
from harness.report.sections import PARTS, FramesFrom, FrameTimes
from harness.rollout import CompileConf, CompileCounters, OverlappedDecoding, Rollout, prepare

DIGITS = 4
"""Decimals of a time in milliseconds: a tenth of a microsecond."""

Decode = Callable[[Tensor], Tensor]
"""Model latents ``[B, C, S, S]`` to RGB ``[B, 3, h, w]`` in [-1, 1]."""


@dataclass(frozen=True)
class Rolled:
    """What an arm made of a batch.

    ``pictures``: in [-1, 1], in the decoder's dtype, and ``times`` of every frame. ``non_finite``: clips (index in the
    batch) with NaN or Inf, and the first frame of it; a rollout that was not patient ends there. ``in_pictures``: those
    whose latents were finite in that frame: the decoder made it. ``kept``: of which run the pictures are, where they
    were not rolled out now; then there are no ``times``.
    """

    pictures: Pictures
    times: FrameTimes
    non_finite: dict[int, int]
    in_pictures: frozenset[int] = frozenset()
    kept: FramesFrom | None = None
    _signs: dict[int, Signs] = field(default_factory=dict, init=False)

    def frames(self, clip: int) -> Shown:
        """Of one clip, in [0, 1]."""
        return self.pictures.clip(clip, to_frames)

    def signs(self, clip: int) -> Signs:
        """Of its frames; looked for once."""
        if clip not in self._signs:
            self._signs[clip] = Signs.of(self.frames(clip))
        return self._signs[clip]


@dataclass(frozen=True)
class Overlap:
    """Throughput with decoding overlapped: ``fps`` of all clips together over ``frames`` frames each.

    ``same_pixels``: whether every picture is, bit for bit, what decoding frame after frame gives.
    """

    fps: float
    frames: int
    same_pixels: bool


class Arm:
    """A rollout (:func:`harness.rollout.assembly`), and what is measured while it runs, once it is :meth:`warm`.

    Args:
        core: a BF16 model on its device; the arm owns and changes it.
        quant: formats of its Linears.
        kv: formats of its cache.
        plan: everything both arms share.
        decode: the decoder, already warm.
        source: who chooses the blocks of its MX Linears; None rounds to nearest.

    Raises:
        ValueError: if the formats do not fit the model, or the kernel the device.
    """

    def __init__(
        self,
        core: WorldModel,
        quant: MXConf,
        kv: KVConf,
        plan: RunPlan,
        decode: Decode,
        source: WeightSource | None = None,
    ) -> None:
        self.device, self.decode, self.quant, self.kv, self.source = plan.device, decode, quant, kv, source
        self._prepared = prepare(core, quant, kv, plan.setup, source)
        self.rollout = self._prepared.rollout
        self.core, self.cache = core, self.rollout.cache
        if plan.conf.measure.parts_frames:
            self.eager().rehearse()
            torch.cuda.empty_cache()  # what an eager prefill needs is more than the arm does
        self.probe = PeakProbe(self.device)
        self.kv_stats = KVStats(self.cache)
        self.frame_timer = FrameTimer(self.device, ("dit", "decoder"))
        self.prefill_timer = FrameTimer(self.device, ("prefill",))
        self.recompiles = self.graph_breaks = 0
        self._new = ArmFigures()
        self.parts: list[dict[str, float]] = []
        self.overlap: Overlap | None = None

    def warm(self) -> Arm:
        """Compile, capture and run it on zeros: this arm, ready. Arms are all made before the first is warmed up."""
        self.assembled = self._prepared.warm()
        return self

    @property
    def calibrated(self) -> CalibratedWeights | None:
        """The calibration that chose its weights, if one did."""
        return self.source if isinstance(self.source, CalibratedWeights) else None

    @cached_property
    def weights_sha256(self) -> str | None:
        """SHA-256 of all weights in their formats; ``None`` without MX Linears."""
        return weights_fingerprint(self.core) if self.assembled.summary.enabled else None

    @torch.inference_mode()
    def roll(
        self,
        batch: ClipBatch,
        noise: tuple[Tensor, Tensor],
        on_frame: Callable[[], None],
        patient: bool = False,
        folder: Path | None = None,
    ) -> Rolled:
        """Roll the clips out and time every frame.

        Args:
            batch: as many clips as the cache was made for.
            noise: of the context and of the new frames, see :func:`harness.data.noise.batch_noise`.
            on_frame: called after each frame, outside all timed spans.
            patient: go on after NaN or Inf, for the other clips' sake.
            folder: where pictures go that are too many for memory.

        Raises:
            OSError: if its file system is full.
        """
        counted = CompileCounters()
        window = batch.latents_context.shape[1]
        context_noise, frame_noise = (part.to(self.device) for part in noise)
        pictures = Pictures(folder)
        non_finite: dict[int, int] = {}
        in_pictures: set[int] = set()
        with self.probe:
            prefill_ms = self._prefill(batch, context_noise)
            for index in range(frame_noise.shape[1]):
                frame = window + index
                self.frame_timer.start()
                latent = self.rollout.next_frame(frame_noise[:, index], batch.mouse[:, frame], batch.btn[:, frame])
                self.frame_timer.lap()
                picture = self.decode(latent)
                self.frame_timer.lap()
                self.kv_stats.sample()
                picture = picture.cpu()
                pictures.append(picture)
                on_frame()
                sound = finite_clips(latent.cpu())
                for clip in (~(sound & finite_clips(picture))).nonzero().flatten().tolist():
                    if clip not in non_finite and sound[clip]:
                        in_pictures.add(clip)
                    non_finite.setdefault(clip, index)
                if non_finite and not patient:
                    break
        self._new.recompiles += counted.graphs
        self._new.graph_breaks += counted.graph_breaks
        rows = self.frame_timer.take()
        dit, decoder = ([round(row[span], DIGITS) for row in rows] for span in ("dit", "decoder"))
        times = FrameTimes(dit, decoder, prefill_ms)
        return Rolled(pictures, times, non_finite, frozenset(in_pictures))

    def take(self) -> ArmFigures:
        """What was counted since the last call, which the arm's totals hold from now on."""
        new, self._new = self._new, ArmFigures()
        samples = self.kv_stats.take()
        self.recompiles += new.recompiles
        self.graph_breaks += new.graph_breaks
        return replace(new, kv_frames=samples.frames, kv_figures=samples.figures)

    def take_over(self, figures: ArmFigures) -> None:
        """Add what the arm of another process, or of an earlier run, counted."""
        self.kv_stats.add(KVSamples(figures.kv_frames, figures.kv_figures))
        self.recompiles += figures.recompiles
        self.graph_breaks += figures.graph_breaks

    def _prefill(self, batch: ClipBatch, noise: Tensor) -> float:
        """Fill the window. Returns the milliseconds it took."""
        window = noise.shape[1]
        self.prefill_timer.start()
        self.rollout.prefill(batch.latents_context, batch.mouse[:, :window], batch.btn[:, :window], noise)
        self.prefill_timer.lap()
        (row,) = self.prefill_timer.take()
        return round(row["total"], DIGITS)

    @torch.inference_mode()
    def measure_parts(self, batch: ClipBatch, noise: tuple[Tensor, Tensor], frames: int) -> None:
        """Time the parts of ``frames`` frames, run eagerly and instrumented from outside.

        A compiled frame has no parts to time: its kernels are fused across them. Needs one frame more than
        ``frames`` in ``noise`` to warm up; uses fewer if there are fewer.
        """
        context_noise, frame_noise = (part.to(self.device) for part in noise)
        rollout, window = self.eager(), context_noise.shape[1]
        rollout.prefill(batch.latents_context, batch.mouse[:, :window], batch.btn[:, :window], context_noise)
        timer = PartTimer(self.device)
        with timer.installed(*self._instruments(rollout)):
            for index in range(min(frames + 1, frame_noise.shape[1])):
                mouse, btn = batch.mouse[:, window + index], batch.btn[:, window + index]
                rollout.next_frame(frame_noise[:, index], mouse, btn)
                parts = defaultdict(float, timer.frame())
                if index:
                    self.parts.append({part: parts[part] for part in PARTS})

    @torch.inference_mode()
    def measure_overlap(self, batch: ClipBatch, noise: tuple[Tensor, Tensor]) -> None:
        """Roll the clips out once more, one frame after the other and then with overlapped decoding; needs CUDA."""
        window = noise[0].shape[1]
        context = batch.latents_context, batch.mouse[:, :window], batch.btn[:, :window], noise[0]
        inputs = list(self._frame_inputs(batch, noise))
        self.rollout.prefill(*context)
        expected = [self.decode(self.rollout.next_frame(*frame)).clone() for frame in inputs]
        self.rollout.prefill(*context)
        pictures, seconds = OverlappedDecoding(self.rollout, self.decode).play(inputs)
        same = all(torch.equal(one, two) for one, two in zip(pictures, expected, strict=True))
        self.overlap = Overlap(len(inputs) * len(batch.clip_ids) / seconds, len(inputs), same)

    def _frame_inputs(self, batch: ClipBatch, noise: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Noise, mouse and buttons of each new frame, on the device."""
        window = noise[0].shape[1]
        for index in range(noise[1].shape[1]):
            inputs = noise[1][:, index], batch.mouse[:, window + index], batch.btn[:, window + index]
            yield tuple(x.to(self.device) for x in inputs)  # type: ignore[misc]

    @torch.inference_mode()
    def locate_non_finite(self, batch: ClipBatch, noise: tuple[Tensor, Tensor], frame: int) -> str | None:
        """Roll out up to generated frame ``frame`` again, eagerly, and name the first layer with NaN or Inf.

        The prefill and that frame are watched; NaN that the frames between left in the cache show as what enters the
        layer after attention. ``None`` if no layer shows any.
        """
        context_noise, frame_noise = (part.to(self.device) for part in noise)
        rollout, window = self.eager(), context_noise.shape[1]
        with watch_non_finite(self.core) as found:
            rollout.prefill(batch.latents_context, batch.mouse[:, :window], batch.btn[:, :window], context_noise)
        if found:
            return f"{found[0]} (prefill)"
        for index in range(frame + 1):
            with watch_non_finite(self.core) if index == frame else nullcontext(found) as found:
                mouse, btn = batch.mouse[:, window + index], batch.btn[:, window + index]
                rollout.next_frame(frame_noise[:, index], mouse, btn)
        return found[0] if found else None

    def eager(self) -> Rollout:
        """The same model and cache, not compiled: its layers can be watched."""
        sampler, attention = self.rollout.sampler, self.rollout.attention
        return Rollout(self.core, self.cache, sampler, attention, CompileConf(cuda_graph=False))

    def _instruments(self, rollout: Rollout) -> tuple[list[Any], list[Any]]:
        parts = self.core.block_parts.items()
        modules = [(part, block.get_submodule(name)) for block in self.core.blocks for part, name in parts]
        methods = [
            ("modulation", self.core, "add_controls"),
            ("modulation", self.core, "modulation"),
            ("kv_get", self.cache, "window"),
            ("kv_update", self.cache, "store"),
            ("kv_update", self.cache, "advance"),
            ("other", rollout, "next_frame"),
        ]
        return modules, methods
