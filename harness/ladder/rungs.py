"""What the ladder tries, as data: rungs, and on each the candidates from the widest to the narrowest.

A new way to quantise is a :class:`Variant`: every candidate of a rung of Linears is tried with each variant's words, in
order, before the next narrower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import RunPlan
from harness.kv import KVConf, KVStorage
from harness.kv.conf import TENSORS, KVScales

Words = tuple[str, ...]
"""What a user would type."""


@dataclass(frozen=True)
class Candidate:
    """One configuration to be judged."""

    name: str
    quant: Words
    kv: Words


@dataclass(frozen=True)
class Rung:
    """A step of the climb: the first of ``candidates`` that ships is taken. ``gate``: an option of ``conf/gates``."""

    step: int
    gate: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Variant:
    """A way to come by the same formats: what it adds to a candidate's name and words."""

    name: str
    words: Words


VARIANTS: tuple[Variant, ...] = (Variant("", ()), Variant(", calibrated", ("calib=gptq",)))
"""Of every candidate of Linears, in the order they are tried: nearest rounding first, which costs nothing."""
FOUR_BIT_CACHE = "mxfp4_kv"
"""The cache of the last rung."""
RECENT_FRAMES = 2
"""Of a 4-bit cache that loses too much, so many of the newest are kept in 8 bits as well."""
SCALE_BITS = 0.25
"""An E8M0 byte for 32 numbers; what 8-bit integers take for theirs is no less."""
BASELINE = Rung(1, "none", (Candidate("BF16", ("quant=bf16",), ("kv=bf16",)),))
QUANTS = ("mxfp8_mlp", "mxfp8_all", "mxfp4_mlp", "mxfp4_all_late8", "mxfp4_all")
"""Choices of Linears that rungs start from."""


def linears(
    step: int, name: str, quant: str, gate: str, kv: Words, layers: int, variants: Sequence[Variant] = VARIANTS
) -> Rung:
    """A rung of MX Linears on a cache of ``kv``, in a model of ``layers`` layers."""
    narrowed = [("", (f"quant={quant}",)), *narrower_quant(quant, layers)]
    candidates = [
        Candidate(_join(name, change) + variant.name, (*words, *variant.words), kv)
        for change, words in narrowed
        for variant in variants
    ]
    return Rung(step, gate, tuple(candidates))


def cache(step: int, kv: str, gate: str, quant: Words, plan: RunPlan) -> Rung:
    """A rung of the quantised cache ``kv``, which ``plan`` runs, on Linears of ``quant``."""
    narrowed = [("", (f"kv={kv}",)), *narrower_kv(kv, plan)]
    return Rung(step, gate, tuple(Candidate(_join(f"+ KV {kv}", change), quant, words) for change, words in narrowed))


def narrower_kv(name: str, plan: RunPlan) -> list[tuple[str, Words]]:
    """Ways back from a KV config, each less aggressive than the one before; the last one left is BF16."""
    kv, layers = plan.conf.kv, plan.arch.n_layers
    words: Words = (f"kv={name}",)
    narrowed = []
    if any(map(kv.is_4_bit, TENSORS)) and not kv.recent_frames and plan.conf.attention.kind != "fused":
        # Not by the fused kernels, which read a ring of one format.
        words += (f"kv.recent_frames={RECENT_FRAMES}",)
        narrowed.append((f"newest {RECENT_FRAMES} frames in 8 bits too", words))
    if kv.storage_of("k") is not KVStorage.bf16 and kv.storage_of("v") is not KVStorage.bf16:
        words += tuple(f"kv.{change}" for change in ("quantize_k=false", "k_storage=null", "k_format=null"))
        words += ("kv.k_late_layers=null",)
        narrowed.append(("K back to BF16", words))
    if kv.scales is KVScales.per_head_ema:
        words += ("kv.scales=per_token",)
        narrowed.append(("scales per token", words))
    kept = min(kv.late_layers or layers, layers)
    for late in (kept // 2, kept // 4):
        if late:
            narrowed.append((f"last {late} layers only", (*words, f"kv.late_layers={late}")))
    return narrowed


def cache_bits(kv: KVConf, layers: int) -> float:
    """About so many bits a layer's pair of cached numbers takes, in the mean: 32 for BF16. Newest frames count once."""
    bits = 0.0
    for layer in range(layers):
        for name in TENSORS:
            bits += 16 if not kv.quantises(name, layer, layers) else (4 if kv.is_4_bit(name) else 8) + SCALE_BITS
    return bits / layers


def narrower_quant(name: str, layers: int) -> list[tuple[str, Words]]:
    """Ways back from a choice of Linears: attention in BF16 (where it was not), then early layers in BF16 too."""
    words: Words = (f"quant={name}",)
    narrowed = []
    if "mlp" not in name:
        words += ("quant.exclude=['*attn*']",)
        narrowed.append(("attention in BF16", words))
    if "late" not in name:
        for late in (layers // 2, layers // 4):
            if late:
                narrowed.append((f"last {late} layers only", (*words, f"quant.late_layers={late}")))
    return narrowed


def keeps_attention(quant: Sequence[str]) -> bool:
    """Whether these words leave attention in BF16: then wider 4-bit Linears need not be tried."""
    return any(word.startswith("quant.exclude") for word in quant)


def _join(name: str, change: str) -> str:
    return f"{name}, {change}" if change else name
