"""Reads figures out of a record that may come from anywhere.

Nothing here trusts the record's form: what is missing, null, a string, NaN or infinite is a :class:`Unmeasured` with
the place in its message, so that it can neither pass a gate nor end in a traceback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.report.gates.blocks import block_ratios
from harness.report.gates.conf import COUNTED_BYTES, GatesConf

Record = Mapping[str, Any]

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


def pick(section: Any, path: str) -> Any:
    """The value at a dotted ``path``; ``None`` where a step of it is missing."""
    for key in path.split("."):
        if not isinstance(section, Mapping) or key not in section:
            return None
        section = section[key]
    return section


def finite(value: Any) -> float | None:
    """``value`` as a float if it is a number that a record can hold: finite, and not absurdly large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if abs(number) <= LARGEST else None


def rows(record: Record, name: str) -> list[Mapping[str, Any]]:
    """The mappings listed at ``name`` of the record.

    Raises:
        Unmeasured: if it is no list of mappings.
    """
    found = record.get(name)
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise Unmeasured(f"the record's {name} cannot be read")
    return found


def clip_ids(record: Record) -> list[str]:
    """Names of the finished clips.

    Raises:
        Unmeasured: if they cannot be read, or one is there twice: a clip counted twice is no second clip.
    """
    names = [row.get("clip_id") for row in rows(record, "clips")]
    if not all(isinstance(name, str) for name in names):
        raise Unmeasured("a clip of the record has no name")
    twice = next((str(name) for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise Unmeasured(f"clip {twice} is in the record twice")
    return names  # type: ignore[return-value]


def _frames(clip: Mapping[str, Any], arm: str, metric: str) -> list[float] | None:
    values = pick(clip, f"scores.{arm}.frames.{metric}")
    if values is None:
        return None
    numbers = [finite(value) for value in values] if isinstance(values, list) else []
    low, high = RANGES[metric]
    if not numbers or not all(number is not None and low <= number <= high for number in numbers):
        raise Unmeasured(f"clip {clip.get('clip_id')}: {arm}'s {metric} per frame are no scores")
    return numbers  # type: ignore[return-value]


def clip_scores(record: Record, metric: str) -> dict[str, ClipScores]:
    """Scores of every clip, frame by frame.

    Raises:
        Unmeasured: if a clip's cannot be read, or contradict each other.
    """
    names = clip_ids(record)
    found = {}
    for name, clip in zip(names, rows(record, "clips"), strict=True):
        scores = ClipScores(*(_frames(clip, arm, metric) for arm in ("bf16", "candidate", "fidelity")))
        lengths = {len(values) for values in vars(scores).values() if values is not None}
        if len(lengths) > 1:
            raise Unmeasured(f"clip {name}: its scores are of {' and '.join(map(str, sorted(lengths)))} frames")
        _check_drop(name, clip, scores, metric)
        found[name] = scores
    return found


def _check_drop(name: str, clip: Mapping[str, Any], scores: ClipScores, metric: str) -> None:
    if scores.bf16 is None or scores.candidate is None:
        return
    said = finite(pick(clip, f"drop.{metric}"))
    if said is None or abs(said - float(np.mean(scores.bf16) - np.mean(scores.candidate))) > TOLERANCE:
        raise Unmeasured(f"clip {name}: its {metric} drop is not what its frames say")


def incidents(record: Record, arm: str) -> list[Mapping[str, Any]]:
    """Instabilities of one arm. Raises ``Unmeasured`` if the record's incidents cannot be read."""
    return [row for row in rows(record, "incidents") if row.get("arm") == arm]


def lost_from(record: Record) -> dict[str, int]:
    """Per clip in which BF16 itself became unstable: its first such frame; later ones prove nothing about a format.

    Raises:
        Unmeasured: if the incidents cannot be read.
    """
    found: dict[str, int] = {}
    for row in incidents(record, "bf16"):
        clip, frame = row.get("clip"), finite(row.get("frame"))
        if row.get("kind") not in LOST:
            continue
        if not isinstance(clip, str) or frame is None or frame < 0:
            raise Unmeasured("an incident of BF16 does not say where it happened")
        found[clip] = min(int(frame), found.get(clip, int(frame)))
    return found


def judged_frames(record: Record, conf: GatesConf, baseline: Record | None) -> dict[str, int | None]:
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


def check_weights(record: Record) -> None:
    """Raise ``Unmeasured`` where pictures mean nothing: random weights, synthetic clips, formats changed midway."""
    model = record.get("model")
    for key, name in (("weights", "the model"), ("decoder_weights", "the decoder")):
        kind = pick(model, key)
        if kind == "random":
            raise Unmeasured(f"random weights: the quality of {name} means nothing")
        if kind != "checkpoint":
            raise Unmeasured(f"the record does not say whether {name} has weights of a checkpoint")
    if pick(record, "data.quality_is_meaningful") is False:
        raise Unmeasured("synthetic clips: there is nothing to be true to")
    if record.get("fallbacks"):
        raise Unmeasured("the candidate fell back to other formats midway: judge a run in the formats it ended with")


def clip_drops(record: Record, metric: str, conf: GatesConf, baseline: Record | None = None) -> dict[str, float]:
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
                raise Unmeasured(f"run {baseline['run_id']} has no clip {name}")  # type: ignore[index]
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


def clip_fidelity(record: Record, conf: GatesConf) -> dict[str, float]:
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


def candidate_instabilities(record: Record) -> list[Mapping[str, Any]]:
    """Incidents of the candidate that are its own: not those after BF16 had lost the clip, except NaN and Inf.

    Raises:
        Unmeasured: if they cannot be read.
    """
    lost = lost_from(record)

    def own(row: Mapping[str, Any]) -> bool:
        end, frame = lost.get(str(row.get("clip"))), finite(row.get("frame"))
        return row.get("kind") not in LOST or end is None or frame is None or frame < end

    return [row for row in incidents(record, "candidate") if own(row)]


def speed_ratios(record: Record, fps: str) -> list[float]:
    """log(candidate's FPS / BF16's) of blocks of frames; ``[0.0]`` of a run of BF16 alone.

    Raises:
        Unmeasured: if the record holds no usable times, or those of an emulated kernel.
    """
    arms = record.get("arms")
    if not isinstance(arms, Mapping) or "candidate" not in arms:
        return [0.0]
    label = pick(arms, "candidate.label")
    if pick(arms, "candidate.speed_is_meaningful") is not True:
        raise Unmeasured(f"{label}: emulated kernel, its speed says nothing about MX")
    skipped = finite(pick(arms, "candidate.speed.skipped_frames_per_clip"))
    if skipped is None or skipped < 0:
        raise Unmeasured("the record does not say how many first frames of a clip are not counted")
    batches = rows(record, "timings")
    if not batches:
        raise Unmeasured("the record holds no frame times")
    bf16, candidate = [], []
    for batch in batches:
        if batch.get("fallback") != batches[-1].get("fallback"):
            continue  # in other formats than those it ended with
        pair = [_times(batch, arm, fps, int(skipped)) for arm in ("bf16", "candidate")]
        if len(pair[0]) != len(pair[1]):
            raise Unmeasured(f"{_batch(batch)}: its arms were timed over different frames")
        bf16.append(pair[0])
        candidate.append(pair[1])
    if not bf16:
        raise Unmeasured("the record's fallbacks cannot be read")
    return block_ratios(bf16, candidate)


def _batch(batch: Mapping[str, Any]) -> str:
    return f"batch {batch.get('clips')}"[:200]


def _times(batch: Mapping[str, Any], arm: str, fps: str, skipped: int) -> list[float]:
    """Milliseconds of each frame of a batch that counts."""
    spans = ("dit_ms",) if fps == "pipeline_fps" else ("dit_ms", "decoder_ms")
    columns = []
    for span in spans:
        values = pick(batch, f"arms.{arm}.{span}")
        numbers = [finite(value) for value in values] if isinstance(values, list) else []
        if not numbers or any(value is None or value <= 0 for value in numbers):
            raise Unmeasured(f"{_batch(batch)}: {arm}'s {span} per frame are no times")
        columns.append(numbers)
    if len({len(column) for column in columns}) > 1:
        raise Unmeasured(f"{_batch(batch)}: {arm}'s spans were timed over different frames")
    whole = [sum(frame) for frame in zip(*columns, strict=True)]  # type: ignore[arg-type]
    return whole[min(skipped, len(whole) - 1) :]


def machine(record: Record) -> str:
    """What the run's times were taken on."""
    return str(pick(record, "environment.gpu.name") or pick(record, "environment.cpu"))


def memory(arm: Any, conf: GatesConf) -> list[float]:
    """Bytes of ``conf.memory``, added up: one value where they are counted, one per batch where an allocator saw them.

    Raises:
        Unmeasured: if a figure is missing.
    """
    counted = [_bytes(arm, name) for name in conf.memory]
    allocator = [name for name in conf.memory if name not in COUNTED_BYTES]
    if not allocator:
        return [sum(counted)]
    fixed = sum(value for name, value in zip(conf.memory, counted, strict=True) if name in COUNTED_BYTES)
    peaks = pick(arm, "memory.peaks")
    if not isinstance(peaks, list) or not peaks:
        raise Unmeasured("the record holds no peak per batch")
    values = [[finite(pick(peak, name)) for name in allocator] for peak in peaks]
    if any(value is None or value < 0 for row in values for value in row):
        raise Unmeasured("a batch's peak is no number of bytes")
    return [fixed + sum(value for value in row if value is not None) for row in values]


def _bytes(arm: Any, name: str) -> float:
    value = pick(arm, f"memory.{name}")
    if value is None:
        raise Unmeasured(f"{name} was not measured on this device")
    number = finite(value)
    if number is None or number < 0:
        raise Unmeasured(f"{name} is no number of bytes")
    return number


def last_arm(record: Record) -> Mapping[str, Any]:
    """The candidate, or BF16 where it ran alone."""
    arm = pick(record, "arms.candidate") or pick(record, "arms.bf16")
    return arm if isinstance(arm, Mapping) else {}


def _check_every_clip(record: Record) -> None:
    """Raise ``Unmeasured`` if a clip that was asked for is gone; one with NaN or Inf has no scores, but an incident."""
    asked = pick(record, "data.clips")
    names = [clip.get("id") for clip in asked if isinstance(clip, Mapping)] if isinstance(asked, list) else []
    told = {row.get("clip") for row in rows(record, "incidents") if row.get("kind") == NON_FINITE}
    there = {*clip_ids(record), *told}
    gone = [name for name in names if name not in there]
    if gone:
        raise Unmeasured(f"clip {gone[0]} was rolled out and is not in the record")


def unsound(record: Record) -> str | None:
    """Why a run may be neither judged, reused nor recommended; ``None`` if it may.

    It must have ended, BF16 must be there and finite, and every clip that was asked for have scores that are numbers.
    """
    status = record.get("status")
    if status != "complete":
        return f"the run is {status}" if isinstance(status, str) else "the record does not say that the run is complete"
    if not isinstance(pick(record, "arms.bf16"), Mapping):
        return "the record has no BF16 arm"
    try:
        if any(row.get("kind") == NON_FINITE for row in incidents(record, "bf16")):
            return "BF16 itself is not finite: there is nothing to hold the candidate against"
        clip_scores(record, "psnr")
        _check_every_clip(record)
    except Unmeasured as error:
        return str(error)
    return None
