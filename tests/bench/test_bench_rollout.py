"""The measuring scripts on a tiny model: what they write, and that one failing row leaves the others alone."""

import itertools
import json

import pytest
import torch

from harness.bench import profile, rollout, summary
from harness.bench.floors import decoder_floor_ms
from harness.bench.inputs import compose_plan
from harness.bench.ready import time_limit
from harness.config import register
from harness.models.dcae import DCAEDecoder

TINY = ["model.arch.n_layers=2", "model.arch.local_idx=2", "sampler.window=3"]


def test_bench_writes_every_row_and_outlives_a_failing_one(tmp_path, capsys):
    base = ["--models", "smoke", "--device", "cpu", "--compile", "off", "--batches", "1", "--out", str(tmp_path)]
    rows = ["--attention", "sdpa,none", "--match", "bf16.bf16|mxfp4_all", "--frames", "2"]
    assert rollout.main([*base, *rows, *TINY]) == 1
    record = json.loads((tmp_path / "bench.json").read_text())
    by_name = {row["row"]: row for row in record["rows"]}
    failed = {name for name, row in by_name.items() if row["failed"]}
    assert failed == {name for name in by_name if name.endswith("/none")}
    done = by_name["smoke/B1/mxfp4_all+mx_v_only/sdpa"]
    baseline = by_name["smoke/B1/bf16+bf16/sdpa"]
    assert done["dit"]["n"] == 2
    assert done["of_bf16"] == pytest.approx(done["dit"]["median"] / baseline["dit"]["median"])
    assert 0 < done["weight_bytes"] < baseline["weight_bytes"]
    assert done["cache_bytes"] < baseline["cache_bytes"]
    assert 0 < done["floor_ms"] < baseline["floor_ms"]
    assert done["prefill_ms"] > 0
    assert done["host_us"] is None  # nothing is captured on a CPU
    assert 0 < done["decoder_floor_ms"] == baseline["decoder_floor_ms"]
    assert record["environment"]["packages"]["torch"]
    table = (tmp_path / "bench.md").read_text().splitlines()
    assert len(table) == 2 + len(by_name)
    assert len({row.count("|") for row in table}) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_decoders_floor_is_weights_once_and_activations_per_clip(tmp_path):
    register()
    words = ("model=smoke", "trainer=cpu", "compile=off")
    plans = [compose_plan([*words, f"data.batch_size={n}"], tmp_path) for n in (1, 2, 3)]
    one, two, three = (decoder_floor_ms(plan, 1e-9) for plan in plans)  # 1 byte a ms
    decoder = DCAEDecoder(plans[0].dcae)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    size = plans[0].conf.decoder.dtype_on(plans[0].device).itemsize
    assert 2 * one - two == pytest.approx(size * sum(p.numel() for m in convolutions for p in m.parameters()))
    assert three - two == pytest.approx(two - one)
    last = decoder.conv_out  # of the largest maps
    pixels = plans[0].dcae.sample_size[0] * plans[0].dcae.sample_size[1]
    assert two - one > size * pixels * (last.in_channels + last.out_channels)


def test_bench_says_when_nothing_matches(capsys):
    assert rollout.main(["--match", "nothing"]) == 2
    assert "no row matches" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["compile.linears=packed", "quant=mxfp8_all", "+data.batch_size=4"])
def test_what_names_a_row_cannot_be_overridden(override, tmp_path, capsys):
    for script in (rollout, summary):
        with pytest.raises(SystemExit) as ended:
            script.main(["--device", "cpu", "--out", str(tmp_path / "out"), override])
        assert ended.value.code == 2
        assert f"{override}: rows are named by this" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="not ready within"), time_limit(0.05):
        sum(number for number in itertools.count())  # Python code, which a signal can interrupt


def test_profile_splits_a_frame_and_compares(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    run = ["--device", "cpu", "--frames", "1", "--out"]
    assert profile.main([*run, str(first), "model=smoke", *TINY]) == 0
    assert profile.main([*run, str(second), "--before", str(first), "model=smoke", "kv=mx_kv", *TINY]) == 0
    now = json.loads(second.read_text())
    assert sum(part["us"] for part in now["frame"]["parts"].values()) == pytest.approx(now["frame"]["us"])
    assert now["frame"]["parts"]["attention"]["us"] > 0
    assert now["frame"]["calls_per_step"] == now["frame"]["calls"] / 2
    assert "before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("window_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("index_copy_kernel", "cache"),
        ("nvjet_tst_64x64_splitK", "GEMM"),
        ("triton_red_fused_add_mean_0", "norm and elementwise"),
        ("Memcpy DtoD", "copy"),
        ("something", "other"),
    ],
)
def test_kernels_have_parts(name, part):
    assert profile.part_of(name) == part
