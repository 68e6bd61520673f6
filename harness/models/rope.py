"""Rotary position embeddings of GameRFT: the ``motion`` and ``ortho`` variants.

Angles are float32 and computed from absolute frame indices, so a rollout may run past ``n_frames``. Frequencies and
grid positions are kept as the int32 bits of their float32 values: ``module.to(torch.bfloat16)`` rounds float buffers,
which would move the angles of late frames by radians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


def bits(x: Tensor) -> Tensor:
    """The bits of float32 ``x`` as int32, which no change of a module's dtype touches; undo with ``view``."""
    return x.to(torch.float32).view(torch.int32)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of ``x [B, H, T, Dh]`` by ``cos, sin [T, Dh/2]`` (float32).

    The pairs are ``(x[..., 0::2], x[..., 1::2])``; the output is the two rotated halves concatenated, not
    interleaved again. Computed in float32, returned in ``x``'s dtype.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


class RotaryTables(NamedTuple):
    """What a frame's angles are made of, the same for every variant.

    Those of frame f are ``(base + time * uses_time) * freqs``, where ``time`` is ``times[f]`` or, behind the last of
    these, ``times[-1] + step * (f - last)``, ``last`` their last index. In float32, each operation rounded by itself,
    that is what ``forward`` computes, bit for bit.

    Attributes:
        base: float32 ``[P, Dh/2]``: positions in space.
        uses_time: float32 ``[Dh/2]``, zeros and ones.
        freqs: float32 ``[Dh/2]``.
        times: float32 ``[n]``.
        step: see above.
    """

    base: Tensor
    uses_time: Tensor
    freqs: Tensor
    times: Tensor
    step: float


class MotionRotary(nn.Module):
    """Angles that move space with time: each frame shifts the x and y positions by ``delta``.

    Token (frame f, row r, column c) sits at ``pt = f*delta``, ``px = pt + c - (S-1)/2``,
    ``py = pt + r - (S-1)/2``. Frequencies are ``10000^(-2i/Dh)``; the first 3/4 alternate x, y, the rest is time.
    """

    freqs: Tensor
    grid: Tensor

    def __init__(self, head_dim: int, side: int, delta: float) -> None:
        super().__init__()
        self.delta = delta
        self.pairs = head_dim // 2
        self.n_space = 3 * self.pairs // 4
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        grid = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        rows, cols = grid.repeat_interleave(side), grid.repeat(side)
        self.register_buffer("freqs", bits(1.0 / 10000.0**exponent), persistent=False)
        self.register_buffer("grid", bits(torch.stack((rows, cols))), persistent=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(cos, sin)``, float32 ``[N*P, Dh/2]``, of absolute frame indices ``frames [N]``."""
        time = frames.to(torch.float32)[:, None] * self.delta
        rows, cols = self.grid.view(torch.float32)
        x, y = time + cols, time + rows
        time = time.expand_as(x)
        index = torch.arange(self.pairs, device=frames.device)
        is_time, is_x = index >= self.n_space, index % 2 == 0
        position = torch.where(is_time, time[..., None], torch.where(is_x, x[..., None], y[..., None]))
        angle = (position * self.freqs.view(torch.float32)).flatten(0, 1)
        return angle.cos(), angle.sin()

    def tables(self) -> RotaryTables:
        """See :class:`RotaryTables`; new tensors, on the module's device."""
        rows, cols = self.grid.view(torch.float32)
        index = torch.arange(self.pairs, device=rows.device)
        base = torch.where(index % 2 == 0, cols[:, None], rows[:, None])
        base = torch.where(index >= self.n_space, torch.zeros_like(base), base)
        freqs = self.freqs.view(torch.float32).clone()
        return RotaryTables(base, torch.ones_like(freqs), freqs, torch.zeros_like(freqs[:1]), self.delta)


class OrthoRotary(nn.Module):
    """Separate angles for time, row and column, plus an unrotated quarter.

    Frequencies are ``pi * linspace(1, 128, Dh/8)``. Positions lie on [-1, 1] for the first ``n_frames`` frames and
    go on at the same spacing beyond.
    """

    times: Tensor
    freqs: Tensor
    grid: Tensor

    def __init__(self, head_dim: int, side: int, n_frames: int) -> None:
        super().__init__()
        self.n_frames = n_frames
        grid = torch.linspace(-1, 1, side + 1)[:side]
        space = torch.stack((grid.repeat_interleave(side), grid.repeat(side)))
        self.register_buffer("times", bits(torch.linspace(-1, 1, n_frames)), persistent=False)
        self.register_buffer("freqs", bits(math.pi * torch.linspace(1, 128, head_dim // 8)), persistent=False)
        self.register_buffer("grid", bits(space), persistent=False)

    @property
    def _step(self) -> float:
        return 2.0 / max(self.n_frames - 1, 1)

    def time_position(self, frames: Tensor) -> Tensor:
        """Position of each frame index, float32: ``linspace(-1, 1, n_frames)``, continued at its spacing without end.

        Within ``n_frames`` it is the table itself. Its last bit depends on the machine's vector instructions, and
        frequencies of 400 rad amplify that bit: no formula gives the same everywhere.
        """
        last = self.n_frames - 1
        inside = self.times[frames.clamp(max=last)].view(torch.float32)
        beyond = self.times[-1].view(torch.float32) + self._step * (frames - last).to(torch.float32)
        return torch.where(frames > last, beyond, inside)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(cos, sin)``, float32 ``[N*P, Dh/2]``, of absolute frame indices ``frames [N]``."""
        n, tokens = frames.shape[0], self.grid.shape[1]
        time = self.time_position(frames)[:, None].expand(n, tokens)
        row, col = (axis.expand(n, tokens) for axis in self.grid.view(torch.float32))
        position = torch.stack((time, row, col, torch.zeros_like(time)), dim=-1)
        angle = (position[..., None] * self.freqs.view(torch.float32)).reshape(n * tokens, -1)
        return angle.cos(), angle.sin()

    def tables(self) -> RotaryTables:
        """See :class:`RotaryTables`; new tensors, on the module's device."""
        freqs = self.freqs.view(torch.float32)
        row, col = self.grid.view(torch.float32)
        zero = torch.zeros_like(row)
        base = torch.stack((zero, row, col, zero), dim=-1).repeat_interleave(len(freqs), dim=-1)
        uses_time = torch.tensor([1.0, 0.0, 0.0, 0.0], device=freqs.device).repeat_interleave(len(freqs))
        return RotaryTables(base, uses_time, freqs.repeat(4), self.times.view(torch.float32).clone(), self._step)
