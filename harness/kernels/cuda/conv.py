"""The decoder's kernels (``resblock.cu``, ``conv_stage.cu``, ``conv_rgb.cu``): packed weights, launch shapes, launches.

Pictures are BF16, channels last: ``[B, height, width, channels]``, contiguous, height and width multiples of 16. Each
shape of launch is a kernel of its own, compiled at its first use and kept. For inference: nothing takes a gradient.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.kernels import rehearsal
from harness.kernels.cuda import nvrtc
from harness.kernels.launch import dependent

GROUP = 16
"""Channels of a group of the 3×3 convolution: what the tensor cores multiply at a time."""

CHUNK = 32
"""What the kernels' channels are a multiple of: four groups among the hidden ones, one for each warp of a warpgroup."""

TILE = 16
"""Width of a tile in pixels."""

ROWS = 8
"""Height of a tile in pixels, but in ``resblock`` where channels are many (``rows_of``)."""


WIDEST = 384
"""Channels up to which a stage is one kernel: above, weights are read more often than their reuse is worth."""

_STAGE = {"TH": ROWS, "WARPS": 4}
_RGB = {"TH": 16, "WARPS": 8}
_RESIZED = (16, 32)  # rows and columns of a tile of ``resize``


def unfit(channels: int) -> str | None:
    """Why the kernels cannot compute a stage of so many channels, or None."""
    if channels % CHUNK:
        return f"{channels} channels are not a multiple of {CHUNK}"
    return None


def _halo(rows: int) -> int:
    return (rows + 2) * (TILE + 2)


def one_launch(channels: int) -> bool:
    """Whether a stage of so many channels is one kernel; in tiles of four rows conv1's inputs come in batches of 64."""
    return channels <= WIDEST and (rows_of(channels) == ROWS or channels % 64 == 0)


def rows_of(channels: int) -> int:
    """Height of a tile of ``resblock``: what shared memory has room for."""
    return ROWS if channels <= 192 else ROWS // 2


def _warps(channels: int) -> int:
    """Warps of a block of ``resblock``, four a warpgroup: as many of 4 to 12 as share the hidden channels evenly."""
    return next(4 * groups for groups in (3, 2, 1) if channels // CHUNK % groups == 0)


def resblock_bytes(channels: int, double: bool) -> int:
    """Shared memory of a block of ``resblock``: x, doubling as a matrix, hidden channels.

    Where warps have one group each: conv3's weights, what is doubled, and x again, too.
    """
    warps = _warps(channels)
    passes = 2 * channels // GROUP // warps
    rows = rows_of(channels)
    pixels, small = -(-_halo(rows) // 8) * 8, -(-(rows // 2 + 4) * (TILE // 2 + 4) // 16) * 16
    x, matrix = channels * 2 * (pixels + 1), 2 * small * _halo(rows) if double else 0
    hidden = warps * 2 * (pixels + (passes - 1) * rows * TILE) * 16
    kept = 4 * channels**2 + (x + channels * 2 * (small + 1) if double else 0)
    return x + matrix + hidden + (kept if passes == 1 else 0)


def _stage_bytes() -> int:
    return _STAGE["WARPS"] * -(-_halo(ROWS) // 8) * 8 * GROUP * 2


def _rgb_bytes(channels: int, rows: int) -> int:
    return _halo(rows) * (channels * 2 + 16) + 9 * (channels // 32) * 512


def fragments(weight: Tensor, rows: bool = False) -> Tensor:
    """BF16 ``[..., N, K]``, N and K multiples of 16, as lanes hold it: uint8 ``[..., K/16, N/16, 512]``.

    16 bytes a lane: of two tiles of 8 outputs each two words of two inputs, as operand B of m16n8k16 (PTX ISA). With
    ``rows`` each of two words of both tiles, as operand A of 16 outputs.
    """
    tiles = weight.unflatten(-1, (-1, 2, 4, 2)).unflatten(-5, (-1, 2, 8))  # N/16, 2, 8, K/16, 2, 4, 2
    lead = list(range(tiles.ndim - 7))
    words = (4, 1) if rows else (1, 4)
    order = [*lead, *(len(lead) + axis for axis in (3, 0, 2, 5, *words, 6))]
    packed = tiles.permute(order).contiguous()  # K/16, N/16, (8, 4) lanes, 2 tiles, 2 words, 2
    return packed.flatten(-5).view(torch.uint8)


def _bytes_of(*parts: Tensor) -> Tensor:
    """Parts ``[chunks, ...]`` side by side, as bytes ``[chunks, n]``."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in parts], 1).contiguous()


def _filters(conv: nn.Conv2d) -> Tensor:
    """A grouped 3×3 convolution's fragments ``[groups, 9, 512]``."""
    weight = conv.weight.detach().unflatten(0, (conv.groups, GROUP)).flatten(3)  # groups, out, in, tap
    return fragments(weight.permute(0, 3, 1, 2)).flatten(2)


def _biases(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias.detach().float().unflatten(0, (-1, CHUNK))


def pack_resblock(conv1: nn.Conv2d, conv2: nn.Conv2d, conv3: nn.Conv2d) -> Tensor:
    """Weights and biases of a residual block, in the order ``resblock`` reads them: uint8 ``[bytes]``."""
    wide, narrow = (fragments(c.weight.detach().flatten(1), rows=True).transpose(0, 1) for c in (conv1, conv3))
    parts = (wide, _filters(conv2), narrow, _biases(conv1), _biases(conv2))
    return _bytes_of(*(part.unsqueeze(0) for part in parts)).squeeze(0)


def pack_grouped(conv: nn.Conv2d) -> Tensor:
    """Weights and biases of a grouped 3×3 convolution for ``grouped_conv``: uint8 ``[groups, bytes]``."""
    return _bytes_of(_filters(conv), _biases(conv).view(-1, GROUP))


def pack_rgb(conv: nn.Conv2d) -> Tensor:
    """The weight of a 3×3 convolution to at most 8 channels, for ``conv_rgb``: uint8 ``[9, C / 32, 512]``."""
    weight = conv.weight.detach().flatten(2)  # colours, C, 9
    padded = weight.new_zeros(8, *weight.shape[1:])
    padded[: len(weight)] = weight
    lanes = padded.permute(2, 0, 1).unflatten(-1, (-1, 2, 2, 4, 2))  # 9, 8, C/32, 2, 2, 4, 2
    return lanes.permute(0, 2, 1, 5, 3, 4, 6).contiguous().flatten(2).view(torch.uint8)


def pack_products(conv: nn.Conv2d) -> Tensor:
    """The same of a convolution to at most 4 colours, for ``resblock_products``: uint8 ``[C / 16, 3, 512]``."""
    weight = conv.weight.detach().flatten(2).permute(2, 0, 1)  # 9, colours, C
    padded = weight.new_zeros(3 * GROUP // 4, 4, weight.shape[2])
    padded[: len(weight), : weight.shape[1]] = weight
    return fragments(padded.flatten(0, 1))


@functools.cache
def source(kernel: str) -> str:
    """A kernel's source."""
    here = Path(__file__).parent
    parts = ("mx_device.cuh", "conv_device.cuh", "conv_tile.cuh", kernel)
    return "".join((here / name).read_text() for name in parts)


def resblock_defines(
    channels: int, wide: int, double: bool, shortcut: bool, silu: bool, following: int = 0, rgb: bool = False
) -> dict[str, int]:
    """Compile-time parameters of ``resblock``.

    ``wide``: channels of the shortcut's picture; ``following``: those of a projection of the result.
    """
    flags = {"DOUBLE": double, "SHORTCUT": shortcut, "SILU": silu, "NEXT": following, "RGB": rgb}
    return {"C": channels, "CI": wide, "TH": rows_of(channels), "WARPS": _warps(channels)} | {
        k: int(v) for k, v in flags.items()
    }


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _load(file: str, name: str, defines: tuple[tuple[str, int], ...], shared: int, device: int) -> nvrtc.Function:
    make = functools.partial(nvrtc.compile_source, source(file), file, dict(defines), "sm_90a")
    return nvrtc.Function(rehearsal.compiled(make), name, shared)


def _launch(
    file: str, name: str, defines: dict[str, int], shared: int, grid: tuple[int, int], arguments: tuple[object, ...]
) -> None:
    function = _load(file, name, tuple(defines.items()), shared, torch.cuda.current_device())
    values = [ctypes.c_int(value) if isinstance(value, int) else value for value in arguments]
    function.launch(grid, 32 * defines["WARPS"], values, dependent(torch.device("cuda")))


def resblock(x: Tensor, weights: Tensor, double: bool, shortcut: Tensor | None = None, silu: bool = False) -> Tensor:
    """A residual block of ``x [B, h, w, C]``, doubled bicubically before it if ``double``; ``weights`` of
    ``pack_resblock``.

    ``shortcut [B, height/2, width/2, CI]`` is pixel-shuffled, repeated along channels to C, and added. ``silu`` of the
    sum.

    Raises ``nvrtc.DriverError`` when the driver refuses the launch.
    """
    out = _result_of(x, double)
    _resblock(x, weights, double, shortcut, silu, out)
    return out


def resblock_projected(
    x: Tensor, weights: Tensor, double: bool, shortcut: Tensor | None, projection: Tensor
) -> tuple[Tensor, Tensor]:
    """``resblock`` and its 1×1 convolution ``[B, height, width, N]``; ``projection``: ``fragments`` of ``[N, C]``."""
    out = _result_of(x, double)
    products = out.new_empty(*out.shape[:3], projection.shape[-2] * GROUP)
    _resblock(x, weights, double, shortcut, False, out, projection, products)
    return out, products


def resblock_products(x: Tensor, weights: Tensor, double: bool, shortcut: Tensor | None, colours: Tensor) -> Tensor:
    """What ``resize`` adds up to the last convolution of SiLU of ``resblock``: ``[B, 9, height, width, 4]``.

    ``colours`` of ``pack_products``.
    """
    batch, height, width, _ = x.shape
    products = x.new_empty(batch, 9, height << double, width << double, 4)
    _resblock(x, weights, double, shortcut, True, None, colours, products)
    return products


def _result_of(x: Tensor, double: bool) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty(batch, height << double, width << double, channels)


def _resblock(
    x: Tensor, weights: Tensor, double: bool, shortcut: Tensor | None, silu: bool, out: Tensor | None,
    after: Tensor | None = None, products: Tensor | None = None,
) -> None:  # fmt: skip
    batch, height, width, channels = x.shape
    height, width = height << double, width << double
    wide = channels if shortcut is None else shortcut.shape[-1]
    following = 0 if products is None or out is None else products.shape[-1]
    defines = resblock_defines(channels, wide, double, shortcut is not None, silu, following, out is None)
    tiles = batch * (height // rows_of(channels)) * (width // TILE)
    grid = (min(tiles, _multiprocessors(x.device)), 1)
    arguments = (x, weights, shortcut, after, out, products, height, width, tiles)
    _launch("resblock.cu", "resblock", defines, resblock_bytes(channels, double), grid, arguments)


def grouped_conv(x: Tensor, weights: Tensor) -> Tensor:
    """``leaky(conv(leaky(x)))`` of ``x [B, h, w, channels]``, 3×3 in groups of 16; ``weights`` of ``pack_grouped``."""
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    grid = (height // ROWS * (width // TILE), batch * (channels // GROUP // _STAGE["WARPS"]))
    arguments = (x, weights, out, height, width, channels)
    _launch("conv_stage.cu", "grouped_conv", _STAGE, _stage_bytes(), grid, arguments)
    return out


def upsample(small: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """``small [B, h, w, C]`` doubled bicubically, and that plus ``shortcut [B, h, w, CI]``, shuffled: ``resblock``."""
    batch, h, w, channels = small.shape
    doubled, base = (small.new_empty(batch, 2 * h, 2 * w, channels) for _ in range(2))
    grid = (-(-(w + 1) * (channels // 8) // (32 * _STAGE["WARPS"])), batch * (h + 1))
    arguments = (small, shortcut, doubled, base, 2 * h, 2 * w, channels, shortcut.shape[-1])
    _launch("conv_stage.cu", "upsample", _STAGE, 0, grid, arguments)
    return doubled, base


def conv_rgb(x: Tensor, weights: Tensor, colours: int) -> Tensor:
    """A 3×3 convolution of ``x [B, h, w, C]`` to ``[B, colours, h, w]``; ``weights`` of ``pack_rgb``."""
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, colours, height, width)
    shared, grid = _rgb_bytes(channels, _RGB["TH"]), (height // _RGB["TH"] * (width // TILE), batch)
    defines, arguments = {**_RGB, "C": channels}, (x, weights, out, height, width, colours)
    _launch("conv_rgb.cu", "conv_rgb", defines, shared, grid, arguments)
    return out


def resize(products: Tensor, colours: int, size: tuple[int, int]) -> Tensor:
    """The picture ``[B, colours, *size]``, resized bicubically, that ``resblock_products`` add up to."""
    batch, _, height, width, _ = products.shape
    rows, tall = _resized(height, size[0], _RESIZED[0])
    columns, across = _resized(width, size[1], _RESIZED[1])
    out = products.new_empty(batch, colours, *size)
    arguments = (products, out, height, width, *size, colours, rows, columns)
    defines, shared = {**_RGB, "C": CHUNK}, rows * columns * 16
    _launch("conv_rgb.cu", "resize", defines, shared, (tall * across, batch), arguments)
    return out


def _resized(before: int, after: int, tile: int) -> tuple[int, int]:
    """Along one axis of ``resize``: the most pixels that a tile is made of, and how many tiles there are."""
    return -(-(tile - 1) * before // after) + 5, -(-after // tile)
