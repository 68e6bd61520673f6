"""What PSNR hides of generated frames: sharpness, texture and obedience to the controls, each against the recording.

PSNR rewards blur, and punishes a rollout for being elsewhere though it looks right. These figures compare statistics of
pictures, not pixels. Learned metrics (LPIPS, FID, DISTS, DreamSim) fetch a network's weights when first used, and a run
must work without a network: texture is judged by a distance that needs none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.measure.figures import Appearance
from harness.measure.motion import action_fidelity, image_motion
from harness.measure.pictures import PIECE, Shown, pieces

PATCH = 7
PATCHES = 4096
"""Patches per octave and clip."""
PROJECTIONS = 128
OCTAVES = 3
"""Of the Laplacian pyramid: detail of the finest pixels, of pairs, of fours."""


def appearance(frames: Shown, recording: Shown) -> Appearance:
    """All three figures of ``frames [F, 3, h, w]`` against ``recording`` (same shape, both float in [0, 1]).

    Raises:
        ValueError: if the shapes differ.
    """
    if frames.shape != recording.shape:
        raise ValueError(f"frames {list(frames.shape)} and recording {list(recording.shape)} differ in shape")
    obedience = action_fidelity(image_motion(frames), image_motion(recording)) if len(frames) > 1 else None
    return Appearance(sharpness(frames, recording), texture_distance(frames, recording), obedience)


def sharpness(frames: Shown, recording: Shown) -> float | None:
    """Mean absolute image gradient of ``frames`` over the recording's: 1 = as sharp, less = blurred, more = noisy.

    ``None`` for a recording without any gradient.
    """
    ours, theirs = _gradient(frames), _gradient(recording)
    return float(ours / theirs) if theirs > 0 else None


def _gradient(frames: Shown) -> Tensor:
    """Float32, as of all frames at once where they are one piece; of several to the last bits of it."""
    total = 0.0
    for (piece,) in pieces(frames):
        grey = piece.float().cpu()
        total += len(grey) * float(grey.diff(dim=-1).abs().mean() + grey.diff(dim=-2).abs().mean())
    return torch.tensor(total / len(frames), dtype=torch.float32)


def texture_distance(frames: Shown, recording: Shown) -> float:
    """Sliced Wasserstein distance between the two clips' patches of detail, times 1000; 0 = the same textures.

    After Karras et al., "Progressive Growing of GANs" (2018), section 5: patches of a Laplacian pyramid, projected on
    random directions, sorted, and compared; the mean over octaves. Patches are compared as sets, so neither place nor
    time matters. Unlike there, contrast is kept (patches are not normalised), since blur is a loss of it. The same
    patches and directions for every clip.
    """
    generator = torch.Generator().manual_seed(0)
    directions, places = [], []
    for size in _octave_sizes(*frames.shape[-2:]):
        towards = torch.randn(3 * PATCH**2, PROJECTIONS, generator=generator)
        directions.append(towards / towards.norm(dim=0))
        places.append(_places(len(frames), *size, generator))
    distances = []
    for towards, *both in zip(directions, *(_patches(shown, places) for shown in (frames, recording)), strict=True):
        a, b = ((patches @ towards).sort(dim=0).values for patches in both)
        distances.append(float((a - b).abs().mean()))
    return 1000 * sum(distances) / len(distances)


def _octave_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each band, finest first; fewer where the picture gets smaller than a patch, but one."""
    sizes = [(height >> octave, width >> octave) for octave in range(OCTAVES)]
    return [size for size in sizes if min(size) >= 2 * PATCH] or sizes[:1]


def _octaves(frames: Tensor) -> Iterator[Tensor]:
    """Bands of a Laplacian pyramid of ``frames [F, 3, h, w]``; a picture smaller than two patches is its own."""
    for size in _octave_sizes(*frames.shape[-2:]):
        if min(size) < 2 * PATCH:
            yield frames
            return
        small = F.avg_pool2d(frames, 2)
        yield frames - F.interpolate(small, frames.shape[-2:], mode="bilinear", align_corners=False)
        frames = small


Places = tuple[Tensor, Tensor, Tensor]
"""Frame, row and column of each patch."""


def _places(frames: int, height: int, width: int, generator: torch.Generator) -> Places:
    sizes = (frames, max(height - PATCH, 0) + 1, max(width - PATCH, 0) + 1)
    count = min(PATCHES, math.prod(sizes))
    frame, row, column = (torch.randint(size, (count,), generator=generator) for size in sizes)
    return frame, row, column


def _patches(shown: Shown, places: list[Places]) -> list[Tensor]:
    """Per octave its patches ``[count, 3·49]``."""
    found = [torch.empty(len(frame), 3 * PATCH**2) for frame, _, _ in places]
    for number, (piece,) in enumerate(pieces(shown)):
        for into, (frame, row, column), band in zip(found, places, _octaves(piece.float().cpu()), strict=True):
            (here,) = (frame // PIECE == number).nonzero(as_tuple=True)
            into[here] = _cut(band, (frame[here] % PIECE, row[here], column[here]))
    return found


def _cut(band: Tensor, where: Places) -> Tensor:
    """Patches ``[count, 3·49]`` of ``band [F, 3, h, w]``; a picture smaller than a patch is repeated at its border."""
    height, width = band.shape[-2:]
    offset = torch.arange(PATCH)
    frame, row, column = where
    rows = (row[:, None] + offset).clamp(max=height - 1)[:, :, None]
    columns = (column[:, None] + offset).clamp(max=width - 1)[:, None, :]
    return band[frame[:, None, None], :, rows, columns].flatten(1)
