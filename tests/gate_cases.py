"""Records to judge, made by hand: a record needs no run."""

from dataclasses import asdict

import report_cases
import yaml

from harness.config import ROOT
from harness.report import gates
from harness.report.codec import read
from harness.report.gates import GatesConf
from harness.report.record import RunRecord

GATES = {path.stem: path for path in (ROOT / "conf" / "gates").glob("*.yaml")}
FRAMES = 25
GPU = {"name": "GPU", "count": 1, "compute_capability": "9.0", "memory_bytes": 1 << 36}


def gate(name, **changes):
    return GatesConf.of({**yaml.safe_load(GATES[name].read_text()), **changes})


def jitter(number, frame):
    """Up to 0.4 % of a time, another for every frame and clip, with no pattern between neighbours."""
    return 1 + ((number * 7 + frame * frame * 3) % 9 - 4) / 1000


def spans(fps, number, decoder=2.0):
    frames = range(FRAMES)
    return {
        "dit_ms": [1000 / fps * jitter(number, frame) for frame in frames],
        "decoder_ms": [decoder * jitter(number, frame + 3) for frame in frames],
    }


def scores(drop, frames=FRAMES):
    values = {"bf16": (30.0, 0.9), "candidate": (30.0 - drop, 0.9 - drop / 100), "fidelity": (40.0, 0.95)}
    return {
        name: {"psnr": psnr, "ssim": ssim, "frames": {"psnr": [psnr] * frames, "ssim": [ssim] * frames}}
        for name, (psnr, ssim) in values.items()
    }


def batch(number, fps=100.0):
    arms = {"bf16": spans(100.0, number), "candidate": spans(fps, number + 1)}
    return {"clips": [f"clip_{number}"], "order": list(arms), "arms": arms, "fallback": None}


def clip(number, drop):
    return {
        "clip_id": f"clip_{number}",
        "tag": "motion",
        "drop": {"psnr": drop, "ssim": drop / 100},
        "scores": scores(drop),
    }


def arm(label="arm", fps=100.0, meaningful=True, kv=1000, decoder=2.0):
    def stats(value):
        return {"median": value, "p10": value, "p90": 1.1 * value, "mean": value, "n": 24}

    return {
        "label": label,
        "speed_is_meaningful": meaningful,
        "speed": {
            "pipeline_fps": fps,
            "total_fps": fps,
            "skipped_frames_per_clip": 1,
            "dit_ms": stats(1000 / fps),
            "decoder_ms": stats(decoder),
        },
        "memory": {"weight_bytes": 4000, "kv_window_bytes": kv, "kv_peak_bytes": kv, "peak_allocated": None},
    }


def record(drops=(0.1, 0.1, 0.1), fps=100.0, meaningful=True, kv=1000, status="complete", incidents=()):
    sections = {name: {} for name in ("decoder", "sampler", "attention", "compile", "trainer", "data")}
    return {
        "run_id": "run",
        "status": status,
        "overrides": ["quant=mxfp8_mlp", "gates=a"],
        "arms": {"bf16": arm("BF16"), "candidate": arm("mx", fps, meaningful, kv)},
        "clips": [clip(number, drop) for number, drop in enumerate(drops)],
        "timings": [batch(number, fps) for number in range(len(drops))],
        "data": {"available": 12, "quality_is_meaningful": True},
        "incidents": list(incidents),
        "fallbacks": [],
        "environment": {"gpu": GPU, "cpu": "CPU"},
        "model": {"weights": "checkpoint", "decoder_weights": "checkpoint", "arch": {"n_layers": 4}},
        "config": {"model": {"window": 4}, **sections},
    }


def incident(arm="candidate", kind="frozen", clip="clip_0", frame=2, **more):
    return {"arm": arm, "kind": kind, "clip": clip, "frame": frame, "message": f"{kind} frames", **more}


def checks(found):
    return {check["criterion"]: check for check in found["checks"]}


def judged(found, conf, baseline=None):
    """The verdict over records as files hold them; fields that a test does not give are filled in."""
    given = [None if one is None else read(RunRecord, report_cases.completed(one)) for one in (found, baseline)]
    return gates.evaluate(given[0], conf, given[1])


def evaluate(found, conf, baseline=None):
    """The same, as a file holds it."""
    return asdict(judged(found, conf, baseline))


def numerics(errors):
    """Of MX Linears by name: these relative errors, and whatever else."""
    error = {"mae": 0.1, "max": 0.1, "sqnr_db": 20.0}
    use = {"saturated": 0, "saturated_fraction": 0.0, "nan_blocks": 0, "clipped": 0}
    use |= dict.fromkeys(("scale_min", "scale_mean", "scale_max"))
    layer = {"category": "mlp", "rows": 1, "in_features": 32, "out_features": 32, "weight": use}
    layers = {name: {**layer, **error, "rel": rel, "bf16": {**error, "rel": 0.0}} for name, rel in errors.items()}
    return {
        "method": "sampled",
        "clip": "clip_0",
        "layers": layers,
        "categories": {},
        "worst": max(errors, key=errors.get),
    }


def full(**changes):
    """A record that the loader takes."""
    return report_cases.completed(record(**changes))
