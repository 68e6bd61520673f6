"""What lies between a layer's big products, in one launch: a gated residual sum and the modulated norm of it.

Host side of ``harness.kernels.triton.norms``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.kernels import launch
from harness.models.gamerft import RMS_EPS

WARPS = 4
"""Of a program, which has one row."""


def residual_norm(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``total = x + gate * branch`` and ``rms_norm(total) * (1 + scale) + shift`` of one frame; an operator in a trace.

    Args:
        x: ``[B, P, D]``.
        branch: likewise.
        gate: ``[B, 1, D]``, any stride between clips.
        scale: likewise.
        shift: likewise.

    Returns:
        Both, ``[B, P, D]`` in the dtype of ``x``, rounded where eager code rounds.
    """
    run = _operator if torch.compiler.is_compiling() else _launch
    return run(x, branch, gate, scale, shift)


def _launch(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    from harness.kernels.triton.norms import residual_norm_kernel

    x, branch = x.contiguous(), branch.contiguous()
    gate, scale, shift = (v if v.stride(-1) == 1 else v.contiguous() for v in (gate, scale, shift))
    batch, tokens, dim = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    dependent = launch.dependent(x.device)
    # A fused multiply-add would leave out the rounding of the product.
    residual_norm_kernel[batch * tokens,](
        x, branch, gate, scale, shift, total, normed, gate.stride(0), scale.stride(0), shift.stride(0),
        tokens, dim, RMS_EPS, 1 << (dim - 1).bit_length(), dependent,
        num_warps=WARPS, enable_fp_fusion=False, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
    return total, normed


_operator = torch.library.custom_op("harness_mx::residual_norm", _launch, mutates_args=())


@_operator.register_fake
def _(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x).contiguous(), torch.empty_like(x).contiguous()
