"""Discriminators and the loss they share: detail that a regression averages away."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchJudge(nn.Module):
    """A small convolutional discriminator: one score per patch of its input, higher = more like a recording.

    Args:
        channels: of the input.
        widths: of its layers.
        strides: of each layer (after the first, which keeps the size).
    """

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for (wide_in, wide_out), stride in zip(pairwise(widths), strides, strict=True):
            layers += [nn.SiLU(), nn.Conv2d(wide_in, wide_out, 3, padding=1, stride=stride), nn.GroupNorm(8, wide_out)]
        self.net = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, h, w]`` to scores ``[B, 1, h', w']``."""
        return self.net(x)


class PyramidJudge(nn.Module):
    """A discriminator with a score per patch at several sizes of patch: texture, things, the whole picture.

    Args:
        channels: of the input.
        widths: of its layers, each of which halves the side.
        heads: indices of the layers that are scored, the first layer being 0.
    """

    def __init__(self, channels: int, widths: Sequence[int], heads: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(a, b, 3, padding=1, stride=2), nn.GroupNorm(8, b))
            for a, b in pairwise(widths)
        )
        self.heads = nn.ModuleDict({str(i): nn.Sequential(nn.SiLU(), nn.Conv2d(widths[i + 1], 1, 1)) for i in heads})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``[B, C, h, w]`` to scores ``[B, 1, h', w']``, one tensor per head."""
        x, scores = self.first(x), []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if str(i) in self.heads:
                scores.append(self.heads[str(i)](x))
        return scores


def _levels(scores: Tensor | list[Tensor]) -> list[Tensor]:
    return scores if isinstance(scores, list) else [scores]


def realism_loss(judge: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """What the generator minimises: relativistic paired loss (fake should score above its own real partner)."""
    with torch.no_grad():
        real_scores = _levels(judge(real))
    pairs = zip(real_scores, _levels(judge(fake)), strict=True)
    return torch.stack([F.softplus(a.float() - b.float()).mean() for a, b in pairs]).mean()


def judge_loss(judge: nn.Module, real: Tensor, fake: Tensor, sigma: float, smooth: float = 10.0) -> Tensor:
    """What the discriminator minimises: the mirrored paired loss, and the same answer under a little noise.

    The second term is an R1/R2 gradient penalty by finite differences of size ``sigma``.
    """
    fake = fake.detach()
    noise = sigma * torch.randn_like(real)
    inputs = (real, fake, real + noise, fake + noise)
    losses = []
    for a, b, rough_a, rough_b in zip(*(_levels(judge(x)) for x in inputs), strict=True):
        rough = (a - rough_a).square().mean() + (b - rough_b).square().mean()
        losses.append(F.softplus(b - a).mean() + smooth * rough)
    return torch.stack(losses).mean()


def balanced(regression: Tensor, realism: Tensor, last: Tensor, weight: float) -> Tensor:
    """Sum of both losses, realism scaled so that its gradient at ``last`` is ``weight`` times the regression's.

    The balance of Esser et al., "Taming Transformers" (2021), eq. 7.
    """
    ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (regression, realism))
    return regression + weight * (ours / (theirs + 1e-6)).clamp(max=1e4).detach() * realism
