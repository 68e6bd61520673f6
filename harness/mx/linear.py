"""The modules that take the place of an `nn.Linear`: weight-only MX, and torchao's dynamic-activation MX.

torchao is imported where it is used: it takes seconds to load, and weight-only MX does without it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.mx.conf import Activation, MXConf, ScaleMode
from harness.mx.formats import BLOCK, E2M1, FORMATS, ElementFormat, MXBlocks, decode, encode

if TYPE_CHECKING:
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig


@dataclass(frozen=True)
class LinearFormat:
    """Numeric format of an MX Linear: its elements, how scales are derived, and what the activations are."""

    element: ElementFormat
    scale_mode: ScaleMode
    activation: Activation

    @classmethod
    def of(cls, conf: MXConf) -> "LinearFormat":
        """The format that a valid `conf` describes."""
        element = E2M1 if conf.bits == 4 else FORMATS[conf.element_8bit]
        return cls(element, ScaleMode(conf.scale_mode), Activation(conf.activation))

    @property
    def numeric_path(self) -> str:
        """Such as `W4A16 E2M1 weights, floor scales`."""
        bits, name = self.element.bits, self.element.name.upper()
        if self.activation == Activation.bf16:
            return f"W{bits}A16 {name} weights, {self.scale_mode} scales"
        return f"W{bits}A{bits} {name} weights and activations, {self.scale_mode} scales"


class MXModule(nn.Module, ABC):
    """What every MX Linear offers beside `forward`: its sizes, its format `fmt`, and its weight."""

    fmt: LinearFormat
    in_features: int
    out_features: int
    bias: Tensor | None

    @abstractmethod
    def weight_blocks(self) -> MXBlocks:
        """The weight [N, K] in MX form, scales row-major."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes in memory of weight, scales and bias."""

    def extra_repr(self) -> str:
        """Sizes and format, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.fmt.numeric_path}"
        )


class MXLinear(MXModule):
    """Linear with MX weights and BF16 activations, emulated: decodes its weight at every call, then `F.linear`.

    Decoding is exact, so this is what any weight-only kernel must match up to summation order. No BF16 copy of the
    weight outlives a call. For inference: the weight takes no gradient.

    Buffers: `elements` uint8 [N, K] (8 bit) or [N, K/2] (4 bit), `scales` uint8 [N, K/32], `bias` BF16 [N] or None,
    with N = out_features and K = in_features.
    """

    elements: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, blocks: MXBlocks, bias: Tensor | None, fmt: LinearFormat) -> None:
        super().__init__()
        self.fmt = fmt
        self.out_features = blocks.scales.shape[0]
        self.in_features = blocks.scales.shape[1] * BLOCK
        self.register_buffer("elements", blocks.elements)
        self.register_buffer("scales", blocks.scales)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, fmt: LinearFormat) -> "MXLinear":
        """Encode the weight of a BF16 `linear`. Raises ValueError when K is not a multiple of 32."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(encode(linear.weight.detach(), fmt.element, fmt.scale_mode), bias, fmt)

    def forward(self, x: Tensor) -> Tensor:
        """Map BF16 [..., K] to BF16 [..., N]."""
        return F.linear(x, decode(self.weight_blocks(), self.fmt.element), self.bias)

    def weight_blocks(self) -> MXBlocks:
        """The buffers, as they are."""
        return MXBlocks(self.elements, self.scales)

    def weight_bytes(self) -> int:
        """Elements, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.elements.nbytes + self.scales.nbytes + bias


class TorchaoMXLinear(MXModule):
    """Linear with MX weights and activations: torchao's `MXTensor` weight, activations encoded at every call.

    `weight` is a parameter holding a torchao MXTensor [N, K] with swizzled scales, `bias` BF16 [N] or None.
    """

    weight: Any

    def __init__(self, weight: Any, bias: nn.Parameter | None, fmt: LinearFormat) -> None:
        super().__init__()
        self.fmt = fmt
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, fmt: LinearFormat, native: bool) -> "TorchaoMXLinear":
        """Quantise a BF16 `linear` with torchao: on the GPU's native MX path, or emulated in BF16."""
        from torchao.quantization import quantize_

        shell = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        shell.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        quantize_(shell, torchao_config(fmt, native))
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return cls(shell.weight, bias, fmt)

    def forward(self, x: Tensor) -> Tensor:
        """Map BF16 [..., K] to BF16 [..., N]."""
        return F.linear(x.contiguous(), self.weight, self.bias)  # torchao encodes contiguous tensors only

    def weight_blocks(self) -> MXBlocks:
        """The weight in MX form, its scales put back in rows (torchao swizzles them for the GPU)."""
        from torchao.prototype.mx_formats.utils import from_blocked

        scales = from_blocked(self.weight.scale, self.out_features, self.in_features // BLOCK)
        return MXBlocks(self.weight.qdata.view(torch.uint8), scales.view(torch.uint8))

    def weight_bytes(self) -> int:
        """Elements, scales (padded by the swizzle) and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.weight.qdata.nbytes + self.weight.scale.nbytes + bias


def torchao_config(fmt: LinearFormat, native: bool) -> "MXDynamicActivationMXWeightConfig":
    """The torchao `MXDynamicActivationMXWeightConfig` for `fmt`."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    dtype = torch.float4_e2m1fn_x2 if fmt.element is E2M1 else fmt.element.float8
    return MXDynamicActivationMXWeightConfig(
        block_size=BLOCK,
        activation_dtype=dtype,
        weight_dtype=dtype,
        kernel_preference=KernelPreference.AUTO if native else KernelPreference.EMULATED,
        scaling_mode=ScaleCalculationMode(fmt.scale_mode.value),
    )
