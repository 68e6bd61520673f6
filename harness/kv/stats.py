"""Counting what quantisation does to K and V, on the device: the host waits only when a figure is read."""

from __future__ import annotations

import torch

from harness.mx.formats import SCALE_NAN, ElementFormat, MXBlocks

E8M0_BIAS = 127
"""The byte of an E8M0 scale is its exponent plus this."""


def max_code(fmt: ElementFormat) -> int:
    """Bits of the largest finite element, without sign."""
    if fmt.bits == 4:
        return 0b0111
    return int(torch.tensor(fmt.max).to(fmt.float8).view(torch.uint8))


class BlockStats:
    """Running counts over MX blocks: saturated elements (``|q| = max``), and the exponents of the scales.

    A few reductions per call and fixed-size accumulators updated in place, so it also runs compiled or
    captured; it costs time all the same, and timed runs leave it off.
    """

    def __init__(self, fmt: ElementFormat, device: torch.device) -> None:
        self.fmt, self._max_code = fmt, max_code(fmt)
        self._sums = torch.zeros(5, dtype=torch.int64, device=device)
        """Elements, saturated elements, blocks that are not NaN, NaN blocks, sum of scale bytes."""
        self._lowest = torch.zeros((), dtype=torch.int64, device=device)
        self._highest = torch.zeros((), dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self._sums.zero_()
        self._lowest.fill_(SCALE_NAN)
        self._highest.fill_(-1)

    def add(self, blocks: MXBlocks) -> None:
        """Count ``blocks``."""
        elements, scale = blocks.elements, blocks.scales.to(torch.int64)
        if self.fmt.bits == 4:
            elements = torch.stack((elements & 0xF, elements >> 4), dim=-1).flatten(-2)
        sign = 1 << (self.fmt.bits - 1)
        is_nan = scale == SCALE_NAN
        at_max = ((elements & (sign - 1)) == self._max_code).unflatten(-1, (scale.shape[-1], -1))
        saturated = (at_max & ~is_nan.unsqueeze(-1)).sum()
        nans = is_nan.sum()
        total = torch.where(is_nan, 0, scale).sum()
        n_blocks = torch.full_like(nans, scale.numel())
        n_elements = torch.full_like(nans, elements.numel())
        self._sums.add_(torch.stack((n_elements, saturated, n_blocks - nans, nans, total)))
        self._lowest.copy_(torch.minimum(self._lowest, scale.amin()))
        self._highest.copy_(torch.maximum(self._highest, torch.where(is_nan, -1, scale).amax()))

    def report(self) -> dict[str, float | int | None]:
        """The counts so far; waits for the device.

        ``saturated`` of ``elements``, ``nan_blocks``, and ``scale_exponent_min/mean/max`` over the other
        blocks (log2 of the scale; ``None`` before any block).
        """
        elements, saturated, blocks, nans, total = self._sums.tolist()
        some = blocks > 0
        return {
            "elements": elements,
            "saturated": saturated,
            "nan_blocks": nans,
            "scale_exponent_min": int(self._lowest) - E8M0_BIAS if some else None,
            "scale_exponent_mean": total / blocks - E8M0_BIAS if some else None,
            "scale_exponent_max": int(self._highest) - E8M0_BIAS if some else None,
        }
