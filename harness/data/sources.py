"""Where clips come from. A source lists its clips and cuts the frames that a rollout needs out of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from harness.data.clips import find_clips, probe_clip, read_clip
from harness.data.conf import DataConf
from harness.data.conf import Source as Kind
from harness.data.latents import find_latents, probe_latents, read_latents
from harness.data.noise import seeded_generator


@dataclass(frozen=True)
class ClipShape:
    """What the model expects of a clip.

    Attributes:
        window: context frames W.
        buttons: buttons K of an action.
        channels: latent channels C. side: latent side S.
        frame_size: (height, width) of a frame of the decoder; None without a decoder.
        vae_scale: stored latents are this times the model's.
    """

    window: int
    buttons: int
    channels: int
    side: int
    frame_size: tuple[int, int] | None
    vae_scale: float


@dataclass(frozen=True)
class ClipEntry:
    """A clip of a source: its id, its tag, how many frames it has, and what to call it in errors.

    ``frame_size``: height and width of a frame, ``buttons``: of an action, as far as they are known unread.
    """

    id: str
    tag: str
    frames: int
    origin: str
    frame_size: tuple[int, int] | None = None
    buttons: int | None = None


@dataclass(frozen=True)
class Excerpt:
    """Consecutive frames of one clip, on the CPU.

    Attributes:
        clip_id: of the clip. tag: likewise. fps: frames a second.
        mouse: float32 ``[n,2]``. btn: float32 ``[n,K]`` of 0 and 1.
        frames: uint8 ``[n,3,h,w]``, or None if the source has none.
        latents: float32 ``[n,C,S,S]`` at the model's scale, or None if frames must be encoded.
    """

    clip_id: str
    tag: str
    fps: float
    mouse: Tensor
    btn: Tensor
    frames: Tensor | None
    latents: Tensor | None


class ClipSource(Protocol):
    """Lists clips and reads excerpts of them.

    ``reference`` says what rollouts are compared with: ``recorded frames``, ``decoded latents`` or ``none``.
    """

    reference: str

    def entries(self) -> list[ClipEntry]:
        """All clips, sorted by id. Raises ``ClipError`` for clips that cannot be listed."""
        ...

    def read(self, entry: ClipEntry, first: int, count: int) -> Excerpt:
        """``count`` frames from ``first`` on. Raises ``ClipError`` naming the file and what is wrong with it."""
        ...


class VideoSource:
    """Recorded clips (:mod:`harness.data.clips`)."""

    reference = "recorded frames"

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = paths

    def entries(self) -> list[ClipEntry]:
        """All clips under the paths, sorted by id."""
        infos = [probe_clip(path) for path in find_clips(self.paths)]
        return [
            ClipEntry(info.id, info.tag, info.frames, str(info.path), (info.height, info.width), len(info.button_names))
            for info in infos
        ]

    def read(self, entry: ClipEntry, first: int, count: int) -> Excerpt:
        """Decode the video; the frames still have to be encoded."""
        clip = read_clip(entry.origin, first, count)
        return Excerpt(clip.id, clip.tag, clip.fps, clip.mouse, clip.buttons.float(), clip.frames, None)


class LatentSource:
    """Upstream latent caches (:mod:`harness.data.latents`)."""

    reference = "decoded latents"

    def __init__(self, paths: Sequence[str | Path], vae_scale: float, fps: float) -> None:
        self.paths, self.vae_scale, self.fps = paths, vae_scale, fps

    def entries(self) -> list[ClipEntry]:
        """All ``.pt`` files under the paths, sorted by name."""
        return [ClipEntry(path.stem, *probe_latents(path), str(path)) for path in find_latents(self.paths)]

    def read(self, entry: ClipEntry, first: int, count: int) -> Excerpt:
        """Map the file and scale the latents for the model."""
        clip = read_latents(entry.origin, first, count)
        latents = clip.latents / self.vae_scale
        return Excerpt(clip.id, entry.tag, self.fps, clip.mouse, clip.buttons.float(), None, latents)


class SyntheticSource:
    """Unit normal latents and random controls, for models with random weights: speed means something, quality nothing.

    Every fourth clip stands still. A clip depends on the seed and its own id alone.
    """

    reference = "none"

    def __init__(self, clips: int, frames: int, shape: ClipShape, seed: int, fps: float) -> None:
        self.clips, self.frames, self.shape, self.seed, self.fps = clips, frames, shape, seed, fps

    def entries(self) -> list[ClipEntry]:
        """``synthetic_0000`` and so on."""
        names = [f"synthetic_{number:04d}" for number in range(self.clips)]
        tags = ["stand_still" if number % 4 == 3 else "motion" for number in range(self.clips)]
        return [ClipEntry(name, tag, self.frames, name) for name, tag in zip(names, tags, strict=True)]

    def read(self, entry: ClipEntry, first: int, count: int) -> Excerpt:
        """Draw the whole clip and cut the excerpt out of it."""
        generator = seeded_generator(self.seed, entry.id)
        shape, part = self.shape, slice(first, first + count)
        latents = torch.randn(self.frames, shape.channels, shape.side, shape.side, generator=generator)
        mouse, buttons = torch.zeros(self.frames, 2), torch.zeros(self.frames, shape.buttons)
        if entry.tag == "motion":
            # Held for some frames and smooth, as play is: a random walk that decays, and buttons in runs of 8.
            for frame in range(1, self.frames):
                mouse[frame] = 0.9 * mouse[frame - 1] + torch.randn(2, generator=generator)
            runs = torch.rand((self.frames + 7) // 8, shape.buttons, generator=generator) < 0.25
            buttons = runs.repeat_interleave(8, 0)[: self.frames].float()
        return Excerpt(entry.id, entry.tag, self.fps, mouse[part], buttons[part], None, latents[part])


def open_source(conf: DataConf, shape: ClipShape) -> ClipSource:
    """The source that ``conf`` names."""
    if conf.source == Kind.clips:
        return VideoSource(conf.paths)
    if conf.source == Kind.owl_cache:
        return LatentSource(conf.paths, shape.vae_scale, conf.fps)
    frames = conf.start + shape.window + conf.future_frames
    return SyntheticSource(conf.synthetic_clips, frames, shape, conf.seed, conf.fps)
