"""In which formats and kernels an arm ran, and how its weights were chosen."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class NumericPath:
    """The formats and kernels that really ran, in words."""

    linears: str
    kv: str
    attention: str
    architecture: str
    emulated: bool


@dataclass
class Transform:
    """Which Linears were replaced and by what; see :class:`harness.mx.transform.TransformSummary`."""

    count: int
    enabled: bool = True
    numeric_path: str = ""
    architecture: str = ""
    bits: int = 16
    element: str = "bf16"
    scale_mode: str | None = None
    activation: str = "bf16"
    scope: str | None = None
    late_layers: int | None = None
    kernel: str = "torch"
    kernel_asked: str = "torch"
    emulated: bool = False
    categories: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    kept_bf16: dict[str, str] = field(default_factory=dict)
    other_kernels: dict[str, str] = field(default_factory=dict)
    fused_activations: dict[str, str] = field(default_factory=dict)
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    bits_by_category: dict[str, int] = field(default_factory=dict)


@dataclass
class Calibration:
    """How the weights of MX Linears were chosen; see ``docs/calibration.md``.

    ``peak_bytes``: the allocator's peak on a GPU, the process's resident peak on a CPU. ``found``: made by an earlier
    run, and kept; ``seconds`` and ``peak_bytes`` are then of that one.
    """

    method: str
    clips: list[str]
    frames: int
    seconds: float
    peak_bytes: int
    device: str
    linears: int
    fingerprint: str
    found: bool


def spoken(category: str) -> str:
    """What a reader is told of a category of Linears: ``attn``, as the config has it, is attention."""
    return {"attn": "attention"}.get(category, category)
