"""Formats of quantised frames: what a codec stores for a frame of K or V, and what it reads back.

Frames are ``x [B, H, F, P, Dh]``: clips, heads, frames, tokens, head size. A codec turns them into :class:`Stored`
tensors with the same first three dimensions, so that any frame can be written into any slot of a ring and always
carries the scales it was encoded with.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from harness.formats.mx import (
    BLOCK,
    E2M1,
    E8M0_BIAS,
    SCALE_NAN,
    ElementFormat,
    MXBlocks,
    decode,
    encode,
    encode_with_scales,
    scale_bytes,
    stored_values,
)
from harness.formats.scales import ScaleMode
from harness.kv.conf import EMAConf

INT8_MAX = 127

CHUNKS = 4
"""4-bit elements are looked up in so many chunks, which bounds the room that the indices take."""


class RingShape(NamedTuple):
    """Sizes of one layer's ring of K or of V: clips, heads, frames kept, tokens per frame, head size."""

    batch: int
    heads: int
    frames: int
    tokens: int
    head_dim: int

    @property
    def numel(self) -> int:
        """Elements of an unquantised ring."""
        return math.prod(self)


class Stored(NamedTuple):
    """Elements and scales of frames; both start with ``[B, H, F]``."""

    elements: Tensor
    scales: Tensor


class Codec(Protocol):
    """Encodes and decodes the frames of one ring."""

    name: str
    """Element format, for records: "e4m3", "int8" …"""

    def allocate(self, shape: RingShape, device: torch.device) -> Stored:
        """Empty storage of a whole ring; reads as zeros."""
        ...

    def calibrate(self, x: Tensor) -> None:
        """Begin a rollout whose prefill leaves ``x`` in the ring."""
        ...

    def encode(self, x: Tensor) -> Stored:
        """What to store for frames ``x`` of the prefill."""
        ...

    def encode_next(self, x: Tensor) -> Stored:
        """What to store for ``x``, the next new frame (F = 1)."""
        ...

    def decode(self, stored: Stored, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Values of ``stored``, ``[B, H, F, P, Dh]`` in ``dtype``, written to ``out`` if given."""
        ...

    def state(self) -> list[Tensor]:
        """Tensors that change in place from frame to frame, beside what is stored."""
        ...

    def computed_bytes(self, shape: RingShape) -> int:
        """Bytes of a ring's storage and of the state, by formula."""
        ...

    def saturated(self, elements: Tensor) -> Tensor:
        """Elements of the largest magnitude, ``|q| = max``: int64 count over the last dimension."""
        ...

    def log2_scales(self, scales: Tensor) -> Tensor:
        """log2 of scales, float32 of their shape; NaN where the values were NaN or Inf, -inf where all were zero."""
        ...


class MXCodec:
    """MX blocks of 32 along the head, one E8M0 scale each; 4-bit elements packed two to a byte.

    Args:
        fmt: element format.
        scale_mode: how a scale follows from its block's amax.
    """

    def __init__(self, fmt: ElementFormat, scale_mode: ScaleMode) -> None:
        self.fmt, self.scale_mode, self.name = fmt, scale_mode, fmt.name
        self._max_code = _max_code(fmt)

    def allocate(self, shape: RingShape, device: torch.device) -> Stored:
        """See :class:`Codec`; scales ``[B, H, R, P, Dh/32]``."""
        elements = torch.zeros(*shape[:4], shape.head_dim * self.fmt.bits // 8, dtype=torch.uint8, device=device)
        return Stored(elements, self._scales(shape, device))

    def _scales(self, shape: RingShape, device: torch.device) -> Tensor:
        return torch.zeros(*shape[:4], shape.head_dim // BLOCK, dtype=torch.uint8, device=device)

    def calibrate(self, x: Tensor) -> None:
        """Nothing: a block's scale depends on the block alone."""

    def encode_next(self, x: Tensor) -> Stored:
        """See :class:`Codec`."""
        return self.encode(x)

    def encode(self, x: Tensor) -> Stored:
        """See :class:`Codec`."""
        return Stored(*encode(x, self.fmt, self.scale_mode))

    def decode(self, stored: Stored, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """See :class:`Codec`."""
        if out is None or out.dtype != torch.bfloat16 or not out.is_contiguous():
            return decode(MXBlocks(*stored), self.fmt, dtype, out)
        elements, scales = stored
        if self.fmt.bits == 8:
            _shift_in_place(elements, self.fmt, out)
        else:
            _look_up_in_place(elements, out)
        factor = scales.view(torch.float8_e8m0fnu).to(out.dtype)
        out.unflatten(-1, (-1, BLOCK)).mul_(factor.unsqueeze(-1))
        return out

    def state(self) -> list[Tensor]:
        """None."""
        return []

    def computed_bytes(self, shape: RingShape) -> int:
        """See :class:`Codec`."""
        return shape.numel * self.fmt.bits // 8 + shape.numel // BLOCK

    def saturated(self, elements: Tensor) -> Tensor:
        """See :class:`Codec`."""
        if self.fmt.bits == 8:
            return ((elements & 0x7F) == self._max_code).sum(-1)
        low, high = (elements & 0x7) == self._max_code, ((elements >> 4) & 0x7) == self._max_code
        return low.sum(-1) + high.sum(-1)

    def log2_scales(self, scales: Tensor) -> Tensor:
        """See :class:`Codec`."""
        exponents = torch.where(scales == 0, -math.inf, scales.float() - E8M0_BIAS)
        return torch.where(scales == SCALE_NAN, math.nan, exponents)


class HeadEMACodec(MXCodec):
    """MX elements under one E8M0 scale per clip, head and frame, from a moving average of the head's amax.

    A scale per frame and head is kept instead of one per block: 1 byte where ``P * Dh / 32`` would be. Every frame
    keeps the scale that encoded it, so a moving average never touches frames stored before.

    * Prefill is the calibration: a head's amax is its largest over the frames that the ring keeps, which all get that
      scale, so that none of them saturates.
    * A new frame updates the average before it is encoded: ``amax = max(amax, own)`` for the first ``warmup_frames``
      frames (nothing saturates), then ``amax = momentum * amax + (1 - momentum) * own``. A frame well above the
      average saturates, which the statistics count. Scales are powers of two, so most modes leave some headroom.
    * ``floor`` bounds the amax from which the scale is made. NaN and Inf never enter the average; a head's frame that
      holds one gets the scale NaN and reads as NaN.

    The average is a device tensor updated in place: it compiles, and a CUDA graph replays it.

    Args:
        fmt: element format.
        scale_mode: how a scale follows from amax.
        conf: momentum, warm-up and floor.
        shape: of the ring.
        device: where.
    """

    def __init__(
        self, fmt: ElementFormat, scale_mode: ScaleMode, conf: EMAConf, shape: RingShape, device: torch.device
    ) -> None:
        super().__init__(fmt, scale_mode)
        self.name = f"{fmt.name}_head_ema"
        self.conf = conf
        self.amax = torch.zeros(shape.batch, shape.heads, device=device)
        """Moving average of amax, float32 ``[B, H]``."""
        self.frames = torch.zeros((), dtype=torch.int64, device=device)
        """New frames since the prefill."""

    def _scales(self, shape: RingShape, device: torch.device) -> Tensor:
        return torch.zeros(*shape[:3], 1, 1, dtype=torch.uint8, device=device)

    def calibrate(self, x: Tensor) -> None:
        """See :class:`Codec`."""
        amax = _frame_amax(x)
        self.amax.copy_(torch.where(amax.isfinite(), amax, 0).amax(-1))
        self.frames.zero_()

    def encode(self, x: Tensor) -> Stored:
        """See :class:`Codec`."""
        return self._encode(x, _frame_amax(x))

    def encode_next(self, x: Tensor) -> Stored:
        """See :class:`Codec`."""
        own = _frame_amax(x)
        new = torch.where(own.isfinite(), own, self.amax.unsqueeze(-1)).squeeze(-1)
        average = torch.lerp(new, self.amax, self.conf.momentum)
        growing = self.frames < self.conf.warmup_frames
        self.amax.copy_(torch.where(growing, torch.maximum(self.amax, new), average))
        self.frames.add_(1)
        return self._encode(x, own)

    def _encode(self, x: Tensor, own: Tensor) -> Stored:
        amax = self.amax.clamp(min=self.conf.floor).unsqueeze(-1)
        scales = scale_bytes(amax, self.fmt, self.scale_mode)
        scales = torch.where(own.isfinite(), scales, SCALE_NAN)[..., None, None]
        return Stored(encode_with_scales(x, scales, self.fmt), scales)

    def decode(self, stored: Stored, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """See :class:`Codec`."""
        elements, scales = stored
        blocks = elements.shape[-1] * 8 // self.fmt.bits // BLOCK
        return super().decode(Stored(elements, scales.expand(*elements.shape[:4], blocks)), dtype, out)

    def state(self) -> list[Tensor]:
        """See :class:`Codec`."""
        return [self.amax, self.frames]

    def computed_bytes(self, shape: RingShape) -> int:
        """See :class:`Codec`."""
        heads = shape.batch * shape.heads
        return shape.numel * self.fmt.bits // 8 + heads * shape.frames + heads * 4 + 8


class Int8Codec:
    """int8 with one scale per token and head: ``scale = amax / 127``, ``q = round(x / scale)``, ties to even.

    The scale is BF16: float32's range in half its bytes (float16 would lose amax below 1e-5). Values are divided by the
    scale as stored, so its own rounding costs no accuracy. A token with a NaN or Inf gets the scale NaN and reads as
    NaN; one of zeros the scale 0.
    """

    name = "int8"

    def allocate(self, shape: RingShape, device: torch.device) -> Stored:
        """See :class:`Codec`; scales BF16 ``[B, H, R, P, 1]``."""
        elements = torch.zeros(*shape, dtype=torch.int8, device=device)
        return Stored(elements, torch.zeros(*shape[:4], 1, dtype=torch.bfloat16, device=device))

    def calibrate(self, x: Tensor) -> None:
        """Nothing: a token's scale depends on the token alone."""

    def encode_next(self, x: Tensor) -> Stored:
        """See :class:`Codec`."""
        return self.encode(x)

    def encode(self, x: Tensor) -> Stored:
        """See :class:`Codec`."""
        x = stored_values(x)
        amax = x.abs().amax(-1, keepdim=True)
        scales = torch.where(amax.isfinite(), amax / INT8_MAX, math.nan).to(torch.bfloat16)
        divisor = torch.where(scales == 0, 1.0, scales.float())
        elements = (x / divisor).round().clamp(-INT8_MAX, INT8_MAX).nan_to_num(0.0)
        return Stored(elements.to(torch.int8), scales)

    def decode(self, stored: Stored, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """See :class:`Codec`; every int8 is exact in BF16, so only the product is rounded."""
        elements, scales = stored
        values = elements.to(dtype) if out is None else out.copy_(elements)
        return values.mul_(scales)

    def state(self) -> list[Tensor]:
        """None."""
        return []

    def computed_bytes(self, shape: RingShape) -> int:
        """See :class:`Codec`."""
        return shape.numel + 2 * (shape.numel // shape.head_dim)

    def saturated(self, elements: Tensor) -> Tensor:
        """See :class:`Codec`."""
        return (elements.to(torch.int16).abs() == INT8_MAX).sum(-1)

    def log2_scales(self, scales: Tensor) -> Tensor:
        """See :class:`Codec`."""
        return scales.float().log2()


def _frame_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each head and frame, float32 ``[B, H, F]``; NaN if it holds NaN."""
    x = stored_values(x) if torch.compiler.is_compiling() else x  # eager code spares itself the copy
    return torch.maximum(x.amax((-2, -1)), -x.amin((-2, -1))).float()


def _shift_in_place(elements: Tensor, fmt: ElementFormat, out: Tensor) -> None:
    """BF16 values of E4M3 or E5M2 elements, without scale, made within ``out``.

    Their bits, moved to where BF16 has its own, are the value times a power of two, subnormals included. NaN and Inf
    elements would not survive this: encoding makes none but in blocks whose scale is NaN.
    """
    shift = 7 - fmt.mantissa
    bits = out.view(torch.int16)
    bits.copy_(elements.view(torch.int8)).bitwise_left_shift_(shift).bitwise_and_(0x7F << shift | -0x8000)
    out.mul_(2.0**fmt.spare)


def _look_up_in_place(elements: Tensor, out: Tensor) -> None:
    """BF16 values of E2M1 elements, without scale: bytes are looked up, pairs of values are written to ``out``."""
    table, bytes_, pairs = _e2m1_pairs(out.device), elements.view(-1), out.view(torch.int32).view(-1)
    for part, into in zip(bytes_.chunk(CHUNKS), pairs.chunk(CHUNKS), strict=True):
        torch.index_select(table, 0, part.to(torch.int32), out=into)


@functools.cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """The two BF16 values in each of the 256 bytes, seen as one int32 ``[256]``."""
    with torch.inference_mode(False):  # the table outlives the caller's mode
        elements = torch.arange(256, dtype=torch.uint8).view(16, 16)  # as blocks of 32 under the scale 1
        blocks = MXBlocks(elements, torch.full((16, 1), E8M0_BIAS, dtype=torch.uint8))
        return decode(blocks, E2M1, torch.bfloat16).view(torch.int32).view(-1).to(device)


def _max_code(fmt: ElementFormat) -> int:
    """Bits of the largest finite element, without sign."""
    if fmt.bits == 4:
        return 0b0111
    return int(torch.tensor(fmt.max).to(fmt.float8).view(torch.uint8))
