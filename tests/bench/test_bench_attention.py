"""The attention benchmark on a CPU, with Triton's interpreter for the GPU: errors are real, times are not."""

import importlib.util
import json

import numpy as np
import pytest

from harness.bench import attention as bench_attention
from harness.rollout import fused
from harness.rollout.fused import WindowConfig

TINY = ["--device", "cpu", "--heads", "1", "--dim", "32", "--tokens", "16", "--frames", "2"]


def rows_of(folder, *words):
    out = folder / "deep" / "attention.json"
    code = bench_attention.main([*TINY, "--out", str(out), *words])
    return code, json.loads(out.read_text())["rows"]


def test_torchs_attention_is_measured_on_bf16_alone(tmp_path, capsys):
    code, rows = rows_of(tmp_path, "--kinds", "sdpa", "--storages", "bf16,mx_kv")
    assert code == 0
    assert [(row["storage"], row["attention"], row["frames"], row["us"]) for row in rows] == [("bf16", "sdpa", 2, None)]
    assert rows[0]["error"] < 1e-6
    assert rows[0]["bytes"] == 2 * 2 * 16 * 32 * 4  # K and V of two frames in float32
    assert "storage=bf16 attention=sdpa" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton's interpreter needs numpy below 2.4")
def test_our_attention_is_measured_on_every_storage_and_by_every_launch_shape(tmp_path):
    code, rows = rows_of(tmp_path, "--kinds", "fused", "--storages", "bf16,mx_kv,i8_kv")
    assert code == 0
    assert [row["storage"] for row in rows] == ["bf16", "mx_kv", "i8_kv"]
    assert all(row["error"] < 1e-5 for row in rows)
    assert rows[1]["bytes"] < rows[2]["bytes"] < rows[0]["bytes"]
    code, rows = rows_of(tmp_path, "--kinds", "fused", "--storages", "mxfp4_kv", "--sweep")
    assert code == 0
    tried = {WindowConfig(*(row[name] for name in WindowConfig.__dataclass_fields__)) for row in rows}
    assert tried == set(bench_attention.SWEEP)
    assert len(rows) == len(tried) == 24
    assert WindowConfig() in tried


def test_a_row_that_fails_is_reported_and_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "unavailable", lambda device: "no Triton here")
    code, rows = rows_of(tmp_path, "--kinds", "fused,sdpa", "--storages", "bf16")
    assert code == 1
    assert "no Triton here; use attention=sdpa" in rows[0]["failed"]
    assert rows[1]["error"] < 1e-6
