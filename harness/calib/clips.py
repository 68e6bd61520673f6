"""The clips that a calibration learns from, and that none of them is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from harness.calib.conf import CalibConf
from harness.calib.sequences import Clips
from harness.data.clips import ClipError
from harness.data.datamodule import ClipDataModule, Encoder, collate
from harness.data.noise import batch_noise
from harness.data.sources import ClipShape, Excerpt
from harness.rollout import SamplerConf

COMMON_FRAMES = 2
"""So many equal frames make two clips the same: one alone may be a dark room."""


def open_clips(conf: CalibConf, shape: ClipShape, encoder: Encoder | None) -> ClipDataModule:
    """The clips of a calibration, every one of them read and checked.

    Raises:
        ValueError: naming each clip that cannot be used.
    """
    data = ClipDataModule(replace(conf.clips, batch_size=1, num_workers=0), shape, encoder)
    try:
        data.check()
    except ClipError as error:
        raise ClipError(f"calib.clips: {error}") from error
    return data


def excerpts(data: ClipDataModule) -> Iterable[Excerpt]:
    """The frames of each clip that a run uses."""
    count = data.shape.window + data.conf.future_frames
    return (data.source.read(entry, data.conf.start, count) for entry in data.entries)


def read_clips(data: ClipDataModule, sampler: SamplerConf, device: torch.device) -> Clips:
    """The clips as rollouts start from them, with noise that no judged clip gets."""
    batches = [data.encode(collate([excerpt])) for excerpt in excerpts(data)]
    names = [f"calibration/{name}" for batch in batches for name in batch.clip_ids]
    shape = data.shape
    noise = batch_noise(sampler.seed, names, shape.window, data.conf.future_frames, shape.channels, shape.side)
    history, mouse, btn = (
        torch.cat([getattr(batch, name) for batch in batches]).to(device)
        for name in ("latents_context", "mouse", "btn")
    )
    return Clips(history, mouse, btn, (noise[0].to(device), noise[1].to(device)))


def check_disjoint(calibration: ClipDataModule, judged: ClipDataModule) -> None:
    """Raise ``ClipError`` naming each judged clip that shows frames of a calibration clip, whatever its name."""
    known: dict[bytes, str] = {}
    for excerpt in excerpts(calibration):
        known |= dict.fromkeys(_frames(excerpt), excerpt.clip_id)
    same = []
    for excerpt in excerpts(judged):
        common = _frames(excerpt) & known.keys()
        if len(common) >= COMMON_FRAMES:
            same.append(f"{excerpt.clip_id} shows {len(common)} frames of {known[next(iter(common))]}")
    if same:
        raise ClipError(
            "clips that a calibration learns from cannot judge it: "
            + "; ".join(same)
            + ". Choose others for calib.clips, or for data"
        )


def _frames(excerpt: Excerpt) -> set[bytes]:
    """A digest of each distinct frame."""
    pictures = excerpt.frames if excerpt.frames is not None else excerpt.latents
    if pictures is None:
        return set()
    return {hashlib.sha256(picture.contiguous().numpy().tobytes()).digest() for picture in pictures}
