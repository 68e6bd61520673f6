"""Compile what host functions launch for sm_90, without a GPU; prints ``case: kernels``. Run without TRITON_INTERPRET.

Triton's interpreter runs kernels that a GPU's compiler refuses. Here the functions that launch kernels are called as
they are, on tensors of a CPU: each launch compiles its kernel for that very call's dtypes, constants and options, and
launches nothing, so results hold nothing.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from harness.kernels import launch

BF16 = torch.bfloat16
TARGET = GPUTarget("cuda", 90, 32)


class _Hopper:
    """What of a GPU's driver a compilation asks for."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132}
    )

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching() -> list[Any]:
    """Until the process ends. Returns where compiled kernels are put."""
    compiled: list[Any] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = record
    triton.runtime.driver.set_active(_Hopper())
    launch.dependent = lambda device: True
    return compiled


def residual_norm() -> None:
    """Widths that are a power of two and that are not."""
    from harness.rollout.norms import residual_norm

    for width in (1536, 2560, 1024):
        x, row = torch.zeros(1, 64, width, dtype=BF16), torch.zeros(1, 1, width, dtype=BF16)
        residual_norm(x, x, row, row, row)


def prefill() -> None:
    """A history into rings of every kind the kernels store, in both bases."""
    from harness.kv import KVCache, KVConf
    from harness.kv.conf import KVStorage
    from harness.rollout.prefill import HistoryAttention

    dim, heads, frames, tokens = 64, 2, 4, 64
    mx = KVStorage.mx
    stores = [KVConf(), KVConf(storage=mx, quantize_k=True), KVConf(storage=mx, quantize_k=True, bits=4)]
    for store in (*stores, replace(stores[1], hadamard=True)):
        cache = KVCache(1, 1, heads, dim, tokens, [frames], store, BF16, torch.device("cpu"))
        attend = HistoryAttention(cache, [frames - 1], True, 0)
        angles = torch.zeros(frames * tokens, dim // 2)
        attend.projected(0, torch.zeros(frames, tokens, 3 * heads * dim, dtype=BF16), (angles, angles))


def linears() -> None:
    """Both products of every weight format, with and without what is rare, at few and at many rows."""
    from harness.formats.mx import FORMATS, encode
    from harness.kernels.triton import ops, packing
    from harness.kernels.triton.shapes import tile_width

    arrived = torch.zeros(4096, dtype=torch.int32)
    for element in ("e4m3", "e5m2", "e2m1"):
        fmt = FORMATS[element]
        for path in ("bf16", "fp8"):
            if path == "fp8" and element == "e5m2":
                continue
            packed = packing.pack(encode(torch.randn(256, 512), fmt), fmt, tile_width(fmt.bits, path))
            for rows in (64, 1024):
                x, bias = torch.zeros(rows, 512, dtype=BF16), torch.zeros(256, dtype=BF16)
                for wide in (False, True):
                    weight = packed.elements, packed.scales, bias, arrived, 256, element, wide, []
                    if path == "bf16":
                        ops.gemm_bf16(x, *weight)
                    else:
                        ops.gemm_fp8(*ops.quantise(x, "e4m3", "rceil"), *weight)
        ops.round_to_mx(torch.zeros(64, 512, dtype=BF16), element, "rceil")


CASES: dict[str, Callable[[], None]] = {case.__name__: case for case in (residual_norm, prefill, linears)}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # what is found in a cache would not be compiled
        compiled = compile_instead_of_launching()
        for name in sys.argv[1:]:
            compiled.clear()
            CASES[name]()
            assert all(kernel.asm["cubin"] for kernel in compiled)
            print(f"{name}:", *sorted({kernel.name for kernel in compiled}), flush=True)
