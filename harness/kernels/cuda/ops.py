"""``mx_linear.cu`` as a torch operator: it traces into ``torch.compile`` and is captured in CUDA graphs.

Every shape of launch is a kernel of its own, compiled (half a second) at its first use and kept. Call it once with
each number of rows before capturing a graph. Of many rows the product is torch's, of what ``mx_unpack.cu`` makes of the
weight.
"""

import ctypes
import functools
import threading
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels import launch, rehearsal
from harness.kernels.cuda import nvrtc
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda import shapes as cuda_config
from harness.kernels.cuda.packing import GROUP
from harness.kernels.cuda.shapes import NORM_TILES, CudaConfig, CudaShape, Role, choose, launch_grid
from harness.kernels.cuda.stream import Modulating, Squares, Stream
from harness.kernels.tuned import gpu_name

_UNPACK_WARPS = 8

loading = threading.Lock()
"""Held while a kernel is made ready."""

_PARTS = {"mx_linear.cu": ("mx_product.cuh",), "mx_attend.cu": ("mx_product.cuh",)}


def mx_linear_now(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
    element: str,
    output_scale: float,
    config: list[int],
    silu: bool = False,
) -> Tensor:
    """``x @ decode(weight).T + bias``, or SiLU of that: BF16 ``x`` [M, K], K a multiple of 32, to BF16 [M, N].

    ``tiles`` and ``output_scale`` come from ``cuda_packing.pack`` (or are rows of larger such tensors), ``bias`` is
    BF16 [N] or None, ``config`` is ``CudaConfig.as_ints()`` or empty (see ``cuda_config.choose``, and
    ``CudaShape.many`` for when the weight is unpacked instead). ``silu`` applies SiLU in float32 to the sums rounded to
    BF16, as ``F.silu`` on the rounded outputs does.

    Raises ``nvrtc.DriverError`` when the driver refuses the launch, ``nvrtc.CompileError`` when ``config`` does not
    compile.
    """
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    m, k = x.shape
    product = CudaShape(m, out_features, k, cuda_packing.element_bits(element))
    if product.many and not config:
        out = library_product(x, unpack(tiles, (out_features, k), element), bias, output_scale)
        return F.silu(out) if silu else out
    out = torch.empty(m, out_features, dtype=torch.bfloat16, device=x.device)
    if m > 0:
        shape = CudaConfig(*config) if config else choose(product, gpu_name(x.device))
        _launch(shape, product, x, PackedWeight(tiles, bias, element, output_scale), out, silu)
    return out


class PackedWeight(NamedTuple):
    """What of a packed Linear its products read; see ``mx_linear_now``."""

    tiles: Tensor
    bias: Tensor | None
    element: str
    output_scale: float


class _StreamArguments(ctypes.Structure):
    """``Stream`` of ``mx_linear.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before", "gate", "scale", "shift", "modulated", "squares")),
        ("given", Squares),
    )


def _launch(
    config: CudaConfig,
    product: CudaShape,
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    silu: bool = False,
    role: Role = Role.plain,
    stream: _StreamArguments | None = None,
) -> None:
    with torch.cuda.device(x.device):
        pdl = launch.dependent(x.device)
        function = load(config, product, weight.element, x.device, silu, pdl, role)
        arguments = (
            nvrtc.TensorMap(x, 8 * (config.m_tiles + (role is Role.norm)), GROUP),
            weight.tiles,
            weight.bias,
            out,
            ctypes.c_int(product.m),
            ctypes.c_int(product.n),
            ctypes.c_int(weight.tiles.shape[1]),
            ctypes.c_float(weight.output_scale),
            _StreamArguments() if stream is None else stream,
        )
        warps = config.warps + (role is not Role.plain)
        function.launch(launch_grid(config, product.m, product.n), 32 * warps, arguments, pdl)


def normed_product(
    stream: Stream, weight: PackedWeight, out_features: int, eps: float, config: CudaConfig | None, silu: bool
) -> Tensor:
    """BF16 [M, N]: the product of ``weight`` and the modulated norm of a residual stream, M at most 64.

    The norm's ``eps`` is added to the mean of squares. Raises as ``mx_linear_now``.
    """
    total, modulated, _ = stream
    (m, k), element = total.shape, weight.element
    product = CudaShape(m, out_features, k, cuda_packing.element_bits(element))
    shape = config or choose(product, gpu_name(total.device), Role.norm)
    out = torch.empty(m, out_features, dtype=torch.bfloat16, device=total.device)
    arguments = _StreamArguments(given=Squares.of_stream(stream, eps))
    _launch(shape, product, modulated, weight, out, silu, Role.norm, arguments)
    return out


def residual_product(
    x: Tensor, weight: PackedWeight, total: Tensor, vectors: Modulating, config: CudaConfig | None
) -> Stream:
    """The residual stream ``total`` [M, N] after ``gate`` times the product of ``weight`` and BF16 ``x`` [M, K].

    M at most 64, N a multiple of 16; ``x`` and ``total`` contiguous. Raises as ``mx_linear_now``.
    """
    (m, k), n = x.shape, total.shape[1]
    vectors = Modulating(*(vector.reshape(n).contiguous() for vector in vectors))
    product = CudaShape(m, n, k, cuda_packing.element_bits(weight.element))
    shape = config or choose(product, gpu_name(x.device), Role.residual)
    squares = torch.empty(m, launch_grid(shape, m, n)[0] // shape.cluster, device=x.device)
    after = Stream(torch.empty_like(total), total.new_empty(8 * NORM_TILES + 1, n), squares)
    arguments = _StreamArguments(*(t.data_ptr() for t in (total, *vectors, after.modulated, after.squares)))
    _launch(shape, product, x, weight, after.total, role=Role.residual, stream=arguments)
    return after


mx_linear = torch.library.custom_op("harness_mx::cuda_linear", mx_linear_now, mutates_args=(), device_types="cuda")
"""``mx_linear_now`` as what a compiler traces; called by itself it takes the host several times as long."""


@mx_linear.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
    element: str,
    output_scale: float,
    config: list[int],
    silu: bool = False,
) -> Tensor:
    return torch.empty(x.shape[0], out_features, dtype=torch.bfloat16, device=x.device)


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: float) -> Tensor:
    """``output_scale * x @ weight.T + bias``, BF16, rounded once."""
    if output_scale == 1:
        return F.linear(x, weight, bias)
    return torch.addmm(x.new_zeros(1) if bias is None else bias, x, weight.t(), alpha=output_scale)


def unpack(tiles: Tensor, sizes: tuple[int, int], element: str) -> Tensor:
    """The BF16 weight [N, K], divided by ``output_scale``, that ``tiles`` hold, for ``sizes`` (N, K).

    Raises ``nvrtc.DriverError`` when the driver refuses the launch.
    """
    if element == "bf16":  # no decoding, and none of a frame's products: prefill's, of a model packed for few rows
        return cuda_packing.unpack_plain(tiles, *sizes)
    (n, k), (rows, groups) = sizes, tiles.shape[:2]
    out = torch.empty(n, k, dtype=torch.bfloat16, device=tiles.device)
    with torch.cuda.device(tiles.device), loading:
        pdl = launch.dependent(tiles.device)
        function = _load_unpack(element, torch.cuda.current_device(), pdl)
        arguments = (tiles, out, *(ctypes.c_int(size) for size in (n, k, groups)))
        function.launch((-(-rows * groups // _UNPACK_WARPS), 1), 32 * _UNPACK_WARPS, arguments, pdl)
    return out


@functools.cache
def source(kernel: str = "mx_linear.cu") -> str:
    """A kernel's source: the instructions, how weights are decoded, then what is made of them."""
    here, parts = Path(__file__).parent, ("mx_device.cuh", "mx_decode.cuh", *_PARTS.get(kernel, ()), kernel)
    return "".join((here / name).read_text() for name in parts)


@functools.cache
def compiled(config: CudaConfig, k: int, element: str, silu: bool, dependent: bool, role: Role = Role.plain) -> bytes:
    """The cubin of ``config`` for ``k`` inputs and elements "e4m3", "e5m2", "e2m1" or "bf16", with or without SiLU."""
    defines = cuda_config.defines(config, k, element, silu, dependent, role)
    return nvrtc.compile_source(source(), "mx_linear.cu", defines, "sm_90a")


def load(
    config: CudaConfig,
    shape: CudaShape,
    element: str,
    device: torch.device,
    silu: bool,
    dependent: bool,
    role: Role = Role.plain,
) -> nvrtc.Function:
    """The kernel ``config`` for the product ``shape`` on the current device, ``device``."""
    with loading:
        index = torch.cuda.current_device() if device.index is None else device.index
        shared = cuda_config.shared_bytes(config, shape, role)
        return _load(config, shape.k, shared, element, index, silu, dependent, role)


@functools.cache
def _load(
    config: CudaConfig, k: int, shared: int, element: str, device: int, silu: bool, dependent: bool, role: Role
) -> nvrtc.Function:
    make = functools.partial(compiled, config, k, element, silu, dependent, role)
    return nvrtc.Function(rehearsal.compiled(make), "mx_linear", shared)


def compiled_unpack(element: str, dependent: bool) -> bytes:
    """The cubin of ``mx_unpack.cu`` for elements "e4m3", "e5m2" or "e2m1"."""
    defines = cuda_packing.decoding(element) | {"WARPS": _UNPACK_WARPS, "PDL": int(dependent)}
    return nvrtc.compile_source(source("mx_unpack.cu"), "mx_unpack.cu", defines, "sm_90a")


@functools.cache
def _load_unpack(element: str, device: int, dependent: bool) -> nvrtc.Function:
    return nvrtc.Function(rehearsal.compiled(lambda: compiled_unpack(element, dependent)), "mx_unpack", 0)
