"""The verdict: each criterion a check with its interval, and what they say together. Pure functions of records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.measure.conf import RUN_ENDED
from harness.measure.trust import distrust
from harness.report.gates import reading
from harness.report.gates.advice import advise
from harness.report.gates.conf import COUNTED_BYTES, THRESHOLDS, Against, GateError, GatesConf, Rule, validate
from harness.report.gates.intervals import Interval, difference_interval, mean_interval, values_needed
from harness.report.gates.reading import Unmeasured, setting
from harness.report.record import RunRecord
from harness.report.verdict import Check, Verdict, clips_in_words

SHIP, DO_NOT_SHIP, UNDECIDED = "ship", "do not ship", "undecided"
EXIT_CODES = {SHIP: 0, DO_NOT_SHIP: 3, UNDECIDED: 4}
"""Exit code of a process that was asked for a verdict. 1 (the run broke) and 2 (wrong input) are taken."""
PASS, FAIL, OPEN, NOT_MEASURED = "pass", "fail", "undecided", "not_measured"
SAME_DATA = ("source", "paths", "start", "future_frames", "batch_size", "seed", "synthetic_clips")
SAME_SECTIONS = ("model", "decoder", "sampler", "attention", "compile", "trainer")
UNITS = {"psnr": " dB", "fidelity": " dB"}
NAMES = {
    "psnr": "PSNR drop",
    "ssim": "SSIM drop",
    "fidelity": "fidelity PSNR",
    "speed": "FPS ratio",
    "memory": "memory ratio",
    "clips": "clips",
    "instabilities": "instabilities",
}
NEEDS_MORE = 1.05
"""A few more than were run: the spread is itself an estimate."""


def differences(config: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What two runs' configs differ in that must be equal for their figures to compare; empty if nothing."""
    pairs = [("data." + key, setting(config, "data", key), setting(baseline, "data", key)) for key in SAME_DATA]
    for section in SAME_SECTIONS:
        ours, theirs = (one if isinstance(one := run.get(section), Mapping) else {} for run in (config, baseline))
        pairs += [(f"{section}.{key}", ours.get(key), theirs.get(key)) for key in sorted({*ours, *theirs})]
    return [f"{name}: {theirs} in the baseline, {ours} here" for name, ours, theirs in pairs if ours != theirs]


def check_comparable(config: Mapping[str, Any], baseline: RunRecord) -> None:
    """Raise ``GateError`` if a run of ``config`` would not compare with the record ``baseline``."""
    different = differences(config, baseline.config)
    if (why := reading.unsound(baseline)) is not None:
        different.append(f"the baseline cannot be stood on, {why}")
    if different:
        raise GateError(
            f"gates.baseline: run {baseline.run_id} does not compare: " + "; ".join(different) + ". "
            "Run the baseline again with the same overrides, only quant and kv may differ"
        )


def evaluate(record: RunRecord, conf: GatesConf, baseline: RunRecord | None = None) -> Verdict:
    """Judge a run.

    Args:
        record: a run's; it may come from anywhere.
        conf: the gate.
        baseline: the record that ``conf.baseline`` names, with ``against=record``.

    Raises:
        GateError: if the gate is not valid, the run has no candidate, or the baseline does not compare.
    """
    validate(conf)
    if (conf.against == Against.record) != (baseline is not None):
        raise GateError(f"gates: against={conf.against} and {'a' if baseline else 'no'} baseline record given")
    if baseline is not None:
        check_comparable(record.config, baseline)
    why = reading.unsound(record)
    if why is None and record.candidate is None:
        raise GateError("gates: the run has no candidate arm (quant=bf16 kv=bf16): there is nothing to judge")
    checks: list[Check] = []
    notes: list[str] = []
    if why is not None and not _ended_by_candidate(record, conf):
        verdict, reason = UNDECIDED, f"{why}, and so it is not judged"
    else:
        checks = _condition_checks(record, conf) if why else _checks(record, conf, baseline)
        verdict, reason = _verdict(checks, conf)
        notes = [*_notes(record, conf, baseline), *([f"Not judged further: {why}."] if why else [])]
    found = Verdict(
        title=conf.title,
        against="BF16" if baseline is None else f"{reading.last_arm(baseline).label} ({baseline.run_id})",
        baseline=conf.baseline,
        rule=str(conf.rule),
        confidence=conf.confidence,
        verdict=verdict,
        reason=reason,
        checks=checks,
        left_out=list(conf.left_out),
        not_asked=list(conf.not_asked),
        notes=notes,
    )
    return replace(found, next=advise(record, found))


def _ended_by_candidate(record: RunRecord, conf: GatesConf) -> bool:
    """Whether the harness itself broke the run off because the candidate did what the gate forbids.

    That much is proven: it is the one verdict over a run that is not complete.
    """
    try:
        bf16_lost = any(row.kind == reading.NON_FINITE for row in reading.incidents(record, "bf16"))
        ended = any(row.action == RUN_ENDED for row in reading.candidate_instabilities(record))
        reading.check_weights(record)
    except Unmeasured:
        return False
    return conf.asks("instabilities") and record.status == "failed" and ended and not bf16_lost


def _checks(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> list[Check]:
    return [
        *_quality_checks(record, conf, baseline),
        *_cost_checks(record, conf, baseline),
        *_condition_checks(record, conf),
    ]


def _quality_checks(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> list[Check]:
    checks = []
    for criterion, relation in (("psnr", "<="), ("ssim", "<="), ("fidelity", ">=")):
        if not conf.asks(criterion):
            continue
        try:
            if criterion == "fidelity":
                values = list(reading.clip_fidelity(record, conf).values())
            else:
                values = list(reading.clip_drops(record, criterion, conf, baseline).values())
        except Unmeasured as error:
            checks.append(_missing(criterion, relation, conf, str(error)))
            continue
        interval = mean_interval(values, conf.confidence, conf.resamples, conf.seed)
        check = _check(criterion, float(np.mean(values)), relation, conf, interval, "one clip gives no interval")
        checks.append(_with_clips(check, values, len(record.clips), conf))
    return checks


def _with_clips(check: Check, values: Sequence[float], clips: int, conf: GatesConf) -> Check:
    """The check with what would decide it: how many clips at this spread."""
    if check.status != OPEN:
        return check
    needed = values_needed(values, check.threshold, conf.confidence)
    if needed is None:
        if len(values) < 2:
            return replace(check, needs_clips=max(2, conf.min_clips), note=f"{check.note}; run two clips at the least")
        return replace(check, note="it lies at the threshold, and no number of clips would decide it")
    # Clips of which nothing can be judged will be among the new ones as well.
    needed = math.ceil(max(needed, len(values) + 1) * NEEDS_MORE * clips / len(values))
    needs = f"{clips_in_words(needed)} would decide it at this spread"
    return replace(check, needs_clips=needed, note=f"{check.note}; {needs}")


def _figure(criterion: str, conf: GatesConf) -> str:
    """What the check is called: with its unit, and what was added up."""
    which = {"speed": f" ({conf.fps})", "memory": f" ({' + '.join(conf.memory)})"}.get(criterion, "")
    return NAMES[criterion] + UNITS.get(criterion, "") + which


def _threshold(criterion: str, conf: GatesConf) -> float:
    return float(getattr(conf, THRESHOLDS[criterion]))


def _check(
    criterion: str, value: float, relation: str, conf: GatesConf, interval: Interval | None, lacking: str
) -> Check:
    """A check of a measured value; ``lacking`` says why there is no ``interval``."""
    threshold = _threshold(criterion, conf)
    margin = threshold - value if relation == "<=" else value - threshold
    if conf.rule == Rule.point:
        status, note = (PASS if _within(value, relation, threshold) else FAIL), "judged by the point estimate alone"
    elif interval is None:
        status, note = OPEN, lacking
    else:
        inside = [_within(end, relation, threshold) for end in interval]
        status = PASS if all(inside) else OPEN if any(inside) else FAIL
        note = "the interval crosses the threshold" if status == OPEN else ""
    return Check(criterion, _figure(criterion, conf), value, relation, threshold, margin, status, interval, note)


def _within(value: float, relation: str, threshold: float) -> bool:
    """``value`` meets the threshold; sums in another order may differ in the last bits."""
    slack = 1e-9 * max(1.0, abs(threshold))
    return value <= threshold + slack if relation == "<=" else value >= threshold - slack


def _missing(criterion: str, relation: str, conf: GatesConf, note: str) -> Check:
    threshold = _threshold(criterion, conf)
    return Check(criterion, _figure(criterion, conf), None, relation, threshold, None, NOT_MEASURED, None, note)


def _cost_checks(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> list[Check]:
    checks = []
    for criterion, relation, judged in (("speed", ">=", _speed), ("memory", "<=", _memory)):
        if not conf.asks(criterion):
            continue
        try:
            checks.append(judged(record, conf, baseline))
        except Unmeasured as error:
            checks.append(_missing(criterion, relation, conf, str(error)))
    return checks


def _speed(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> Check:
    """Candidate / BF16 of the run, divided by the same of the baseline."""
    if baseline is not None and reading.machine(record) != reading.machine(baseline):
        raise Unmeasured("the baseline ran on another machine")
    ours = reading.speed_ratios(record, conf.fps)
    theirs = None if baseline is None else reading.speed_ratios(baseline, conf.fps)
    if theirs is None or theirs == [0.0]:
        centre, interval = float(np.mean(ours)), mean_interval(ours, conf.confidence, conf.resamples, conf.seed)
    else:
        centre = float(np.mean(ours) - np.mean(theirs))
        interval = difference_interval(ours, theirs, conf.confidence)
    ends = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    check = _check("speed", math.exp(centre), ">=", conf, ends, "too few frames were timed for an interval")
    doubts = [
        text
        for run in (record, baseline)
        if run is not None
        for text in distrust({name: arm.speed for name, arm in run.arms.items()})
    ]
    if doubts and check.status in (PASS, FAIL):
        check = replace(check, status=OPEN, note=doubts[0].rstrip("."))
    elif check.status == OPEN and interval is not None:
        check = replace(check, note=f"{doubts[0].rstrip('.') if doubts else check.note + '; time more frames'}")
    return check


def _memory(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> Check:
    """Bytes of the candidate over BF16's, or over those of the baseline's candidate."""
    ours = reading.memory(reading.last_arm(record), conf)
    theirs = reading.memory(record.arms["bf16"] if baseline is None else reading.last_arm(baseline), conf)
    if min(theirs) <= 0 or min(ours) < 0:
        raise Unmeasured("bytes of nothing cannot be compared")
    ratio = float(np.mean(ours) / np.mean(theirs))
    if all(name in COUNTED_BYTES for name in conf.memory):
        return _check("memory", ratio, "<=", conf, (ratio, ratio), "")
    if baseline is None and len(ours) != len(theirs):
        raise Unmeasured("the arms' peaks are of different batches")
    logs = [np.log(np.maximum(values, 1.0)) for values in (ours, theirs)]
    if baseline is None:
        interval = mean_interval(list(logs[0] - logs[1]), conf.confidence, conf.resamples, conf.seed)
    else:
        interval = difference_interval(list(logs[0]), list(logs[1]), conf.confidence)
    ends = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return _check("memory", ratio, "<=", conf, ends, "one batch gives no interval")


def _condition_checks(record: RunRecord, conf: GatesConf) -> list[Check]:
    """What must hold beside the figures: enough clips, nothing unstable."""
    checks = []
    if conf.asks("clips"):
        clips = len(record.clips)
        enough = clips >= conf.min_clips
        note = "" if enough else f"{clips} of at least {conf.min_clips} clips"
        status, needs = (PASS, None) if enough else (OPEN, conf.min_clips)
        margin = clips - conf.min_clips
        checks.append(Check("clips", "clips", clips, ">=", conf.min_clips, margin, status, None, note, needs))
    if conf.asks("instabilities"):
        checks.append(_instability_check(record))
    return checks


def _instability_check(record: RunRecord) -> Check:
    try:
        reading.check_weights(record)
        unstable = reading.candidate_instabilities(record)
    except Unmeasured as error:
        return Check("instabilities", "instabilities", None, "<=", 0, None, NOT_MEASURED, None, str(error))
    count, note = len(unstable), "; ".join(incident.message[:300] for incident in unstable[:3])
    return Check("instabilities", "instabilities", count, "<=", 0, -count, FAIL if count else PASS, None, note)


def _verdict(checks: Sequence[Check], conf: GatesConf) -> tuple[str, str]:
    """The verdict and why, as the rest of its sentence."""
    failed = [check for check in checks if check.status == FAIL]
    if failed:
        return DO_NOT_SHIP, "; ".join(map(_said, failed))
    still = [check for check in checks if check.status in (OPEN, NOT_MEASURED)]
    if still:
        return UNDECIDED, "; ".join(dict.fromkeys(map(_said, still)))
    return SHIP, "; ".join(_said(check) for check in checks if check.criterion in THRESHOLDS)


def _said(check: Check) -> str:
    """One check in words: its figure, its bound and what is allowed."""
    name, unit = NAMES[check.criterion], UNITS.get(check.criterion, "")
    if check.status == NOT_MEASURED:
        return f"{name} not measured ({check.note})"
    if check.criterion == "clips":
        return check.note
    if check.criterion == "instabilities":
        return f"the candidate is unstable ({check.note or check.value})"
    allowed = f"{'at most' if check.relation == '<=' else 'at least'} {check.threshold:g}{unit} allowed"
    text = f"{name} {check.value:.3f}{unit}"
    if check.interval is not None and check.interval[0] != check.interval[1]:
        low, high = check.interval
        text += f" ({low:.3f} to {high:.3f})"
    return f"{text}, {allowed}" + (f": {check.note}" if check.note else "")


def _notes(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> list[str]:
    """What qualifies the verdict."""
    notes = []
    if conf.not_asked:
        notes.append(f"Not asked: {', '.join(NAMES[name] for name in conf.not_asked)}.")
    if conf.rule == Rule.point:
        notes.append("Judged by point estimates alone (gates.rule=point): noise could have decided it.")
    else:
        notes.append(
            f"Each end of an interval holds with {conf.confidence:.3g} confidence; "
            "a criterion passes or fails with its whole interval."
        )
    notes += _cut_notes(record, conf, baseline)
    before = None if baseline is None or baseline.gates is None else baseline.gates.verdict
    if before not in (None, SHIP):
        notes.append(f"The baseline stands on nothing itself: its own verdict is {before}.")
    return notes


def _cut_notes(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> list[str]:
    notes = []
    if conf.frames is not None:
        notes.append(f"Judged over the first {conf.frames} generated frames of each clip (gates.frames).")
    try:
        lost = reading.lost_from(record)
    except Unmeasured:
        return notes
    if lost:
        where = ", ".join(f"{clip} from frame {frame}" for clip, frame in sorted(lost.items()))
        notes.append(
            f"Judged without the frames after BF16 itself became unstable, which prove nothing about a format: {where}."
        )
    return notes
