"""What a user chooses about the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from harness.mx.formats import BLOCK, FORMATS, ElementFormat, ScaleMode


class KVStorage(Enum):
    """How frames are kept: ``bf16`` in the attention's own dtype, ``mx`` as MX blocks of 32 along Dh."""

    bf16 = "bf16"
    mx = "mx"


class KVFormat(Enum):
    """Element format of MX blocks; see :mod:`harness.mx.formats`."""

    e4m3 = "e4m3"
    e5m2 = "e5m2"
    e2m1 = "e2m1"


@dataclass
class KVConf:
    """Storage of K and V. Fits an OmegaConf structured config.

    Attributes:
        storage: see :class:`KVStorage`; everything below concerns ``mx`` alone.
        quantize_k: quantise K (the sensitive one, so off by default).
        quantize_v: quantise V.
        bits: 8 or 4 bits per element, where no format is named: at 8 bits K is E5M2 and V E4M3, at 4 both
        are E2M1. k_format: format of K whatever ``bits`` says. v_format: format of V whatever ``bits``
        says. late_layers: quantise the last N layers only; null = all. k_late_layers: the same for K alone;
        null = as ``late_layers``. scale_mode: how a block's scale follows from its amax.
    """

    storage: KVStorage = KVStorage.bf16
    quantize_k: bool = False
    quantize_v: bool = True
    bits: int = 8
    k_format: KVFormat | None = None
    v_format: KVFormat | None = None
    late_layers: int | None = None
    k_late_layers: int | None = None
    scale_mode: ScaleMode = ScaleMode.rceil

    def element_format(self, name: str) -> ElementFormat:
        """Format of ``name``: "k" or "v"."""
        named = self.k_format if name == "k" else self.v_format
        if named is not None:
            return FORMATS[named.value]
        return FORMATS["e2m1" if self.bits == 4 else {"k": "e5m2", "v": "e4m3"}[name]]

    def quantises(self, name: str, layer: int, layers: int) -> bool:
        """Whether ``name`` ("k" or "v") of ``layer`` (from 0, of ``layers``) is stored quantised."""
        if self.storage is KVStorage.bf16 or not (self.quantize_k if name == "k" else self.quantize_v):
            return False
        late = self.late_layers
        if name == "k" and self.k_late_layers is not None:
            late = self.k_late_layers
        return late is None or layer >= layers - late


def validate(conf: KVConf, head_dim: int, layers: int) -> None:
    """Check ``conf`` against a model of ``layers`` layers and head size ``head_dim``.

    Raises:
        ValueError: naming every field that is out of range, contradicts another or does not fit the model.
    """
    late = {"late_layers": conf.late_layers, "k_late_layers": conf.k_late_layers}
    problems = []
    if conf.storage is KVStorage.bf16:
        given = {**late, "k_format": conf.k_format, "v_format": conf.v_format}
        problems += [
            f"{name}={getattr(value, 'value', value)}: bf16 quantises nothing; use storage=mx or drop {name}"
            for name, value in given.items()
            if value is not None
        ]
    else:
        problems += _mx_problems(conf, head_dim)
    problems += [
        f"{name}={value}: give 1 to {layers} (the model's layers), or null for all of them"
        for name, value in late.items()
        if value is not None and not 1 <= value <= layers
    ]
    if problems:
        raise ValueError("KV cache config: " + "; ".join(problems))


def _mx_problems(conf: KVConf, head_dim: int) -> list[str]:
    problems = []
    if conf.bits not in (8, 4):
        problems.append(f"bits={conf.bits}: allowed are 8, 4")
    if not (conf.quantize_k or conf.quantize_v):
        problems.append("quantize_k=false and quantize_v=false leave nothing to quantise; use storage=bf16")
    if conf.k_late_layers is not None and not conf.quantize_k:
        problems.append(f"k_late_layers={conf.k_late_layers} with quantize_k=false; set quantize_k=true")
    if head_dim % BLOCK:
        problems.append(
            f"head size {head_dim} is not divisible by {BLOCK}, the size of an MX block along the head; "
            "use storage=bf16"
        )
    return problems
