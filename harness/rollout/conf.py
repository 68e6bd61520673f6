"""What a user chooses about a rollout. Without torch, see ``harness/config/schema.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class SamplerConf:
    """How frames are sampled. Fits an OmegaConf structured config.

    Attributes:
        window: frames W that a new frame sees, itself included; also the length of the history.
        timesteps: noise levels at which the model is evaluated, from the first (1 = pure noise) down; a last step
            to 0 is implied.
        context_noise: noise level a of the history in prefill, ``x(1-a) + a*noise``.
        seed: seed of all noise.
    """

    window: int = 60
    timesteps: list[float] = field(default_factory=lambda: [1.0, 0.25])
    context_noise: float = 0.25
    seed: int = 0


class AttentionKind(StrEnum):
    """How one frame attends to the ring.

    ``sdpa`` is torch's fused attention, ``flex`` its FlexAttention; both unpack a quantised ring first. ``fused`` are
    our kernels, which read it packed (:mod:`harness.rollout.fused`).
    """

    sdpa = "sdpa"
    flex = "flex"
    fused = "fused"


MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
SCOPES = ("frame", "block")
BACKENDS = ("inductor", "aot_eager", "eager")
LINEARS = ("auto", "library", "packed")


@dataclass
class CompileConf:
    """How a frame runs. Fits an OmegaConf structured config.

    Attributes:
        enabled: compile the denoising steps and the decoder with ``torch.compile``: fixed shapes, no graph breaks
            allowed. What is kernels of ours alone needs no compiler, and ``mode``, ``backend`` and ``options`` say
            nothing of it; a run tells of how many graphs were compiled.
        mode: ``torch.compile`` mode: default, reduce-overhead (its own CUDA graphs) or
            max-autotune-no-cudagraphs.
        cuda_graph: capture one whole frame in a CUDA graph and replay it; null = where compiled code runs on a GPU
            in a mode that captures nothing by itself.
        backend: inductor, or aot_eager / eager to trace without generating code (debugging).
        options: Inductor options over those of ``mode``, by name as in ``torch._inductor.list_options()``.
        scope: what is compiled as one piece. frame: a whole denoising step. block: a layer, whose code all layers of
            its kind share, which takes a fraction of the time; but each layer is called from Python, which costs time
            unless the frame is captured. null = block where it is, else frame.
        linears: what multiplies BF16 Linears of the blocks. library: torch. packed: our kernel, over packed weights
            (Hopper). auto = packed where that is faster, see :mod:`harness.rollout.linears`.
        overlap_decode: also measure throughput with each frame decoded while the next is denoised (CUDA alone).
    """

    enabled: bool = False
    mode: str = "default"
    cuda_graph: bool | None = None
    backend: str = "inductor"
    options: dict[str, Any] = field(default_factory=dict)
    scope: str | None = None
    linears: str = "auto"
    overlap_decode: bool = False

    def captures(self, device: torch.device) -> bool:
        """Whether a frame on ``device`` is captured in our CUDA graph."""
        if self.cuda_graph is not None:
            return self.cuda_graph
        return self.enabled and device.type == "cuda" and self.mode != "reduce-overhead"

    def scope_on(self, device: torch.device) -> str:
        """``scope``, or what null stands for on ``device``."""
        return self.scope or ("block" if self.captures(device) else "frame")


class DecoderGroups(StrEnum):
    """How grouped convolutions run; all compute the same.

    ``grouped``: as trained. ``dense``: as ordinary convolutions whose weights are zero between the groups: more
    arithmetic, but GPU libraries have few good kernels for groups of 16 channels. ``fused``: as trained, by our
    kernels, each with what stands around it (:mod:`harness.rollout.fused_decoder`). ``auto``: ``fused`` where
    compilation is on and these kernels run; on other GPUs each convolution the fastest way measured at its size, groups
    merged to 64 or 128 channels included; on a CPU as trained.
    """

    grouped = "grouped"
    dense = "dense"
    fused = "fused"
    auto = "auto"
