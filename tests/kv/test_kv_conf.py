from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from harness.formats.scales import ScaleMode
from harness.kv import EMAConf, KVConf, KVFormat, KVScales, KVStorage, describe, validate


def mx(**fields):
    return KVConf(storage=KVStorage.mx, **fields)


I8, BF16 = KVStorage.i8_scale, KVStorage.bf16


@pytest.mark.parametrize(
    "conf",
    [
        KVConf(),
        mx(),
        mx(bits=4),
        mx(quantize_k=True, k_late_layers=4, late_layers=8),
        mx(v_format=KVFormat.e5m2),
        mx(late_layers=99),
        mx(scales=KVScales.per_head_ema, ema=EMAConf(momentum=0, warmup_frames=0)),
        KVConf(storage=I8, late_layers=4),
        KVConf(k_storage=I8, v_storage=KVStorage.mx, bits=4),
        mx(v_storage=BF16, k_storage=KVStorage.mx, k_format=KVFormat.e4m3),
    ],
)
def test_sensible_configs_pass(conf):
    validate(conf, head_dim=64)


@pytest.mark.parametrize(
    ("conf", "head_dim", "message"),
    [
        (mx(), 48, "head size 48 is not divisible by 32"),
        (mx(bits=6), 64, "bits=6: allowed are 8, 4"),
        (mx(quantize_v=False), 64, "neither K nor V is chosen; use storage=bf16"),
        (mx(late_layers=0), 64, "late_layers=0: must be at least 1"),
        (mx(v_late_layers=-1), 64, "v_late_layers=-1: must be at least 1"),
        (mx(k_late_layers=4), 64, "k_late_layers=4: K is stored as bf16; quantise it or drop"),
        (mx(quantize_k=True, v_storage=BF16, v_late_layers=4), 64, "v_late_layers=4: V is stored as bf16"),
        (KVConf(late_layers=4), 64, "late_layers=4: bf16 quantises nothing"),
        (KVConf(k_format=KVFormat.e5m2), 64, "k_format=e5m2: K is stored as bf16, which has no MX format"),
        (mx(v_storage=I8, v_format=KVFormat.e4m3), 64, "v_format=e4m3: V is stored as i8_scale"),
        (KVConf(storage=I8, bits=4), 64, "bits=4: i8_scale has 8"),
        (KVConf(storage=I8, scales=KVScales.per_head_ema), 64, "scales=per_head_ema: concerns mx alone"),
        (mx(ema=EMAConf(momentum=1)), 64, "ema.momentum=1: must be at least 0 and below 1"),
        (mx(ema=EMAConf(warmup_frames=-1)), 64, "ema.warmup_frames=-1"),
        (mx(ema=EMAConf(floor=0)), 64, "ema.floor=0"),
        (mx(ema=EMAConf(floor=float("nan"))), 64, "ema.floor=nan"),
    ],
)
def test_contradictions_are_named(conf, head_dim, message):
    with pytest.raises(ValueError, match=message):
        validate(conf, head_dim=head_dim)


def test_int8_needs_no_blocks_of_32():
    validate(KVConf(storage=I8, quantize_k=True), head_dim=48)


def test_all_problems_come_in_one_error():
    with pytest.raises(ValueError, match=r"bits=5.*late_layers=0.*head size 40"):
        validate(mx(bits=5, late_layers=0), head_dim=40)


@pytest.mark.parametrize(
    ("conf", "text"),
    [
        (KVConf(), "K bf16, V bf16"),
        (mx(), "K bf16, V e4m3"),
        (mx(quantize_k=True, late_layers=4), "K e5m2 (last 4 of 12 layers), V e4m3 (last 4 of 12 layers)"),
        (mx(late_layers=16), "K bf16, V e4m3 (last 16 asked for: all 12 layers)"),
        (mx(quantize_k=True, k_late_layers=8), "K e5m2 (last 8 of 12 layers), V e4m3"),
        (mx(scales=KVScales.per_head_ema), "K bf16, V e4m3 per-head EMA"),
        (KVConf(k_storage=I8, v_storage=KVStorage.mx, bits=4), "K int8, V e2m1"),
    ],
)
def test_numeric_path_in_words(conf, text):
    assert describe(conf, 12) == text


@pytest.mark.parametrize(
    ("conf", "k", "v"),
    [
        (mx(late_layers=99), 0, 12),
        (mx(quantize_k=True, k_late_layers=4), 4, 12),
        (mx(quantize_k=True, late_layers=8, v_late_layers=2), 8, 2),
        (KVConf(k_storage=I8), 12, 0),
        (mx(quantize_k=True, k_storage=BF16), 0, 12),
    ],
)
def test_k_and_v_are_chosen_apart(conf, k, v):
    assert [sum(conf.quantises(name, layer, 12) for layer in range(12)) for name in "kv"] == [k, v]
    assert conf.enabled


@pytest.mark.parametrize(
    ("conf", "k", "v"),
    [
        (mx(), "e5m2", "e4m3"),
        (mx(bits=4), "e2m1", "e2m1"),
        (mx(bits=4, k_format=KVFormat.e5m2), "e5m2", "e2m1"),
        (mx(v_format=KVFormat.e5m2), "e5m2", "e5m2"),
    ],
)
def test_default_formats(conf, k, v):
    assert (conf.element_format("k").name, conf.element_format("v").name) == (k, v)


def test_yaml_values_type_check():
    schema = OmegaConf.structured(KVConf)
    conf = OmegaConf.to_object(OmegaConf.merge(schema, {"storage": "mx", "k_format": "e4m3", "scale_mode": "floor"}))
    assert conf == mx(k_format=KVFormat.e4m3, scale_mode=ScaleMode.floor)
    with pytest.raises(ValidationError, match="int8"):
        OmegaConf.merge(schema, {"storage": "int8"})
    nested = OmegaConf.to_object(OmegaConf.merge(schema, {"ema": {"momentum": 0.5}}))
    assert nested.ema == EMAConf(momentum=0.5)


CONF = Path(__file__).resolve().parents[2] / "conf" / "kv"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("bf16", "K bf16, V bf16"),
        ("i8_scale", "K int8, V int8"),
        ("i8_v_only", "K bf16, V int8"),
        ("mx_v_only", "K bf16, V e4m3"),
        ("mx_k_only", "K e5m2, V bf16"),
        ("mx_kv", "K e5m2, V e4m3"),
        ("mx_kv_e4m3", "K e4m3, V e4m3"),
        ("mx_late4", "K e5m2 (last 4 of 16 layers), V e4m3 (last 4 of 16 layers)"),
        ("mx_late8", "K e5m2 (last 8 of 16 layers), V e4m3 (last 8 of 16 layers)"),
        ("mx_late12", "K e5m2 (last 12 of 16 layers), V e4m3 (last 12 of 16 layers)"),
        ("mx_ema", "K e5m2 per-head EMA, V e4m3 per-head EMA"),
        ("mx_ema_v_only", "K bf16, V e4m3 per-head EMA"),
        ("mx_k_late4_v", "K e5m2 (last 4 of 16 layers), V e4m3"),
        ("mx_k_late8_v", "K e5m2 (last 8 of 16 layers), V e4m3"),
        ("mx_k_late12_v", "K e5m2 (last 12 of 16 layers), V e4m3"),
        ("mxfp4_v_only", "K bf16, V e2m1"),
        ("mxfp4_kv", "K e2m1, V e2m1"),
        ("mxfp4_k_late4_v", "K e2m1 (last 4 of 16 layers), V e2m1"),
        ("mx_k_mxfp4_v", "K e5m2, V e2m1"),
        ("mx_k_late4_mxfp4_v", "K e5m2 (last 4 of 16 layers), V e2m1"),
        ("i8_k_mx_v", "K int8, V e4m3"),
        ("i8_k_mxfp4_v", "K int8, V e2m1"),
    ],
)
def test_the_experiment_matrix_has_names(option, text):
    conf = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(KVConf), OmegaConf.load(CONF / f"{option}.yaml")))
    validate(conf, head_dim=64)
    assert describe(conf, 16) == text
