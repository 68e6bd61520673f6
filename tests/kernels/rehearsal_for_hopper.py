"""Rehearse launches for sm_90, without a GPU; prints what was compiled. Run without TRITON_INTERPRET."""

import tempfile
from concurrent.futures import wait

import torch
import triton
from triton_for_hopper import _Hopper

from harness.kernels import launch, rehearsal
from harness.kernels.triton.norms import residual_norm_kernel, stream_kernel
from harness.rollout.norms import enter_stream, residual_norm


def kernels():
    return [kernel.name for jitted in (residual_norm_kernel, stream_kernel) for kernel in cached(jitted).values()]


def cached(jitted):
    return jitted.device_caches[0][0]


with tempfile.TemporaryDirectory() as folder:
    triton.knobs.cache.dir = folder
    triton.runtime.driver.set_active(_Hopper())
    launch.dependent = lambda device: True
    x, row = torch.zeros(1, 64, 1536, dtype=torch.bfloat16), torch.zeros(1, 1, 1536, dtype=torch.bfloat16)
    assert not rehearsal.rehearsing()
    with rehearsal.rehearsal():
        assert rehearsal.rehearsing()
        for _ in range(2):  # twice the same launch is compiled once
            residual_norm(x, x, row, row, row)
            enter_stream(x[0], row, row)
    assert not rehearsal.rehearsing()
    wait(rehearsal._jobs.values())
    rehearsed = kernels()

    # What the launch itself needs is what was compiled: nothing is added to it.
    run = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = lambda *args, warmup, **named: run(*args, warmup=True, **named)
    residual_norm(x, x, row, row, row)
    enter_stream(x[0], row, row)
    assert kernels() == rehearsed, (rehearsed, kernels())
    print(*rehearsed)
