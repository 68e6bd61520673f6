import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from harness.formats.scales import ScaleMode
from harness.mx.conf import CategoryBits, MXConf, Scope, validate


def test_defaults_are_valid_and_off():
    validate(MXConf())
    assert not MXConf().enabled


def test_serves_as_a_structured_config():
    conf = OmegaConf.merge(OmegaConf.structured(MXConf), {"scope": "all", "late_layers": 4, "include": ["*.qkv"]})
    made = OmegaConf.to_object(conf)
    assert made == MXConf(scope=Scope.all, late_layers=4, include=["*.qkv"])
    validate(made)


@pytest.mark.parametrize("field", ["scope", "kernel", "activation", "scale_mode", "element_8bit"])
def test_a_wrong_choice_fails_at_compose_time_with_the_allowed_ones(field):
    with pytest.raises(ValidationError, match=r"Invalid value 'fast', expected one of \["):
        OmegaConf.merge(OmegaConf.structured(MXConf), {field: "fast"})


def test_every_problem_is_listed_at_once():
    conf = MXConf(bits=6, scope="heads", late_layers=0, include=[""])
    with pytest.raises(ValueError, match="quant config") as caught:
        validate(conf)
    message = str(caught.value)
    assert "bits=6: allowed are 8 and 4" in message
    assert "scope=heads: allowed are mlp, attn, modulation, all" in message
    assert "late_layers=0: must be at least 1" in message
    assert "include=['']" in message


def test_bits_of_a_category_win_over_bits():
    conf = MXConf(enabled=True, scope="all", bits_by_category=CategoryBits(mlp=4))
    validate(conf)
    assert [conf.bits_of(name) for name in ("mlp", "attn", "modulation", "other")] == [4, 8, 8, 8]
    assert conf.has_4_bits
    assert not MXConf(enabled=True, scope="attn", bits_by_category=CategoryBits(mlp=4)).has_4_bits
    assert not MXConf(bits=4).has_4_bits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scope": "all", "bits_by_category": {"attn": 6}}, r"bits_by_category\.attn=6: allowed are 8, 4, and null"),
        ({"scope": "mlp", "bits_by_category": {"attn": 8}}, r"scope=mlp leaves attn BF16; use scope=all"),
    ],
)
def test_wrong_bits_of_a_category_are_named(changes, said):
    conf = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MXConf), changes))
    with pytest.raises(ValueError, match=said):
        validate(conf)
    with pytest.raises(ConfigKeyError, match="heads"):
        OmegaConf.merge(OmegaConf.structured(MXConf), {"bits_by_category": {"heads": 4}})


def test_default_scale_mode_is_that_of_torchao():
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig

    assert MXConf().scale_mode == ScaleMode(MXDynamicActivationMXWeightConfig().scaling_mode.value)


def test_composing_a_config_imports_no_torch():
    code = "import sys, harness.mx.conf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
