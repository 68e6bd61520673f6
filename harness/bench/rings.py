"""Attention of one frame over the ring, and what storing and reading it cost, per storage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.bench.linears import relative_error
from harness.bench.measuring import Bench, Row
from harness.kv import KVCache
from harness.kv.conf import KVConf, KVFormat, KVStorage
from harness.models.attention import LayerAttend
from harness.models.gamerft import GameRFTConfig, attend_from_projection, rms_norm
from harness.models.rope import apply_rotary
from harness.rollout.attention import check_attention, frame_attention
from harness.rollout.compile import compile_function
from harness.rollout.conf import AttentionKind, CompileConf

CACHES = {
    "bf16": KVConf(),
    "mx_v_only": KVConf(storage=KVStorage.mx),
    "mx_kv": KVConf(storage=KVStorage.mx, quantize_k=True),
    "mxfp4_kv": KVConf(storage=KVStorage.mx, quantize_k=True, k_format=KVFormat.e2m1, v_format=KVFormat.e2m1),
}


ATTENTION_LAYERS = 4
"""Rings that take turns: of a 60-frame window in BF16 they are larger than any L2."""


def make_kv(arch: GameRFTConfig, window: int, batch: int, conf: KVConf, device: torch.device) -> KVCache:
    """A cache of ``ATTENTION_LAYERS`` layers whose windows are full."""
    sizes = (ATTENTION_LAYERS, batch, arch.n_heads, arch.head_dim, arch.tokens_per_frame)
    cache = KVCache(*sizes, [window] * ATTENTION_LAYERS, conf, torch.bfloat16, device)
    for layer in range(ATTENTION_LAYERS):
        shape = (batch, arch.n_heads, window * arch.tokens_per_frame, arch.head_dim)
        cache.load(layer, *(torch.randn(shape, device=device).bfloat16() for _ in range(2)))
    cache.advance()
    return cache


def heads_of(arch: GameRFTConfig, batch: int, device: torch.device) -> list[Tensor]:
    """Random q, k and v of one frame, each ``[B, H, P, Dh]`` in BF16."""
    shape = (batch, arch.n_heads, arch.tokens_per_frame, arch.head_dim)
    return [torch.randn(shape, device=device).bfloat16() for _ in range(3)]


def bench_attention(bench: Bench, arch: GameRFTConfig, window: int, batch: int) -> None:
    """One frame against a full ring, from a layer's projection on; checked against SDPA on what is stored.

    Per storage and per kind of attention.
    """
    q, k, v = heads_of(arch, batch, bench.device)
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
    angles = torch.rand(arch.tokens_per_frame, arch.head_dim // 2, device=bench.device)
    rotary = (angles.cos(), angles.sin())
    q, k = (apply_rotary(rms_norm(x), *rotary) for x in (q, k))
    shape = f"{arch.tokens_per_frame} tokens × {window} frames, {batch * arch.n_heads} heads"
    for storage, conf in CACHES.items():
        cache = make_kv(arch, window, batch, conf, bench.device)
        want = F.scaled_dot_product_attention(q, *cache.window(0, k, v)).double().transpose(1, 2).flatten(2)
        size = cache.nbytes().allocated / ATTENTION_LAYERS
        for kind in AttentionKind:
            row = Row("attention", f"ring {storage}", shape, kind.value)
            bench.rows.append(row)
            bench.check_time()
            try:
                check_attention(kind, bench.device, arch.head_dim)
            except ValueError as error:
                row.note = str(error)
                continue
            attend = frame_attention(cache, kind, store=False)

            def layers(attend: LayerAttend = attend) -> list[Tensor]:
                given = (qkv, arch.n_heads, rotary)
                return [attend_from_projection(attend, layer, *given) for layer in range(ATTENTION_LAYERS)]

            run = compile_function(layers, CompileConf(enabled=bench.device.type == "cuda"))
            with torch.no_grad():
                row.error = relative_error(run()[0], want)
                us, p90 = bench.time([run])
            row.us, row.p90 = us / ATTENTION_LAYERS, p90 / ATTENTION_LAYERS
            row.floor_us, row.gb_s = size / bench.bandwidth / 1e3, size / row.us / 1e3
            row.note = "" if row.error < 2e-2 else "WRONG"


def bench_kv(bench: Bench, arch: GameRFTConfig, window: int, batch: int) -> None:
    """Storing one frame's K and V, and handing the window out as a plain tensor, per storage."""
    _, k, v = heads_of(arch, batch, bench.device)
    for storage, conf in CACHES.items():
        cache = make_kv(arch, window, batch, conf, bench.device)

        def store(cache: KVCache = cache, k: Tensor = k, v: Tensor = v) -> None:
            for layer in range(ATTENTION_LAYERS):
                cache.window(layer, k, v) if cache.store_is_free else cache.store(layer, k, v)

        def read(cache: KVCache = cache, k: Tensor = k, v: Tensor = v) -> list[tuple[Tensor, Tensor]]:
            return [cache.window(layer, k, v) for layer in range(ATTENTION_LAYERS)]

        for variant, function in (("store a frame", store), ("read the window", read)):
            bench.check_time()
            run = compile_function(function, CompileConf(enabled=bench.device.type == "cuda"))
            row = Row("kv", f"ring {storage}", f"{window} frames", variant)
            with torch.no_grad():
                us, p90 = bench.time([run])
            row.us, row.p90 = us / ATTENTION_LAYERS, p90 / ATTENTION_LAYERS
            bench.rows.append(row)
