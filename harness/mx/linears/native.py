"""Where the GPU's own MX matrix product runs, as torch and torchao reach it.

Read off the sources of torch 2.11 to 2.13 (``ATen/native/cuda/ScaledBlas.cpp``) and torchao 0.18 (``mx_tensor.py``):
torchao's ``KernelPreference.AUTO`` calls ``torch._scaled_mm`` (MXFP8, E4M3 only) or ``F.scaled_mm`` (MXFP4), both with
swizzled E8M0 scales. cuBLAS has MXFP8 from compute capability 10.0 on (Blackwell, sm_120 included) and rejects it on
Hopper (9.0); torch allows MXFP4 on 10.x only (B200, B300). ``KernelPreference.EMULATED`` decodes both operands to BF16
and runs an ordinary matrix product on any device. ``TORCH``, ``MSLK`` and ``TRITON`` are not implemented for MXTensor.
"""

import torch
from torch import nn


def unavailable(device: torch.device, bits: int) -> str | None:
    """Why ``device`` has no native product of two MX operands of ``bits`` bits, or None if it has one."""
    if device.type != "cuda":
        return f"the native MX path needs an NVIDIA Blackwell GPU, the model is on {device.type}"
    if torch.version.hip is not None:
        return "the native MX path is wired for NVIDIA Blackwell GPUs, this is a ROCm build of torch"
    return unavailable_on(torch.cuda.get_device_capability(device), bits)


def unavailable_on(capability: tuple[int, int], bits: int) -> str | None:
    """The same for an NVIDIA GPU of compute ``capability`` (major, minor)."""
    major, minor = capability
    if major < 10:
        return f"the native MX path needs a Blackwell GPU (sm_100 or newer), this one is sm_{major}{minor}"
    if bits == 4 and major != 10:
        return f"torch runs MXFP4 natively on B200 and B300 (sm_10x) only, this GPU is sm_{major}{minor}"
    return None


def unfit(linear: nn.Linear) -> str | None:
    """Why the native product cannot take ``linear``, or None: cuBLAS wants out_features in multiples of 16."""
    if linear.out_features % 16:
        return f"out_features={linear.out_features} is not a multiple of 16, as the native MX path needs"
    return None
