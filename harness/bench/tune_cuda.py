"""Finds the fastest launch shape of ``kernel=cuda`` for a Linear; ``scripts/microbench.py --tune`` calls it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.bench.measuring import Bench
from harness.kernels import launch
from harness.kernels.cuda import nvrtc
from harness.kernels.cuda import ops as cuda_ops
from harness.kernels.cuda.linear import PackedLinear
from harness.kernels.cuda.shapes import CudaConfig, CudaShape, candidates, choose, fits
from harness.kernels.tuned import entry, gpu_name

TRIED = 64
"""Launch shapes tried at first, the ones that the rule puts in front."""

REFINED = 4
"""Of these, the fastest are tried with other stages."""


def tune(bench: Bench, mx: PackedLinear, x: Tensor) -> str:
    """Set ``mx.config`` to the fastest found; the entry for a file in ``tuned/``, and what was refused.

    Launch shapes are compiled side by side. One that gives anything but the product of the decoded operands up to the
    order of summation is never timed, and named.
    """
    rows, shape, dependent = mx.operand(x), mx.shape(x.shape[0]), launch.dependent(x.device)
    if shape.many:
        return f"nothing to tune: of {shape.m} rows the weight is unpacked for a library's product"
    modules = [mx, *(copy.deepcopy(mx) for _ in range(bench.copies(mx.weight_bytes()) - 1))]
    check = checker(mx, rows)
    timed: dict[CudaConfig, float] = {}
    wrong: list[str] = []

    def measure(configs: Sequence[CudaConfig]) -> None:
        fresh = [config for config in dict.fromkeys(configs) if config not in timed]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {c: pool.submit(cuda_ops.compiled, c, mx.in_features, mx.element, False, dependent) for c in fresh}
            for config, job in jobs.items():
                if bench.over:
                    job.cancel()
                    continue
                mx.config = config
                refusal = reason(job, check)
                if refusal is not None:
                    wrong.append(f"{config}: {refusal}")
                    continue
                for module in modules:
                    module.config = config
                timed[config] = bench.time([partial(module.product, rows) for module in modules])[0]

    measure([choose(shape, gpu_name(x.device)), *candidates(shape, TRIED)])
    fastest = sorted(timed, key=timed.__getitem__)[:REFINED]
    measure([other for config in fastest for other in other_stages(config, shape)])
    best = min(timed, key=timed.__getitem__)
    mx.config = best
    for config in sorted(timed, key=timed.__getitem__)[:8]:
        print(f"  {timed[config]:7.2f} µs {config}", flush=True)
    print("".join(f"  REFUSED {line}\n" for line in wrong), end="", flush=True)
    note = f" {len(wrong)} refused." if wrong else ""
    key = (shape.bits, shape.bucket, shape.n, shape.k)
    bench.tried.append({"shape": key, "us": [[*config.as_ints(), us] for config, us in timed.items()]})
    found = dict(zip(("bits", "m", "n", "k"), key, strict=True)) | {"config": best.as_ints()}
    return f"{entry(found)}  {timed[best]:.2f} µs; {len(timed)} tried.{note}"


def other_stages(config: CudaConfig, shape: CudaShape) -> list[CudaConfig]:
    """``config`` with longer stages, or fewer of them, where they fit."""
    groups = config.stage_groups * config.stages
    others = [
        replace(config, stage_groups=stage, stages=-(-groups // stage)) for stage in (1, 2, 3, 4, 6) if stage <= groups
    ]
    others += [replace(config, stages=stages) for stages in (2, 3, 4, 6) if stages < config.stages]
    return [other for other in others if fits(other, shape)]


def checker(mx: PackedLinear, rows: Tensor) -> Callable[[], str | None]:
    """A function that says what is wrong with ``mx``'s product of ``rows``, or None."""
    weight = mx.dense_weight()
    bias = None if mx.bias is None else mx.bias.double()
    parts = [slice(0, 512), slice(max(0, mx.out_features - 512), mx.out_features)]  # both ends
    wants = [F.linear(rows.double(), weight[p].double(), None if bias is None else bias[p]) for p in parts]
    slacks = [
        2**-8 * want.abs() + 2**-18 * F.linear(rows.double().abs(), weight[p].double().abs())
        for p, want in zip(parts, wants, strict=True)
    ]

    def check() -> str | None:
        first, second = mx.product(rows), mx.product(rows)
        if not torch.equal(first, second):
            return "two calls differ"
        for part, want, slack in zip(parts, wants, slacks, strict=True):
            count = int((~((first[:, part].double() - want).abs() <= slack)).sum())
            if count:
                return f"{count} of {want.numel()} outputs are wrong"
        return None

    return check


def reason(job: Future[bytes], check: Callable[[], str | None]) -> str | None:
    """Why a launch shape must not be timed, or None."""
    try:
        job.result()
        return check()
    except nvrtc.CompileError as error:
        return str(error).splitlines()[0]
    except nvrtc.DriverError as error:
        return str(error)
