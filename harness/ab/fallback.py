"""What to fall back to when a candidate becomes unstable: ever safer formats, down to BF16."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.kv import KVConf, KVStorage
from harness.kv.conf import KVScales
from harness.mx.conf import CategoryBits, MXConf


@dataclass(frozen=True)
class Fallback:
    """Formats to go on with, and what ``step`` they are from those before."""

    step: str
    quant: MXConf
    kv: KVConf


def fallbacks(quant: MXConf, kv: KVConf, layers: int) -> list[Fallback]:
    """The way down from a candidate's formats, each step on top of those before.

    K back to BF16, half as many quantised KV layers, scales per token instead of an average per head, MXFP4 off
    (8 bits instead), KV cache back to BF16, Linears back to BF16. Steps that would change nothing are left out, so a
    BF16 candidate has none.

    Args:
        quant: formats of the Linears.
        kv: formats of the cache.
        layers: of the model.
    """
    steps: list[Fallback] = []

    def add(step: str) -> None:
        steps.append(Fallback(step, quant, kv))

    if kv.storage_of("k") is not KVStorage.bf16:
        k_off = replace(kv, quantize_k=False, k_storage=None, k_format=None, k_late_layers=None)
        kv = k_off if k_off.enabled else KVConf()
        add("K back to BF16")
    kept = min(kv.v_late_layers or kv.late_layers or layers, layers)
    if kv.enabled and kept > 1:
        kv = replace(kv, late_layers=kept // 2, v_late_layers=None)
        add(f"only the last {kept // 2} layers of the KV cache")
    if kv.enabled and kv.scales is KVScales.per_head_ema:
        kv = replace(kv, scales=KVScales.per_token)
        add("scales per token instead of an average per head")
    kv_4bit = kv.enabled and kv.storage_of("v") is KVStorage.mx and kv.element_format("v").name == "e2m1"
    if kv_4bit or quant.has_4_bits:
        quant = replace(quant, bits=8, bits_by_category=CategoryBits())
        kv = replace(kv, bits=8, v_format=None, recent_frames=0) if kv_4bit else kv
        add("MXFP4 off, 8 bits instead")
    if kv.enabled:
        kv = KVConf()
        add("KV cache back to BF16")
    if quant.enabled:
        quant = MXConf()
        add("Linears back to BF16")
    return steps
