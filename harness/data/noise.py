"""Sampling noise: a function of the run's seed and the clip's id alone.

Both arms of an A/B, every batch size, every order of clips and every process draw the same noise for a clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

CONTEXT, FUTURE = "context", "future"
"""What the noise of a frame is for: known frames, and those to be rolled out."""


def clip_noise(seed: int, clip_id: str, window: int, future: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """Standard normal noise of one clip, float32 on the CPU.

    Returns:
        The context's noise ``[window, channels, side, side]`` and that of the new frames
        ``[future, channels, side, side]``. Each frame draws from a generator of its own, seeded with
        SHA-256(seed, clip id, part, frame index): a longer rollout begins with the noise of a shorter one.
    """
    shape = (channels, side, side)
    context = [frame_noise(seed, clip_id, CONTEXT, frame, shape) for frame in range(window)]
    frames = [frame_noise(seed, clip_id, FUTURE, frame, shape) for frame in range(future)]
    return _stack(context, shape), _stack(frames, shape)


def batch_noise(
    seed: int, clip_ids: Sequence[str], window: int, future: int, channels: int, side: int
) -> tuple[Tensor, Tensor]:
    """:func:`clip_noise` of each clip, stacked: ``[B, window, C, S, S]`` and ``[B, future, C, S, S]``."""
    pairs = [clip_noise(seed, clip_id, window, future, channels, side) for clip_id in clip_ids]
    return torch.stack([context for context, _ in pairs]), torch.stack([frames for _, frames in pairs])


def seeded_generator(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``parts`` alone, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def frame_noise(seed: int, clip_id: str, part: str, frame: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise of one frame, float32 ``shape`` on the CPU; ``part`` says what it is for."""
    return torch.randn(shape, generator=seeded_generator(seed, clip_id, part, frame))


def _stack(frames: list[Tensor], shape: tuple[int, int, int]) -> Tensor:
    return torch.stack(frames) if frames else torch.empty(0, *shape)
