"""GPTQ on MX blocks: round a weight one input at a time and let the inputs still to come make up for each error.

Source: Frantar et al., GPTQ (2210.17323). For outputs W x the squared error of a row is (w - q) H (w - q)ᵀ with
H = E[x xᵀ]. Inputs are visited in their natural order, so that a block of 32 keeps its place; with U the upper
Cholesky factor of H⁻¹, rounding input i costs e_i² with e_i = (w_i - q_i) / U_ii once the inputs after i have moved
by -e_i U_ij. A block's scale is therefore the one, of a few, whose 32 errors cost least when really made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harness.formats.mx import BLOCK, ElementFormat, MXBlocks, decode, encode_with_scales

EXPONENTS = (-1, 0, 1)
"""Scales tried for a block, as exponents relative to floor(log2 amax) - emax."""

SCALE_BIAS = 127
"""Byte of the scale 1."""

CHUNK_ELEMENTS = 1 << 28
"""Weights that are worked on at a time: rows are independent of each other."""

DOUBLE_INPUTS = 4096
"""Up to so many inputs the algebra is float64; beyond, float32 holds, and a Hessian of 10240 inputs takes 420 MB."""


class Rounded(NamedTuple):
    """A weight ``[N, K]`` in MX, and what it costs: ``loss`` float32 ``[N]``, (w - q) H (w - q)ᵀ of each row."""

    blocks: MXBlocks
    loss: Tensor


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian [K, K]`` in the dtype the algebra runs in, plus ``damping`` times its mean diagonal on the diagonal.

    Inputs that never were anything but zero get the mean diagonal: their weights do not matter and are left alone.
    """
    dtype = torch.float64 if len(hessian) <= DOUBLE_INPUTS else torch.float32
    work = hessian.to(dtype, copy=True)
    diagonal = work.diagonal()
    mean = diagonal.mean()
    dead = diagonal <= 0
    diagonal.add_(damping * mean + dead * mean)
    if not mean > 0:
        diagonal.fill_(1)  # no input at all: every rounding costs the same
    return work


def inverse(hessian: Tensor) -> Tensor:
    """H⁻¹ of a positive definite ``hessian [K, K]``.

    Raises:
        ValueError: if it is not positive definite, or not finite.
    """
    lower, info = torch.linalg.cholesky_ex(hessian)
    if int(info) or not bool(lower.diagonal().isfinite().all()):
        raise ValueError("calibration statistics are not positive definite; raise calib.damping")
    return torch.cholesky_inverse(lower)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent (int32, within the normal range) in float32 or float64, exact: made from its bits."""
    word, bias, fraction = {
        torch.float32: (torch.int32, 127, 23),
        torch.float64: (torch.int64, 1023, 52),
    }[dtype]
    return ((exponent.to(word) + bias) << fraction).view(dtype)


class Grid:
    """The values of an element format, to round to: a search and a lookup, where arithmetic takes ten operations."""

    def __init__(self, fmt: ElementFormat, dtype: torch.dtype, device: torch.device) -> None:
        per_element = BLOCK * fmt.bits // 8
        codes = torch.arange(256, dtype=torch.uint8).view(-1, per_element)
        ones = torch.full((len(codes), 1), SCALE_BIAS, dtype=torch.uint8)
        found = decode(MXBlocks(codes, ones), fmt, torch.float32).flatten()
        values = found[found.isfinite()].unique().to(dtype)
        self.values = values.to(device)
        self.bounds = ((values[1:] + values[:-1]) / 2).to(device)

    def round(self, x: Tensor) -> Tensor:
        """``x`` rounded to the nearest value; halfway to the lower one, beyond the largest to it."""
        return self.values[torch.bucketize(x.contiguous(), self.bounds)]


def gptq(weight: Tensor, hessian: Tensor, inverse: Tensor, fmt: ElementFormat, sweeps: int = 0) -> Rounded:
    """``weight [N, K]`` in MX for inputs of second moment ``hessian [K, K]``.

    Args:
        weight: any float dtype; K is a multiple of 32.
        hessian: E[x xᵀ], damped, on the weight's device, in the dtype to compute in (:func:`damped`).
        inverse: of ``hessian``.
        fmt: elements.
        sweeps: passes of coordinate descent after GPTQ, which let earlier inputs answer to later ones.
    """
    upper = torch.linalg.cholesky(inverse, upper=True)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts = [_gptq_rows(part, hessian, upper, fmt, sweeps) for part in weight.split(rows)]
    blocks = MXBlocks(*(torch.cat([getattr(part.blocks, name) for part in parts]) for name in MXBlocks._fields))
    return Rounded(blocks, torch.cat([part.loss for part in parts]))


def _gptq_rows(weight: Tensor, hessian: Tensor, upper: Tensor, fmt: ElementFormat, sweeps: int) -> Rounded:
    """:func:`gptq` of some rows; ``upper`` is the factor of the inverse."""
    target, grid = weight.to(upper.dtype), Grid(fmt, upper.dtype, upper.device)
    exponents = block_exponents(target.unflatten(-1, (-1, BLOCK)), fmt)  # [E, N, K/32]
    moved, values = target.clone(), torch.empty_like(target)
    kept = []
    for start in range(0, weight.shape[1], BLOCK):
        stop = start + BLOCK
        local = upper[start:stop, start:stop]
        block = _round_block(moved[:, start:stop], exponents[..., start // BLOCK], local, grid)
        values[:, start:stop] = block.values
        kept.append(block.exponents)
        moved[:, stop:] -= block.errors @ upper[start:stop, stop:]
    exponent = torch.stack(kept, -1)
    values = _descend(target, values, exponent, hessian, grid, sweeps)
    difference = target - values
    scales = (exponent + SCALE_BIAS).to(torch.uint8)
    blocks = MXBlocks(encode_with_scales(values.float(), scales, fmt), scales)
    return Rounded(blocks, ((difference @ hessian) * difference).sum(-1).float())


class _Block(NamedTuple):
    """32 inputs of N rows: rounded values, errors over U_ii, exponents of their scales."""

    values: Tensor
    errors: Tensor
    exponents: Tensor


def _round_block(weight: Tensor, exponents: Tensor, upper: Tensor, grid: Grid) -> _Block:
    """GPTQ within one block ``weight [N, 32]`` under each scale of ``exponents [E, N]``, the cheapest kept."""
    step = power_of_two(exponents, weight.dtype)[..., None]
    left = weight / step  # in units of the scale
    values, errors = torch.empty_like(left), torch.empty_like(left)
    diagonal = upper.diagonal().reciprocal().tolist()
    for i in range(BLOCK):
        column = left[..., i]
        value = grid.round(column)
        error = (column - value).mul_(diagonal[i])
        values[..., i], errors[..., i] = value, error
        if i + 1 < BLOCK:
            left[..., i + 1 :].addcmul_(error[..., None], upper[i, i + 1 :], value=-1)
    values, errors = values.mul_(step), errors.mul_(step)
    best = errors.square().sum(-1).argmin(0, keepdim=True)  # [1, N]

    def chosen(x: Tensor) -> Tensor:
        index = best[..., None].expand(1, *x.shape[1:]) if x.dim() > best.dim() else best
        return x.gather(0, index).squeeze(0)

    return _Block(chosen(values), chosen(errors), chosen(exponents))


def block_exponents(blocks: Tensor, fmt: ElementFormat) -> Tensor:
    """Exponents of the scales worth trying for ``blocks [..., 32]``, int32 ``[len(EXPONENTS), ...]``.

    They follow from the weight as it was. What earlier errors add to inputs that hardly vary may be large and does not
    matter: it may saturate, and must not make the block's scale coarse.
    """
    floor = torch.frexp(blocks.abs().amax(-1)).exponent - 1 - fmt.emax
    offsets = torch.tensor(EXPONENTS, dtype=torch.int32, device=blocks.device)
    candidates = floor + offsets.view(-1, *[1] * floor.dim())
    return candidates.clamp(1 - SCALE_BIAS, SCALE_BIAS)


def _descend(target: Tensor, values: Tensor, exponents: Tensor, hessian: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """``values [N, K]`` after ``sweeps`` of coordinate descent on (t - q) H (t - q)ᵀ under their scales."""
    if not sweeps:
        return values
    steps = power_of_two(exponents, target.dtype)
    diagonal = hessian.diagonal().reciprocal().tolist()
    residual = (target - values) @ hessian
    for _ in range(sweeps):
        for start in range(0, values.shape[1], BLOCK):
            stop, step = start + BLOCK, steps[:, start // BLOCK, None]
            local = hessian[start:stop, start:stop]
            own, old = residual[:, start:stop] / step, values[:, start:stop] / step
            moves = torch.empty_like(own)
            for i in range(BLOCK):
                move = grid.round(torch.add(old[:, i], own[:, i], alpha=diagonal[start + i])).sub_(old[:, i])
                moves[:, i] = move
                own.addr_(move, local[i], alpha=-1)
            values[:, start:stop] = (old + moves) * step
            residual.addmm_(moves.mul_(step), hessian[start:stop], alpha=-1)
    return values
