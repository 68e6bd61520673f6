import dataclasses
import errno
import json
import math
import os
import re

import pytest

from harness.measure.figures import FrameScores
from harness.report.codec import read
from harness.report.record import RecordError, RunRecord, load_record, save_record
from harness.report.sections import ClipRecord
from harness.report.table import bytes_text, render

STATS = {"median": 10.0, "p10": 9.0, "p90": 12.0, "mean": 10.5, "n": 8}


def arm(label, factor=1.0, meaningful=True, transform=None):
    stats = {key: value if key == "n" else value * factor for key, value in STATS.items()}
    content = {
        "label": label,
        "numeric_path": {
            "linears": "BF16",
            "kv": "K bf16, V bf16",
            "attention": "sdpa",
            "architecture": "cpu",
            "emulated": not meaningful,
        },
        "speed_is_meaningful": meaningful,
        "transform": transform,
        "speed": {
            "pipeline_fps": 100 / factor,
            "total_fps": 80 / factor,
            "dit_ms": stats,
            "decoder_ms": STATS,
            "total_ms": stats,
            "prefill_ms": None,
        },
        "parts": {"method": "instrumented eager pass, 3 frames", "frames": 3, "ms": {"attention": stats}},
        "memory": {
            "weight_bytes": int(4096 * factor),
            "kv_window_bytes": 1 << 21,
            "transient": None,
            "peak_allocated": None,
            "peak_reserved": None,
            "process_peak_rss": 1 << 30,
        },
        "compile": {
            "enabled": meaningful,
            "mode": "default",
            "cuda_graph": True,
            "cold_start_s": 0.5,
            "graphs": 3,
            "graph_breaks": 0,
            "recompiles_after_warmup": 1,
        },
    }
    return content


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
    content = {
        "run_id": "r",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "status": "complete",
        "command": ["run.py"],
        "overrides": ["quant=mxfp8_all"],
        "choices": {"model": "smoke"},
        "config": {"seed": 0},
        "environment": {"gpu": None},
        "model": {"parameters": 1, "weights": "random"},
        "data": {"name": "synthetic", "summary": "2 clips"},
        "arms": arms,
        "quality": {"all": section, "by_tag": {"motion": section}},
        "clips": [],
        "incidents": [],
        "notes": ["random weights: speed is real, quality is not"],
        "schema_version": 1,
    }
    return read(RunRecord, content)


def test_a_record_survives_the_disk(tmp_path):
    original = record(
        arm("mxfp8_all", 2.0, transform={"count": 8, "categories": {"mlp": 4, "attn": 4}, "kept_bf16": {}})
    )
    path = tmp_path / "run" / "record.json"
    save_record(original, path)
    assert load_record(path) == original
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_failed_write_keeps_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    save_record(record(), path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write: No space left on device: .*record.json"):
        save_record(dataclasses.replace(record(), seconds=2.5), path)
    assert load_record(path).seconds == 1.5
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_record_holds_every_float_in_strict_json(tmp_path):
    clip = ClipRecord.of("a", "motion", {"bf16": FrameScores([math.nan, math.inf, -math.inf, 0.1], [1.0] * 4)})
    save_record(dataclasses.replace(record(), clips=[clip]), tmp_path / "record.json")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "record.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content["clips"][0]["scores"]["bf16"]["frames"]["psnr"] == ["NaN", "Infinity", "-Infinity", 0.1]
    nan, *others = load_record(tmp_path / "record.json").clips[0].scores["bf16"].frames.psnr
    assert math.isnan(nan)
    assert others == [math.inf, -math.inf, 0.1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": {"bf16": {}}}, "arms.bf16 lacks compile, label"),
        ({"seconds": None}, "seconds: 'None' is no float"),
        ({"seconds": "1.5"}, "seconds: '1.5' is no float"),
        ({"clips": {}}, "clips: '{}' is no list"),
        ({"clips": [{"clip_id": 1, "tag": "motion"}]}, "clips[0].clip_id: '1' is no str"),
        ({"quality": {"all": {"clips": True}}}, "quality.all.clips: 'True' is no int"),
        ({"qualities": {}}, "the record has unknown qualities"),
    ],
)
def test_what_has_another_type_is_refused_by_name(tmp_path, change, said):
    path = tmp_path / "record.json"
    save_record(record(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecordError, match=re.escape(said)):
        load_record(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, '{"schema_version": NaN}', "[]", '"record"', "\x00"])
def test_what_is_no_record_is_one_error_in_no_time(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"record.json: (not a|schema_version)"):
        load_record(path)


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
    assert "Linears in MX: 8 (4 mlp, 4 attention)" in text
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


def test_an_arm_of_our_kernels_alone_says_so():
    mine = arm("mxfp4_mlp", 0.5)
    mine["compile"]["graphs"] = 0
    assert "Compiled mxfp4_mlp: nothing but kernels of ours (default, replayed as" in render(record(mine))


def test_sizes_read_naturally():
    assert [bytes_text(n) for n in (None, 12, 2048, 3 << 20, 5 << 30)] == [
        "-",
        "12 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
