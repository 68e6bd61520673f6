"""Clips as predict batches for a Lightning ``Trainer``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.data.clips import TAGS, ClipError
from harness.data.conf import DataConf, Source, validate
from harness.data.sources import ClipEntry, ClipShape, ClipSource, Excerpt, open_source

Encoder = Callable[[Tensor], Tensor]
"""RGB ``[M,3,h,w]`` in [-1, 1] to latents ``[M,C,S,S]`` at the decoder's scale: a ``DCAEEncoder``, or alike."""

ENCODER_BATCH = 32
"""Frames encoded at once."""
LISTED_ERRORS = 10

NAMED_ALIKE = 3
"""Clips with one and the same trouble that are named; of more of them the first is, with their number."""


def _folded(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Messages of clips, each with its clip's origin: those that differ by the origin alone as one, with a count."""
    alike: dict[str, list[str]] = {}
    for origin, said in problems:
        alike.setdefault(said.replace(origin, "") if origin else said, []).append(said)
    lines = []
    for several in alike.values():
        if len(several) > NAMED_ALIKE:
            lines.append(f"{several[0]} ({len(several)} clips alike, this the first)")
        else:
            lines += several
    more = [f"and {len(lines) - LISTED_ERRORS} more"] if len(lines) > LISTED_ERRORS else []
    return lines[:LISTED_ERRORS] + more


BatchT = TypeVar("BatchT", bound="_Movable")


class _Movable:
    """A dataclass whose tensors move together, which is what Lightning asks of a batch."""

    def to(self: BatchT, device: torch.device | str, non_blocking: bool = False) -> BatchT:
        """A copy with every tensor on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=non_blocking)
        return type(self)(**values)


@dataclass
class RecordedBatch(_Movable):
    """Excerpts of B clips, stacked, before encoding. Fields as in :class:`harness.data.sources.Excerpt`."""

    clip_ids: list[str]
    tags: list[str]
    fps: list[float]
    mouse: Tensor
    btn: Tensor
    frames: Tensor | None
    latents: Tensor | None


@dataclass
class ClipBatch(_Movable):
    """B clips as a rollout needs them: W context frames, then F future ones.

    Attributes:
        clip_ids: of the B clips. tags: ``motion`` or ``stand_still`` each. fps: frames a second of each.
        latents_context: float32 ``[B,W,C,S,S]`` at the model's scale (decoder's latents / ``vae_scale``).
        mouse: float32 ``[B,W+F,2]``. btn: float32 ``[B,W+F,K]`` of 0 and 1. Row i is what is held while frame i is
            produced.
        frames: float32 ``[B,F,3,h,w]`` in [0, 1], the recorded future, or None if the source has no frames.
        latents_future: float32 ``[B,F,C,S,S]`` at the model's scale where the source has latents only: decoded,
            they are the reference. None where frames were recorded, and for synthetic clips, which have no reference.
    """

    clip_ids: list[str]
    tags: list[str]
    fps: list[float]
    latents_context: Tensor
    mouse: Tensor
    btn: Tensor
    frames: Tensor | None
    latents_future: Tensor | None


def ignore_signals(worker: int) -> None:
    """For a loader's workers: a terminal and a scheduler signal the whole group, and the main process ends them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class ClipDataset(Dataset[Excerpt]):
    """Excerpts of ``count`` frames from ``first`` on, one per clip; any sampler may shard them by index."""

    def __init__(self, source: ClipSource, entries: Sequence[ClipEntry], first: int, count: int) -> None:
        self.source, self.entries, self.first, self.count = source, entries, first, count

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Excerpt:
        return self.source.read(self.entries[index], self.first, self.count)


def collate(excerpts: Sequence[Excerpt]) -> RecordedBatch:
    """Stack excerpts of equal shapes."""
    frames = [excerpt.frames for excerpt in excerpts if excerpt.frames is not None]
    latents = [excerpt.latents for excerpt in excerpts if excerpt.latents is not None]
    return RecordedBatch(
        clip_ids=[excerpt.clip_id for excerpt in excerpts],
        tags=[excerpt.tag for excerpt in excerpts],
        fps=[excerpt.fps for excerpt in excerpts],
        mouse=torch.stack([excerpt.mouse for excerpt in excerpts]),
        btn=torch.stack([excerpt.btn for excerpt in excerpts]),
        frames=torch.stack(frames) if frames else None,
        latents=torch.stack(latents) if latents else None,
    )


def _shape(frames: Tensor | None) -> Sequence[int]:
    """Shape of one frame; empty if there are none."""
    return () if frames is None else frames.shape[1:]


def alternate_tags(entries: Sequence[ClipEntry]) -> list[ClipEntry]:
    """Motion, stand-still, motion, ... while both last, then the rest; within a tag the given order.

    So the first few clips of a mixed set hold both tags.
    """
    queues = [[entry for entry in entries if entry.tag == tag] for tag in TAGS]
    return [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]


class ClipDataModule(LightningDataModule):
    """Predict batches of clips.

    Args:
        conf: which clips and frames.
        shape: what the model expects.
        encoder: encodes the context frames of recorded clips; runs where its parameters are, without gradients.

    ``entries``: the run's clips, once checked. ``done``: ids of those that an earlier run has finished.

    Raises:
        ValueError: ``conf`` is not valid, or recorded clips without an encoder.
    """

    def __init__(self, conf: DataConf, shape: ClipShape, encoder: Encoder | None = None) -> None:
        super().__init__()
        validate(conf)
        if conf.source == Source.clips and encoder is None:
            raise ValueError("source=clips: recorded frames must be encoded; give an encoder, or use source=owl_cache")
        self.conf, self.shape, self.encoder = conf, shape, encoder
        self.source = open_source(conf, shape)
        self.entries: list[ClipEntry] = []
        self.available = 0
        self.done: frozenset[str] = frozenset()

    @property
    def remaining(self) -> list[ClipEntry]:
        """The clips that no earlier run has finished."""
        return [entry for entry in self.entries if entry.id not in self.done]

    def check(self) -> None:
        """List the clips and really read each one that will be used, so that a bad clip stops the run at its start.

        Raises:
            ClipError: naming every clip that is unusable, and why; or no clip is left by ``tag``.
        """
        entries = alternate_tags(self.source.entries())
        fitting = [entry for entry in entries if self.conf.tag in (None, entry.tag)]
        self.available = len(fitting)
        chosen = fitting[: self.conf.limit]
        if not chosen:
            raise ClipError(f"tag={self.conf.tag}: none of {len(entries)} clips has it; use another tag, or null")
        problems: list[tuple[str, str]] = []
        frame_sizes: dict[torch.Size, str] = {}
        for entry in chosen:
            try:
                excerpt = self._read_checked(entry)
            except ClipError as error:
                problems.append((entry.origin, str(error)))
                continue
            if excerpt.frames is not None:
                frame_sizes.setdefault(excerpt.frames.shape[2:], entry.origin)
        if len(frame_sizes) > 1:
            sizes = ", ".join(f"{origin} {h}×{w}" for (h, w), origin in frame_sizes.items())
            problems.append(("", f"clips of different frame sizes: {sizes}"))
        if problems:
            raise ClipError("\n".join(_folded(problems)))
        self.entries = chosen

    def read_context(self, entry: ClipEntry, start: int) -> Excerpt:
        """The window of ``entry`` that begins at its frame ``start``: where play begins.

        Raises:
            ClipError: if the clip is too short, damaged or of another shape than the model's.
        """
        window = self.shape.window
        if not 0 <= start <= entry.frames - window:
            raise ClipError(
                f"{entry.origin}: has {entry.frames} frames and the model's window {window}, so start={start} must "
                f"lie between 0 and {entry.frames - window}"
            )
        return self._read(entry, start, window)

    def _read_checked(self, entry: ClipEntry) -> Excerpt:
        conf, shape = self.conf, self.shape
        needed = conf.start + shape.window + conf.future_frames
        if entry.frames < needed:
            raise ClipError(
                f"{entry.origin}: has {entry.frames} frames, but start {conf.start} + window {shape.window} + "
                f"{conf.future_frames} future frames need {needed}; use a shorter window or fewer future_frames"
            )
        return self._read(entry, conf.start, shape.window + conf.future_frames)

    def _read(self, entry: ClipEntry, first: int, count: int) -> Excerpt:
        """These frames, checked to be of the model's shapes: before they are decoded, where the clip says its own."""
        self._check_shapes(
            entry,
            buttons=() if entry.buttons is None else (entry.buttons,),
            frames=() if entry.frame_size is None else (3, *entry.frame_size),
        )
        excerpt = self.source.read(entry, first, count)
        latents, frames = _shape(excerpt.latents), _shape(excerpt.frames)
        self._check_shapes(entry, buttons=excerpt.btn.shape[1:], latents=latents, frames=frames)
        return excerpt

    def _check_shapes(self, entry: ClipEntry, **found: Sequence[int]) -> None:
        """Raise ``ClipError`` for what is known of a clip's shapes (else empty) and differs from the model's."""
        shape = self.shape
        wanted: dict[str, Sequence[int] | None] = {
            "buttons": [shape.buttons],
            "latents": [shape.channels, shape.side, shape.side],
            "frames": shape.frame_size and [3, *shape.frame_size],
        }
        for name, given in found.items():
            if given and (ours := wanted[name]) and list(given) != list(ours):
                raise ClipError(f"{entry.origin}: {name} of shape {list(given)}; the model has {list(ours)}")

    def setup(self, stage: str | None = None) -> None:
        """Check the clips, once."""
        if not self.entries:
            self.check()

    def predict_dataloader(self) -> DataLoader[Excerpt]:
        """Batches of the remaining clips in the order of ``alternate_tags``."""
        return DataLoader(
            self._dataset(self.remaining),
            batch_size=self.conf.batch_size,
            num_workers=self.conf.num_workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
        )

    def _dataset(self, entries: Sequence[ClipEntry]) -> ClipDataset:
        return ClipDataset(self.source, entries, self.conf.start, self.shape.window + self.conf.future_frames)

    def first_batch(self, device: torch.device) -> ClipBatch:
        """The first batch of all clips, finished or not, as the loader gives it."""
        dataset = self._dataset(self.entries[: self.conf.batch_size])
        return self.encode(collate([dataset[index] for index in range(len(dataset))]).to(device))

    def on_after_batch_transfer(self, batch: RecordedBatch, dataloader_idx: int = 0) -> ClipBatch:
        """Encode the context where the clips are frames (a hook of Lightning's)."""
        return self.encode(batch)

    def encode(self, batch: RecordedBatch) -> ClipBatch:
        """Split a batch into context and future, and encode the context frames.

        Raises:
            ValueError: the encoder's latents do not have the model's shape.
        """
        window = self.shape.window
        if batch.latents is not None:
            context, future = batch.latents[:, :window], batch.latents[:, window:]
            frames = None
        elif batch.frames is not None:
            context, future = self.encode_frames(batch.frames[:, :window]), None
            frames = batch.frames[:, window:].float() / 255
        else:
            raise ValueError("a batch needs frames or latents; this one has neither")
        return ClipBatch(
            clip_ids=batch.clip_ids,
            tags=batch.tags,
            fps=batch.fps,
            latents_context=context,
            mouse=batch.mouse,
            btn=batch.btn,
            frames=frames,
            latents_future=future if self.source.reference == "decoded latents" else None,
        )

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """uint8 ``[B,W,3,h,w]`` to float32 ``[B,W,C,S,S]`` at the model's scale, on the frames' device.

        Raises:
            ValueError: without an encoder, or if its latents do not have the model's shape.
        """
        if self.encoder is None:
            raise ValueError("recorded frames must be encoded; give an encoder")
        where, dtype = frames.device, torch.float32
        if isinstance(self.encoder, nn.Module) and (weight := next(self.encoder.parameters(), None)) is not None:
            where, dtype = weight.device, weight.dtype
        parts = [
            self.encoder(part.to(where).to(dtype) / 127.5 - 1) for part in frames.flatten(0, 1).split(ENCODER_BATCH)
        ]
        latents = torch.cat(parts).to(frames.device, torch.float32)
        shape = self.shape
        if latents.shape[1:] != (shape.channels, shape.side, shape.side):
            raise ValueError(
                f"the encoder gives latents of {list(latents.shape[1:])}; the model has "
                f"{[shape.channels, shape.side, shape.side]}: use the encoder of the model's own autoencoder"
            )
        return latents.unflatten(0, frames.shape[:2]) / shape.vae_scale

    def describe(self) -> dict[str, Any]:
        """For the run record: where the clips come from and what rollouts are compared with."""
        return {
            "source": str(self.conf.source),
            "reference": self.source.reference,
            "quality_is_meaningful": self.conf.source != Source.synthetic,
            "clips": [{"id": entry.id, "tag": entry.tag} for entry in self.entries],
            "available": self.available,
            "start": self.conf.start,
            "context_frames": self.shape.window,
            "future_frames": self.conf.future_frames,
        }
