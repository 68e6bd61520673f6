"""One table of everything measured, from the result files of the three measuring scripts."""

import json
import subprocess

import pytest

from harness.bench import attention, micro, summary
from harness.bench import rollout as rollouts
from harness.bench.rows import all_rows


def rollout(name, ms=None, **others):
    row = {
        "row": name,
        "dit": ms and {"median": ms},
        "decoder": {"median": 1.25},
        "decoder_floor_ms": 0.25,
        "emulated": False,
        "failed": None,
    }
    row |= {"floor_ms": 0.5, "fps": 250.4, "fps_overlapped": 300.0, "weight_bytes": 2e6, "cache_bytes": 1e6}
    return row | {"run_bytes": None, "prefill_ms": 12.34, "host_us": 17.6} | others


@pytest.fixture
def results(tmp_path):
    rows = [
        rollout("m/B1/bf16+bf16/sdpa", 3.0),
        rollout("m/B1/bf16+bf16/fused", 2.0),
        rollout("m/B1/mxfp8_all+mx_v_only/fused", 1.5),
        rollout("m/B1/mxfp4_all+mx_v_only/fused", failed="OutOfMemoryError: too large"),
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    linear = [
        {"shape": "64×8→16", "variant": variant, "us": us, "floor_us": 2.0}
        for variant, us in (("torch BF16", 9.0), ("W8", 6.0))
    ]
    (tmp_path / "linear_m.json").write_text(json.dumps({"rows": linear}))
    layers = [
        {"storage": "bf16", "attention": "flex", "frames": 60, "us": 100.0},
        {"storage": "mx_kv", "attention": "fused", "frames": 60, "us": 20.0},
        {"storage": "mx_v_only", "attention": "fused", "failed": "ValueError: no"},
    ]
    (tmp_path / "attention.json").write_text(json.dumps({"rows": layers}))
    return summary.parse(["--models", "m", "--out", str(tmp_path)])


def test_ratios_are_to_the_fastest_bf16_of_the_same_run(results):
    table = dict(line.strip("| ").split(" | ", 1) for line in summary.summary(results).splitlines())
    assert table["DiT, `m`, bf16+bf16/sdpa"].startswith("3.00 ms a frame, 1.50× of BF16, 6.0× its floor of 0.50")
    assert "0.75× of BF16" in table["DiT, `m`, mxfp8_all+mx_v_only/fused"]
    assert table["DiT, `m`, mxfp4_all+mx_v_only/fused"] == "failed: OutOfMemoryError: too large"
    assert table["Linear 64×8→16, `m`, W8"] == "6.00 µs, 1.50× the speed of BF16, floor 2.00 µs"
    assert "5.0× the speed of FlexAttention" in table["attention over 60 frames, fused, ring mx_kv"]
    assert table["attention over ? frames, fused, ring mx_v_only"] == "ValueError: no"
    assert table["decoder, `m`"] == "1.25 ms, 5.0× its floor of 0.25"
    assert table["prefill, `m`, bf16+bf16/fused"] == "12.3 ms; 18 µs of a frame are the host's"
    assert table["memory, `m`, bf16+bf16/fused"].endswith("cache and a frame's peak – MB")


def test_the_measuring_scripts_take_its_commands(results):
    parsers = {
        "micro": lambda words: micro.parse([*words, "--device", "cpu"]),
        "rollout": rollouts.parse,
        "attention": attention.parse,
    }
    for module, *words in summary.jobs(results).values():
        parsers[module](words)
    rows = all_rows(rollouts.parse(summary.jobs(results)["bench.json"][1:]))
    assert [row.name for row in rows] == [
        "m/B1/bf16+bf16/sdpa",
        "m/B1/bf16+bf16/fused/library",
        "m/B1/bf16+bf16/fused/packed",
        "m/B1/mxfp8_all+mx_v_only/fused",
        "m/B1/mxfp8_all+mx_kv/fused",
        "m/B1/mxfp4_all+mx_v_only/fused",
    ]


def test_further_models_have_fewer_rows(tmp_path):
    args = summary.parse(["--models", "m", "n", "--out", str(tmp_path)])
    rows = all_rows(rollouts.parse(summary.jobs(args)["bench.json"][1:]))
    assert [sum(row.model == model for row in rows) for model in ("m", "n")] == [6, 4]


def test_a_job_that_breaks_is_an_exit_code_and_leaves_no_old_figures(results, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda args, env, check: subprocess.CompletedProcess(args, 1))
    assert summary.main(["--models", "m", "--out", str(results.out)]) == 1
    assert "µs" not in capsys.readouterr().out
    assert (results.out / "summary.md").is_file()
