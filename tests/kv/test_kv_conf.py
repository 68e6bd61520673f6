import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from harness.kv import KVConf, KVFormat, KVStorage, validate
from harness.mx.formats import ScaleMode


def mx(**fields):
    return KVConf(storage=KVStorage.mx, **fields)


@pytest.mark.parametrize(
    "conf",
    [KVConf(), mx(), mx(bits=4), mx(quantize_k=True, k_late_layers=4, late_layers=8), mx(v_format=KVFormat.e5m2)],
)
def test_sensible_configs_pass(conf):
    validate(conf, head_dim=64, layers=16)


@pytest.mark.parametrize(
    ("conf", "head_dim", "message"),
    [
        (mx(), 48, "head size 48 is not divisible by 32"),
        (mx(bits=6), 64, "bits=6: allowed are 8, 4"),
        (mx(quantize_v=False), 64, "nothing to quantise; use storage=bf16"),
        (mx(late_layers=17), 64, "late_layers=17: give 1 to 16"),
        (mx(late_layers=0), 64, "late_layers=0: give 1 to 16"),
        (mx(k_late_layers=4), 64, "k_late_layers=4 with quantize_k=false"),
        (KVConf(late_layers=4), 64, "late_layers=4: bf16 quantises nothing"),
        (KVConf(k_format=KVFormat.e5m2), 64, "k_format=e5m2: bf16 quantises nothing"),
    ],
)
def test_contradictions_are_named(conf, head_dim, message):
    with pytest.raises(ValueError, match=message):
        validate(conf, head_dim=head_dim, layers=16)


def test_all_problems_come_in_one_error():
    with pytest.raises(ValueError, match=r"bits=5.*head size 40.*late_layers=99"):
        validate(mx(bits=5, late_layers=99), head_dim=40, layers=16)


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
