"""Attention of prefill and of one frame against the cache, as the model's :class:`~harness.models.attention.Attend`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from harness.formats.scales import ScaleMode
from harness.kernels import launch
from harness.kernels.cuda import attend
from harness.kernels.cuda.attend import AttendShape
from harness.kernels.cuda.linear import PackedLinear
from harness.kernels.cuda.stream import Stream
from harness.kv import KVCache, KVConf
from harness.kv.conf import TENSORS
from harness.models.attention import Attend, ProjectedAttend
from harness.models.gamerft import RMS_EPS
from harness.rollout import fused
from harness.rollout.compile import compile_function
from harness.rollout.conf import AttentionKind, CompileConf


def sdpa_over_window(cache: KVCache) -> Attend:
    """Attention to the window with ``F.scaled_dot_product_attention``."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, *cache.window(layer, k, v))

    return attend


def flex_over_window(cache: KVCache) -> Attend:
    """Attention to the window with FlexAttention.

    FlexAttention is a code generator and, called plainly, materialises all scores. So the operator is compiled by
    itself where the step around it is not.
    """

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v)
        assert isinstance(out, Tensor)
        return out

    compiled = compile_function(operator, CompileConf(enabled=True))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = operator if torch.compiler.is_compiling() else compiled
        return run(q, *cache.window(layer, k, v))

    return attend


FRAME_ATTENTION: dict[AttentionKind, Callable[[KVCache], Attend]] = {
    AttentionKind.sdpa: sdpa_over_window,
    AttentionKind.flex: flex_over_window,
}
"""Attention of one frame, made for a cache. Once prefilled, a ring is full: no mask."""


def check_attention(kind: AttentionKind, device: torch.device, head_dim: int | None = None) -> None:
    """Raise ``ValueError`` if ``kind`` cannot run on ``device``, or not with heads of size ``head_dim``."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if kind is AttentionKind.flex and device.type == "cpu" and not vectors.startswith("AVX"):
        raise ValueError(
            f"attention=flex: FlexAttention on a CPU needs AVX2, this one offers {vectors}; use attention=sdpa"
        )
    if kind is AttentionKind.fused:
        reason = fused.unavailable(device)
        if reason is not None:
            raise ValueError(f"attention=fused: {reason}; use attention=sdpa")
        if head_dim is not None:
            fused.check_head_dim(head_dim)


def check_storage(kind: AttentionKind, kv: KVConf, head_dim: int) -> None:
    """Raise ``ValueError`` if ``kind`` cannot read what ``kv``, which is valid, stores.

    Asked of rings on the meta device, so it holds of every storage there is.
    """
    if kind is AttentionKind.fused:
        for ring in KVCache(1, 1, 1, head_dim, 1, [2], kv, torch.bfloat16, "meta").rings[0].values():
            fused.ring_view(ring)


class PrefillAttention:
    """Masked attention over the history, frames from ``first`` on, that leaves every layer's K and V in the cache."""

    def __init__(self, cache: KVCache, masked: Attend, first: int = 0) -> None:
        self.cache, self.masked, self.first = cache, masked, first

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`~harness.models.attention.Attend`."""
        kept = (self.cache.turned(name, layer, x) for name, x in (("k", k), ("v", v)))
        self.cache.load(layer, *kept, first=self.first)
        return self.masked(layer, q, k, v)


class RingAttention:
    """Attention of the current frame to its window with torch's operators.

    Args:
        cache: the rings.
        kind: which attention; not ``fused``.
        store: whether this is a frame's last step, whose K and V are kept.
    """

    def __init__(self, cache: KVCache, kind: AttentionKind, store: bool) -> None:
        self.cache, self.attend, self.store = cache, FRAME_ATTENTION[kind](cache), store

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`~harness.models.attention.Attend`."""
        q, k, v = (self.cache.turned(name, layer, x) for name, x in (("k", q), ("k", k), ("v", v)))
        out = self.attend(layer, q, k, v)
        if self.store:
            self.cache.store(layer, k, v)
        return self.cache.turned("v", layer, out)


class FusedAttention:
    """Attention of the current frame to its window with our kernel, from the projection on.

    Args:
        cache: the rings.
        store: whether this is a frame's last step, whose K and V are kept. A plain ring keeps every step's, as its
            ``window`` would.
        config: how the window is shared out; None: the defaults.
        meeting: of the windows of this cache, or of a larger one whose layers run one after the other; None: its own.
    """

    def __init__(
        self,
        cache: KVCache,
        store: bool,
        config: fused.WindowConfig | None = None,
        meeting: fused.Meeting | None = None,
    ) -> None:
        self.cache, self.store = cache, store
        self.config = [] if config is None else config.as_ints()
        self._views = [{name: fused.ring_view(ring) for name, ring in rings.items()} for rings in cache.rings]
        self.meeting = meeting_of(cache, config) if meeting is None else meeting
        self.join = True
        """Whether attention may be one launch with its projection; False to measure what that gains."""

    def projected(self, layer: int, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """See :class:`~harness.models.attention.ProjectedAttend`."""
        slot, views = self.cache.slot(layer), self._views[layer]
        key, value = views["k"], views["v"]
        store_k, store_v = (view.scales is None or (self.store and view.stores) for view in (key, value))
        keep_k = self.store and not key.stores
        mode = key.scale_mode or value.scale_mode or ScaleMode.rceil
        formats = (key.format, key.per, store_k, value.format, value.per, store_v, mode.value, self.config, keep_k)
        rings = (key.data, key.scales, value.data, value.scales)
        turns = [self.cache.turns(name, layer) for name in TENSORS]
        out, k = fused.window_attention(qkv, *rotary, *rings, slot, *self.meeting, *formats, *turns)
        if keep_k:
            self.cache.rings[layer]["k"].store(slot, k)
        if self.store and not value.stores:
            v = qkv.unflatten(-1, (3, value.data.shape[1], -1))[:, :, 2].transpose(1, 2)
            self.cache.rings[layer]["v"].store(slot, self.cache.turned("v", layer, v))
        return out

    def streamed(self, layer: int, qkv: PackedLinear, stream: Stream, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attention ``[T, D]`` of one clip's frame from the residual stream on, through the projection ``qkv``.

        One launch where there is a kernel for it (:func:`joined`), two elsewhere.
        """
        shape = joined(self.cache, layer, qkv, self.store) if self.join else None
        if shape is None:
            return self.projected(layer, qkv.normed(stream, RMS_EPS)[None], rotary)[0]
        views = self._views[layer]
        rings = attend.Ring(*views["k"][:2]), attend.Ring(*views["v"][:2])
        return attend.attend(stream, qkv.packed(), shape, rings, self.cache.slot(layer), rotary, RMS_EPS)


def joined(cache: KVCache, layer: int, qkv: PackedLinear, store: bool) -> AttendShape | None:
    """The kernel that is projection and attention of a layer; None if there is none for it.

    ``store``: whether the frame's own K and V are kept; a plain ring keeps them in any case.
    """
    rings, shape = cache.rings[layer], cache.rings[layer]["k"].shape
    cluster = attend.cluster_of(shape.heads, shape.head_dim, cache.tokens, cache.batch, cache.device)
    if qkv.config is not None or not cluster:
        return None
    key, value = (fused.ring_view(rings[name]) for name in TENSORS)
    known = all(view.per == "block" and (view.stores or not store) for view in (key, value))
    if not known or any(cache.turns(name, layer) for name in TENSORS):
        return None
    found = AttendShape(
        inputs=qkv.in_features,
        element=qkv.element,
        k=key.format,
        v=value.format,
        k_stores=store or key.scales is None,
        v_stores=store or value.scales is None,
        mode=(value if key.scales is None else key).scale_mode or ScaleMode.rceil,
        cluster=cluster,
        dependent=launch.dependent(cache.device),
    )
    return found if found.stages() else None


class OneLayer:
    """Attention of one layer, made for a cache of that layer alone (:meth:`KVCache.of_layer`).

    It does not ask which layer calls it, so that code compiled for one layer serves its like.
    """

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`~harness.models.attention.Attend`."""
        return self.attend(0, q, k, v)


class OneProjectedLayer:
    """:class:`OneLayer` of a :class:`~harness.models.attention.ProjectedAttend`."""

    def __init__(self, attend: ProjectedAttend) -> None:
        self.attend = attend

    def projected(self, layer: int, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """See :class:`~harness.models.attention.ProjectedAttend`."""
        return self.attend.projected(0, qkv, rotary)


def meeting_of(cache: KVCache, config: fused.WindowConfig | None = None) -> fused.Meeting:
    """Where our kernel's programs meet, of a cache whose layers run one after the other."""
    shape = cache.rings[0]["v"].shape
    return fused.meeting(cache.windows, cache.tokens, shape.head_dim, cache.batch * shape.heads, cache.device, config)


def layer_attention(
    cache: KVCache, layer: int, kind: AttentionKind, store: bool, meeting: fused.Meeting | None = None
) -> OneLayer | OneProjectedLayer:
    """:func:`frame_attention` of one layer by itself; ``meeting``: see :class:`FusedAttention`."""
    if kind is AttentionKind.fused:
        return OneProjectedLayer(FusedAttention(cache.of_layer(layer), store, meeting=meeting))
    return OneLayer(RingAttention(cache.of_layer(layer), kind, store))


def frame_attention(cache: KVCache, kind: AttentionKind, store: bool) -> RingAttention | FusedAttention:
    """Attention of one frame's step; ``store``: it is the last, whose K and V are kept."""
    return FusedAttention(cache, store) if kind is AttentionKind.fused else RingAttention(cache, kind, store)
