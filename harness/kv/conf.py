"""What a user chooses about the KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from harness.formats.scales import BLOCK, ScaleMode

if TYPE_CHECKING:
    from harness.formats.mx import ElementFormat

TENSORS = ("k", "v")


class KVStorage(StrEnum):
    """How frames are kept.

    ``bf16``: in the attention's own dtype. ``i8_scale``: int8 with one BF16 scale per token and head. ``mx``: MX
    elements (8 or 4 bits) with E8M0 scales.
    """

    bf16 = "bf16"
    i8_scale = "i8_scale"
    mx = "mx"


class KVFormat(StrEnum):
    """Element format of MX; see :mod:`harness.formats.mx`."""

    e4m3 = "e4m3"
    e5m2 = "e5m2"
    e2m1 = "e2m1"


class KVScales(StrEnum):
    """What shares an E8M0 scale.

    ``per_token``: a block of 32 along the head, scaled by its own amax. ``per_head_ema``: a head's whole frame, scaled
    by a moving average of the head's amax.
    """

    per_token = "per_token"
    per_head_ema = "per_head_ema"


@dataclass
class EMAConf:
    """Of ``scales=per_head_ema``; see :class:`harness.kv.codecs.HeadEMACodec`.

    Attributes:
        momentum: weight of the past in the moving average.
        warmup_frames: frames after the prefill during which a head's amax may only grow.
        floor: smallest amax a scale is made for, so that a head that was silent has a scale when it speaks.
    """

    momentum: float = 0.9
    warmup_frames: int = 8
    floor: float = 0.01


@dataclass
class KVConf:
    """Storage of K and V. Fits an OmegaConf structured config.

    Attributes:
        storage: of what is quantised, see :class:`KVStorage`.
        quantize_k: quantise K (the sensitive one, so off by default).
        quantize_v: quantise V.
        k_storage: storage of K whatever ``storage`` and ``quantize_k`` say.
        v_storage: storage of V whatever ``storage`` and ``quantize_v`` say.
        bits: 8 or 4 bits per MX element where no format is named: at 8 bits K is E5M2 and V E4M3, at 4 both are E2M1.
        k_format: MX format of K whatever ``bits`` says.
        v_format: MX format of V whatever ``bits`` says.
        late_layers: quantise the last N layers only; more than the model has means all of them, as does null.
        k_late_layers: the same for K alone; null = as ``late_layers``.
        v_late_layers: the same for V alone; null = as ``late_layers``.
        scale_mode: how an E8M0 scale follows from amax.
        scales: what shares an E8M0 scale, see :class:`KVScales`.
        hadamard: quantise K and V in another basis, the columns of an orthonormal Hadamard matrix over each head: it
            spreads large values over their block. Queries are turned along with K, outputs turned back, so that scores
            and results stay the same up to the rounding of what is stored.
        recent_frames: so many of the newest earlier frames are kept as E4M3 beside the 4-bit ring, and read from there:
            attention looks at them most. For 4-bit MX.
        ema: of ``scales=per_head_ema``.
    """

    storage: KVStorage = KVStorage.bf16
    quantize_k: bool = False
    quantize_v: bool = True
    k_storage: KVStorage | None = None
    v_storage: KVStorage | None = None
    bits: int = 8
    k_format: KVFormat | None = None
    v_format: KVFormat | None = None
    late_layers: int | None = None
    k_late_layers: int | None = None
    v_late_layers: int | None = None
    scale_mode: ScaleMode = ScaleMode.rceil
    scales: KVScales = KVScales.per_token
    hadamard: bool = False
    recent_frames: int = 0
    ema: EMAConf = field(default_factory=EMAConf)

    @property
    def enabled(self) -> bool:
        """Whether anything is quantised."""
        return any(self.storage_of(name) is not KVStorage.bf16 for name in TENSORS)

    def storage_of(self, name: str) -> KVStorage:
        """Storage of ``name`` ("k" or "v") in the layers where it is quantised."""
        own, chosen = {"k": (self.k_storage, self.quantize_k), "v": (self.v_storage, self.quantize_v)}[name]
        if own is not None:
            return own
        return self.storage if chosen else KVStorage.bf16

    def element_format(self, name: str) -> ElementFormat:
        """MX format of ``name``: "k" or "v"."""
        from harness.formats.mx import FORMATS  # here, so that a config is composed without torch

        named = self.k_format if name == "k" else self.v_format
        if named is not None:
            return FORMATS[named.value]
        return FORMATS["e2m1" if self.bits == 4 else {"k": "e5m2", "v": "e4m3"}[name]]

    def is_4_bit(self, name: str) -> bool:
        """Whether ``name`` ("k" or "v") has 4-bit MX elements, in the layers where it is quantised."""
        return self.storage_of(name) is KVStorage.mx and self.element_format(name).bits == 4

    def late(self, name: str) -> int | None:
        """How many last layers of ``name`` are quantised; None = all."""
        own = self.k_late_layers if name == "k" else self.v_late_layers
        return self.late_layers if own is None else own

    def quantises(self, name: str, layer: int, layers: int) -> bool:
        """Whether ``name`` ("k" or "v") of ``layer`` (from 0, of ``layers``) is stored quantised."""
        late = self.late(name)
        return self.storage_of(name) is not KVStorage.bf16 and (late is None or layer >= layers - late)


def describe(conf: KVConf, layers: int) -> str:
    """The numeric path in words, such as ``K e5m2 (last 4 of 12 layers), V e4m3``."""
    parts = [f"{name.upper()} {_format_name(conf, name)}{_where(conf, name, layers)}" for name in TENSORS]
    parts += ["Hadamard-turned"] if conf.hadamard else []
    parts += [f"newest {conf.recent_frames} frames e4m3"] if conf.recent_frames else []
    return ", ".join(parts)


def _format_name(conf: KVConf, name: str) -> str:
    storage = conf.storage_of(name)
    if storage is not KVStorage.mx:
        return {KVStorage.bf16: "bf16", KVStorage.i8_scale: "int8"}[storage]
    shared = " per-head EMA" if conf.scales is KVScales.per_head_ema else ""
    return f"{conf.element_format(name).name}{shared}"


def _where(conf: KVConf, name: str, layers: int) -> str:
    late = conf.late(name)
    if late is None or conf.storage_of(name) is KVStorage.bf16:
        return ""
    return f" (last {late} of {layers} layers)" if late < layers else f" (last {late} asked for: all {layers} layers)"


def validate(conf: KVConf, head_dim: int) -> None:
    """Check ``conf`` against a model of head size ``head_dim``.

    Raises:
        ValueError: naming every field that is out of range, contradicts another or does not fit the model.
    """
    storages = {conf.storage_of(name) for name in TENSORS}
    problems = _contradictions(conf)
    if conf.bits not in (8, 4):
        problems.append(f"bits={conf.bits}: allowed are 8, 4")
    elif conf.bits == 4 and KVStorage.i8_scale in storages and KVStorage.mx not in storages:
        problems.append("bits=4: i8_scale has 8; use storage=mx")
    if conf.storage is not KVStorage.bf16 and not conf.enabled:
        problems.append("nothing to quantise: neither K nor V is chosen; use storage=bf16")
    problems += [
        f"{name}={value}: must be at least 1, or null for every layer"
        for name, value in _late_fields(conf).items()
        if value is not None and value < 1
    ]
    if KVStorage.mx in storages and head_dim % BLOCK:
        problems.append(
            f"head size {head_dim} is not divisible by {BLOCK}, the size of an MX block along the head; "
            "use storage=i8_scale or bf16"
        )
    if conf.hadamard and not conf.enabled:
        problems.append("hadamard=true: turns what is quantised, and nothing is; use storage=mx or drop hadamard")
    elif conf.hadamard and head_dim & (head_dim - 1):
        problems.append(f"hadamard=true: head size {head_dim} is not a power of two, as a Hadamard matrix is; drop it")
    if conf.recent_frames < 0:
        problems.append(f"recent_frames={conf.recent_frames}: must be at least 0")
    elif conf.recent_frames and not any(map(conf.is_4_bit, TENSORS)):
        problems.append(f"recent_frames={conf.recent_frames}: concerns 4-bit MX alone, and neither K nor V is; drop it")
    problems += _ema_problems(conf, KVStorage.mx in storages)
    if problems:
        raise ValueError("KV cache config: " + "; ".join(problems))


def _late_fields(conf: KVConf) -> dict[str, int | None]:
    return {name: getattr(conf, name) for name in ("late_layers", "k_late_layers", "v_late_layers")}


def _contradictions(conf: KVConf) -> list[str]:
    """Fields that say something about what is not there."""
    problems = []
    if not conf.enabled and conf.late_layers is not None:
        problems.append(f"late_layers={conf.late_layers}: bf16 quantises nothing; use storage=mx or drop late_layers")
    for name in TENSORS:
        storage, tensor = conf.storage_of(name), name.upper()
        late, fmt = f"{name}_late_layers", f"{name}_format"
        if storage is KVStorage.bf16 and getattr(conf, late) is not None:
            problems.append(f"{late}={getattr(conf, late)}: {tensor} is stored as bf16; quantise it or drop {late}")
        if storage is not KVStorage.mx and getattr(conf, fmt) is not None:
            problems.append(
                f"{fmt}={getattr(conf, fmt).value}: {tensor} is stored as {storage.value}, which has no MX format; "
                f"drop {fmt}, or store {tensor} as mx"
            )
    return problems


def _ema_problems(conf: KVConf, has_mx: bool) -> list[str]:
    problems, ema = [], conf.ema
    if conf.scales is KVScales.per_head_ema and not has_mx:
        problems.append("scales=per_head_ema: concerns mx alone, and neither K nor V is mx; use storage=mx")
    if not 0 <= ema.momentum < 1:
        problems.append(f"ema.momentum={ema.momentum}: must be at least 0 and below 1")
    if ema.warmup_frames < 0:
        problems.append(f"ema.warmup_frames={ema.warmup_frames}: must be at least 0")
    if not (math.isfinite(ema.floor) and ema.floor >= 1e-30):
        problems.append(f"ema.floor={ema.floor}: must be finite and at least 1e-30")
    return problems
