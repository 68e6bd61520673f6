"""BF16 arithmetic on processors that lack it.

torch multiplies BF16 on any CPU, but without BF16 instructions many times slower than float32 (here, an AVX2 machine:
matrix products 6 times, convolutions 9 times). The product of two BF16 numbers is exact in float32 and sums are float32
on every device, so multiplying in float32 and rounding the result is the same arithmetic.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _cpu_multiplies_bf16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


CPU_HAS_BF16 = _cpu_multiplies_bf16()
"""Whether this machine's CPU multiplies BF16 as fast as its width promises. Read once: compiled code asks for it."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether BF16 is worth its name on ``device``: on any accelerator, and on CPUs with instructions for it."""
    return device.type != "cpu" or CPU_HAS_BF16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; BF16 on a CPU without BF16 instructions by way of float32, the result rounded to BF16."""
    if x.dtype is not torch.bfloat16 or has_fast_bf16(x.device):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)


class WideLinear(nn.Linear):
    """``nn.Linear`` that multiplies by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return linear(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is a Linear and nothing more: ``nn.Linear`` itself, widened or not."""
    return type(module) in (nn.Linear, WideLinear)


def widen(module: nn.Module) -> nn.Module:
    """Make plain BF16 Linears of ``module`` that sit on a CPU without BF16 instructions :class:`WideLinear`, in place.

    For after all that asks for plain Linears: MX transforms, loading. Returns ``module``.
    """
    for layer in module.modules():
        if type(layer) is not nn.Linear or layer.weight.dtype is not torch.bfloat16:
            continue
        if not has_fast_bf16(layer.weight.device):
            layer.__class__ = WideLinear
    return module
