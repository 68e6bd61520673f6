import dataclasses
import json
import math

import pytest

from harness.report.record import ArmRecord, RecordError, RunRecord, load_record, save_record
from harness.report.table import bytes_text, render

STATS = {"median": 10.0, "p10": 9.0, "p90": 12.0, "mean": 10.5, "n": 8}


def arm(label, factor=1.0, meaningful=True, transform=None):
    stats = {key: value * factor for key, value in STATS.items()}
    return ArmRecord(
        label=label,
        numeric_path={"linears": "BF16", "kv": "K bf16, V bf16", "attention": "sdpa", "architecture": "cpu"},
        speed_is_meaningful=meaningful,
        transform=transform,
        speed={
            "pipeline_fps": 100 / factor,
            "total_fps": 80 / factor,
            "dit_ms": stats,
            "decoder_ms": STATS,
            "total_ms": stats,
            "prefill_ms": None,
        },
        parts={"method": "instrumented eager pass, 3 frames", "frames": 3, "ms": {"attention": stats}},
        memory={
            "weight_bytes": int(4096 * factor),
            "kv_window_bytes": 1 << 21,
            "transient": None,
            "peak_allocated": None,
            "peak_reserved": None,
            "process_peak_rss": 1 << 30,
        },
        compile={
            "enabled": meaningful,
            "mode": "default",
            "cuda_graph": True,
            "cold_start_s": 0.5,
            "graphs": 3,
            "graph_breaks": 0,
            "recompiles_after_warmup": 1,
        },
    )


def record(candidate=None):
    section = {"clips": 2, "bf16": {"psnr": 25.0, "ssim": 0.8}}
    arms = {"bf16": arm("BF16")}
    if candidate is not None:
        arms["candidate"] = candidate
        section |= {
            "candidate": {"psnr": 24.5, "ssim": 0.79},
            "drop": {"psnr": 0.5, "ssim": 0.01},
            "fidelity": {"psnr": 38.25, "ssim": 0.98},
        }
    return RunRecord(
        run_id="r",
        started="2026-01-01T00:00:00+00:00",
        seconds=1.5,
        status="complete",
        command=["run.py"],
        overrides=["quant=mxfp8_all"],
        choices={"model": "smoke"},
        config={"seed": 0},
        environment={"gpu": None},
        model={"name": "smoke"},
        data={"name": "synthetic", "summary": "2 clips"},
        arms=arms,
        quality={"all": section, "by_tag": {"motion": section}},
        clips=[],
        notes=["random weights: speed is real, quality is not"],
    )


def test_a_record_survives_the_disk(tmp_path):
    original = record(
        arm("mxfp8_all", 2.0, transform={"count": 8, "categories": {"mlp": 4, "attn": 4}, "kept_bf16": {}})
    )
    path = tmp_path / "run" / "record.json"
    save_record(original, path)
    assert load_record(path) == original
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_failed_write_keeps_the_old_record(tmp_path):
    path = tmp_path / "record.json"
    save_record(record(), path)
    broken = dataclasses.replace(record(), seconds=math.nan)
    with pytest.raises(ValueError, match="JSON"):
        save_record(broken, path)
    assert load_record(path).seconds == 1.5


def test_a_record_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "record.json"
    save_record(record(), path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(RecordError, match=r"schema_version 99; this version reads 1"):
        load_record(path)
    path.write_text("{")
    with pytest.raises(RecordError, match="not a readable run record"):
        load_record(path)


def test_the_table_shows_both_arms_the_drop_and_what_the_speed_means():
    emulated = arm(
        "mxfp8_all", 2.0, meaningful=False, transform={"count": 8, "categories": {"mlp": 4, "attn": 4}, "kept_bf16": {}}
    )
    text = render(record(emulated))
    assert "mxfp8_all *" in text
    assert "its speed says nothing about MX" in text
    assert "random weights" in text
    assert "Linears in MX: 8 (4 mlp, 4 attn)" in text
    assert "0.50x" in next(line for line in text.splitlines() if "FPS, pipeline" in line)
    assert "-0.50" in next(line for line in text.splitlines() if "PSNR dB" in line)
    fidelity = next(line for line in text.splitlines() if "fidelity," in line)
    assert "38.25 dB / 0.9800" in fidelity
    assert "drop +0.50 dB" in fidelity
    assert max(map(len, text.splitlines())) <= 100


def test_a_lone_baseline_says_so():
    text = render(record())
    assert "The candidate is the baseline" in text
    assert "drop" not in text


def test_native_speed_carries_no_mark():
    transform = {"count": 1, "categories": {"mlp": 1}, "kept_bf16": {"mlp.fc2": "4 bit"}}
    text = render(record(arm("mxfp4_mlp", 0.5, transform=transform)))
    assert "*" not in text
    assert "Compiled mxfp4_mlp: 3 graphs (default, replayed as one CUDA graph), 0 breaks, 1 recompiles" in text
    assert "Linears in MX: 1 (1 mlp); 1 in scope kept BF16." in text


def test_sizes_read_naturally():
    assert [bytes_text(n) for n in (None, 12, 2048, 3 << 20, 5 << 30)] == [
        "-",
        "12 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
