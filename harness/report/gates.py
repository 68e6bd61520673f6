"""Gates: may a candidate ship? Judged from run records alone, so that an old run can be judged again.

A gate is a set of thresholds. Each gives one check: its figure, threshold, margin and a status, ``pass``, ``fail`` or
``not_measured``. The verdict follows:

* ``do not ship``: a check failed;
* ``undecided``: none failed, but a quality or memory figure, a clip or the end of the run is missing;
* ``ship``: the rest. Speed that was not measured (an emulated kernel's says nothing about MX) does not stand in the
  way, but then the verdict says that it rests on quality alone.

Drops carry a percentile bootstrap interval over clips (Efron & Tibshirani 1993, ch. 13): clips are drawn with
replacement, paired, and their mean drop taken. A check whose interval crosses its threshold says that noise could
flip it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np
from rich.table import Table

SHIP, DO_NOT_SHIP, UNDECIDED = "ship", "do not ship", "undecided"
EXIT_CODES = {SHIP: 0, DO_NOT_SHIP: 3, UNDECIDED: 4}
"""Exit code of a process that was asked for a verdict. 1 (the run broke) and 2 (wrong input) are taken."""
PASS, FAIL, NOT_MEASURED = "pass", "fail", "not_measured"
FPS_FIGURES = ("pipeline_fps", "total_fps")
MEMORY_FIGURES = (
    "weight_bytes",
    "kv_window_bytes",
    "kv_scratch_bytes",
    "kv_peak_bytes",
    "transient",
    "peak_allocated",
    "peak_reserved",
)
MIN_RESAMPLES = 2000
SAME_DATA = ("source", "paths", "start", "future_frames", "batch_size", "seed", "synthetic_clips")
SAME_SECTIONS = ("model", "decoder", "sampler", "attention", "compile", "trainer")

Record = Mapping[str, Any]


class GateError(ValueError):
    """A gate that cannot be evaluated: its config is wrong, or the records do not compare."""


class Against(StrEnum):
    """What the candidate is held against: the BF16 arm of its own run, or the candidate of an earlier ``record``."""

    bf16 = "bf16"
    record = "record"


@dataclass
class GatesConf:
    """The thresholds of a gate; null = not asked for. Fits an OmegaConf structured config.

    Attributes:
        enabled: whether the run is judged at all.
        title: what a person calls the gate.
        against: what drops and ratios are relative to.
        baseline: with ``against=record``, the ``record.json`` of what the candidate stands on.
        max_psnr_drop: dB of PSNR against the recording, mean over clips.
        max_ssim_drop: the same of SSIM.
        min_fidelity_psnr: dB of the candidate against BF16, mean over clips; for clips without a recording.
        min_fps_ratio: candidate / baseline. Against a record both are first divided by the BF16 arm of their own run,
            so that a machine that was slower that day does not count.
        fps: which FPS: ``pipeline_fps`` (DiT) or ``total_fps`` (with decode).
        max_memory_ratio: candidate / baseline of the sum of ``memory``.
        memory: figures of the record's memory section; by default what the KV cache needs at its worst: its buffers as
            allocated and the room to dequantise a layer, so that a cache which keeps BF16 copies gains nothing.
        min_clips: fewer clips leave the verdict open.
        no_instabilities: NaN, Inf, black or frozen frames or lost structure in the candidate fail the gate.
        confidence: of the bootstrap interval. resamples: of the bootstrap. seed: of the bootstrap.
    """

    enabled: bool = False
    title: str = ""
    against: Against = Against.bf16
    baseline: str | None = None
    max_psnr_drop: float | None = None
    max_ssim_drop: float | None = None
    min_fidelity_psnr: float | None = None
    min_fps_ratio: float | None = None
    fps: str = "pipeline_fps"
    max_memory_ratio: float | None = None
    memory: list[str] = field(default_factory=lambda: ["kv_peak_bytes"])
    min_clips: int = 1
    no_instabilities: bool = True
    confidence: float = 0.95
    resamples: int = MIN_RESAMPLES
    seed: int = 0

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> GatesConf:
        """The gate of a record's ``config["gates"]``. Raises ``GateError`` on a field it does not know."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(section) - known)
        if unknown:
            raise GateError(f"gates: unknown {', '.join(unknown)}; allowed are {', '.join(sorted(known))}")
        return cls(**{**section, "against": Against(section.get("against", Against.bf16))})


@dataclass(frozen=True)
class Check:
    """One figure of a gate.

    ``margin`` is how far ``value`` is on the right side of ``threshold`` (negative: on the wrong one), ``interval``
    the bootstrap's, ``note`` what a person should know about the status.
    """

    figure: str
    value: float | None
    relation: str
    threshold: float
    margin: float | None
    status: str
    interval: tuple[float, float] | None = None
    note: str = ""
    decides: bool = True


def validate(conf: GatesConf) -> None:
    """Raise ``GateError`` naming every field of ``conf`` that is out of range or contradicts another."""
    problems = []
    if conf.against == Against.record and conf.baseline is None:
        problems.append(
            "against=record: give gates.baseline=<folder>/record.json, the run of what this configuration stands on "
            "(or gates.against=bf16)"
        )
    if conf.against == Against.bf16 and conf.baseline is not None:
        problems.append(f"baseline={conf.baseline} with against=bf16; use gates.against=record, or drop the baseline")
    if conf.fps not in FPS_FIGURES:
        problems.append(f"fps={conf.fps}: allowed are {', '.join(FPS_FIGURES)}")
    unknown = [name for name in conf.memory if name not in MEMORY_FIGURES]
    if unknown or not conf.memory:
        problems.append(f"memory={list(conf.memory)}: allowed are {', '.join(MEMORY_FIGURES)}")
    if conf.min_clips < 1:
        problems.append(f"min_clips={conf.min_clips}: must be at least 1")
    if not 0 < conf.confidence < 1:
        problems.append(f"confidence={conf.confidence}: must lie between 0 and 1")
    if conf.resamples < MIN_RESAMPLES:
        problems.append(f"resamples={conf.resamples}: must be at least {MIN_RESAMPLES}")
    for name in ("min_fps_ratio", "max_memory_ratio"):
        value = getattr(conf, name)
        if value is not None and not value > 0:
            problems.append(f"{name}={value}: must be above 0")
    if problems:
        raise GateError("gates config: " + "; ".join(problems))


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = MIN_RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of ``values``; ``None`` for fewer than two."""
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(sample), (resamples, len(sample)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(sample[drawn].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


def differences(config: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What two runs' configs differ in that must be equal for their figures to compare; empty if nothing."""
    pairs = [("data." + key, config["data"].get(key), baseline["data"].get(key)) for key in SAME_DATA]
    for section in SAME_SECTIONS:
        ours, theirs = config[section], baseline[section]
        pairs += [(f"{section}.{key}", ours.get(key), theirs.get(key)) for key in sorted({*ours, *theirs})]
    return [f"{name}: {theirs} in the baseline, {ours} here" for name, ours, theirs in pairs if ours != theirs]


def check_comparable(config: Mapping[str, Any], baseline: Record) -> None:
    """Raise ``GateError`` if a run of ``config`` would not compare with the record ``baseline``."""
    different = differences(config, baseline["config"])
    if baseline["status"] != "complete":
        different.append(f"the baseline's run is {baseline['status']}")
    if different:
        raise GateError(
            f"gates.baseline: run {baseline['run_id']} does not compare: " + "; ".join(different) + ". "
            "Run the baseline again with the same overrides, only quant and kv may differ"
        )


def evaluate(record: Record, conf: GatesConf, baseline: Record | None = None) -> dict[str, Any]:
    """Judge a run.

    Args:
        record: a run record as a dict.
        conf: the gate.
        baseline: the record that ``conf.baseline`` names, with ``against=record``.

    Returns:
        A dict for the record: ``title``, ``against``, ``verdict``, ``checks`` (see :class:`Check`), ``notes``.

    Raises:
        GateError: if the gate is not valid, the run has no candidate, or the baseline does not compare.
    """
    validate(conf)
    if "candidate" not in record["arms"] and not _instabilities(record):
        raise GateError("gates: the run has no candidate arm (quant=bf16 kv=bf16): there is nothing to judge")
    if (conf.against == Against.record) != (baseline is not None):
        raise GateError(f"gates: against={conf.against} and {'a' if baseline else 'no'} baseline record given")
    if baseline is not None:
        check_comparable(record["config"], baseline)
    checks = [*_quality_checks(record, conf, baseline), *_cost_checks(record, conf, baseline)]
    checks += _condition_checks(record, conf)
    verdict, notes = _verdict(checks)
    before = ((baseline or {}).get("gates") or {}).get("verdict", SHIP)
    if before != SHIP:
        notes.append(f"The baseline stands on nothing itself: its own verdict is {before}.")
    against = "BF16" if baseline is None else f"{_last_arm(baseline)['label']} ({baseline['run_id']})"
    return {
        "title": conf.title,
        "against": against,
        "baseline": conf.baseline,
        "verdict": verdict,
        "checks": [vars(check) for check in checks],
        "notes": notes,
    }


def _verdict(checks: Sequence[Check]) -> tuple[str, list[str]]:
    failed = [check for check in checks if check.status == FAIL]
    missing = [check for check in checks if check.status == NOT_MEASURED and check.decides]
    unsaid = [check for check in checks if check.status == NOT_MEASURED and not check.decides]
    if failed:
        verdict, notes = DO_NOT_SHIP, []
    elif missing:
        verdict, notes = UNDECIDED, [f"{check.figure}: {check.note}" for check in missing]
    else:
        verdict, notes = SHIP, []
    if unsaid:
        # The only figure that may be missing is speed.
        measured = "quality and memory" if any("memory" in check.figure for check in checks) else "quality"
        notes += [f"{check.figure} not measured: {check.note}." for check in unsaid]
        notes.append(f"The verdict rests on {measured} alone.")
    notes += [f"{check.figure}: {check.note}." for check in checks if check.interval and check.note]
    return verdict, notes


def _check(figure: str, value: float, relation: str, threshold: float, conf: GatesConf, sample: Any = None) -> Check:
    """A check of a measured value; ``sample`` per clip, where ``value`` is its mean."""
    margin = threshold - value if relation == "<=" else value - threshold
    status, note, interval = PASS if margin >= 0 else FAIL, "", None
    if sample is not None:
        interval = bootstrap_interval(sample, conf.confidence, conf.resamples, conf.seed)
        if interval is None:
            note = "one clip: its uncertainty is unknown"
        elif interval[0] <= threshold <= interval[1]:
            note = f"{status}, but the {conf.confidence:.0%} interval crosses the threshold: noise could flip it"
    return Check(figure, value, relation, threshold, margin, status, interval, note)


def _missing(figure: str, relation: str, threshold: float, note: str, decides: bool = True) -> Check:
    return Check(figure, None, relation, threshold, None, NOT_MEASURED, None, note, decides)


def _quality_checks(record: Record, conf: GatesConf, baseline: Record | None) -> list[Check]:
    checks = []
    for metric, name, threshold in (
        ("psnr", "PSNR drop dB", conf.max_psnr_drop),
        ("ssim", "SSIM drop", conf.max_ssim_drop),
    ):
        if threshold is None:
            continue
        drops, why = clip_drops(record, metric, baseline)
        if why:
            checks.append(_missing(name, "<=", threshold, why))
        else:
            checks.append(_check(name, float(np.mean(drops)), "<=", threshold, conf, drops))
    if conf.min_fidelity_psnr is not None:
        name, threshold = "fidelity PSNR dB", conf.min_fidelity_psnr
        values = [clip["scores"]["fidelity"]["psnr"] for clip in record["clips"] if "fidelity" in clip["scores"]]
        if record["model"].get("weights") == "random":
            checks.append(_missing(name, ">=", threshold, "random weights: quality means nothing"))
        elif not values:
            checks.append(_missing(name, ">=", threshold, "no clip was finished"))
        else:
            checks.append(_check(name, float(np.mean(values)), ">=", threshold, conf, values))
    return checks


def clip_drops(record: Record, metric: str, baseline: Record | None = None) -> tuple[list[float], str]:
    """Per clip: how much worse the candidate is than BF16, or how much more it lost than the baseline's candidate.

    Returns:
        The drops, or none and why not.
    """
    drops = {clip["clip_id"]: clip["drop"][metric] for clip in record["clips"] if clip["drop"]}
    if record["model"].get("weights") == "random":
        return [], "random weights: quality means nothing"
    if not drops:
        return [], "no clip was scored against a recording"
    if baseline is None:
        return list(drops.values()), ""
    # A baseline that ran BF16 alone dropped nothing.
    before = {clip["clip_id"]: clip["drop"][metric] if clip["drop"] else 0.0 for clip in baseline["clips"]}
    lacking = sorted(set(drops) - set(before))
    if lacking:
        return [], f"run {baseline['run_id']} has no clip {', '.join(lacking)}"
    return [dropped - before[clip] for clip, dropped in drops.items()], ""


def _last_arm(record: Record) -> Mapping[str, Any]:
    return record["arms"].get("candidate") or record["arms"]["bf16"]


def _cost_checks(record: Record, conf: GatesConf, baseline: Record | None) -> list[Check]:
    checks = []
    if conf.min_fps_ratio is not None:
        name, threshold = f"FPS ratio ({conf.fps})", conf.min_fps_ratio
        ratio, why = _fps_ratio(record, conf, baseline)
        if ratio is None:
            checks.append(_missing(name, ">=", threshold, why, decides=False))
        else:
            checks.append(_check(name, ratio, ">=", threshold, conf))
    if conf.max_memory_ratio is not None:
        name, threshold = f"memory ratio ({' + '.join(conf.memory)})", conf.max_memory_ratio
        ours = _bytes(record["arms"].get("candidate"), conf)
        theirs = _bytes(record["arms"]["bf16"] if baseline is None else _last_arm(baseline), conf)
        if ours is None or not theirs:
            checks.append(_missing(name, "<=", threshold, "not measured on this device"))
        else:
            checks.append(_check(name, ours / theirs, "<=", threshold, conf))
    return checks


def _bytes(arm: Mapping[str, Any] | None, conf: GatesConf) -> float | None:
    values = [None if arm is None else arm["memory"].get(name) for name in conf.memory]
    return None if None in values else sum(values)  # type: ignore[arg-type]


def _fps_ratio(record: Record, conf: GatesConf, baseline: Record | None) -> tuple[float | None, str]:
    """Candidate / BF16 of the run, divided by the same of the baseline; or ``None`` and why not."""
    ratio = 1.0
    for run, power in ((record, 1), (baseline, -1)):
        if run is None or "candidate" not in run["arms"]:
            continue
        bf16, candidate = run["arms"]["bf16"], run["arms"]["candidate"]
        if not candidate["speed_is_meaningful"]:
            return None, f"{candidate['label']}: emulated kernel, its speed says nothing about MX"
        figures = candidate["speed"][conf.fps], bf16["speed"][conf.fps]
        if not all(figures):
            return None, "no frame was timed"
        ratio *= (figures[0] / figures[1]) ** power
    machines = {_machine(run) for run in (record, baseline) if run is not None}
    if len(machines) > 1:
        return None, "the baseline ran on another machine"
    return ratio, ""


def _machine(record: Record) -> str:
    gpu = record["environment"].get("gpu")
    return gpu["name"] if gpu else str(record["environment"].get("cpu"))


def _instabilities(record: Record) -> list[Mapping[str, Any]]:
    return [incident for incident in record["incidents"] if incident.get("arm") == "candidate"]


def _condition_checks(record: Record, conf: GatesConf) -> list[Check]:
    """What must hold beside the figures: enough clips, a run that ended, nothing unstable."""
    clips, checks = len(record["clips"]), []
    enough = clips >= conf.min_clips
    note = "" if enough else f"{clips} of at least {conf.min_clips} clips"
    status = PASS if enough else NOT_MEASURED
    checks.append(Check("clips", clips, ">=", conf.min_clips, clips - conf.min_clips, status, None, note))
    unstable = _instabilities(record)
    if conf.no_instabilities:
        note = "; ".join(str(incident["message"]) for incident in unstable[:3])
        count = len(unstable)
        checks.append(Check("instabilities", count, "<=", 0, -count, FAIL if count else PASS, None, note))
    if record["status"] != "complete" and not (unstable and conf.no_instabilities):
        checks.append(_missing("run complete", ">=", 1, f"the run is {record['status']}"))
    return checks


def verdict_line(gates: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    title = f"{gates['title']}, " if gates["title"] else ""
    return f"Verdict ({title}against {gates['against']}): {gates['verdict'].upper()}"


def build_table(gates: Mapping[str, Any]) -> Table:
    """The checks for a person."""
    table = Table(title=verdict_line(gates), title_justify="left")
    for heading in ("gate", "figure", "threshold", "margin", "interval", "status"):
        table.add_column(heading, justify="left" if heading in ("gate", "status") else "right")
    for check in gates["checks"]:
        value, margin, interval = check["value"], check["margin"], check["interval"]
        table.add_row(
            check["figure"],
            "-" if value is None else f"{value:.4g}",
            f"{check['relation']} {check['threshold']:g}",
            "-" if margin is None else f"{margin:+.3g}",
            "" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
            check["status"].replace("_", " "),
        )
    return table
