"""Measure a layer's attention of one frame to a full window by itself: our kernel on every storage, torch's on BF16.

    python scripts/bench_attention.py                       # 24 heads of 64, windows of 16 and 60 frames
    python scripts/bench_attention.py --heads 20 --dim 128 --batch 4 --sweep

A time is one layer's, from its projection on (QK norm, rotation, attention, the frame's own K and V stored), in a
frame's last step: the median of CUDA-graph replays over enough caches that each comes from memory and not from the L2
cache. What surrounds torch's operators is compiled; they are timed on BF16 alone, for they know no other storage.
``GB/s`` counts each stored byte of the window once. --sweep also tries other launch shapes of our kernel.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.entries import command_parser, count, counts, output
from harness.kv import KVCache, KVConf, KVStorage
from harness.measure.environment import environment
from harness.measure.timing import samples_ms
from harness.models.attention import LayerAttend
from harness.models.gamerft import attend_from_projection, rms_norm
from harness.models.rope import apply_rotary
from harness.rollout import AttentionKind, CompileConf
from harness.rollout.attention import FusedAttention, OneProjectedLayer, check_attention, layer_attention
from harness.rollout.compile import CapturedGraph, compile_function
from harness.rollout.fused import WindowConfig
from harness.streams import patient

MX = KVStorage.mx
STORAGES = {
    "bf16": KVConf(),
    "mx_v_only": KVConf(MX),
    "mx_kv": KVConf(MX, quantize_k=True),
    "mxfp4_v_only": KVConf(MX, bits=4),
    "mxfp4_kv": KVConf(MX, quantize_k=True, bits=4),
    "i8_kv": KVConf(KVStorage.i8_scale, quantize_k=True),
}
L2_BYTES = 50e6
"""Of an H200; caches in rotation hold several times as much."""


SWEEP = [WindowConfig(*shape) for shape in itertools.product((1, 2), (64, 128), (2, 3), (64, 96, 192))]


def make_caches(conf: KVConf, frames: int, args: argparse.Namespace) -> list[KVCache]:
    """Filled caches of one layer, enough to defeat the L2 cache."""

    def make() -> KVCache:
        sizes = (1, args.batch, args.heads, args.dim, args.tokens, [frames])
        cache = KVCache(*sizes, conf, args.dtype, args.device)
        shape = (args.batch, args.heads, frames * args.tokens, args.dim)
        k, v = (torch.randn(shape, device=args.device, dtype=args.dtype) for _ in range(2))
        cache.load(0, k, v)
        cache.advance()
        return cache

    first = make()
    count = 1 if args.device.type == "cpu" else max(2, int(4 * L2_BYTES / first.nbytes().allocated) + 1)
    return [first, *(make() for _ in range(count - 1))]


def median_us(run: Callable[[], Any], calls: int, args: argparse.Namespace) -> float | None:
    """Microseconds of one of the ``calls`` calls in ``run``, by replaying a graph of them; None on a CPU."""
    if args.device.type == "cpu":
        run()
        return None
    graph = CapturedGraph(run, args.device)
    return statistics.median(samples_ms(graph.replay, args.device, args.replays, wait=True)) * 1e3 / calls


def layers_over(
    caches: list[KVCache],
    kind: AttentionKind,
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    heads: int,
    config: WindowConfig,
) -> list[Callable[[], Tensor]]:
    """Attention of one frame from ``qkv [B, P, 3*H*Dh]`` on, over each of the caches; compiled once for all of them."""

    def layer(attend: LayerAttend, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return attend_from_projection(attend, 0, qkv, heads, rotary)

    run = compile_function(layer, CompileConf(enabled=qkv.device.type == "cuda"))
    attends: list[LayerAttend] = [
        OneProjectedLayer(FusedAttention(cache, True, config))
        if kind is AttentionKind.fused
        else layer_attention(cache, 0, kind, store=True)
        for cache in caches
    ]
    return [functools.partial(run, attend, qkv, rotary) for attend in attends]


def expected_output(cache: KVCache, qkv: Tensor, rotary: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Float32 attention ``[B, P, H*Dh]`` to the unpacked window."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (apply_rotary(rms_norm(x), *rotary) for x in (q, k))
    keys, values = (x.float() for x in cache.window(0, k, v))
    return F.scaled_dot_product_attention(q.float(), keys, values).transpose(1, 2).flatten(2)


@torch.no_grad()
def measure(
    conf: KVConf, kind: AttentionKind, frames: int, config: WindowConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: time, bandwidth and error against float32 attention to the unpacked window."""
    check_attention(kind, args.device, args.dim)
    caches = make_caches(conf, frames, args)
    shape = (args.batch, args.tokens, 3 * args.heads * args.dim)
    qkv = torch.randn(shape, device=args.device, dtype=args.dtype)
    angles = torch.rand(args.tokens, args.dim // 2, device=args.device)
    rotary = (angles.cos(), angles.sin())
    expected = expected_output(caches[0], qkv, rotary, args.heads)
    runs = layers_over(caches, kind, qkv, rotary, args.heads, config)
    error = (runs[0]().float() - expected).norm() / expected.norm()
    us = median_us(lambda: [run() for run in runs], len(runs), args)
    size = caches[0].nbytes().allocated
    return {
        "frames": frames, "us": us, "GB/s": None if us is None else size / us / 1e3, "bytes": size,
        "error": error.item(),
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments; BF16 on a GPU, float32 on a CPU."""
    parser = command_parser(__doc__)
    sizes = (("batch", 1), ("heads", 24), ("dim", 64), ("tokens", 64), ("replays", 50))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--frames", type=counts, default="16,60", help="comma-separated windows")
    parser.add_argument("--kinds", default="sdpa,flex,fused")
    parser.add_argument("--storages", default=",".join(STORAGES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--out", type=output, default="outputs/bench/attention.json")
    args = parser.parse_args(argv)
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    return args


@patient
def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; 1 if a row failed."""
    args = parse(argv)
    rows, failed = [], False
    for frames, storage, kind in itertools.product(args.frames, args.storages.split(","), args.kinds.split(",")):
        if kind != "fused" and storage != "bf16":
            continue
        for config in SWEEP if args.sweep and kind == "fused" else [WindowConfig()]:
            row: dict[str, Any] = {"storage": storage, "attention": kind}
            row |= asdict(config) if kind == "fused" else {}
            try:
                row |= measure(STORAGES[storage], AttentionKind(kind), frames, config, args)
            except Exception as error:  # whatever stops one row is that row's result; the others still count
                row["failed"], failed = f"{type(error).__name__}: {error}"[:300], True
            rows.append(row)
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(args.device), "arguments": {k: str(v) for k, v in vars(args).items()}}
    args.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
