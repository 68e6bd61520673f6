"""quant=env kv=env compile=env: the old environment flags."""

import pytest
from omegaconf import OmegaConf

from harness.config import ConfigError, plan_run
from harness.config.flags import FlagError, flag, flags_set, ignored, kv_flag
from harness.kv import KVStorage
from harness.run import run

pytestmark = pytest.mark.usefixtures("no_flags")
ENV = ("model=smoke", "quant=env", "kv=env", "compile=env")
KV_FIELDS = ("storage", "quantize_k", "bits", "late_layers")


@pytest.fixture
def planned(composed, monkeypatch):
    def plan_with(flags, *words):
        for name, value in flags.items():
            monkeypatch.setenv(name, value)
        return plan_run(composed(*ENV, *words)).conf

    return plan_with


def test_unset_flags_mean_what_the_old_pipeline_ran(planned):
    conf = planned({})
    quant = conf.quant
    assert (quant.enabled, quant.bits, quant.scope, quant.kernel, quant.list) == (True, 8, "all", "auto", False)
    assert quant.activation == "mx"
    kv = conf.kv
    assert (kv.storage, kv.quantize_k, kv.quantize_v, kv.late_layers) == (KVStorage.i8_scale, False, True, 12)
    assert not conf.compile.enabled
    assert conf.flags == {}


def test_every_linear_flag_reaches_the_config(planned):
    flags = {
        "OWL_MXFP_ENABLE": "1",
        "OWL_MXFP_BITS": "4",
        "OWL_MXFP_SCOPE": "mlp",
        "OWL_MXFP_KERNEL": "emulated",
        "OWL_MXFP_LIST": "1",
        "OWL_COMPILE": "1",
        "OWL_PROFILE_KV": "0",
    }
    conf = planned(flags)
    quant = conf.quant
    assert (quant.enabled, quant.bits, quant.scope, quant.kernel, quant.list) == (True, 4, "mlp", "emulated", True)
    assert conf.compile.enabled
    assert conf.measure.parts_frames == 0
    assert conf.flags == flags


def test_mxfp_off_is_the_baseline_whatever_its_bits(planned):
    conf = planned({"OWL_MXFP_ENABLE": "0", "OWL_MXFP_BITS": "4", "OWL_FP8_KV": "0", "OWL_K_FP8": "1"})
    assert conf.is_baseline


def test_what_a_user_types_beats_a_flag(planned):
    conf = planned({"OWL_MXFP_BITS": "4"}, "quant.bits=8", "kv.late_layers=2", "measure.parts_frames=1")
    assert (conf.quant.bits, conf.kv.late_layers, conf.measure.parts_frames) == (8, 2, 1)


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ({}, ("i8_scale", False, 8, 12)),
        ({"OWL_FP8_KV": "1", "OWL_K_FP8": "true", "OWL_KV_LATE_LAYERS": "4"}, ("i8_scale", True, 8, 4)),
        ({"OWL_FP8_KV": "0", "OWL_K_FP8": "1", "OWL_KV_LATE_LAYERS": "4"}, ("bf16", False, 8, None)),
        ({"OWL_KV_STORAGE": "bf16"}, ("bf16", False, 8, None)),
        ({"OWL_KV_STORAGE": "mxfp", "OWL_KV_BITS": "4"}, ("mx", False, 4, 12)),
        ({"OWL_KV_STORAGE": "mxfp", "OWL_FP8_KV": "1", "OWL_KV_LATE_LAYERS": "all"}, ("mx", False, 8, None)),
        ({"OWL_KV_STORAGE": "", "OWL_FP8_KV": " "}, ("i8_scale", False, 8, 12)),
    ],
)
def test_kv_flags_together_decide_the_cache(flags, fields):
    assert tuple(kv_flag(field, flags) for field in KV_FIELDS) == fields


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"OWL_FP8_KV": "1", "OWL_KV_STORAGE": "bf16"}, "OWL_FP8_KV=1 contradicts OWL_KV_STORAGE=bf16"),
        ({"OWL_FP8_KV": "0", "OWL_KV_STORAGE": "mxfp"}, "OWL_FP8_KV=0 contradicts OWL_KV_STORAGE=mxfp"),
        ({"OWL_KV_BITS": "4"}, "OWL_KV_BITS=4: i8_scale has 8 bits; set OWL_KV_STORAGE=mxfp too"),
        ({"OWL_KV_LATE_LAYERS": "0"}, "OWL_KV_LATE_LAYERS=0: allowed are a whole number from 1, all"),
        ({"OWL_KV_LATE_LAYERS": "some"}, "OWL_KV_LATE_LAYERS=some"),
        ({"OWL_K_FP8": "maybe"}, "OWL_K_FP8=maybe: allowed are 1, 0"),
        ({"OWL_KV_STORGE": "mxfp"}, "OWL_KV_STORGE: no such flag"),
    ],
)
def test_kv_flags_that_cannot_be_say_so(flags, said):
    with pytest.raises(FlagError, match=said):
        kv_flag("storage", flags)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("OWL_MXFP_BITS", "6", "allowed are 8, 4 (or unset: 8)"),
        ("OWL_MXFP_SCOPE", "heads", "mlp, attn, modulation, all"),
        ("OWL_MXFP_KERNEL", "cublas", "cutlass, cuda, triton, emulated, auto"),
        ("OWL_MXFP_ENABLE", "2", "1, 0"),
        ("OWL_COMPILE", "yes", "1, 0"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed_before_anything_is_loaded(planned, name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        planned({name: value})
    message = str(caught.value)
    assert f"{name}={value}: " in message
    assert allowed in message
    assert "\n" not in message


def test_a_misspelled_flag_is_an_error_and_a_stranger_is_not(planned):
    assert flags_set({"OWL_OTHER": "1", "HOME": "/", "OWL_MXFP_BITS": "8"}) == {"OWL_MXFP_BITS": "8"}
    assert flag("OWL_MXFP_BITS", {"OWL_OTHER": "1"}) == 8
    with pytest.raises(ConfigError, match="OWL_MXFP_BIT: no such flag; there are OWL_MXFP_ENABLE"):
        planned({"OWL_MXFP_BIT": "4"})


def test_flags_without_env_are_recorded_and_said_to_do_nothing(composed, monkeypatch):
    monkeypatch.setenv("OWL_MXFP_BITS", "nonsense")
    conf = plan_run(composed("model=smoke", "quant=mxfp8_mlp")).conf
    assert conf.flags == {"OWL_MXFP_BITS": "nonsense"}
    assert "without effect here; quant=env" in ignored(conf.flags, {"quant": "mxfp8_mlp"})
    assert ignored(conf.flags, {"quant": "env"}) is None
    assert ignored({}, {"quant": "bf16"}) is None


def test_the_old_commands_run_and_the_record_keeps_their_flags(composed, monkeypatch, tmp_path, capsys):
    from harness.report.record import load_record

    flags = {"OWL_MXFP_BITS": "4", "OWL_MXFP_SCOPE": "mlp", "OWL_MXFP_LIST": "1", "OWL_FP8_KV": "0"}
    for name, value in flags.items():
        monkeypatch.setenv(name, value)
    words = ("model.arch.n_layers=2", "data.limit=1", "data.future_frames=2", "measure.videos=false")
    run(composed(*ENV, *words))
    record = load_record(tmp_path / "run" / "record.json")
    assert record.config["flags"] == flags
    assert record.arms["candidate"].transform.names
    assert "W4A4" in record.arms["candidate"].numeric_path.linears
    printed = capsys.readouterr().out
    assert "Linears in MX: 3 (3 mlp), W4A4" in printed
    assert "mlp        transformer.blocks.{0-1}.mlp.fc1" in printed
    assert "transformer.blocks.1.mlp.fc2: kept BF16 as a final output projection" in printed


def test_flags_resolve_when_read_so_that_every_job_of_a_sweep_sees_its_own(composed, monkeypatch):
    cfg = composed(*ENV)
    monkeypatch.setenv("OWL_MXFP_BITS", "4")
    assert cfg.quant.bits == 4
    monkeypatch.setenv("OWL_MXFP_BITS", "8")
    assert OmegaConf.to_container(cfg, resolve=True)["quant"]["bits"] == 8
