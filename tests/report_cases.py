"""Run records to build pages from: one that a real run would leave, and its variations."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np

from harness.report.codec import read
from harness.report.record import RunRecord
from harness.report.video import Panel, write_comparison

FRAMES = 8
NASTY = "<script>window.hacked = 1</script>\"'&"
SPREAD = {"median": 10.0, "p10": 9.0, "p90": 12.0, "mean": 10.5, "n": 8}

TRANSFORM = {"count": 2, "categories": {"mlp": 2}, "names": ["blocks.0.mlp.fc1"], "kept_bf16": {"fc2": "4 bit"}}


def arm(label, factor=1.0, emulated=False):
    stats = {key: value if key == "n" else value * factor for key, value in SPREAD.items()}
    quantised = label != "BF16"
    return {
        "label": label,
        "numeric_path": {
            "linears": "W8A16 E4M3" if quantised else "BF16",
            "kv": "K bf16, V bf16",
            "attention": "sdpa",
            "architecture": "cpu",
            "emulated": emulated,
        },
        "speed_is_meaningful": not emulated,
        "transform": {
            "count": 2,
            "categories": {"mlp": 2},
            "names": ["blocks.0.mlp.fc1"],
            "kept_bf16": {"fc2": "4 bit"},
        }
        if quantised
        else None,
        "speed": {
            "pipeline_fps": 100 / factor,
            "total_fps": 80 / factor,
            "dit_ms": stats,
            "decoder_ms": SPREAD,
            "total_ms": stats,
            "prefill_ms": None,
        },
        "parts": {"method": "instrumented eager pass", "frames": 3, "ms": {"attention": stats, "mlp": stats}},
        "memory": {
            "weight_bytes": int((1 << 24) / factor),
            "kv_window_bytes": 1 << 21,
            "kv_scratch_bytes": 0,
            "transient": None,
            "peak_allocated": None,
            "peak_reserved": None,
            "process_peak_rss": 1 << 30,
        },
        "compile": {"enabled": False, "mode": "default", "cuda_graph": False, "cold_start_s": 0.5},
    }


def _section(scores, clips):
    curve = {
        "psnr": [scores["psnr"] - i for i in range(FRAMES)],
        "ssim": [scores["ssim"] - i / 50 for i in range(FRAMES)],
    }
    return {**scores, "curve": curve}


def quality(one_arm=False, recording=True):
    sections = {"bf16": {"psnr": 25.0, "ssim": 0.8}} if recording else {}
    if not one_arm:
        sections["fidelity"] = {"psnr": 41.5, "ssim": 0.99}
        if recording:
            sections["candidate"] = {"psnr": 24.5, "ssim": 0.79}
    every = {"clips": 2, **{name: _section(scores, 2) for name, scores in sections.items()}}
    if {"bf16", "candidate"} <= sections.keys():
        every["drop"] = {"psnr": 0.5, "ssim": 0.01}
    return {"all": every, "by_tag": {"motion": every, "stand_still": every}}


def clip(name, tag, one_arm=False, drop=0.5):
    scores = {
        arm: {"psnr": psnr, "ssim": ssim, "frames": {"psnr": [psnr] * FRAMES, "ssim": [ssim] * FRAMES}}
        for arm, psnr, ssim in (("bf16", 25.0, 0.8), ("candidate", 25.0 - drop, 0.79), ("fidelity", 41.5, 0.99))
        if arm == "bf16" or not one_arm
    }
    dropped = None if one_arm else {"psnr": drop, "ssim": 0.01}
    return {"clip_id": name, "tag": tag, "scores": scores, "drop": dropped, "video": f"videos/{name}.mp4"}


def record(candidate="mxfp8_all", emulated=False, factor=2.0, **changes):
    arms = {"bf16": arm("BF16")}
    if candidate:
        arms["candidate"] = arm(candidate, factor, emulated)
    whole = {
        "run_id": "r1",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 12.5,
        "status": "complete",
        "command": ["run.py", "quant=mxfp8_all"],
        "overrides": ["quant=mxfp8_all"],
        "choices": {"model": "smoke"},
        "config": {"seed": 0, "data": {"paths": ["clips"]}},
        "environment": {"gpu": None, "cpu": "a CPU", "packages": {"torch": "2.13"}},
        "model": {
            "weights": "checkpoint",
            "decoder_weights": "checkpoint",
            "parameters": 1234567,
            "arch": {"n_layers": 2},
        },
        "data": {"name": "clips", "summary": "2 of 2 clips", "future_frames": FRAMES, "clips": []},
        "arms": arms,
        "quality": quality(one_arm=not candidate),
        "clips": [clip("walk", "motion", not candidate), clip("wait", "stand_still", not candidate, drop=0.2)],
        "notes": ["A CPU run."],
        "incidents": [],
        "schema_version": 1,
    }
    return read(RunRecord, whole | changes)


def completed(content):
    """A record of which a test gives but some fields; the others are those of ``record()``."""
    return _merged(asdict(record()), content)


def _merged(base, changes):
    """``changes`` over ``base``, section by section; arms that are not in ``changes`` are left out."""
    merged = dict(base)
    for key, value in changes.items():
        if key == "arms":
            merged[key] = {name: _merged(base[key]["bf16"], one) for name, one in value.items()}
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merged(base[key], value)
        else:
            merged[key] = value
    return merged


def write(folder, run_record, videos=False):
    """Write a record, and videos of its clips, as a run leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(asdict(run_record)))
    for found in run_record.clips if videos else []:
        shades = np.linspace(40, 200, FRAMES, dtype=np.uint8)
        frames = np.broadcast_to(shades[:, None, None, None], (FRAMES, 32, 48, 3))
        names = ["recording", *run_record.arms]
        panels = [Panel(name, frames + np.uint8(10 * (name == "candidate"))) for name in names]
        write_comparison(folder / found.video, panels, fps=10.0)
    return folder
