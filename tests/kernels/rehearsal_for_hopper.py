"""Rehearse launches for sm_90, without a GPU; prints what was compiled. Run without TRITON_INTERPRET."""

import tempfile
from concurrent.futures import wait

import torch
import triton
from triton_for_hopper import _Hopper

from harness.kernels import launch, rehearsal
from harness.kernels.triton.norms import residual_norm_kernel
from harness.kernels.triton.window import window_kernel
from harness.kv import KVCache, KVConf, KVStorage
from harness.rollout.attention import FusedAttention
from harness.rollout.norms import residual_norm

JITTED = (residual_norm_kernel, window_kernel)
STORAGES = (KVConf(), KVConf(KVStorage.i8_scale, quantize_k=True), KVConf(KVStorage.mx, quantize_k=True, bits=4))


def kernels():
    """The name of each kernel that is there, and its PTX."""
    return [(kernel.name, kernel.asm["ptx"]) for jitted in JITTED for kernel in jitted.device_caches[0][0].values()]


def launch_norms():
    x, row = torch.zeros(1, 64, 1536, dtype=torch.bfloat16), torch.zeros(1, 1, 1536, dtype=torch.bfloat16)
    residual_norm(x, x, row, row, row)


def launch_all():
    launch_norms()
    for conf in STORAGES:
        cache = KVCache(1, 1, 2, 64, 64, [4], conf, torch.bfloat16, "cpu")
        cache.advance()
        angles = torch.zeros(64, 32)
        FusedAttention(cache, store=True).projected(0, torch.zeros(1, 64, 384, dtype=torch.bfloat16), (angles, angles))


with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as another:
    triton.knobs.cache.dir = folder
    triton.runtime.driver.set_active(_Hopper())
    launch.dependent = lambda device: True
    assert not rehearsal.rehearsing()
    with rehearsal.rehearsal():
        assert rehearsal.rehearsing()
        launch_norms()
        launch_all()  # twice the same launch is compiled once
    assert not rehearsal.rehearsing()
    wait(rehearsal._jobs.values())
    rehearsed = kernels()

    # What the launch itself needs is what was compiled: nothing is added to it.
    run = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = lambda *args, warmup, **named: run(*args, warmup=True, **named)
    launch_all()
    assert kernels() == rehearsed, [name for name, _ in (*rehearsed, *kernels())]
    # And it is what the launch by itself would have compiled, where no compiled kernel is found on disk: Triton's name
    # for one there does not tell a text from a type of that name.
    triton.knobs.cache.dir = another
    for jitted in JITTED:
        jitted.device_caches[0][0].clear()
    launch_all()
    assert sorted(kernels()) == sorted(rehearsed), [name for name, _ in (*rehearsed, *kernels())]
    print(*(name for name, _ in rehearsed))
