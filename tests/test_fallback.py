import pytest

from harness.ab.fallback import fallbacks
from harness.kv import KVConf, KVStorage
from harness.kv.conf import KVScales
from harness.mx.conf import CategoryBits, MXConf, Scope

MX = KVStorage.mx
MIXED = MXConf(enabled=True, scope=Scope.all, bits_by_category=CategoryBits(mlp=4))


def steps(quant, kv, layers=12):
    return [one.step for one in fallbacks(quant, kv, layers)]


def test_everything_at_once_goes_down_in_the_plans_order():
    quant = MXConf(enabled=True, bits=4, scope=Scope.all)
    kv = KVConf(storage=MX, quantize_k=True, bits=4, scales=KVScales.per_head_ema)
    assert steps(quant, kv) == [
        "K back to BF16",
        "only the last 6 layers of the KV cache",
        "scales per token instead of an average per head",
        "MXFP4 off, 8 bits instead",
        "KV cache back to BF16",
        "Linears back to BF16",
    ]
    way = fallbacks(quant, kv, 12)
    assert way[0].kv.quantises("v", 0, 12)
    assert not way[0].kv.quantises("k", 11, 12)
    assert [way[1].kv.quantises("v", layer, 12) for layer in (5, 6)] == [False, True]
    assert way[2].kv.scales is KVScales.per_token
    assert way[2].quant == quant
    assert (way[3].quant.bits, way[3].quant.scope) == (8, Scope.all)
    assert way[3].kv.element_format("v").name == "e4m3"
    assert (way[4].kv, way[4].quant.enabled) == (KVConf(), True)
    assert (way[5].kv, way[5].quant) == (KVConf(), MXConf())


@pytest.mark.parametrize(
    ("quant", "kv", "expected"),
    [
        (MXConf(), KVConf(), []),
        (MXConf(enabled=True), KVConf(), ["Linears back to BF16"]),
        (MXConf(enabled=True, bits=4), KVConf(), ["MXFP4 off, 8 bits instead", "Linears back to BF16"]),
        (MIXED, KVConf(), ["MXFP4 off, 8 bits instead", "Linears back to BF16"]),
        (MXConf(), KVConf(storage=MX, late_layers=1), ["KV cache back to BF16"]),
        (MXConf(), KVConf(storage=MX, quantize_k=True, quantize_v=False), ["K back to BF16"]),
        (
            MXConf(),
            KVConf(storage=KVStorage.i8_scale, late_layers=4),
            ["only the last 2 layers of the KV cache", "KV cache back to BF16"],
        ),
    ],
)
def test_steps_that_change_nothing_are_left_out(quant, kv, expected):
    found = fallbacks(quant, kv, 12)
    assert [one.step for one in found] == expected
    assert not any(one.quant.has_4_bits for one in found)
    if found:
        assert not found[-1].quant.enabled
        assert not found[-1].kv.enabled
