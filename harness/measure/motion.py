"""Whether generated frames move as the recording does: the image motion between successive frames, by least squares.

Same keys and mouse, same motion: a turn shifts the picture, a step forward widens it. Content may differ, so a rollout
that has left the recording's place but still obeys is not blamed for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.measure.pictures import Shown, pieces

LEVELS = (8, 4)
"""Sides are divided by these in turn, coarse first: shifts of several pixels are found at the coarse one."""
ITERATIONS = 4
FARTHEST = 0.15
"""Largest shift and zoom looked for, in half sides."""
TOLERANCE = 0.05
"""Difference of brightness beyond which a pixel counts little (Cauchy weights): a weapon that stays, a monster."""
DAMPING = 1e-3
"""Keeps plain walls, which show no motion, from showing a wild one."""
MOVING = 0.25
"""Root mean square of a recording's motion, in pixels, below which it stands still and nothing can be followed."""


def _grey(frames: Tensor, factor: int) -> Tensor:
    grey = frames.float().mean(1, keepdim=True)
    return F.avg_pool2d(F.avg_pool2d(grey, factor), 3, stride=1, padding=1, count_include_pad=False)


def _warped(pictures: Tensor, motion: Tensor, grid: Tensor) -> Tensor:
    shift, zoom = motion[:, None, None, :2], motion[:, None, None, 2:]
    return F.grid_sample(pictures, grid + shift + zoom * grid, padding_mode="border", align_corners=False)


def image_motion(frames: Shown) -> Tensor:
    """Motion from each of ``frames [F, 3, h, w]`` (in [0, 1]) to the next, ``[F - 1, 3]`` in pixels.

    Per pair the shift to the right, the shift down, and the widening at the border of the picture (positive: what is
    seen comes nearer), found together by iterated least squares on the brightness constancy of Lucas and Kanade (1981),
    coarse to fine.
    """
    return torch.cat([_image_motion(piece) for (piece,) in pieces(frames, before=1)])


def _image_motion(frames: Tensor) -> Tensor:
    half = torch.tensor([frames.shape[-1] / 2, frames.shape[-2] / 2])
    motion = torch.zeros(max(len(frames) - 1, 0), 3)  # in half sides: shift x, shift y, zoom
    for factor in LEVELS:
        grey = _grey(frames.cpu(), factor)
        first, second = grey[:-1], grey[1:]
        ys, xs = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in grey.shape[-2:])
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1)[None]
        for _ in range(ITERATIONS):
            moved = _warped(second, motion, grid.expand(len(second), -1, -1, -1))
            motion = (motion + _update(first, moved, grid)).clamp(-FARTHEST, FARTHEST)
    return torch.cat((motion[:, :2] * half, motion[:, 2:] * half[0]), dim=1)


def _update(first: Tensor, moved: Tensor, grid: Tensor) -> Tensor:
    """The change of motion ``[N, 3]`` that best explains ``first - moved``, both ``[N, 1, h, w]``."""
    mean = (first + moved) / 2
    across = F.pad(mean, (1, 1, 0, 0), mode="replicate")
    down = F.pad(mean, (0, 0, 1, 1), mode="replicate")
    step = 4 / torch.tensor(mean.shape[-2:])  # two pixels, in half sides
    gx = (across[..., 2:] - across[..., :-2]) / step[1]
    gy = (down[..., 2:, :] - down[..., :-2, :]) / step[0]
    columns = torch.stack((gx, gy, gx * grid[..., 0] + gy * grid[..., 1]), dim=-1).flatten(1, 3)
    error = (first - moved).flatten(1)[..., None]
    weighted = columns / (1 + (error / TOLERANCE).square())
    normal = weighted.mT @ columns + DAMPING * columns.shape[1] * torch.eye(3)
    return torch.linalg.solve(normal, weighted.mT @ error)[..., 0]


def action_fidelity(motion: Tensor, recorded: Tensor) -> float | None:
    """Share of the recording's image motion that an arm's follows; both ``[F - 1, 3]`` of :func:`image_motion`.

    ``1 - mean |arm - recording|² / mean |recording|²``: 1 where both move alike, 0 for a still picture, negative where
    the arm moves against its controls. ``None`` where the recording stands still.
    """
    power = recorded.square().sum(1).mean()
    if len(recorded) == 0 or power < MOVING**2:
        return None
    return float(1 - (motion - recorded).square().sum(1).mean() / power)
