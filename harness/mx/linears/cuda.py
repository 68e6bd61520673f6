"""``kernel=cuda``: an MX Linear whose packed weight our own CUDA C++ kernel reads directly.

For few rows (a frame's 64) on Hopper; for many it is unpacked (``cuda_config.MANY_ROWS``). Equal to the emulated
kernels up to the order of float32 summation.
"""

import torch
from torch import Tensor

from harness.formats.mx import MXBlocks, decode, encode
from harness.kernels.cuda import linear as kernel
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda.linear import PackedLinear
from harness.kernels.cuda.packing import CudaWeight
from harness.mx.linears.base import LinearFormat, MXModule, MXWeight
from harness.mx.linears.triton import TritonMXLinear


def unavailable(device: torch.device, fmt: LinearFormat) -> str | None:
    """Why the CUDA kernel cannot run ``fmt`` on ``device``, or None. Every format is supported where any is."""
    return kernel.unavailable(device)


def build(weight: MXWeight) -> MXModule:
    """A CudaMXLinear of ``weight``, or a TritonMXLinear where the blocks do not suit (``note`` says why)."""
    reason = cuda_packing.unfit(weight.blocks, weight.fmt.element)
    if reason is None:
        return CudaMXLinear.from_weight(weight)
    module = TritonMXLinear.from_weight(weight)
    module.note = f"kernel=triton, since {reason}"
    return module


class CudaMXLinear(PackedLinear, MXModule):
    """A packed Linear over an MX weight; activations BF16, or rounded to MX at every call (exact in BF16)."""

    def __init__(self, weight: CudaWeight, sizes: tuple[int, int], bias: Tensor | None, fmt: LinearFormat) -> None:
        """As ``PackedLinear``, with the weight in ``fmt``."""
        super().__init__(weight, sizes, bias)
        self.fmt, self.element, self.bits = fmt, fmt.element.name, fmt.element.bits

    @classmethod
    def from_weight(cls, weight: MXWeight) -> "CudaMXLinear":
        """Pack ``weight``. Raises ValueError when the kernel cannot hold it exactly (see ``cuda_packing.unfit``)."""
        return cls(cuda_packing.pack(weight.blocks, weight.fmt.element), weight.sizes, weight.bias, weight.fmt)

    def _kind(self) -> tuple[LinearFormat, ...]:
        return (self.fmt,)

    def operand(self, rows: Tensor) -> Tensor:
        """BF16 rows [M, K], rounded to MX if activations are to be; in compiled code fused with what made the rows."""
        element = self.fmt.activation_element
        return rows if element is None else decode(encode(rows, element, self.fmt.scale_mode), element)

    def weight_blocks(self) -> MXBlocks:
        """The weight in MX form, unpacked."""
        weight = CudaWeight(self.tiles, self.output_scale)
        return cuda_packing.unpack(weight, self.fmt.element, self.out_features, self.in_features)

    def dense_weight(self) -> Tensor:
        """The weight [N, K] decoded, in BF16."""
        return decode(self.weight_blocks(), self.fmt.element)

    def extra_repr(self) -> str:
        """Sizes, format, and whether SiLU follows."""
        return MXModule.extra_repr(self) + ", then SiLU" * self.silu
