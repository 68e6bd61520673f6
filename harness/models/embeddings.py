"""Embeddings of the diffusion time and of the player's controls."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def frequencies(half: int, device: torch.device) -> Tensor:
    """Those of :func:`sincos`, float32 ``[half]``: they fall geometrically from 1 to 1/300."""
    index = torch.arange(half, device=device, dtype=torch.float32)
    return torch.exp(index * (-math.log(300) / (half - 1)))


def sincos(x: Tensor, dim: int) -> Tensor:
    """Sinusoidal features ``[..., dim]`` of ``x [...]``, float32: sines, then cosines, of ``1000 * x * f``.

    ``f`` are ``dim / 2`` :func:`frequencies`. Arguments reach thousands of radians, hence float32 throughout.
    """
    angle = (1000 * x.float())[..., None] * frequencies(dim // 2, x.device)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class MLP(nn.Module):
    """Linear, SiLU, Linear, with biases."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, d_hidden)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(d_hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., d_in]`` to ``[..., d_out]``."""
        return self.fc2(self.act(self.fc1(x)))


class TimestepEmbedding(nn.Module):
    """Embeds the diffusion time, 1 = pure noise and 0 = clean."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mlp = MLP(512, 4 * d_model, d_model)

    def forward(self, t: Tensor) -> Tensor:
        """Map ``t [B, N]`` to ``[B, N, D]``."""
        return self.mlp(sincos(t, 512).to(self.mlp.fc1.weight.dtype))


class MouseEmbedding(nn.Module):
    """Embeds mouse motion by direction and magnitude, both after a symmetric log of each axis."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.angle_proj = nn.Linear(2, 256, bias=False)
        self.mlp = MLP(512, 2048, d_model)

    def forward(self, mouse: Tensor) -> Tensor:
        """Map ``mouse [B, N, 2]`` (dx, dy; any unit, kept as trained) to ``[B, N, D]``."""
        mouse = mouse.float()
        mouse = mouse.sign() * mouse.abs().log1p()
        angle = torch.atan2(mouse[..., 1], mouse[..., 0])
        dtype = self.angle_proj.weight.dtype
        direction = self.angle_proj(torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype))
        magnitude = sincos(mouse.norm(dim=-1), 256).to(dtype)
        return self.mlp(torch.cat((direction, magnitude), dim=-1))


class ButtonEmbedding(nn.Module):
    """Embeds the pressed buttons."""

    def __init__(self, n_buttons: int, d_model: int) -> None:
        super().__init__()
        self.proj = MLP(n_buttons, 2048, d_model)

    def forward(self, btn: Tensor) -> Tensor:
        """Map ``btn [B, N, n_buttons]`` (0 or 1) to ``[B, N, D]``."""
        return self.proj((2 * btn.float() - 1).to(self.proj.fc1.weight.dtype))


class ControlEmbedding(nn.Module):
    """Sum of the mouse and button embeddings."""

    def __init__(self, n_buttons: int, d_model: int) -> None:
        super().__init__()
        self.mouse = MouseEmbedding(d_model)
        self.button = ButtonEmbedding(n_buttons, d_model)

    def forward(self, mouse: Tensor, btn: Tensor) -> Tensor:
        """Map ``mouse [B, N, 2]`` and ``btn [B, N, n_buttons]`` to ``[B, N, D]``."""
        return self.mouse(mouse) + self.button(btn)
