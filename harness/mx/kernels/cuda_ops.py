"""`mx_linear.cu` as a torch operator: it traces into `torch.compile` and is captured in CUDA graphs.

Every shape of launch is a kernel of its own, compiled (half a second) at its first use and kept. Call it once with
each number of rows before capturing a graph.
"""

import ctypes
import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from harness import launch
from harness.mx.kernels import cuda_config, nvrtc
from harness.mx.kernels.cuda_config import CudaConfig, CudaShape, choose, launch_grid
from harness.mx.kernels.cuda_packing import GROUP

_MAGNITUDE_AT = {"e4m3": 4, "e5m2": 5, "e2m1": 0, "bf16": 0}
"""Lowest bit of an 8-bit element's magnitude where BF16 has it."""

_BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "bf16": 16}

_loading = threading.Lock()


@torch.library.custom_op("harness_mx::cuda_linear", mutates_args=(), device_types="cuda")
def mx_linear(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
    element: str,
    post: float,
    config: list[int],
    silu: bool = False,
) -> Tensor:
    """`x @ decode(weight).T + bias`, or SiLU of that: BF16 `x` [M, K], K a multiple of 32, to BF16 [M, N].

    `tiles` and `post` come from `cuda_packing.pack` (or are rows of larger such tensors), `bias` is BF16 [N] or None,
    `config` is `CudaConfig.as_ints()` or empty (see `cuda_config.choose`). `silu` applies SiLU in float32 to the sums
    rounded to BF16, as `F.silu` on the rounded outputs does.

    Raises `nvrtc.DriverError` when the driver refuses the launch, `nvrtc.CompileError` when `config` does not compile.
    """
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    (m, k), bits = x.shape, _BITS[element]
    out = torch.empty(m, out_features, dtype=torch.bfloat16, device=x.device)
    if m == 0:
        return out
    product = CudaShape(m, out_features, k, bits)
    shape = CudaConfig(*config) if config else choose(product)
    with torch.cuda.device(x.device):
        pdl = launch.dependent(x.device)
        function = load(shape, product, element, x.device, silu, pdl)
        arguments = (
            nvrtc.TensorMap(x, 8 * shape.m_tiles, GROUP),
            tiles,
            bias,
            out,
            ctypes.c_int(m),
            ctypes.c_int(out_features),
            ctypes.c_int(tiles.shape[1]),
            ctypes.c_float(post),
        )
        function.launch(launch_grid(shape, m, out_features), 32 * shape.warps, arguments, pdl)
    return out


@mx_linear.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
    element: str,
    post: float,
    config: list[int],
    silu: bool = False,
) -> Tensor:
    return torch.empty(x.shape[0], out_features, dtype=torch.bfloat16, device=x.device)


@functools.cache
def source() -> str:
    """The kernel's source: the instructions, then what is made of them."""
    here = Path(__file__).parent
    return (here / "mx_device.cuh").read_text() + (here / "mx_linear.cu").read_text()


@functools.cache
def compiled(config: CudaConfig, k: int, element: str, silu: bool, dependent: bool) -> bytes:
    """The cubin of `config` for `k` inputs and elements "e4m3", "e5m2", "e2m1" or "bf16", with or without SiLU."""
    defines = cuda_config.defines(config, k, _BITS[element], _MAGNITUDE_AT[element], silu, dependent)
    return nvrtc.compile_source(source(), "mx_linear.cu", defines, "sm_90a")


def load(
    config: CudaConfig, shape: CudaShape, element: str, device: torch.device, silu: bool, dependent: bool
) -> nvrtc.Function:
    """The kernel `config` for the product `shape` on the current device, `device`."""
    with _loading:
        index = torch.cuda.current_device() if device.index is None else device.index
        return _load(config, shape.k, cuda_config.shared_bytes(config, shape), element, index, silu, dependent)


@functools.cache
def _load(
    config: CudaConfig, k: int, shared: int, element: str, device: int, silu: bool, dependent: bool
) -> nvrtc.Function:
    return nvrtc.Function(compiled(config, k, element, silu, dependent), "mx_linear", shared)
