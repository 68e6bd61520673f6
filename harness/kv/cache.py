"""The KV cache: which frames a layer keeps and where; how a frame is stored is the storage's business."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness.kv.codecs import RingShape
from harness.kv.conf import TENSORS, KVConf, validate
from harness.kv.hadamard import hadamard_matrix
from harness.kv.storage import FrameRing, Scratch, build_ring


class KVBytes(NamedTuple):
    """Size of a cache in bytes.

    ``computed`` by formula and ``allocated`` in fact (the storages behind the tensors), over all layers, for what is
    kept from frame to frame; ``scratch``: allocated to dequantise into; ``peak``: ``allocated`` and room for the
    largest K and V dequantised, which is what the cache needs at its worst, whether that room is the scratch or
    compiled code's own; ``plain``: the same windows unquantised, which need no more than that;
    ``dequantised_per_step``: what one denoising step dequantises; ``by_format``: ``allocated`` by element format.
    """

    computed: int
    allocated: int
    scratch: int
    peak: int
    plain: int
    dequantised_per_step: int
    by_format: dict[str, int]


class KVCache:
    """Rings of the newest K and V of every layer, in fixed buffers that are only ever written in place.

    Frame f of layer l lives in slot ``f % R_l``, so writing it overwrites frame ``f - R_l``, the one that
    leaves the window: nothing is rolled or concatenated. Attention over a whole ring needs no mask and does
    not care about the order of its frames. The slot is a device tensor, so no call here makes the host wait
    (``ordered`` and the byte counts aside), and all of them compile and can be captured in a CUDA graph.

    One frame is: :meth:`advance`; :meth:`window` once per layer and denoising step; :meth:`store` once per
    layer, at the last step.

    Args:
        layers: number of layers.
        batch: clips B.
        heads: attention heads H.
        head_dim: size of a head Dh.
        tokens: tokens per frame P.
        windows: frames R_l that each layer keeps, the current one included.
        conf: how K and V are stored.
        dtype: dtype of attention, and of whatever is stored unquantised.
        device: where the buffers live.

    Raises:
        ValueError: if a size is not positive, ``windows`` does not have one entry per layer, or ``conf``
            does not fit (see :func:`harness.kv.conf.validate`).
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        tokens: int,
        windows: list[int],
        conf: KVConf,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        _check_sizes(layers, batch, heads, head_dim, tokens, windows)
        validate(conf, head_dim=head_dim)
        self.conf, self.dtype, self.device = conf, dtype, torch.device(device)
        self.layers, self.batch, self.tokens, self.windows = layers, batch, tokens, list(windows)
        with torch.inference_mode(False):  # buffers outlive the mode they are made in
            self.scratch = Scratch(dtype, self.device)
            shapes = [RingShape(batch, heads, frames, tokens, head_dim) for frames in windows]
            self.rings = [self._layer_rings(layer, shape) for layer, shape in enumerate(shapes)]
            self._basis = hadamard_matrix(head_dim, self.device) if conf.hadamard else None
            self.frame = torch.full((1,), -1, dtype=torch.int64, device=self.device)
            """Absolute index of the current frame, int64 ``[1]`` on the device; -1 before :meth:`load`."""
            self._slots = {r: torch.zeros_like(self.frame) for r in sorted(set(windows))}

    def _layer_rings(self, layer: int, shape: RingShape) -> dict[str, FrameRing]:
        return {
            name: build_ring(
                name,
                shape,
                self.conf,
                self.conf.quantises(name, layer, self.layers),
                self.dtype,
                self.device,
                self.scratch,
            )
            for name in TENSORS
        }

    def turns(self, name: str, layer: int) -> bool:
        """Whether ``name`` ("k" or "v") of ``layer`` is kept in the Hadamard basis, not in the model's own."""
        return self._basis is not None and self.rings[layer][name].codec is not None

    def turned(self, name: str, layer: int, x: Tensor) -> Tensor:
        """``x [..., Dh]`` from the model's own basis to that in which ``name`` of ``layer`` is kept, or back again.

        All other methods take and give K and V in the basis they are kept in: turn K and V before, the queries as K,
        and the outputs back as V.
        """
        if self._basis is None or not self.turns(name, layer):
            return x
        return (x.float() @ self._basis).to(x.dtype)

    @property
    def store_is_free(self) -> bool:
        """Whether :meth:`store` has nothing to do, since :meth:`window` writes all there is to keep."""
        return all(ring.store_is_free for ring in self._all_rings())

    def load(self, layer: int, k: Tensor, v: Tensor, *, first: int = 0) -> None:
        """Fill a layer from a prefill over frames ``first`` … ``first + N-1``, ``k, v [B, H, N*P, Dh]``, oldest first.

        The newest R_l frames are kept (quantised where the storage says so). The current frame becomes the last of
        them, so the next :meth:`advance` begins frame ``first + N``. May be called again at any time: a new prefill
        reuses the buffers.

        Raises:
            ValueError: if N < R_l: the window would hold frames that never were.
        """
        keep, frames = self.windows[layer], k.shape[2] // self.tokens
        self._check_frames(layer, frames)
        oldest = frames - keep
        for name, x in zip(TENSORS, (k, v), strict=True):
            newest = x.unflatten(2, (frames, self.tokens))[:, :, oldest:]
            self.rings[layer][name].load(newest, (first + oldest) % keep)
        self.loaded(first + frames - 1)

    def _check_frames(self, layer: int, frames: int) -> None:
        keep = self.windows[layer]
        if frames < keep:
            raise ValueError(
                f"prefill of {frames} frames: layer {layer} keeps a window of {keep}; prefill at least that many "
                "frames or lower the sampler's window"
            )

    def check_history(self, frames: int) -> None:
        """Raise ``ValueError`` if a prefill of ``frames`` frames would leave a window with frames that never were."""
        for layer in range(self.layers):
            self._check_frames(layer, frames)

    def loaded(self, frame: int) -> None:
        """What :meth:`load` ends with, for those who fill all rings themselves: ``frame`` is the current one."""
        self.frame.fill_(frame)
        self._locate()

    def advance(self) -> None:
        """Begin the next frame: its slot is the oldest frame's."""
        self.frame.add_(1)
        self._locate()

    def _locate(self) -> None:
        for frames, slot in self._slots.items():
            slot.copy_(self.frame % frames)

    def window(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V that the current frame attends to, ``[B, H, R_l*P, Dh]`` each, in slot order.

        The frame's own ``k, v [B, H, P, Dh]`` stand unquantised beside the R_l - 1 newest earlier frames.
        The result is valid until the next call: it may be the ring itself or the scratch buffer shared by
        all layers.
        """
        ring, slot = self.rings[layer], self._slots[self.windows[layer]]
        return ring["k"].window(slot, k), ring["v"].window(slot, v)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep the frame's ``k, v [B, H, P, Dh]``, those last given to :meth:`window`, for the frames to come."""
        ring, slot = self.rings[layer], self._slots[self.windows[layer]]
        ring["k"].store(slot, k)
        ring["v"].store(slot, v)

    def ordered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Stored K and V, dequantised, oldest frame first, ``[B, H, R_l*P, Dh]`` each.

        Fresh tensors, for tests and parity; waits for the device.
        """
        keep, newest = self.windows[layer], int(self.frame.item())
        slots = torch.tensor([f % keep for f in range(newest - keep + 1, newest + 1)], device=self.device)
        ring = self.rings[layer]
        k, v = (ring[name].read().index_select(2, slots).flatten(2, 3) for name in ("k", "v"))
        return k, v

    def slot(self, layer: int) -> Tensor:
        """Slot of the current frame in a layer's rings, int64 ``[1]`` on the device."""
        return self._slots[self.windows[layer]]

    @property
    def slots(self) -> dict[int, Tensor]:
        """:meth:`slot` by the number of frames that a ring keeps, for kernels that do what :meth:`advance` does."""
        return dict(self._slots)

    def of_layer(self, layer: int) -> KVCache:
        """The cache of ``layer`` by itself, as that of a model with one layer (0); it shares this one's buffers."""
        view, frames = copy.copy(self), self.windows[layer]
        view.layers, view.windows, view.rings = 1, [frames], [self.rings[layer]]
        view._slots = {frames: self._slots[frames]}
        return view

    def nbytes(self) -> KVBytes:
        """Sizes of the stored windows and of the scratch."""
        rings = self._all_rings()
        by_format: dict[str, int] = {}
        for ring in rings:
            size = _storage_bytes(ring.buffers())
            by_format[ring.format_name] = by_format.get(ring.format_name, 0) + size
        itemsize = self.frame.new_empty((), dtype=self.dtype).element_size()
        allocated = sum(by_format.values())
        return KVBytes(
            computed=sum(ring.computed_bytes() for ring in rings),
            allocated=allocated,
            scratch=_storage_bytes(self.scratch.buffers()),
            peak=allocated + self.scratch.reserved_bytes,
            plain=sum(ring.shape.numel for ring in rings) * itemsize,
            dequantised_per_step=sum(ring.shape.numel for ring in rings if ring.codec is not None) * itemsize,
            by_format=by_format,
        )

    def reset(self) -> None:
        """Forget every frame; buffers stay where they are."""
        self.frame.fill_(-1)
        for slot in self._slots.values():
            slot.zero_()
        for ring in self._all_rings():
            ring.reset()

    def buffers(self) -> list[Tensor]:
        """Every tensor that is written in place from frame to frame; none of them ever moves."""
        return [self.frame, *self._slots.values(), *(buffer for ring in self._all_rings() for buffer in ring.buffers())]

    def saved(self) -> list[Tensor]:
        """A copy of all that the cache remembers, in the order of :meth:`buffers`."""
        return [buffer.clone() for buffer in self.buffers()]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Write what :meth:`saved` gave back into the buffers, bit for bit; they stay where they are.

        Raises:
            ValueError: if ``saved`` is not of a cache of the same sizes and formats; nothing is written then.
        """
        buffers = self.buffers()
        ours, given = ([(x.dtype, tuple(x.shape)) for x in tensors] for tensors in (buffers, saved))
        if ours != given:
            raise ValueError(
                f"a saved cache of {len(given)} tensors does not fit this one of {len(ours)}: another model, window, "
                "number of clips or KV format"
            )
        for buffer, values in zip(buffers, saved, strict=True):
            buffer.copy_(values)

    def _all_rings(self) -> list[FrameRing]:
        return [ring for layer in self.rings for ring in layer.values()]


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, which share none."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _check_sizes(layers: int, batch: int, heads: int, head_dim: int, tokens: int, windows: list[int]) -> None:
    sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "tokens": tokens}
    problems = [f"{name}={size}: must be at least 1" for name, size in sizes.items() if size < 1]
    if len(windows) != layers:
        problems.append(f"{len(windows)} windows for {layers} layers: give one per layer")
    problems += [f"windows[{i}]={frames}: must be at least 1 frame" for i, frames in enumerate(windows) if frames < 1]
    if problems:
        raise ValueError("KV cache: " + "; ".join(problems))
