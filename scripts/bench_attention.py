#!/usr/bin/env python3
"""Measure attention of one frame to a full window by itself: our kernels on every storage, torch's on BF16.

    python scripts/bench_attention.py                       # 24 heads of 64, windows of 16 and 60 frames
    python scripts/bench_attention.py --heads 20 --dim 128 --batch 4 --sweep

A time is one layer's, the median of CUDA-graph replays over enough caches that each comes from memory and not from
the L2 cache; writing the frame's own K and V into a plain ring is part of torch's times. torch's operators are timed on
BF16 alone, for they know no other storage. ``GB/s`` counts each stored byte of the window once. --sweep also tries
other launch shapes of our kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.kv import KVCache, KVConf, KVStorage
from harness.measure.environment import environment
from harness.rollout import AttentionKind, CompileConf, fused
from harness.rollout.attention import FusedAttention, check_attention
from harness.rollout.compile import CapturedGraph, compile_function

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


@contextmanager
def launch_shape(waves: int, stages: int) -> Iterator[None]:
    """Run our kernels with another launch shape."""
    before = fused.WAVES, fused.STAGES
    fused.WAVES, fused.STAGES = waves, stages
    try:
        yield
    finally:
        fused.WAVES, fused.STAGES = before


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
    graph, times = CapturedGraph(run, args.device), []
    for _ in range(args.replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def attention_over(kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor) -> Callable[[KVCache], Tensor]:
    """Attention of one frame to a cache's window, compiled once for all caches."""
    if kind is AttentionKind.fused:
        return lambda cache: FusedAttention(cache, store=False)(0, q, k, v)
    if kind is AttentionKind.sdpa:
        return lambda cache: F.scaled_dot_product_attention(q, *cache.window(0, k, v))

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v)

    compiled = compile_function(operator, CompileConf(enabled=True))
    return lambda cache: compiled(q, *cache.window(0, k, v))


def measure(conf: KVConf, kind: AttentionKind, frames: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: time, bandwidth and error against float32 attention to the unpacked window."""
    check_attention(kind, args.device, args.dim)
    caches = make_caches(conf, frames, args)
    shape = (args.batch, args.heads, args.tokens, args.dim)
    q, k, v = (torch.randn(shape, device=args.device, dtype=args.dtype) for _ in range(3))
    run = attention_over(kind, q, k, v)
    keys, values = (x.float() for x in caches[0].window(0, k, v))
    expected = F.scaled_dot_product_attention(q.float(), keys, values)
    error = (run(caches[0]).float() - expected).norm() / expected.norm()
    us = median_us(lambda: [run(cache) for cache in caches], len(caches), args)
    size = caches[0].nbytes().allocated
    return {
        "frames": frames, "us": us, "GB/s": None if us is None else size / us / 1e3, "bytes": size,
        "error": error.item(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("batch", 1), ("heads", 24), ("dim", 64), ("tokens", 64), ("replays", 50))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--frames", default="16,60", help="comma-separated windows")
    parser.add_argument("--kinds", default="sdpa,flex,fused")
    parser.add_argument("--storages", default=",".join(STORAGES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/attention.json"))
    args = parser.parse_args(argv)
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    rows, failed = [], False
    windows = [int(frames) for frames in args.frames.split(",")]
    for frames, storage, kind in itertools.product(windows, args.storages.split(","), args.kinds.split(",")):
        if kind != "fused" and storage != "bf16":
            continue
        own = (fused.WAVES, fused.STAGES)
        shapes = itertools.product((1, 2, 3, 4), (2, 3, 4)) if args.sweep and kind == "fused" else [own]
        for waves, stages in shapes:
            row: dict[str, Any] = {"storage": storage, "attention": kind, "waves": waves, "stages": stages}
            try:
                with launch_shape(waves, stages):
                    row |= measure(STORAGES[storage], AttentionKind(kind), frames, args)
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
