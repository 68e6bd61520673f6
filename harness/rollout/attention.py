"""Attention of prefill and of one frame against the cache, as the model's :class:`~harness.models.attention.Attend`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from harness.kv import KVCache
from harness.models.attention import Attend
from harness.rollout.compile import CompileConf, compile_function


class AttentionKind(Enum):
    """How one frame attends to the ring: ``sdpa`` is torch's fused attention, ``flex`` its FlexAttention."""

    sdpa = "sdpa"
    flex = "flex"


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


def check_attention(kind: AttentionKind, device: torch.device) -> None:
    """Raise ``ValueError`` if ``kind`` cannot run on ``device``."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if kind is AttentionKind.flex and device.type == "cpu" and not vectors.startswith("AVX"):
        raise ValueError(
            f"attention=flex: FlexAttention on a CPU needs AVX2, this one offers {vectors}; use attention=sdpa"
        )


class PrefillAttention:
    """Masked attention over the history that leaves every layer's K and V in the cache."""

    def __init__(self, cache: KVCache, masked: Attend) -> None:
        self.cache, self.masked = cache, masked

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`~harness.models.attention.Attend`."""
        self.cache.load(layer, k, v)
        return self.masked(layer, q, k, v)


class RingAttention:
    """Attention of the current frame to its window.

    Args:
        cache: the rings.
        kind: which attention.
        store: whether this is a frame's last step, whose K and V are kept.
    """

    def __init__(self, cache: KVCache, kind: AttentionKind, store: bool) -> None:
        self.cache, self.attend, self.store = cache, FRAME_ATTENTION[kind](cache), store

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`~harness.models.attention.Attend`."""
        out = self.attend(layer, q, k, v)
        if self.store:
            self.cache.store(layer, k, v)
        return out
