"""The one place that decides which kernel computes an MX Linear.

A kernel is an entry of ``KERNELS``: when it can run, which Linears it fits, and what it puts in the place of an
``nn.Linear``. To add one, put its device code into ``harness/kernels/`` and its entry here; ``auto``, the errors and
the run record follow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from harness.formats.mx import E5M2
from harness.mx.conf import Activation, KernelChoice
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears import native
from harness.mx.linears import triton as triton_linear
from harness.mx.linears.base import LinearFormat, MXLinear, MXModule, MXWeight
from harness.mx.linears.torchao import TorchaoMXLinear

AVAILABLE = "ok"


@dataclass(frozen=True)
class Kernel:
    """One way to compute an MX Linear.

    ``unavailable(device, format)`` and ``unfit(linear)`` give a reason, or None when all is well. ``build(weight)``
    makes the module that computes with ``weight``, whoever chose it (``harness.mx.weights``). ``emulated`` marks
    kernels whose speed says nothing about MX.
    """

    name: KernelChoice
    unavailable: Callable[[torch.device, LinearFormat], str | None]
    unfit: Callable[[nn.Linear], str | None]
    build: Callable[[MXWeight], MXModule]
    emulated: bool = False


def _cutlass_unavailable(device: torch.device, fmt: LinearFormat) -> str | None:
    reason = native.unavailable(device, fmt.element.bits)
    if reason is None and fmt.activation != Activation.mx:
        return "the native MX path multiplies MX by MX of one format only; it needs activation=mx"
    if reason is None and fmt.element is E5M2:
        return "torchao's native MX path has E4M3 and E2M1 elements, not E5M2"
    return reason


def _build_emulated(weight: MXWeight) -> MXModule:
    if weight.fmt.activation == Activation.mx:
        return TorchaoMXLinear.from_weight(weight, native=False)
    return MXLinear(weight)


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        KernelChoice.cutlass,
        unavailable=_cutlass_unavailable,
        unfit=native.unfit,
        build=lambda weight: TorchaoMXLinear.from_weight(weight, native=True),
    ),
    Kernel(
        KernelChoice.cuda,
        unavailable=cuda_linear.unavailable,
        unfit=lambda linear: None,
        build=cuda_linear.build,
    ),
    Kernel(
        KernelChoice.triton,
        unavailable=triton_linear.unavailable,
        unfit=lambda linear: None,
        build=triton_linear.TritonMXLinear.from_weight,
    ),
    Kernel(
        KernelChoice.emulated,
        unavailable=lambda device, fmt: None,
        unfit=lambda linear: None,
        build=_build_emulated,
        emulated=True,
    ),
)
"""Every kernel of this version, fastest first (docs/performance.md): ``auto`` takes the first that is available."""


def available_kernels(device: torch.device, fmt: LinearFormat) -> dict[str, str]:
    """For each kernel a user can name, ``"ok"`` or the reason why it cannot run on ``device`` for this format."""
    return {str(k.name): k.unavailable(device, fmt) or AVAILABLE for k in KERNELS}


def resolve_kernel(choice: KernelChoice, device: torch.device, fmt: LinearFormat) -> Kernel:
    """The kernel ``choice`` names, or for ``auto`` the fastest one that can run.

    Raises ValueError when it cannot run here, with the reason for each kernel that cannot and the ones that can.
    """
    verdicts = available_kernels(device, fmt)
    for kernel in KERNELS:
        asked = choice in (KernelChoice.auto, kernel.name)
        if asked and verdicts[kernel.name] == AVAILABLE:
            return kernel
    runnable = [name for name, verdict in verdicts.items() if verdict == AVAILABLE]
    refused = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict != AVAILABLE)
    raise ValueError(
        f"kernel={choice} cannot run {fmt.numeric_path} on {describe_device(device)} "
        f"({refused}). Use kernel={' or '.join(runnable)}, or kernel=auto"
    )


def describe_device(device: torch.device) -> str:
    """Such as ``cpu`` or ``NVIDIA H200 (sm_90)``."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
