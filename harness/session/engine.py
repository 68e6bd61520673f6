"""A model loaded once, in BF16 and in the candidate formats, for any number of sessions that play it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.ab.arms import load_arms
from harness.calib.plan import make_encoder
from harness.config import RunPlan
from harness.data.clips import ClipError
from harness.data.conf import BUTTON_NAMES, Source
from harness.data.datamodule import ClipDataModule, collate
from harness.data.sources import ClipEntry
from harness.kv import KVConf
from harness.models.dcae import to_frames
from harness.models.world import WorldModel
from harness.mx.conf import MXConf
from harness.mx.linears.decoded import KeepDecoded, Kept, keep_decoded
from harness.mx.transform import TransformSummary
from harness.mx.weights import WeightSource
from harness.rollout import LatentDecoder, Rollout, load_dcae
from harness.rollout.assembly import put_into_formats, warm_rollout
from harness.session.action import Action

BF16, CANDIDATE = "bf16", "candidate"
ARMS = (BF16, CANDIDATE)


@dataclass(frozen=True)
class EngineArm:
    """A model in its formats: what every session that plays it shares. ``kept``: weights held decoded, if any are."""

    name: str
    core: WorldModel
    kv: KVConf
    summary: TransformSummary
    kept: Kept


@dataclass(frozen=True)
class Context:
    """Where a session starts: W known frames and what was held while each was produced, on the CPU.

    Attributes:
        name: names the noise, and the clip in records. start: which frame of the clip is the first, for records.
        fps: frames a second of the game. scenario: where it was recorded, for records.
        latents: float32 ``[W, C, S, S]`` at the model's scale.
        mouse: float32 ``[W, 2]``. btn: float32 ``[W, K]`` of 0 and 1.
        pictures: uint8 ``[W, h, w, 3]``, or None where only latents are known.
    """

    name: str
    latents: Tensor
    mouse: Tensor
    btn: Tensor
    pictures: Tensor | None = None
    start: int = 0
    fps: float = 60.0
    scenario: str = ""

    @classmethod
    def of_pictures(cls, engine: Engine, name: str, pictures: Tensor, actions: Sequence[Action]) -> Context:
        """A window of one's own: pictures uint8 ``[W, h, w, 3]`` and what was held while each was produced.

        Raises:
            ValueError: if there are not W of each, or one does not fit the model.
        """
        window = engine.shape.window
        if not len(pictures) == len(actions) == window:
            raise ValueError(
                f"{len(pictures)} pictures and {len(actions)} actions: give {window} pictures and as many actions, "
                "the model's window"
            )
        rows = [action.rows(engine.button_names) for action in actions]
        mouse, btn = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return cls(name, engine.encode(pictures), mouse, btn, pictures.cpu())


class Engine:
    """The arms of a checked config with their weights, the decoder, and the clips that a session can start from.

    Args:
        plan: the config, as a run's.
        arms: which of ``bf16`` and ``candidate`` to load; all that the config has by default.
        keep: whether emulated MX Linears keep their weights decoded, see :mod:`harness.mx.linears.decoded`.

    Raises:
        ValueError: if a checkpoint does not fit, a format cannot be had, or an arm is not one of the config's.
    """

    def __init__(self, plan: RunPlan, arms: Sequence[str] | None = None, keep: KeepDecoded = KeepDecoded.auto) -> None:
        self.plan, self.shape, self.device = plan, plan.clip_shape, plan.device
        conf = plan.conf
        available = list(plan.arm_names)
        wanted = available if arms is None else list(arms)
        if not wanted or any(name not in available for name in wanted):
            raise ValueError(f"arms={wanted}: this config (quant, kv) has {', '.join(available)}")
        formats = {BF16: (MXConf(), KVConf()), CANDIDATE: (conf.quant, conf.kv)}
        with torch.inference_mode(False):
            loaded = load_arms(plan, wanted)
            self.arms = {name: self._arm(name, *loaded[name], *formats[name], keep) for name in wanted}
        self._decoder = load_dcae(plan.dcae, conf.decoder.checkpoint, conf.decoder.seed, plan.device)
        self._contexts: dict[tuple[str, int], Context] = {}
        self._lock = threading.Lock()
        self.data = self._open_data()

    @property
    def default_arm(self) -> str:
        """The candidate where there is one."""
        return CANDIDATE if CANDIDATE in self.arms else BF16

    @property
    def button_names(self) -> tuple[str, ...]:
        """Names of the model's buttons, in its order."""
        count = self.shape.buttons
        return tuple(BUTTON_NAMES[:count]) + tuple(f"B{i}" for i in range(len(BUTTON_NAMES), count))

    def _arm(
        self, name: str, core: WorldModel, source: WeightSource | None, quant: MXConf, kv: KVConf, keep: KeepDecoded
    ) -> EngineArm:
        summary, _ = put_into_formats(core, quant, self.plan.setup, source)
        return EngineArm(name, core, kv, summary, keep_decoded(core, keep))

    def _open_data(self) -> ClipDataModule:
        return ClipDataModule(self.plan.conf.data, self.shape, make_encoder(self.plan))

    def rollout(self, arm: str, batch: int) -> Rollout:
        """A rollout of ``batch`` worlds over an arm's weights, with a cache of its own, compiled and warm."""
        shared = self.arms[arm]
        rollout, _ = warm_rollout(shared.core, shared.kv, replace(self.plan.setup, batch=batch))
        return rollout

    def decoder(self, batch: int) -> LatentDecoder:
        """A decoder that nobody else uses, warm: where it is captured, its result lies in a buffer of its own."""
        plan, conf, shape = self.plan, self.plan.conf.decoder, self.shape
        with torch.inference_mode(False):
            own, dtype = copy.deepcopy(self._decoder), conf.dtype_on(self.device)
            decoder = LatentDecoder(own, plan.vae_scale, dtype, plan.conf.compile, conf.groups)
            decoder.warmup(torch.zeros(batch, shape.channels, shape.side, shape.side, device=self.device))
        return decoder

    def clips(self) -> list[ClipEntry]:
        """The clips of ``data`` that are long enough to start from, sorted by id.

        Raises:
            ClipError: if they cannot be listed, or none is long enough.
        """
        entries = self.data.source.entries()
        enough = [entry for entry in entries if entry.frames >= self.shape.window]
        if not enough:
            raise ClipError(f"none of {len(entries)} clips has the {self.shape.window} frames of the model's window")
        return enough

    def context(self, clip: str, start: int = 0) -> Context:
        """The window of a clip of ``data``, or of a recorded clip's file, from frame ``start`` on.

        Raises:
            ClipError: if there is no such clip, or it is too short, damaged or of another shape.
        """
        with self._lock:
            if (clip, start) not in self._contexts:
                if len(self._contexts) >= 64:
                    self._contexts.pop(next(iter(self._contexts)))
                self._contexts[clip, start] = self._read_context(self.data, clip, start)
            return self._contexts[clip, start]

    def context_of_file(self, path: str, start: int = 0) -> Context:
        """As :meth:`context`, of a clip's ``.json`` or ``.mp4`` anywhere."""
        conf = replace(self.plan.conf.data, source=Source.clips, paths=[path])
        with self._lock:
            data = ClipDataModule(conf, self.shape, self.data.encoder)
            return self._read_context(data, data.source.entries()[0].id, start)

    def _read_context(self, data: ClipDataModule, clip: str, start: int) -> Context:
        entries = {entry.id: entry for entry in data.source.entries()}
        if clip not in entries:
            names = ", ".join(list(entries)[:12])
            raise ClipError(f"clip {clip!r}: not one of {len(entries)} clips ({names}{', …' * (len(entries) > 12)})")
        excerpt = data.read_context(entries[clip], start)
        batch = data.encode(collate([excerpt]))
        pictures = None if excerpt.frames is None else excerpt.frames.permute(0, 2, 3, 1).contiguous()
        window = self.shape.window
        return Context(
            name=clip,
            latents=batch.latents_context[0].cpu(),
            mouse=batch.mouse[0, :window],
            btn=batch.btn[0, :window],
            pictures=pictures,
            start=start,
            fps=excerpt.fps,
            scenario=clip,
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents float32 ``[N, C, S, S]`` at the model's scale, on the CPU, of pictures uint8 ``[N, h, w, 3]``.

        Raises:
            ValueError: without an encoder, or for pictures of another size.
        """
        height, width = self.plan.dcae.sample_size
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or tuple(pictures.shape[1:]) != (height, width, 3):
            raise ValueError(
                f"pictures are {pictures.dtype} {list(pictures.shape)}; give uint8 [N, {height}, {width}, 3]"
            )
        with torch.inference_mode(False):
            return self.data.encode_frames(pictures.permute(0, 3, 1, 2)[None].to(self.device))[0].cpu()


def to_pictures(rgb: Tensor) -> Tensor:
    """Decoder output ``[B, 3, h, w]`` in [-1, 1] to uint8 ``[B, h, w, 3]`` on the CPU, as a run's videos have it."""
    return (to_frames(rgb) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
