"""Linears whose packed weight our own CUDA C++ kernel reads directly, of BF16 and what those of MX formats share.

For few rows (a frame's 64) on Hopper; for many the weight is unpacked (``shapes.MANY_ROWS``).
"""

import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from harness.kernels.cuda import nvrtc
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda.packing import CudaWeight
from harness.kernels.cuda.shapes import CudaConfig, CudaShape
from harness.kernels.cuda.stream import Modulating, Stream

if TYPE_CHECKING:
    from harness.kernels.cuda.ops import PackedWeight


def unavailable(device: torch.device) -> str | None:
    """Why the CUDA kernel cannot run on ``device``, or None. Every format, BF16 too, is supported where any is."""
    if device.type != "cuda":
        return f"the CUDA kernel needs an NVIDIA Hopper GPU, the model is on {device.type}"
    if torch.version.hip is not None:
        return "the CUDA kernel is written for NVIDIA GPUs, this is a ROCm build of torch"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the CUDA kernel is compiled for Hopper (sm_90), this GPU is sm_{major}{minor}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which takes weights that the CUDA kernel cannot, is not installed"
    return nvrtc.unavailable()


class PackedLinear(nn.Module, ABC):
    """Linear over a packed weight of any format; ``forward`` maps BF16 [..., K] to BF16 [..., N].

    Buffers: ``tiles`` uint8 [N/16, K/64, bytes] (see ``cuda_packing``), ``bias`` BF16 [N] or None. Sums are multiplied
    by ``output_scale``, a power of two. ``config`` overrides the launch shape (see ``cuda_config.choose``) for every M.
    ``silu``: whether the kernel applies SiLU to its outputs (see ``absorb``).
    """

    tiles: Tensor
    bias: Tensor | None
    element: str
    bits: int
    config: CudaConfig | None = None
    silu: bool = False

    def __init__(self, weight: CudaWeight, sizes: tuple[int, int], bias: Tensor | None) -> None:
        """``sizes`` are (out_features, in_features) of the weight that ``weight`` holds."""
        super().__init__()
        self.output_scale = weight.output_scale
        self.out_features, self.in_features = sizes
        self.register_buffer("tiles", weight.tiles)
        self.register_buffer("bias", bias)
        if weight.tiles.is_cuda:  # the kernel may fetch weights before what is queued in front of it has ended
            torch.cuda.synchronize(weight.tiles.device)

    def forward(self, x: Tensor) -> Tensor:
        """Map BF16 [..., K] to BF16 [..., N]."""
        return self._outputs(x, self.silu)

    def linear(self, x: Tensor) -> Tensor:
        """The same without SiLU."""
        return self._outputs(x, silu=False)

    def absorb(self, activation: nn.Module) -> bool:
        """Take over SiLU: a call of the kernel that writes the outputs instead of two."""
        if self.silu or type(activation) is not nn.SiLU:
            return False
        self.silu = True
        return True

    def _outputs(self, x: Tensor, silu: bool) -> Tensor:
        rows = self.operand(x.reshape(-1, self.in_features))
        return self.product(rows, silu).view(*x.shape[:-1], self.out_features)

    def operand(self, rows: Tensor) -> Tensor:
        """What the kernel multiplies for BF16 rows [M, K]: these."""
        return rows

    def product(self, rows: Tensor, silu: bool = False) -> Tensor:
        """BF16 [M, N] of what ``operand`` made of the rows; with ``silu``, SiLU of it."""
        from harness.kernels.cuda.ops import mx_linear, mx_linear_now  # operators of CUDA tensors alone

        config = [] if self.config is None else self.config.as_ints()
        run = mx_linear_now if rows.is_cuda and not torch.compiler.is_compiling() else mx_linear
        return run(rows, self.tiles, self.bias, self.out_features, self.element, self.output_scale, config, silu)

    def normed(self, stream: Stream, eps: float) -> Tensor:
        """``forward`` of the modulated norm of one frame's residual stream, BF16 [M, N]; ``eps`` is the norm's.

        Neither rounds the norm to BF16. For Linears that do not quantise what they are given.
        """
        from harness.kernels.cuda.ops import normed_product

        return normed_product(stream, self.packed(), self.out_features, eps, self.config, self.silu)

    def added(self, x: Tensor, total: Tensor, vectors: Modulating) -> Stream:
        """The residual stream ``total`` [M, N] of one frame with ``gate * forward(x)`` added, x BF16 [M, K]."""
        from harness.kernels.cuda.ops import residual_product

        return residual_product(x, self.packed(), total, vectors, self.config)

    def packed(self) -> "PackedWeight":
        """What kernels read of it."""
        from harness.kernels.cuda.ops import PackedWeight

        return PackedWeight(self.tiles, self.bias, self.element, self.output_scale)

    def weight_bytes(self) -> int:
        """Elements and scales with their padding, and bias."""
        return self.tiles.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight [N, K] in BF16, unpacked."""

    def stacked(self, others: Sequence[nn.Module]) -> "Self | None":
        """One Linear whose output is that of this one, then those of ``others``, which read the same input.

        Their packed weights become views of its own, so nothing is held twice; called again, it reuses them. None
        when they do not fit together: another format or K, padded outputs, another output scale, or SiLU behind some
        only.
        """
        members = [self, *(other for other in others if type(other) is type(self))]
        kinds = {(*m._kind(), m.output_scale, m.in_features, m.bias is None, m.silu) for m in members}
        outputs = [m.out_features for m in members]
        if len(members) <= len(others) or len(kinds) > 1 or any(n % cuda_packing.ROWS for n in outputs):
            return None
        with torch.inference_mode(False):
            bias = None if self.bias is None else torch.cat([m.bias for m in members if m.bias is not None])
            weight = CudaWeight(_joined(members), self.output_scale)
            stacked = type(self)(weight, (sum(outputs), self.in_features), bias, *self._kind())
            stacked.silu = self.silu
            return stacked

    def _kind(self) -> tuple[Any, ...]:
        """What ``__init__`` takes besides weight, sizes and bias."""
        return ()

    def shape(self, rows: int) -> CudaShape:
        """The product of this weight and ``rows`` activation rows."""
        return CudaShape(rows, self.out_features, self.in_features, self.bits)

    def extra_repr(self) -> str:
        """Sizes, and whether SiLU follows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + ", then SiLU" * self.silu


class PackedBF16Linear(PackedLinear):
    """The same over a BF16 weight."""

    element, bits = "bf16", 16

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "PackedBF16Linear":
        """Pack a BF16 ``linear``; its weight is not needed any more."""
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach().clone()
        sizes = linear.out_features, linear.in_features
        return cls(CudaWeight(cuda_packing.pack_plain(weight), 1.0), sizes, bias)

    def dense_weight(self) -> Tensor:
        """The weight [N, K] in BF16, unpacked."""
        return cuda_packing.unpack_plain(self.tiles, self.out_features, self.in_features)

    def plain(self) -> nn.Linear:
        """The Linear that this was made from."""
        weight = self.dense_weight()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear


def _joined(members: Sequence[PackedLinear]) -> Tensor:
    """The tiles of all members one after the other; theirs become views of them, unless they are already."""
    parts = [m.tiles for m in members]
    ends = list(itertools.accumulate((part.nbytes for part in parts), initial=parts[0].data_ptr()))
    if [part.data_ptr() for part in parts] == ends[:-1] and len({p.untyped_storage().data_ptr() for p in parts}) == 1:
        return parts[0].as_strided((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].stride())
    joined = torch.cat(parts)
    for member, part in zip(members, joined.split([len(part) for part in parts]), strict=True):
        member.tiles = part
    return joined
