"""Takes figures out of a run's record, which may come from anywhere.

Its types hold (see :mod:`harness.report.codec`), its values need not make sense: what is missing, not finite, out of
range or contradicts the rest is a :class:`Unmeasured` with the place in its message, so that it can neither pass a gate
nor end in a traceback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.report.gates.blocks import block_ratios
from harness.report.gates.conf import COUNTED_BYTES, GatesConf
from harness.report.record import COMPLETE, RunRecord
from harness.report.sections import ArmRecord, BatchTimes, ClipRecord, IncidentRecord

LOST = ("structure", "black", "frozen")
"""Incidents of the BF16 arm after which its frames prove nothing about a format."""
NON_FINITE = "non_finite"
LARGEST = 1e15
"""No figure of a record is larger: milliseconds, bytes, dB."""
RANGES = {"psnr": (-1.0, 100.001), "ssim": (-1.001, 1.001)}
"""What scores of frames in [0, 1] can be; PSNR is capped at 100 dB."""
TOLERANCE = 1e-3
"""dB by which a record's own drop may differ from its frames'."""


class Unmeasured(Exception):
    """A figure that the record does not hold, and why; the message ends a sentence."""


@dataclass(frozen=True)
class ClipScores:
    """Per frame, of one clip: ``bf16`` and ``candidate`` against the recording, ``fidelity`` between them."""

    bf16: list[float] | None
    candidate: list[float] | None
    fidelity: list[float] | None


def setting(config: Mapping[str, Any], section: str, name: str) -> Any:
    """A field of a config, which is plain data and may be of another version; ``None`` where it is missing."""
    found = config.get(section)
    return found.get(name) if isinstance(found, Mapping) else None


def finite(value: float | None) -> float | None:
    """``value`` if it is a number that a record can hold: finite, and not absurdly large."""
    return value if value is not None and abs(value) <= LARGEST else None


def clip_ids(record: RunRecord) -> list[str]:
    """Names of the finished clips.

    Raises:
        Unmeasured: if one is there twice: a clip counted twice is no second clip.
    """
    names = [clip.clip_id for clip in record.clips]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise Unmeasured(f"clip {twice} is in the record twice")
    return names


def _frames(clip: ClipRecord, arm: str, metric: str) -> list[float] | None:
    if arm not in clip.scores:
        return None
    values: list[float] = getattr(clip.scores[arm].frames, metric)
    low, high = RANGES[metric]
    if not values or not all(low <= value <= high for value in values):
        raise Unmeasured(f"clip {clip.clip_id}: {arm}'s {metric} per frame are no scores")
    return values


def clip_scores(record: RunRecord, metric: str) -> dict[str, ClipScores]:
    """Scores of every clip, frame by frame.

    Raises:
        Unmeasured: if a clip's are none, or contradict each other.
    """
    found = {}
    for name, clip in zip(clip_ids(record), record.clips, strict=True):
        scores = ClipScores(*(_frames(clip, arm, metric) for arm in ("bf16", "candidate", "fidelity")))
        lengths = {len(values) for values in vars(scores).values() if values is not None}
        if len(lengths) > 1:
            raise Unmeasured(f"clip {name}: its scores are of {' and '.join(map(str, sorted(lengths)))} frames")
        _check_drop(clip, scores, metric)
        found[name] = scores
    return found


def _check_drop(clip: ClipRecord, scores: ClipScores, metric: str) -> None:
    if scores.bf16 is None or scores.candidate is None:
        return
    said = None if clip.drop is None else finite(getattr(clip.drop, metric))
    if said is None or abs(said - float(np.mean(scores.bf16) - np.mean(scores.candidate))) > TOLERANCE:
        raise Unmeasured(f"clip {clip.clip_id}: its {metric} drop is not what its frames say")


def incidents(record: RunRecord, arm: str) -> list[IncidentRecord]:
    """Instabilities of one arm."""
    return [incident for incident in record.incidents if incident.arm == arm]


def lost_from(record: RunRecord) -> dict[str, int]:
    """Per clip in which BF16 itself became unstable: its first such frame; later ones prove nothing about a format.

    Raises:
        Unmeasured: if an incident does not say where it happened.
    """
    found: dict[str, int] = {}
    for incident in incidents(record, "bf16"):
        clip, frame = incident.clip, incident.frame
        if incident.kind not in LOST:
            continue
        if clip is None or frame is None or frame < 0:
            raise Unmeasured("an incident of BF16 does not say where it happened")
        found[clip] = min(frame, found.get(clip, frame))
    return found


def judged_frames(record: RunRecord, conf: GatesConf, baseline: RunRecord | None) -> dict[str, int | None]:
    """Per clip: how many of its frames are judged, ``None`` = all.

    Raises:
        Unmeasured: see :func:`lost_from`.
    """
    runs = [lost_from(run) for run in (record, baseline) if run is not None]
    found: dict[str, int | None] = {}
    for name in clip_ids(record):
        ends = [run[name] for run in runs if name in run]
        if conf.frames is not None:
            ends.append(conf.frames)
        found[name] = min(ends, default=None)
    return found


def check_weights(record: RunRecord) -> None:
    """Raise ``Unmeasured`` where pictures mean nothing: random weights, synthetic clips, formats changed midway."""
    for kind, name in ((record.model.weights, "the model"), (record.model.decoder_weights, "the decoder")):
        if kind == "random":
            raise Unmeasured(f"random weights: the quality of {name} means nothing")
        if kind != "checkpoint":
            raise Unmeasured(f"the record does not say whether {name} has weights of a checkpoint")
    if not record.data.quality_is_meaningful:
        raise Unmeasured("synthetic clips: there is nothing to be true to")
    if record.fallbacks:
        raise Unmeasured("the candidate fell back to other formats midway: judge a run in the formats it ended with")


def clip_drops(record: RunRecord, metric: str, conf: GatesConf, baseline: RunRecord | None = None) -> dict[str, float]:
    """Per clip: how much worse the candidate is than BF16, or how much more it lost than the baseline's candidate.

    Means over the frames that are judged; clips without one are left out.

    Raises:
        Unmeasured: if it cannot be told.
    """
    check_weights(record)
    scores, frames = clip_scores(record, metric), judged_frames(record, conf, baseline)
    before = None if baseline is None else clip_scores(baseline, metric)
    drops: dict[str, float] = {}
    for name, clip in scores.items():
        if clip.bf16 is None or clip.candidate is None:
            raise Unmeasured("no clip was scored against a recording" if not drops else f"clip {name} has no scores")
        if frames[name] == 0:
            continue
        drops[name] = _drop(clip, frames[name])
        if before is not None:
            if name not in before:
                raise Unmeasured(f"the baseline has no clip {name}")
            drops[name] -= _drop(before[name], frames[name])
    if not drops:
        raise Unmeasured("no clip was finished" if not scores else "BF16 itself is unstable from the first frame on")
    return drops


def _drop(scores: ClipScores, frames: int | None) -> float:
    """BF16 minus candidate; a run of BF16 alone dropped nothing."""
    if scores.candidate is None:
        return 0.0
    if scores.bf16 is None:
        raise Unmeasured("the baseline was not scored against a recording")
    return float(np.mean(scores.bf16[:frames]) - np.mean(scores.candidate[:frames]))


def clip_fidelity(record: RunRecord, conf: GatesConf) -> dict[str, float]:
    """Per clip: PSNR of the candidate against BF16, dB, over the frames that are judged.

    Raises:
        Unmeasured: if it cannot be told.
    """
    check_weights(record)
    frames = judged_frames(record, conf, None)
    scores = clip_scores(record, "psnr")
    if not scores:
        raise Unmeasured("no clip was finished")
    if any(clip.fidelity is None for clip in scores.values()):
        raise Unmeasured("not every clip was compared with BF16")
    return {name: float(np.mean(clip.fidelity[: frames[name]])) for name, clip in scores.items() if frames[name] != 0}  # type: ignore[index]


def candidate_instabilities(record: RunRecord) -> list[IncidentRecord]:
    """Incidents of the candidate that are its own: not those after BF16 had lost the clip, except NaN and Inf.

    Raises:
        Unmeasured: see :func:`lost_from`.
    """
    lost = lost_from(record)

    def own(incident: IncidentRecord) -> bool:
        end = None if incident.clip is None else lost.get(incident.clip)
        return incident.kind not in LOST or end is None or incident.frame is None or incident.frame < end

    return [incident for incident in incidents(record, "candidate") if own(incident)]


def speed_ratios(record: RunRecord, fps: str) -> list[float]:
    """log(candidate's FPS / BF16's) of blocks of frames; ``[0.0]`` of a run of BF16 alone.

    Raises:
        Unmeasured: if the record holds no usable times, or those of an emulated kernel.
    """
    candidate = record.candidate
    if candidate is None:
        return [0.0]
    if not candidate.speed_is_meaningful:
        raise Unmeasured(f"{candidate.label}: emulated kernel, its speed says nothing about MX")
    skipped = candidate.speed.skipped_frames_per_clip
    if skipped < 0:
        raise Unmeasured("the record does not say how many first frames of a clip are not counted")
    if not record.timings:
        raise Unmeasured("the record holds no frame times")
    times: dict[str, list[list[float]]] = {"bf16": [], "candidate": []}
    for batch in record.timings:
        if batch.fallback != record.timings[-1].fallback:
            continue  # in other formats than those it ended with
        pair = [_times(batch, arm, fps, skipped) for arm in times]
        if len(pair[0]) != len(pair[1]):
            raise Unmeasured(f"{_batch(batch)}: its arms were timed over different frames")
        for arm, frames in zip(times, pair, strict=True):
            times[arm].append(frames)
    return block_ratios(times["bf16"], times["candidate"])


def _batch(batch: BatchTimes) -> str:
    return f"batch {batch.clips}"[:200]


def _times(batch: BatchTimes, arm: str, fps: str, skipped: int) -> list[float]:
    """Milliseconds of each frame of a batch that counts."""
    if arm not in batch.arms:
        raise Unmeasured(f"{_batch(batch)}: {arm} was not timed")
    frames = batch.arms[arm]
    columns = [("dit_ms", frames.dit_ms), ("decoder_ms", frames.decoder_ms)][: 1 if fps == "pipeline_fps" else 2]
    for span, values in columns:
        if not values or not all(0 < value <= LARGEST for value in values):
            raise Unmeasured(f"{_batch(batch)}: {arm}'s {span} per frame are no times")
    if len({len(values) for _, values in columns}) > 1:
        raise Unmeasured(f"{_batch(batch)}: {arm}'s spans were timed over different frames")
    whole = [sum(frame) for frame in zip(*(values for _, values in columns), strict=True)]
    return whole[min(skipped, len(whole) - 1) :]


def machine(record: RunRecord) -> str:
    """What the run's times were taken on."""
    there = record.environment
    return str(there.cpu if there.gpu is None else there.gpu.name)


def memory(arm: ArmRecord, conf: GatesConf) -> list[float]:
    """Bytes of ``conf.memory``, added up: one value where they are counted, one per batch where an allocator saw them.

    Raises:
        Unmeasured: if a figure is missing.
    """
    counted = [_bytes(arm, name) for name in conf.memory]
    allocator = [name for name in conf.memory if name not in COUNTED_BYTES]
    if not allocator:
        return [sum(counted)]
    fixed = sum(value for name, value in zip(conf.memory, counted, strict=True) if name in COUNTED_BYTES)
    if not arm.memory.peaks:
        raise Unmeasured("the record holds no peak per batch")
    return [fixed + _peak(peak, allocator) for peak in arm.memory.peaks]


def _bytes(arm: ArmRecord, name: str) -> float:
    value = getattr(arm.memory, name)
    if value is None:
        raise Unmeasured(f"{name} was not measured on this device")
    if not 0 <= value <= LARGEST:
        raise Unmeasured(f"{name} is no number of bytes")
    return float(value)


def _peak(peak: Mapping[str, int], names: Sequence[str]) -> float:
    values = [peak.get(name, -1) for name in names]
    if not all(0 <= value <= LARGEST for value in values):
        raise Unmeasured("a batch's peak is no number of bytes")
    return float(sum(values))


def last_arm(record: RunRecord) -> ArmRecord:
    """The candidate, or BF16 where it ran alone."""
    return record.candidate or record.first


def _check_every_clip(record: RunRecord) -> None:
    """Raise ``Unmeasured`` if a clip that was asked for is gone; one with NaN or Inf has no scores, but an incident."""
    told = {incident.clip for incident in record.incidents if incident.kind == NON_FINITE}
    there = {*clip_ids(record), *told}
    gone = [clip.id for clip in record.data.clips if clip.id not in there]
    if gone:
        raise Unmeasured(f"clip {gone[0]} was rolled out and is not in the record")


def unsound(record: RunRecord) -> str | None:
    """Why a run may be neither judged, reused nor recommended; ``None`` if it may.

    It must have ended, BF16 must be there and finite, and every clip that was asked for have scores that are numbers.
    """
    if record.status != COMPLETE:
        return f"the run is {record.status}"
    if "bf16" not in record.arms:
        return "the record has no BF16 arm"
    try:
        if any(incident.kind == NON_FINITE for incident in incidents(record, "bf16")):
            return "BF16 itself is not finite: there is nothing to hold the candidate against"
        clip_scores(record, "psnr")
        _check_every_clip(record)
    except Unmeasured as error:
        return str(error)
    return None
