"""MX weights and activations through torchao: its ``MXTensor``, emulated or on the GPU's native MX path.

torchao is imported where it is used: it takes seconds to load, and weight-only MX does without it.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.formats.mx import BLOCK, E2M1, FORMATS, MXBlocks
from harness.formats.scales import ScaleMode
from harness.mx.conf import Activation
from harness.mx.linears.base import LinearFormat, MXModule, MXWeight

if TYPE_CHECKING:
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig


class TorchaoMXLinear(MXModule):
    """Linear with MX weights and activations: torchao's ``MXTensor`` weight, activations encoded at every call.

    ``weight`` is a parameter holding a torchao MXTensor [N, K] with swizzled scales, ``bias`` BF16 [N] or None.
    ``native`` runs on the GPU's MX path; otherwise torchao decodes both operands to BF16 and multiplies those
    (emulated). Activations are encoded by torchao 0.18, which differs from ``formats.mx.encode`` in blocks with
    infinity or below the smallest scale (see there).
    """

    weight: Any

    def __init__(self, weight: Any, bias: nn.Parameter | None, fmt: LinearFormat, native: bool) -> None:
        super().__init__()
        self.fmt = fmt
        self.native = native
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias

    @classmethod
    def from_weight(cls, weight: MXWeight, native: bool) -> "TorchaoMXLinear":
        """The blocks as the MXTensor that torchao's ``quantize_`` would have put there, had it chosen them."""
        from torchao.prototype.mx_formats.utils import hp_data_dims_to_swizzled_scale_dims_mx, to_blocked

        blocks, bias, fmt = weight
        swizzled = to_blocked(blocks.scales.view(torch.float8_e8m0fnu))
        scales = swizzled.view(hp_data_dims_to_swizzled_scale_dims_mx(*weight.sizes))
        elements = blocks.elements if fmt.element is E2M1 else blocks.elements.view(fmt.element.float8)
        tensor = _mx_tensor(elements, scales, fmt, native, torch.bfloat16)
        bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return cls(nn.Parameter(tensor, requires_grad=False), bias, fmt, native)

    def forward(self, x: Tensor) -> Tensor:
        """Map BF16 [..., K] to BF16 [..., N]."""
        x = x.contiguous()  # torchao encodes contiguous tensors only
        if self.native or not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        element, mode = self.fmt.element.name, str(self.fmt.scale_mode)
        return _torchao_emulated_linear(x, self.weight.qdata, self.weight.scale, self.bias, element, mode)

    def weight_blocks(self) -> MXBlocks:
        """The weight in MX form, its scales put back in rows (torchao swizzles them for the GPU)."""
        from torchao.prototype.mx_formats.utils import from_blocked

        scales = from_blocked(self.weight.scale, self.out_features, self.in_features // BLOCK)
        return MXBlocks(self.weight.qdata.view(torch.uint8), scales.view(torch.uint8))

    def weight_bytes(self) -> int:
        """Elements, scales (padded by the swizzle) and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.weight.qdata.nbytes + self.weight.scale.nbytes + bias


# Inductor cannot build torchao's emulation for the CPU (no E8M0 there in torch 2.11 and 2.13), and what it builds
# for GPUs has been reported to lose precision (pytorch/ao pull 3066). So within a compiled graph the emulation stays
# one opaque eager call, equal to eager bit for bit; its speed is of no interest.
@torch.library.custom_op("harness_mx::torchao_emulated_linear", mutates_args=())
def _torchao_emulated_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, element: str, scale_mode: str
) -> Tensor:
    fmt = LinearFormat(FORMATS[element], ScaleMode(scale_mode), Activation.mx)
    return F.linear(x, _mx_tensor(qdata, scale, fmt, False, x.dtype), bias)


@_torchao_emulated_linear.register_fake
def _(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, element: str, scale_mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


def _mx_tensor(qdata: Tensor, scale: Tensor, fmt: LinearFormat, native: bool, dtype: torch.dtype) -> Any:
    """The MXTensor of these bits (swizzled scales), as ``quantize_`` makes it of a weight of ``dtype``."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs

    config = torchao_config(fmt, native)
    common = {"block_size": BLOCK, "kernel_preference": config.kernel_preference, "is_swizzled_scales": True}
    encode_x = QuantizeTensorToMXKwargs(elem_dtype=config.activation_dtype, scaling_mode=config.scaling_mode, **common)
    return MXTensor(qdata, scale, config.weight_dtype, orig_dtype=dtype, act_quant_kwargs=encode_x, **common)


def torchao_config(fmt: LinearFormat, native: bool) -> "MXDynamicActivationMXWeightConfig":
    """The torchao ``MXDynamicActivationMXWeightConfig`` for ``fmt``."""
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
