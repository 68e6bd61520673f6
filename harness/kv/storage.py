"""How a ring keeps its frames. The ring logic is in :mod:`harness.kv.cache`; here is only what a slot holds.

A storage of quantised frames is a :class:`~harness.kv.codecs.Codec` and a line in :data:`CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from harness.formats.mx import E4M3
from harness.kv.codecs import Codec, HeadEMACodec, Int8Codec, MXCodec, RingShape, Stored
from harness.kv.conf import KVConf, KVScales, KVStorage

LOAD_FRAMES = 4
"""Frames encoded at a time while a prefill is stored: encoding needs a few float32 copies of what it encodes."""


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
        return self._buffers[name][: shape.numel].view(shape)

    def buffers(self) -> list[Tensor]:
        """What is allocated."""
        return list(self._buffers.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes allocated once every ring has been read; compiled code needs as much in its own memory."""
        return sum(self._largest.values()) * torch.empty((), dtype=self._dtype).element_size()


class FrameRing(Protocol):
    """One layer's K or V of its newest R frames. ``slot`` is int64 ``[1]`` on the device, frames ``[B, H, P, Dh]``."""

    shape: RingShape
    format_name: str
    """Element format or dtype, for records: "bfloat16", "e4m3" …"""
    codec: Codec | None
    """What quantises the frames; ``None`` for those in the attention's own dtype."""
    store_is_free: bool
    """Whether :meth:`window` leaves nothing for :meth:`store` to do."""

    def load(self, x: Tensor, first_slot: int) -> None:
        """Replace every slot: ``x [B, H, R, P, Dh]``, oldest first, the oldest in ``first_slot``."""
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

    def frame(self, slot: Tensor) -> Stored:
        """A copy of what ``slot`` holds; a frame in the attention's own dtype has no scales (an empty tensor)."""
        ...

    def reset(self) -> None:
        """Forget all frames."""
        ...

    def buffers(self) -> list[Tensor]:
        """Every tensor that is written in place."""
        ...

    def computed_bytes(self) -> int:
        """Size of the ring by formula, to hold against the bytes of :meth:`buffers`."""
        ...


class PlainRing:
    """Frames in the attention's own dtype. The window handed out is the ring itself: no copy, no scratch.

    Until the frame is over, its slot holds nothing that anyone needs (its old frame has left the window),
    so every denoising step writes its K or V there, and the last step's stay.
    """

    store_is_free = True

    def __init__(self, shape: RingShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.codec: Codec | None = None
        self.format_name = str(dtype).removeprefix("torch.")
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    def load(self, x: Tensor, first_slot: int) -> None:
        """See :class:`FrameRing`."""
        older = self.shape.frames - first_slot
        self.data[:, :, first_slot:].copy_(x[:, :, :older])
        self.data[:, :, :first_slot].copy_(x[:, :, older:])

    def window(self, slot: Tensor, x: Tensor) -> Tensor:
        """See :class:`FrameRing`."""
        self.data.index_copy_(2, slot, x.unsqueeze(2))
        return self.data.flatten(2, 3)

    def store(self, slot: Tensor, x: Tensor) -> None:
        """Nothing: :meth:`window` wrote it."""

    def read(self) -> Tensor:
        """See :class:`FrameRing`."""
        return self.data

    def frame(self, slot: Tensor) -> Stored:
        """See :class:`FrameRing`."""
        return Stored(self.data.index_select(2, slot), self.data.new_empty(0))

    def reset(self) -> None:
        """See :class:`FrameRing`."""
        self.data.zero_()

    def buffers(self) -> list[Tensor]:
        """See :class:`FrameRing`."""
        return [self.data]

    def computed_bytes(self) -> int:
        """See :class:`FrameRing`."""
        return self.shape.numel * self.data.element_size()


class QuantisedRing:
    """Frames as a codec encodes them, each with the scales it was encoded with.

    The window is dequantised for attention, with the current frame's unquantised K or V in its slot. Nothing
    unquantised is kept but the scratch that all layers share.
    """

    store_is_free = False

    def __init__(
        self, name: str, shape: RingShape, codec: Codec, dtype: torch.dtype, device: torch.device, scratch: Scratch
    ) -> None:
        self.name, self.shape, self.dtype, self.scratch = name, shape, dtype, scratch
        scratch.reserve(name, shape)
        self.codec: Codec | None = codec
        self._codec = codec
        self.format_name = codec.name
        self.slots = torch.arange(shape.frames, device=device).view(-1, 1, 1)
        self.stored = codec.allocate(shape, device)

    def load(self, x: Tensor, first_slot: int) -> None:
        """See :class:`FrameRing`."""
        self._codec.calibrate(x)
        older = self.shape.frames - first_slot
        self._encode_into(x[:, :, :older], first_slot)
        self._encode_into(x[:, :, older:], 0)

    def _encode_into(self, x: Tensor, slot: int) -> None:
        for first in range(0, x.shape[2], LOAD_FRAMES):
            encoded = self._codec.encode(x[:, :, first : first + LOAD_FRAMES])
            for stored, new in zip(self.stored, encoded, strict=True):
                stored.narrow(2, slot + first, new.shape[2]).copy_(new)

    def window(self, slot: Tensor, x: Tensor) -> Tensor:
        """See :class:`FrameRing`."""
        own = x.unsqueeze(2)
        if torch.compiler.is_compiling():
            # One fused kernel decodes and selects. The compiler reuses one layer's memory for the next by
            # itself; writing to the scratch would only make it copy the last layer's window there in the
            # end.
            return torch.where(self.slots == slot, own, self.read()).flatten(2, 3)
        frames = self._codec.decode(self.stored, self.dtype, out=self.scratch.of(self.name, self.shape))
        return frames.index_copy_(2, slot, own).flatten(2, 3)

    def store(self, slot: Tensor, x: Tensor) -> None:
        """See :class:`FrameRing`."""
        for stored, new in zip(self.stored, self._codec.encode_next(x.unsqueeze(2)), strict=True):
            stored.index_copy_(2, slot, new)

    def read(self) -> Tensor:
        """See :class:`FrameRing`."""
        return self._codec.decode(self.stored, self.dtype)

    def frame(self, slot: Tensor) -> Stored:
        """See :class:`FrameRing`."""
        return Stored(*(buffer.index_select(2, slot) for buffer in self.stored))

    def reset(self) -> None:
        """See :class:`FrameRing`."""
        for buffer in self.buffers():
            buffer.zero_()

    def buffers(self) -> list[Tensor]:
        """See :class:`FrameRing`."""
        return [*self.stored, *self._codec.state()]

    def computed_bytes(self) -> int:
        """See :class:`FrameRing`."""
        return self._codec.computed_bytes(self.shape)


class RecentRing:
    """A ring of few bits that keeps its newest frames in more bits as well, and reads those from there.

    Frames of any age are in ``older``; a copy of the newest lies in ``recent``, newest first, so that a frame that is
    recent no longer needs no second encoding.

    Args:
        older: a quantised ring.
        codec: of the newest frames.
        frames: how many, fewer than the ring keeps.
    """

    store_is_free = False

    def __init__(self, older: QuantisedRing, codec: Codec, frames: int) -> None:
        self.older, self.shape, self.codec, self._codec = older, older.shape, older.codec, codec
        self.format_name = f"{older.format_name}+{codec.name}"
        device = older.slots.device
        self.recent = codec.allocate(self.shape._replace(frames=frames), device)
        self._ages = torch.arange(frames, device=device)
        self._newest = torch.zeros(1, dtype=torch.int64, device=device)

    def load(self, x: Tensor, first_slot: int) -> None:
        """See :class:`FrameRing`."""
        self.older.load(x, first_slot)
        count, kept = len(self._ages), self.shape.frames
        for stored, new in zip(self.recent, self._codec.encode(x[:, :, kept - count :].flip(2)), strict=True):
            stored.copy_(new)
        self._newest.fill_((first_slot - 1) % kept)

    def window(self, slot: Tensor, x: Tensor) -> Tensor:
        """See :class:`FrameRing`."""
        frames = self.older.window(slot, x).unflatten(2, (self.shape.frames, -1))
        return self._with_recent(frames, slot - 1).flatten(2, 3)

    def _with_recent(self, frames: Tensor, newest: Tensor) -> Tensor:
        slots = (newest - self._ages) % self.shape.frames
        recent = self._codec.decode(self.recent, frames.dtype)
        if torch.compiler.is_compiling():
            return frames.index_copy(2, slots, recent)
        return frames.index_copy_(2, slots, recent)

    def store(self, slot: Tensor, x: Tensor) -> None:
        """See :class:`FrameRing`."""
        self.older.store(slot, x)
        for stored, new in zip(self.recent, self._codec.encode_next(x.unsqueeze(2)), strict=True):
            stored.copy_(torch.cat((new, stored[:, :, :-1]), 2))
        self._newest.copy_(slot)

    def read(self) -> Tensor:
        """See :class:`FrameRing`."""
        return self._with_recent(self.older.read(), self._newest)

    def frame(self, slot: Tensor) -> Stored:
        """See :class:`FrameRing`; in few bits, which is how it will stay."""
        return self.older.frame(slot)

    def reset(self) -> None:
        """See :class:`FrameRing`."""
        for buffer in self.buffers():
            buffer.zero_()

    def buffers(self) -> list[Tensor]:
        """See :class:`FrameRing`."""
        return [*self.older.buffers(), *self.recent, *self._codec.state(), self._newest]

    def computed_bytes(self) -> int:
        """See :class:`FrameRing`."""
        recent = self.shape._replace(frames=len(self._ages))
        return self.older.computed_bytes() + self._codec.computed_bytes(recent) + self._newest.nbytes


def _mx_codec(name: str, shape: RingShape, conf: KVConf, device: torch.device) -> Codec:
    fmt = conf.element_format(name)
    if conf.scales is KVScales.per_head_ema:
        return HeadEMACodec(fmt, conf.scale_mode, conf.ema, shape, device)
    return MXCodec(fmt, conf.scale_mode)


def _int8_codec(name: str, shape: RingShape, conf: KVConf, device: torch.device) -> Codec:
    return Int8Codec()


CODECS: dict[KVStorage, Callable[[str, RingShape, KVConf, torch.device], Codec]] = {
    KVStorage.i8_scale: _int8_codec,
    KVStorage.mx: _mx_codec,
}
"""Codecs of a quantised K or V ("k" or "v"), by storage."""


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
    codec = CODECS[conf.storage_of(name)](name, shape, conf, device)
    ring = QuantisedRing(name, shape, codec, dtype, device, scratch)
    recent = min(conf.recent_frames, shape.frames - 1) if conf.is_4_bit(name) else 0
    return RecentRing(ring, MXCodec(E4M3, conf.scale_mode), recent) if recent else ring
