"""What PSNR hides of generated frames: sharpness, texture and obedience to the controls, each against the recording.

PSNR rewards blur, and punishes a rollout for being elsewhere though it looks right. These figures compare statistics of
pictures, not pixels. Learned metrics (LPIPS, FID, DISTS, DreamSim) fetch a network's weights when first used, and a run
must work without a network: texture is judged by a distance that needs none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.measure.figures import Appearance
from harness.measure.motion import action_fidelity, image_motion

PATCH = 7
PATCHES = 4096
"""Patches per octave and clip."""
PROJECTIONS = 128
OCTAVES = 3
"""Of the Laplacian pyramid: detail of the finest pixels, of pairs, of fours."""


def appearance(frames: Tensor, recording: Tensor) -> Appearance:
    """All three figures of ``frames [F, 3, h, w]`` against ``recording`` (same shape, both float in [0, 1]).

    Raises:
        ValueError: if the shapes differ.
    """
    if frames.shape != recording.shape:
        raise ValueError(f"frames {list(frames.shape)} and recording {list(recording.shape)} differ in shape")
    frames, recording = frames.float().cpu(), recording.float().cpu()
    obedience = action_fidelity(image_motion(frames), image_motion(recording)) if len(frames) > 1 else None
    return Appearance(sharpness(frames, recording), texture_distance(frames, recording), obedience)


def sharpness(frames: Tensor, recording: Tensor) -> float | None:
    """Mean absolute image gradient of ``frames`` over the recording's: 1 = as sharp, less = blurred, more = noisy.

    ``None`` for a recording without any gradient.
    """
    ours, theirs = (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean() for x in (frames, recording))
    return float(ours / theirs) if theirs > 0 else None


def texture_distance(frames: Tensor, recording: Tensor) -> float:
    """Sliced Wasserstein distance between the two clips' patches of detail, times 1000; 0 = the same textures.

    After Karras et al., "Progressive Growing of GANs" (2018), section 5: patches of a Laplacian pyramid, projected on
    random directions, sorted, and compared; the mean over octaves. Patches are compared as sets, so neither place nor
    time matters. Unlike there, contrast is kept (patches are not normalised), since blur is a loss of it. The same
    patches and directions for every clip.
    """
    generator = torch.Generator().manual_seed(0)
    distances = []
    for ours, theirs in zip(_octaves(frames), _octaves(recording), strict=True):
        directions = torch.randn(3 * PATCH**2, PROJECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        where = _places(ours, generator)
        a, b = ((_patches(x, where) @ directions).sort(dim=0).values for x in (ours, theirs))
        distances.append(float((a - b).abs().mean()))
    return 1000 * sum(distances) / len(distances)


def _octaves(frames: Tensor) -> list[Tensor]:
    """Bands of a Laplacian pyramid, finest first; fewer where the picture gets smaller than a patch."""
    bands = []
    for _ in range(OCTAVES):
        if min(frames.shape[-2:]) < 2 * PATCH:
            break
        small = F.avg_pool2d(frames, 2)
        bands.append(frames - F.interpolate(small, frames.shape[-2:], mode="bilinear", align_corners=False))
        frames = small
    return bands or [frames]


def _places(band: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    frames, _, height, width = band.shape
    sizes = (frames, max(height - PATCH, 0) + 1, max(width - PATCH, 0) + 1)
    count = min(PATCHES, math.prod(sizes))
    frame, row, column = (torch.randint(size, (count,), generator=generator) for size in sizes)
    return frame, row, column


def _patches(band: Tensor, where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Patches ``[count, 3·49]`` of ``band [F, 3, h, w]``; a picture smaller than a patch is repeated at its border."""
    height, width = band.shape[-2:]
    offset = torch.arange(PATCH)
    frame, row, column = where
    rows = (row[:, None] + offset).clamp(max=height - 1)[:, :, None]
    columns = (column[:, None] + offset).clamp(max=width - 1)[:, None, :]
    return band[frame[:, None, None], :, rows, columns].flatten(1)
