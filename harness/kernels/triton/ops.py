"""The kernels of ``triton_kernels`` as torch operators: they trace into ``torch.compile`` and CUDA graphs.

Importing this module needs the package triton. Nothing here waits for the device. Workspace for split K is allocated
inside an operator, so that a CUDA graph owns it; ``arrived`` are the caller's, int32, zero before and after every call.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from harness.formats.mx import BLOCK, FORMATS, carry_threshold
from harness.formats.scales import ScaleMode
from harness.kernels.triton import gemm as triton_kernels
from harness.kernels.triton.shapes import GemmConfig, Shape, choose, machine
from harness.kernels.tuned import gpu_name

_QUANTISE_BLOCKS = 16  # MX blocks a program of quantise_rows takes


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (on CPU tensors, for tests)."""
    return not isinstance(triton_kernels.gemm_bf16, triton.runtime.JITFunction)


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid] if interpreted() else wrap_triton(kernel)[grid]


def _grid_and_partial(m: int, n: int, config: GemmConfig, arrived: Tensor) -> tuple[tuple[int, int, int], Tensor]:
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split_k)
    tiles = grid[0] * grid[1]
    if config.split_k == 1:
        return grid, arrived  # never touched
    if tiles > arrived.numel():
        raise ValueError(f"{config} makes {tiles} output tiles, {arrived.numel()} counters were given; use split_k=1")
    size = tiles * config.split_k * config.block_m * config.block_n
    return grid, torch.empty(size, dtype=torch.float32, device=arrived.device)


def _shape(config: list[int], shape: Shape, device: torch.device) -> GemmConfig:
    # Chosen here, within an operator, because torch.compile does not trace the choice.
    return GemmConfig.from_ints(config) if config else choose(shape, *machine(device), gpu_name(device))


def _launch_options(config: GemmConfig) -> dict[str, int]:
    return {} if interpreted() else {"num_warps": config.warps, "num_stages": config.stages}


@triton_op("harness_mx::triton_gemm_bf16", mutates_args={"arrived"})
def gemm_bf16(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    arrived: Tensor,
    out_features: int,
    element: str,
    wide: bool,
    config: list[int],
) -> Tensor:
    """``x @ decode(weight).T + bias``: BF16 ``x`` [M, KP], contiguous, to BF16 [M, N].

    ``weight`` uint8 [tiles, NP, 64 or 128] and ``scales`` int32 [blocks/4, NP] come from ``packing.pack`` (or are rows
    of larger such tensors), ``bias`` is BF16 [N] or None, ``config`` is ``GemmConfig.as_ints()`` or empty (see
    ``triton_config.choose``), ``arrived`` has a zero for every output tile.

    Raises ValueError when K is split and there are fewer counters than output tiles.
    """
    m, k = x.shape
    shape = _shape(config, Shape(m, out_features, k, FORMATS[element].bits, "bf16"), x.device)
    out = torch.empty(m, out_features, dtype=torch.bfloat16, device=x.device)
    grid, partial = _grid_and_partial(m, out_features, shape, arrived)
    _launch(triton_kernels.gemm_bf16, grid)(
        x,
        weight,
        scales,
        x if bias is None else bias,
        out,
        partial,
        arrived,
        m,
        out_features,
        weight.stride(0) // weight.shape[2],
        k,
        weight.shape[0],
        ELEMENT=element,
        WIDE=wide,
        NATIVE=not interpreted(),
        HAS_BIAS=bias is not None,
        SWAP=shape.swap,
        SPLIT=shape.split_k,
        WIDTH=weight.shape[2],
        BM=shape.block_m,
        BN=shape.block_n,
        **_launch_options(shape),
    )
    return out


@triton_op("harness_mx::triton_gemm_fp8", mutates_args={"arrived"})
def gemm_fp8(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    arrived: Tensor,
    out_features: int,
    element: str,
    wide: bool,
    config: list[int],
) -> Tensor:
    """The same for MX activations as ``quantise`` gives them: E4M3 bytes [KP/32, M, 32], float32 scales [KP/32, M].

    ``weight`` uint8 [4 * tiles, NP, 32]: packed in tiles of 32 bytes.
    """
    m = x.shape[1]
    shape = _shape(config, Shape(m, out_features, x.shape[0] * BLOCK, FORMATS[element].bits, "fp8"), x.device)
    out = torch.empty(m, out_features, dtype=torch.bfloat16, device=x.device)
    grid, partial = _grid_and_partial(m, out_features, shape, arrived)
    _launch(triton_kernels.gemm_fp8, grid)(
        x,
        x_scales,
        weight,
        scales,
        x if bias is None else bias,
        out,
        partial,
        arrived,
        m,
        out_features,
        weight.stride(0) // weight.shape[2],
        weight.shape[0] // 4,
        ELEMENT=element,
        WIDE=wide,
        NATIVE=not interpreted(),
        HAS_BIAS=bias is not None,
        SWAP=shape.swap,
        SPLIT=shape.split_k,
        BM=shape.block_m,
        BN=shape.block_n,
        **_launch_options(shape),
    )
    return out


def _quantise(x: Tensor, elements: Tensor, scales: Tensor, decoded: Tensor, element: str, mode: str) -> None:
    fmt = FORMATS[element]
    m, k = x.shape
    blocks = m * k // BLOCK
    _launch(triton_kernels.quantise_rows, (triton.cdiv(blocks, _QUANTISE_BLOCKS),))(
        x,
        elements,
        scales,
        decoded,
        m,
        k,
        blocks,
        ELEMENT=element,
        EMAX=fmt.emax,
        MAX=fmt.max,
        THRESHOLD=carry_threshold(fmt, ScaleMode(mode)),
        DECODE=decoded is not x,
        NATIVE=not interpreted(),
        ROWS=_QUANTISE_BLOCKS,
        **({} if interpreted() else {"num_warps": 4}),
    )


@triton_op("harness_mx::triton_quantise", mutates_args=())
def quantise(x: Tensor, element: str, mode: str) -> tuple[Tensor, Tensor]:
    """Encode BF16 ``x`` [M, K], contiguous, for ``gemm_fp8``: E4M3 bytes [K/32, M, 32] and float32 scales [K/32, M].

    Values are those of ``formats.encode`` for ``element`` e4m3 or e2m1 (whose values are written as E4M3).
    """
    m, k = x.shape
    elements = torch.empty(k // BLOCK, m, BLOCK, dtype=torch.uint8, device=x.device)
    scales = torch.empty(k // BLOCK, m, dtype=torch.float32, device=x.device)
    _quantise(x, elements, scales, x, element, mode)
    return elements, scales


@triton_op("harness_mx::triton_round_to_mx", mutates_args=())
def round_to_mx(x: Tensor, element: str, mode: str) -> Tensor:
    """``decode(encode(x))`` in BF16 for BF16 ``x`` [M, K], contiguous."""
    decoded = torch.empty_like(x)
    _quantise(x, x, x, decoded, element, mode)
    return decoded
