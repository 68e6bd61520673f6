"""How ``kernel=cuda`` lays MX weights out in memory: once, at set-up, in the order in which tensor cores take them.

A weight [N, K] is cut into tiles of 16 rows by 64 inputs. A tile is 1024 bytes of elements (512 at 4 bits) and 32 scale
bytes; the tiles of 16 rows lie one after the other along K, so any stretch of K is one contiguous copy. Within a tile
the 16 bytes that a lane of a warp reads at once are its fragments of ``mma.m16n8k16`` (PTX ISA): lane 4g + t holds rows
g and g + 8, inputs 2t, 2t + 1, 2t + 8, 2t + 9 of every 16.

* 8 bits: 512 bytes for each 32 inputs. A lane's words are (16 inputs, row g), (same, row g + 8), (next 16, row g), ...
  The low half of a word holds inputs 2t and 2t + 8, the high half the odd ones, their bits as ``_BYTE_PLACES`` says.
* 4 bits: a lane's four words are the four times 16 inputs. The low half of a word holds even inputs, the high half odd
  ones, each of row g, row g + 8, and 8 inputs on row g and row g + 8, as ``_NIBBLE_PLACES`` says.
* Scales: four bytes for each g, row g and row g + 8 of the first 32 inputs, then of the second. They are not E8M0 but
  the BF16 exponents that decoding multiplies by.

N is rounded up to 16, K to 64; what is padded is zero.

A BF16 weight is laid out likewise (``pack_plain``): 2048 bytes a tile, 512 for each 16 inputs, no scales.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.formats.mx import (
    BLOCK,
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    ElementFormat,
    MXBlocks,
    filled,
    has_special_values,
    one_per_byte,
)

ROWS = 16
"""Rows of a tile."""

GROUP = 64
"""Inputs of a tile."""

SCALE_BYTES = ROWS * GROUP // BLOCK

_SMALLEST = {E4M3.name: -9, E5M2.name: -16, E2M1.name: -1}
"""Exponent of the smallest element that is not zero."""

_LARGEST_SHIFT = 30
"""Weights are held at most this many powers of two smaller than they are, so that sums of products stay normal."""

Places = tuple[tuple[tuple[int, int, int], ...], ...]
"""Where a 16-bit half holds elements: runs of bits of each, (first bit of the code, bits, first bit in the half)."""

_NIBBLE_PLACES: Places = tuple(((0, 3, low), (3, 1, sign)) for sign, low in ((15, 6), (12, 3), (14, 9), (13, 0)))
"""Elements (row g), (row g + 8), (row g, 8 inputs on), (row g + 8, 8 inputs on)."""

_BYTE_PLACES: dict[str, Places] = {
    E4M3.name: (((0, 7, 4), (7, 1, 15)), ((0, 4, 0), (4, 3, 12), (7, 1, 11))),
    E5M2.name: (((0, 7, 5), (7, 1, 15)), ((0, 5, 0), (5, 2, 12), (7, 1, 14))),
}
"""An element and that 8 inputs on: the first one as BF16 has it, the second in the bits that this leaves."""


class CudaWeight(NamedTuple):
    """A weight as the kernel reads it: ``tiles`` uint8 [N/16, K/64, bytes]; sums are multiplied by ``output_scale``."""

    tiles: Tensor
    output_scale: float


def element_bits(element: str) -> int:
    """Bits of an element "e4m3", "e5m2", "e2m1" or "bf16"."""
    return 16 if element == "bf16" else FORMATS[element].bits


def decoding(element: str) -> dict[str, int]:
    """The compile-time parameters of ``mx_decode.cuh`` for weights of such elements."""
    places = _BYTE_PLACES.get(element)
    return {"BITS": element_bits(element), "MAG_AT": places[0][0][2] if places else 0}


def tile_bytes(bits: int) -> int:
    """Bytes of one tile: elements, and scales unless they are BF16."""
    return ROWS * GROUP * bits // 8 + (SCALE_BYTES if bits < 16 else 0)


def groups(in_features: int) -> int:
    """Tiles along K."""
    return -(-in_features // GROUP)


def unfit(blocks: MXBlocks, fmt: ElementFormat) -> str | None:
    """Why the kernel cannot hold ``blocks`` exactly, or None: NaN, infinity, or scales too far apart or too extreme."""
    if has_special_values(blocks, fmt):
        return "its weight has NaN or infinite values"
    low, high = _scale_range(blocks, fmt)
    shift = _shift(high, fmt)
    if shift > _LARGEST_SHIFT or low - shift < 1 - _SMALLEST[fmt.name]:
        return f"its block scales reach from 2^{low - 127} to 2^{high - 127}, more than the kernel decodes exactly"
    return None


def pack(blocks: MXBlocks, fmt: ElementFormat) -> CudaWeight:
    """Lay out ``blocks`` of a weight [N, K]. Raises ValueError when it is ``unfit``."""
    reason = unfit(blocks, fmt)
    if reason is not None:
        raise ValueError(f"kernel=cuda cannot hold this weight: {reason}")
    n, k = blocks.scales.shape[0], blocks.scales.shape[1] * BLOCK
    rows, inputs = -n % ROWS, -k % GROUP
    shift = _shift(_scale_range(blocks, fmt)[1], fmt)
    exponents = (blocks.scales.to(torch.int16) + fmt.spare - shift).clamp(1, 254).to(torch.uint8)
    exponents = F.pad(exponents, (0, inputs // BLOCK, 0, rows), value=1)
    codes = F.pad(one_per_byte(blocks.elements, fmt), (0, inputs, 0, rows))
    lanes = codes.view(-1, 2, 8, (k + inputs) // GROUP, 4, 2, 4, 2)  # N/16, h, g, K/64, 16 inputs, +8, t, odd
    elements = _elements8(lanes, _BYTE_PLACES[fmt.name]) if fmt.bits == 8 else _elements4(lanes)
    scales = exponents.view(-1, 2, 8, (k + inputs) // GROUP, 2).permute(0, 3, 2, 4, 1).flatten(2)
    return CudaWeight(torch.cat((elements, scales), dim=2).contiguous(), 2.0**shift)


def pack_plain(weight: Tensor) -> Tensor:
    """Lay out a BF16 ``weight`` [N, K]: uint8 [N/16, K/64, 2048]."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % GROUP, 0, -n % ROWS))
    lanes = padded.view(-1, 2, 8, padded.shape[1] // GROUP, 4, 2, 4, 2)  # N/16, h, g, K/64, 16 inputs, +8, t, odd
    return lanes.permute(0, 3, 4, 2, 6, 5, 1, 7).flatten(2).contiguous().view(torch.uint8)


def unpack_plain(tiles: Tensor, out_features: int, in_features: int) -> Tensor:
    """The BF16 weight [N, K] that ``pack_plain`` was given."""
    lanes = tiles.view(torch.bfloat16).unflatten(2, (4, 8, 4, 2, 2, 2))  # N/16, K/64, 16 inputs, g, t, +8, h, odd
    weight = lanes.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(tiles.shape[0] * ROWS, -1)
    return weight[:out_features, :in_features].contiguous()


def unpack(weight: CudaWeight, fmt: ElementFormat, out_features: int, in_features: int) -> MXBlocks:
    """The blocks that ``pack`` was given, but for the scales of zero blocks, which mean nothing."""
    tiles = weight.tiles
    elements, exponents = tiles[..., :-SCALE_BYTES], tiles[..., -SCALE_BYTES:]
    lanes = _lanes8(elements, _BYTE_PLACES[fmt.name]) if fmt.bits == 8 else _lanes4(elements)
    codes = lanes.reshape(tiles.shape[0] * ROWS, -1)[:out_features, :in_features]
    shift = int(torch.tensor(weight.output_scale).log2())
    scales = (exponents.to(torch.int16) - fmt.spare + shift).clamp(0, 254).to(torch.uint8)
    scales = scales.unflatten(2, (8, 2, 2)).permute(0, 4, 2, 1, 3).reshape(tiles.shape[0] * ROWS, -1)
    scales = scales[:out_features, : in_features // BLOCK].contiguous()
    if fmt.bits == 8:
        return MXBlocks(codes.contiguous(), scales)
    return MXBlocks(codes[:, 0::2] | codes[:, 1::2] << 4, scales)


def _elements8(lanes: Tensor, places: Places) -> Tensor:
    pairs = _scattered([lanes[:, :, :, :, :, i] for i in range(2)], places)
    # from N/16, h, g, K/64, 32 inputs, 16 inputs, t, odd, byte
    return pairs.unflatten(4, (2, 2)).permute(0, 3, 4, 2, 6, 5, 1, 7, 8).flatten(2)


def _lanes8(elements: Tensor, places: Places) -> Tensor:
    pairs = elements.unflatten(2, (2, 8, 4, 2, 2, 2, 2))
    codes = torch.stack(_gathered(pairs, places))
    # from +8, N/16, K/64, 32 inputs, g, t, 16 inputs, h, odd
    return codes.permute(1, 7, 4, 2, 3, 6, 0, 5, 8)


def _elements4(lanes: Tensor) -> Tensor:
    pairs = _scattered([lanes[:, i % 2, :, :, :, i // 2] for i in range(4)], _NIBBLE_PLACES)
    # from N/16, g, K/64, 16 inputs, t, odd, byte
    return pairs.permute(0, 2, 1, 4, 3, 5, 6).flatten(2)


def _lanes4(elements: Tensor) -> Tensor:
    codes = _gathered(elements.unflatten(2, (8, 4, 4, 2, 2)), _NIBBLE_PLACES)
    both = torch.stack((torch.stack(codes[:2]), torch.stack(codes[2:])))
    # from +8, h, N/16, K/64, g, t, 16 inputs, odd
    return both.permute(2, 1, 4, 3, 6, 0, 5, 7)


def _scattered(codes: list[Tensor], places: Places) -> Tensor:
    """The two bytes, low one first, of 16-bit halves that hold ``codes``, in a dimension that comes last."""
    half = torch.zeros_like(codes[0], dtype=torch.int32)
    for code, runs in zip(codes, places, strict=True):
        for first, bits, at in runs:
            half |= (code.to(torch.int32) >> first & (1 << bits) - 1) << at
    return torch.stack((half & 0xFF, half >> 8), dim=-1).to(torch.uint8)


def _gathered(pairs: Tensor, places: Places) -> list[Tensor]:
    """The codes that ``_scattered`` was given."""
    half = pairs[..., 0].to(torch.int32) | pairs[..., 1].to(torch.int32) << 8
    codes = []
    for runs in places:
        code = torch.zeros_like(half)
        for first, bits, at in runs:
            code |= (half >> at & (1 << bits) - 1) << first
        codes.append(code.to(torch.uint8))
    return codes


def _scale_range(blocks: MXBlocks, fmt: ElementFormat) -> tuple[int, int]:
    """Lowest and highest scale byte among blocks that are not all zero; 127 of a weight of zeros."""
    used = blocks.scales[filled(blocks, fmt)]
    if used.numel() == 0:
        return 127, 127
    low, high = used.aminmax()
    return int(low), int(high)


def _shift(high: int, fmt: ElementFormat) -> int:
    """Powers of two by which weights are held smaller, so that the largest scale's exponent fits a BF16."""
    return max(0, high + fmt.spare - 254)
