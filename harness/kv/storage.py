"""How a ring keeps its frames. The ring logic is in :mod:`harness.kv.cache`; here is only a slot's format.

A storage is a :class:`FrameRing` and a line in :data:`BUILDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harness.kv.conf import KVConf, KVStorage
from harness.kv.stats import BlockStats
from harness.mx.formats import BLOCK, MXBlocks, decode, encode


@dataclass(frozen=True)
class RingShape:
    """Sizes of one layer's ring of K or of V: clips, heads, frames kept, tokens per frame, head size."""

    batch: int
    heads: int
    frames: int
    tokens: int
    head_dim: int

    def __call__(self, width: int) -> tuple[int, int, int, int, int]:
        """Buffer shape ``[B, H, R, P, width]``."""
        return self.batch, self.heads, self.frames, self.tokens, width

    @property
    def numel(self) -> int:
        """Elements of an unquantised ring."""
        return math.prod(self(self.head_dim))


class Scratch:
    """Room to dequantise one layer's window into; K and V each have one, and every layer reuses them.

    Nothing is allocated before the first use: compiled code plans its own memory and needs no scratch.

    Args:
        dtype: dtype of attention.
        device: where.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._largest: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, name: str, shape: RingShape) -> None:
        """Announce a ring that will ask for room; all are announced before the first use."""
        self._largest[name] = max(self._largest.get(name, 0), shape.numel)

    def of(self, name: str, shape: RingShape) -> Tensor:
        """A contiguous ``[B, H, R, P, Dh]`` view at the start of ``name``'s buffer."""
        if name not in self._buffers:
            with torch.inference_mode(False):  # it outlives the caller's mode
                self._buffers[name] = torch.empty(self._largest[name], dtype=self._dtype, device=self._device)
        return self._buffers[name][: shape.numel].view(shape(shape.head_dim))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class FrameRing(Protocol):
    """One layer's K or V of its newest R frames. ``slot`` is int64 ``[1]`` on the device, frames ``[B, H,
    P, Dh]``."""

    shape: RingShape
    stats: BlockStats | None
    """Where to count what quantisation did; ``None`` (always, if nothing is quantised) counts nothing."""
    format_name: str
    """Element format or dtype, for records: "bfloat16", "e4m3" …"""
    store_is_free: bool
    """Whether :meth:`window` leaves nothing for :meth:`store` to do."""

    def load(self, x: Tensor) -> None:
        """Replace every slot: ``x [B, H, R, P, Dh]`` in slot order."""
        ...

    def window(self, slot: Tensor, x: Tensor) -> Tensor:
        """All R frames in slot order, ``[B, H, R*P, Dh]``, with the unquantised ``x`` in ``slot``."""
        ...

    def store(self, slot: Tensor, x: Tensor) -> None:
        """Keep ``x``, the very frame that :meth:`window` was last given, in ``slot``."""
        ...

    def read(self) -> Tensor:
        """Stored frames in slot order, dequantised, ``[B, H, R, P, Dh]``."""
        ...

    def count(self) -> None:
        """Start counting in :attr:`stats`, if anything is quantised."""
        ...

    def reset(self) -> None:
        """Forget all frames and statistics."""
        ...

    def buffers(self) -> list[Tensor]:
        """Every tensor that holds frames or scales."""
        ...

    def computed_bytes(self) -> int:
        """Size of the stored window by formula, to hold against the bytes of :meth:`buffers`."""
        ...


class PlainRing:
    """Frames in the attention's own dtype. The window handed out is the ring itself: no copy, no scratch.

    Until the frame is over, its slot holds nothing that anyone needs (its old frame has left the window),
    so every denoising step writes its K or V there, and the last step's stay.
    """

    store_is_free = True

    def __init__(self, shape: RingShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.stats: BlockStats | None = None
        self.format_name = str(dtype).removeprefix("torch.")
        self.data = torch.zeros(shape(shape.head_dim), dtype=dtype, device=device)

    def load(self, x: Tensor) -> None:
        """See :class:`FrameRing`."""
        self.data.copy_(x)

    def window(self, slot: Tensor, x: Tensor) -> Tensor:
        """See :class:`FrameRing`."""
        self.data.index_copy_(2, slot, x.unsqueeze(2))
        return self.data.flatten(2, 3)

    def store(self, slot: Tensor, x: Tensor) -> None:
        """Nothing: :meth:`window` wrote it."""

    def read(self) -> Tensor:
        """See :class:`FrameRing`."""
        return self.data

    def count(self) -> None:
        """Nothing is quantised, nothing to count."""

    def reset(self) -> None:
        """See :class:`FrameRing`."""
        self.data.zero_()

    def buffers(self) -> list[Tensor]:
        """See :class:`FrameRing`."""
        return [self.data]

    def computed_bytes(self) -> int:
        """See :class:`FrameRing`."""
        return self.shape.numel * self.data.element_size()


class MXRing:
    """Frames as MX blocks of 32 along the head: one E8M0 scale per block, 4-bit elements packed two to a
    byte.

    The window is dequantised for attention, with the current frame's unquantised K or V in its slot.
    """

    store_is_free = False

    def __init__(
        self,
        name: str,
        shape: RingShape,
        conf: KVConf,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
    ) -> None:
        self.name, self.shape, self.dtype, self.scratch = name, shape, dtype, scratch
        scratch.reserve(name, shape)
        self.fmt, self.scale_mode = conf.element_format(name), conf.scale_mode
        self.stats: BlockStats | None = None
        self.format_name = self.fmt.name
        self.slots = torch.arange(shape.frames, device=device).view(-1, 1, 1)
        self.blocks = MXBlocks(
            torch.zeros(shape(shape.head_dim * self.fmt.bits // 8), dtype=torch.uint8, device=device),
            torch.zeros(shape(shape.head_dim // BLOCK), dtype=torch.uint8, device=device),
        )

    def _encode(self, x: Tensor) -> MXBlocks:
        blocks = encode(x, self.fmt, self.scale_mode)
        if self.stats is not None:
            self.stats.add(blocks)
        return blocks

    def load(self, x: Tensor) -> None:
        """See :class:`FrameRing`."""
        for stored, new in zip(self.blocks, self._encode(x), strict=True):
            stored.copy_(new)

    def window(self, slot: Tensor, x: Tensor) -> Tensor:
        """See :class:`FrameRing`."""
        own = x.unsqueeze(2)
        if torch.compiler.is_compiling():
            # One fused kernel decodes and selects. The compiler reuses one layer's memory for the next by
            # itself; writing to the scratch would only make it copy the last layer's window there in the
            # end.
            return torch.where(self.slots == slot, own, decode(self.blocks, self.fmt, self.dtype)).flatten(2, 3)
        frames = decode(self.blocks, self.fmt, self.dtype, out=self.scratch.of(self.name, self.shape))
        return frames.index_copy_(2, slot, own).flatten(2, 3)

    def store(self, slot: Tensor, x: Tensor) -> None:
        """See :class:`FrameRing`."""
        for stored, new in zip(self.blocks, self._encode(x), strict=True):
            stored.index_copy_(2, slot, new.unsqueeze(2))

    def read(self) -> Tensor:
        """See :class:`FrameRing`."""
        return decode(self.blocks, self.fmt, self.dtype)

    def count(self) -> None:
        """See :class:`FrameRing`."""
        self.stats = BlockStats(self.fmt, self.slots.device)

    def reset(self) -> None:
        """See :class:`FrameRing`."""
        for stored in self.blocks:
            stored.zero_()
        if self.stats is not None:
            self.stats.reset()

    def buffers(self) -> list[Tensor]:
        """See :class:`FrameRing`."""
        return list(self.blocks)

    def computed_bytes(self) -> int:
        """See :class:`FrameRing`."""
        return self.shape.numel * self.fmt.bits // 8 + self.shape.numel // BLOCK


RingBuilder = Callable[[str, RingShape, KVConf, torch.dtype, torch.device, Scratch], FrameRing]

BUILDERS: dict[KVStorage, RingBuilder] = {KVStorage.mx: MXRing}
"""Storages of a quantised K or V, by ``KVConf.storage``; each takes (name, shape, conf, dtype, device,
scratch)."""


def build_ring(
    name: str,
    shape: RingShape,
    conf: KVConf,
    quantise: bool,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Scratch,
) -> FrameRing:
    """The ring of one layer's ``name`` ("k" or "v"), plain unless it is to be quantised."""
    if not quantise:
        return PlainRing(shape, dtype, device)
    return BUILDERS[conf.storage](name, shape, conf, dtype, device, scratch)
