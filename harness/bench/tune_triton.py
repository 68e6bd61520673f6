"""Finds the fastest launch shape of ``kernel=triton`` for a Linear; ``scripts/microbench.py --tune`` calls it."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

from torch import Tensor

from harness.bench.measuring import Bench
from harness.kernels.triton import shapes as triton_config
from harness.kernels.triton.shapes import GemmConfig, candidates
from harness.kernels.tuned import entry, gpu_name
from harness.mx.linears.triton import TritonMXLinear


def tune(bench: Bench, mx: TritonMXLinear, x: Tensor) -> str:
    """Set ``mx.config`` to the fastest found, one dimension of a shape after the other; an entry for ``tuned/``."""
    from triton.runtime.errors import OutOfResources  # not on machines without a GPU

    shape = mx.shape(x.shape[0])
    allowed = set(candidates(shape, mx.capability))
    modules = [mx, *(copy.deepcopy(mx) for _ in range(bench.copies(mx.weight_bytes()) - 1))]
    timed: dict[GemmConfig, float] = {}

    operands = mx.operands(x)

    def measure(config: GemmConfig) -> float:
        if config not in timed and timed and bench.over:
            return float("inf")
        if config not in timed:
            for module in modules:
                module.config = config
            try:
                timed[config] = bench.time([partial(module.product, *operands) for module in modules])[0]
            except OutOfResources:
                timed[config] = float("inf")
        return timed[config]

    start = triton_config.choose(shape, *triton_config.machine(bench.device), gpu_name(bench.device)).as_ints()
    best = min(allowed, key=lambda c: [abs(a - b) for a, b in zip(c.as_ints(), start, strict=True)])
    for _ in range(2):
        for dimension in ("split_k", "block_n", "warps", "swap", "stages"):
            others = {replace(best, **{dimension: getattr(c, dimension)}) for c in allowed} & allowed
            best = min({best, *others}, key=measure)
    mx.config = best
    key = {"path": mx.path, "bits": shape.bits, "m": shape.bucket, "n": shape.n, "k": shape.k}
    return entry(key | {"config": best.as_ints()})
