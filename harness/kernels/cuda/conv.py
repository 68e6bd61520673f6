"""The decoder's kernels (``resblock.cu``, ``conv_stage.cu``, ``conv_rgb.cu``): packed weights, launch shapes, launches.

Pictures are BF16, channels last: ``[B, height, width, channels]``, contiguous, height and width multiples of 16. Each
shape of launch is a kernel of its own, compiled at its first use and kept. For inference: nothing takes a gradient.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.kernels.cuda import nvrtc

GROUP = 16
"""Channels of a group of the 3×3 convolution: what the tensor cores multiply at a time."""

CHUNK = 32
"""Hidden channels that a block has in shared memory at a time."""

TILE = 16
"""Width of a tile in pixels; its height is a launch shape's."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block may have (CUDA C++ programming guide, compute capability 9.0)."""


@dataclass(frozen=True)
class Shape:
    """Launch shape of ``resblock``: rows of a tile, warps, blocks of a multiprocessor.

    ``shares`` and ``split``: into how many parts conv3's and conv1's outputs are divided among the warps.
    """

    rows: int
    warps: int
    shares: int
    blocks: int
    split: int = 1


SHAPES = {96: Shape(8, 8, 2, 1), 192: Shape(8, 8, 1, 1)}
"""By channels: the fastest on an H100 (``scripts/bench_decoder.py --tune``)."""

WIDEST = 192
"""Channels up to which a stage is one kernel: above, weights are read more often than their reuse is worth."""

_STAGE = {"TH": 8, "WARPS": 8}
_RGB = {"TH": 8, "WARPS": 8}


def shape_of(channels: int) -> Shape:
    """The launch shape of ``resblock`` with so many channels."""
    return SHAPES.get(channels, Shape(8, 8, 2, 1))


def unfit(channels: int) -> str | None:
    """Why the kernels cannot compute a stage of so many channels, or None."""
    if channels % CHUNK:
        return f"{channels} channels are not a multiple of {CHUNK}"
    return None


def _halo(rows: int) -> int:
    return (rows + 2) * (TILE + 2)


def resblock_bytes(channels: int, rows: int) -> int:
    """Shared memory of a block of ``resblock``."""
    pixel, hidden = channels * 2 + 16, CHUNK * 2 + 16
    return _halo(rows) * (pixel + hidden) + rows * TILE * hidden + 2 * _chunk_bytes(channels)


def _chunk_bytes(channels: int) -> int:
    return 2 * CHUNK * channels * 2 + CHUNK // GROUP * 9 * 512 + 2 * CHUNK * 4


def _stage_bytes(rows: int) -> int:
    return _halo(rows) * (CHUNK * 2 + 16) + CHUNK // GROUP * 9 * 512 + CHUNK * 4


def _rgb_bytes(channels: int, rows: int) -> int:
    return _halo(rows) * (channels * 2 + 16) + 9 * (channels // 32) * 512


def fragments(weight: Tensor) -> Tensor:
    """BF16 ``[..., N, K]``, N and K multiples of 16, as lanes hold it: uint8 ``[..., K/16, N/16, 512]``.

    16 bytes a lane: of two tiles of 8 outputs each two words of two inputs, as operand B of m16n8k16 (PTX ISA).
    """
    tiles = weight.unflatten(-1, (-1, 2, 4, 2)).unflatten(-5, (-1, 2, 8))  # N/16, 2, 8, K/16, 2, 4, 2
    lead = list(range(tiles.ndim - 7))
    order = [*lead, *(len(lead) + axis for axis in (3, 0, 2, 5, 1, 4, 6))]
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
    """Weights and biases of a residual block, in the order ``resblock`` reads them: uint8 ``[2 * C / 32, bytes]``."""
    widening = conv1.weight.detach().flatten(1).unflatten(0, (-1, CHUNK))  # chunks, 32, C
    narrowing = conv3.weight.detach().flatten(1).unflatten(1, (-1, CHUNK)).transpose(0, 1)  # chunks, C, 32
    filters = _filters(conv2).unflatten(0, (-1, CHUNK // GROUP))
    return _bytes_of(fragments(widening), filters, fragments(narrowing), _biases(conv1), _biases(conv2))


def pack_grouped(conv: nn.Conv2d) -> Tensor:
    """Weights and biases of a grouped 3×3 convolution for ``grouped_conv``: uint8 ``[channels / 32, bytes]``."""
    return _bytes_of(_filters(conv).unflatten(0, (-1, CHUNK // GROUP)), _biases(conv))


def pack_rgb(conv: nn.Conv2d) -> Tensor:
    """The weight of a 3×3 convolution to at most 8 channels, for ``conv_rgb``: uint8 ``[9, C / 32, 512]``."""
    weight = conv.weight.detach().flatten(2)  # colours, C, 9
    padded = weight.new_zeros(8, *weight.shape[1:])
    padded[: len(weight)] = weight
    lanes = padded.permute(2, 0, 1).unflatten(-1, (-1, 2, 2, 4, 2))  # 9, 8, C/32, 2, 2, 4, 2
    return lanes.permute(0, 2, 1, 5, 3, 4, 6).contiguous().flatten(2).view(torch.uint8)


@functools.cache
def source(kernel: str) -> str:
    """A kernel's source."""
    here = Path(__file__).parent
    parts = ("mx_device.cuh", "conv_device.cuh", "conv_tile.cuh", kernel)
    return "".join((here / name).read_text() for name in parts)


def resblock_defines(
    channels: int, wide: int, double: bool, shortcut: bool, silu: bool, shape: Shape
) -> dict[str, int]:
    """Compile-time parameters of ``resblock``; ``wide``: channels of the shortcut's picture."""
    flags = {"DOUBLE": int(double), "SHORTCUT": int(shortcut), "SILU": int(silu)}
    sizes = {"C": channels, "CI": wide, "TH": shape.rows, "WARPS": shape.warps, "WN": shape.shares}
    return {**sizes, "BLOCKS": shape.blocks, "SPLIT": shape.split, **flags}


@functools.cache
def _load(file: str, name: str, defines: tuple[tuple[str, int], ...], shared: int, device: int) -> nvrtc.Function:
    return nvrtc.Function(nvrtc.compile_source(source(file), file, dict(defines), "sm_90a"), name, shared)


def _launch(
    file: str, name: str, defines: dict[str, int], shared: int, grid: tuple[int, int], arguments: tuple[object, ...]
) -> None:
    function = _load(file, name, tuple(defines.items()), shared, torch.cuda.current_device())
    values = [ctypes.c_int(value) if isinstance(value, int) else value for value in arguments]
    function.launch(grid, 32 * defines["WARPS"], values)


def resblock(
    x: Tensor,
    weights: Tensor,
    double: bool,
    shortcut: Tensor | None = None,
    silu: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """A residual block of ``x [B, h, w, C]``, doubled bicubically before it if ``double``; ``weights`` of
    ``pack_resblock``.

    ``shortcut [B, height/2, width/2, CI]`` is pixel-shuffled, repeated along channels to C, and added. ``silu`` of the
    sum.

    Raises ``nvrtc.DriverError`` when the driver refuses the launch.
    """
    batch, height, width, channels = x.shape
    if double:
        height, width = 2 * height, 2 * width
    shape = shape or shape_of(channels)
    out = x.new_empty(batch, height, width, channels)
    wide = channels if shortcut is None else shortcut.shape[-1]
    defines = resblock_defines(channels, wide, double, shortcut is not None, silu, shape)
    grid = (height // shape.rows * (width // TILE), batch)
    arguments = (x, weights, shortcut, out, height, width)
    _launch("resblock.cu", "resblock", defines, resblock_bytes(channels, shape.rows), grid, arguments)
    return out


def grouped_conv(x: Tensor, weights: Tensor) -> Tensor:
    """``leaky(conv(leaky(x)))`` of ``x [B, h, w, channels]``, 3×3 in groups of 16; ``weights`` of ``pack_grouped``."""
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    grid = (height // _STAGE["TH"] * (width // TILE), batch * (channels // CHUNK))
    arguments = (x, weights, out, height, width, channels)
    _launch("conv_stage.cu", "grouped_conv", _STAGE, _stage_bytes(_STAGE["TH"]), grid, arguments)
    return out


def upsample(small: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """``small [B, h, w, C]`` doubled bicubically, and that plus ``shortcut [B, h, w, CI]``, shuffled: ``resblock``."""
    batch, h, w, channels = small.shape
    doubled, base = (small.new_empty(batch, 2 * h, 2 * w, channels) for _ in range(2))
    rows, threads = _STAGE["TH"], 32 * _STAGE["WARPS"]
    grid = (-(-2 * w * (channels // 8) // threads), batch * (2 * h // rows + 1))
    arguments = (small, shortcut, doubled, base, 2 * h, 2 * w, channels, shortcut.shape[-1])
    _launch("conv_stage.cu", "upsample", _STAGE, 0, grid, arguments)
    return doubled, base


def conv_rgb(x: Tensor, weights: Tensor, colours: int, size: tuple[int, int] | None = None) -> Tensor:
    """A 3×3 convolution of ``x [B, h, w, C]`` to ``[B, colours, h, w]``; ``weights`` of ``pack_rgb``.

    With ``size``, and at most 4 colours, then resized bicubically to that height and width.
    """
    batch, height, width, channels = x.shape
    shape = (batch, colours, height, width) if size is None else (batch, height, width, 4)
    out = x.new_empty(shape)
    defines = {**_RGB, "C": channels, "PACKED": int(size is not None)}
    shared, grid = _rgb_bytes(channels, _RGB["TH"]), (height // _RGB["TH"] * (width // TILE), batch)
    _launch("conv_rgb.cu", "conv_rgb", defines, shared, grid, (x, weights, out, height, width, colours))
    if size is None:
        return out
    resized = x.new_empty(batch, colours, *size)
    grid = (-(-size[0] * size[1] // (32 * _RGB["WARPS"])), batch)
    _launch("conv_rgb.cu", "resize", defines, 0, grid, (out, resized, height, width, *size, colours))
    return resized
