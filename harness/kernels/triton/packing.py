"""How ``kernel=triton`` lays MX weights out in memory: once, at set-up, so that the GPU reads them in one pass.

A weight [N, K] is cut into tiles of ``width`` bytes along its rows, and a tile of all rows is contiguous:
``elements`` uint8 [tiles, NP, width], NP being N rounded up to 128. An 8-bit byte is one element. A byte of two 4-bit
elements holds element k of the first half of K low and element k of the second half high, so that unpacking moves
nothing between threads. ``scales`` int32 [blocks/4, NP] holds four consecutive E8M0 bytes a word, lowest first.

K is rounded up to KP, a multiple of 128 (8 bit) or 256 (4 bit); what is padded is zero with scale 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.formats.mx import BLOCK, E8M0_BIAS, ElementFormat, MXBlocks, filled, has_special_values, one_per_byte

ROWS = 128
"""NP is a multiple of this: no block of a kernel reads past the end."""

STEP = 128
"""Bytes of a weight row that one step of a kernel's loop takes."""


class PackedWeight(NamedTuple):
    """A weight as the kernels read it. ``wide``: it needs the decoding that knows every scale and special value."""

    elements: Tensor
    scales: Tensor
    wide: bool


def padded_inputs(in_features: int, fmt: ElementFormat) -> int:
    """KP: ``in_features`` rounded up to whole steps of the kernels."""
    step = STEP * 8 // fmt.bits
    return -(-in_features // step) * step


def pack(blocks: MXBlocks, fmt: ElementFormat, width: int) -> PackedWeight:
    """Lay out ``blocks`` of [N, K] in tiles of ``width`` (32, 64 or 128) bytes; values are kept, bit for bit."""
    n = blocks.scales.shape[0]
    k = blocks.scales.shape[1] * BLOCK
    kp, rows = padded_inputs(k, fmt), -n % ROWS
    elements = F.pad(one_per_byte(blocks.elements, fmt), (0, kp - k, 0, rows))
    scales = F.pad(blocks.scales, (0, (kp - k) // BLOCK, 0, rows), value=E8M0_BIAS)
    if fmt.bits == 4:
        elements = elements[:, : kp // 2] | elements[:, kp // 2 :] << 4
    tiled = _compact(elements.unflatten(1, (-1, width)).transpose(0, 1))
    words = _compact(scales.contiguous().view(torch.int32).t())
    return PackedWeight(tiled, words, _needs_wide(blocks, fmt))


def unpack(packed: PackedWeight, fmt: ElementFormat, out_features: int, in_features: int) -> MXBlocks:
    """The blocks that ``pack`` was given."""
    rows = packed.elements.transpose(0, 1).flatten(1)[:out_features]
    scales = _compact(packed.scales.t()).view(torch.uint8)[:out_features, : in_features // BLOCK].contiguous()
    if fmt.bits == 8:
        return MXBlocks(rows[:, :in_features].contiguous(), scales)
    codes = torch.cat((rows & 0xF, rows >> 4), dim=1)[:, :in_features]
    return MXBlocks(codes[:, 0::2] | codes[:, 1::2] << 4, scales)


def _compact(x: Tensor) -> Tensor:
    """A copy of ``x`` with row-major strides, also along dimensions of size 1, whose strides ``contiguous`` leaves."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _needs_wide(blocks: MXBlocks, fmt: ElementFormat) -> bool:
    """Whether a scale lies outside what the short decoding spares, or an element is NaN or infinite."""
    used = torch.where(filled(blocks, fmt), blocks.scales, E8M0_BIAS)  # a zero block may have any scale but NaN
    low, high = (int(v) for v in used.aminmax())
    return low == 0 or high + fmt.spare > 254 or has_special_values(blocks, fmt)
