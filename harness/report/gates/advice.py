"""What to do after a verdict: one sentence and the command, made from what the run measured."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.entries import entry
from harness.report.gates.reading import finite, setting
from harness.report.record import RunRecord
from harness.report.verdict import MANY_CLIPS, Advice, Check, Verdict, clips_in_words

CHOSEN = ("quant", "kv", "gates", "experiment", "hydra", "attention")
"""Groups whose words the ladder sets itself, or that say how one run ran."""
ENOUGH = 0.8
"""Share of the threshold that a narrowed configuration should be expected to lose."""
OF_RANDOM = ("model", "decoder", "data.synthetic")
"""Begins words that say what a model without weights is and sees: a named model brings its own shape and clips."""
NEW_SEED = 1_001_000
"""Of the first clip to record for the demo: beyond the clips that are there."""

AT_THRESHOLD = "the figure is what is allowed, to within noise: narrow or calibrate the formats, or allow more"


def advise(record: RunRecord, found: Verdict) -> Advice:
    """What to do next after the verdict ``found``."""
    failed = [check for check in found.checks if check.status == "fail"]
    still = [check for check in found.checks if check.status in ("undecided", "not_measured")]
    if found.verdict == "ship":
        return _after_ship(record, found)
    if failed:
        return _after_failure(record, failed[0])
    if not still:
        return Advice("run it again", command(record.overrides))
    # What more clips cannot decide comes first.
    still.sort(key=lambda check: check.needs_clips is not None)
    clips = max((check.needs_clips or 0 for check in still), default=0)
    return _after_doubt(record, still[0], clips, found.baseline is not None)


def command(words: Sequence[str], name: str = "run") -> str:
    """The command a user would paste; ``name`` of :data:`harness.entries.SCRIPTS`."""
    return " ".join([entry(name), *(shlex.quote(word) for word in words)])


ONCE = {"export", "resume", "overwrite", "hydra.run.dir"}
"""Words about one run's own files: the next run has others."""


def changed(words: Sequence[str], *new: str) -> list[str]:
    """``words`` with those of the same key replaced by ``new``, and without what is meant for one run alone."""
    keys = {_key(word) for word in new} | ONCE
    return [*(word for word in words if _key(word) not in keys), *new]


def _untied(words: Sequence[str]) -> list[str]:
    """Words without those that were about this machine's cores, and would be refused or idle on a GPU."""
    return [word for word in words if _key(word) not in ("measure.reuse_bf16", "trainer.devices", "threads")]


def _on_gpu(words: Sequence[str]) -> list[str]:
    return changed(_untied(words), "trainer=gpu", "compile=on")


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _after_ship(record: RunRecord, found: Verdict) -> Advice:
    words = record.overrides
    alone = found.baseline is None  # a record to stand on is of its own machine
    if alone and "speed" in found.not_asked and not (record.candidate and record.candidate.speed_is_meaningful):
        words = _on_gpu([word for word in words if _key(word) != "gates.without"])
        words = words if any(_key(word) in ("gates", "experiment") for word in words) else [*words, "gates=a"]
        return Advice("measure its speed on the GPU it is for", command(words))
    common = [word for word in words if _key(word).split(".")[0] not in CHOSEN]
    return Advice("look for a smaller configuration that ships", command(common, "ladder"))


def _after_failure(record: RunRecord, check: Check) -> Advice:
    words = record.overrides
    if check.criterion == "instabilities":
        text = "let the candidate fall back to safer formats, and see which ones hold"
        return Advice(text, command(changed(words, "on_instability=fallback")))
    if check.criterion == "speed":
        return _faster(record, words)
    if check.criterion == "memory":
        return _smaller(record, words)
    return _narrower(record, check, words)


def _faster(record: RunRecord, words: list[str]) -> Advice:
    if not setting(record.config, "compile", "enabled"):
        return Advice("compile the frame", command(changed(words, "compile=on")))
    if setting(record.config, "attention", "kind") != "fused":
        text = "attend over the packed window instead of dequantising it"
        return Advice(text, command(changed(words, "attention=fused")))
    transform = None if record.candidate is None else record.candidate.transform
    kernel = None if transform is None else transform.kernel
    text = (
        f"the kernel that ran is {kernel}: try the other one, or keep the format for its memory (gates.without=[speed])"
    )
    other = "triton" if kernel != "triton" else "cuda"
    return Advice(text, command(changed(words, f"quant.kernel={other}")))


def _smaller(record: RunRecord, words: list[str]) -> Advice:
    scratch = record.candidate is not None and record.candidate.memory.kv_scratch_bytes
    if scratch and record.environment.device.startswith("cuda"):
        text = "the room to dequantise a layer costs what the formats save: attend over the packed window"
        return Advice(text, command(changed(words, "attention=fused")))
    if setting(record.config, "kv", "late_layers"):
        text = "so few layers save less than the room to read one takes: quantise them all"
        return Advice(text, command(changed(words, "kv.late_layers=null")))
    return Advice("quantise K as well as V", command(changed(words, "kv=mx_kv")))


def _narrower(record: RunRecord, check: Check, words: list[str]) -> Advice:
    """Fewer Linears in MX, those first whose measured error is largest; or fewer bits saved."""
    if not setting(record.config, "quant", "enabled"):
        return _narrower_cache(record, words)
    errors = _block_errors(record)
    if setting(record.config, "calib", "method") == "none" and setting(record.config, "model", "calibration"):
        count = record.candidate.transform.count if record.candidate and record.candidate.transform else 0
        rms = f", {math.sqrt(sum(errors.values()) / count):.1%} off in their outputs" if errors and count else ""
        text = f"weights are rounded to nearest{rms}: choose them for the inputs they will meet"
        return Advice(text, command(changed(words, "calib=gptq")))
    value, threshold = check.value, check.threshold
    if check.relation == "<=" and errors and value is not None and value > 0:
        blocks = worst_blocks(errors, 1 - ENOUGH * max(threshold, 0) / value)
        if len(blocks) <= len(errors) / 2:
            share = sum(errors[block] for block in blocks) / sum(errors.values())
            kept = setting(record.config, "quant", "exclude")
            patterns = [*(kept if isinstance(kept, list) else []), *(f"*blocks.{block}.*" for block in sorted(blocks))]
            names = ",".join(f'"{pattern}"' for pattern in patterns)
            text = (
                f"keep the blocks with the largest measured error in BF16: {len(blocks)} of {len(errors)} carry "
                f"{share:.0%} of the squared error"
            )
            return Advice(text, command(changed(words, f"quant.exclude=[{names}]")))
    by_category = setting(record.config, "quant", "bits_by_category")
    fours = (
        [name for name, bits in (by_category or {}).items() if bits == 4] if isinstance(by_category, Mapping) else []
    )
    if setting(record.config, "quant", "bits") == 4 or fours:
        text = "no few blocks carry the error: store the same Linears in 8 bits"
        wider = ["quant.bits=8", *(f"quant.bits_by_category.{name}=null" for name in fours)]
        return Advice(text, command(changed(words, *wider)))
    late = _half(record.model.arch.get("n_layers"))
    return Advice(f"only the last {late} layers in MX", command(changed(words, f"quant.late_layers={late}")))


def _half(layers: Any) -> int:
    """Half of so many layers, at the least one; of a number that nobody knows, one."""
    return max(1, layers // 2) if isinstance(layers, int) else 1


def worst_blocks(errors: Mapping[int, float], share: float) -> list[int]:
    """The fewest blocks with at least ``share`` of the squared error, which the drop is taken to be proportional to."""
    total, taken, blocks = sum(errors.values()), 0.0, []
    for block in sorted(errors, key=lambda one: -errors[one]):
        if taken >= share * total:
            break
        blocks.append(block)
        taken += errors[block]
    return blocks


def _block_errors(record: RunRecord) -> dict[int, float]:
    """Squared relative error of each block's MX Linears, added up; empty where it was not measured."""
    numerics = None if record.candidate is None else record.candidate.numerics
    errors: dict[int, float] = {}
    for name, layer in numerics.layers.items() if numerics is not None else ():
        place, error = re.search(r"blocks\.(\d+)\.", name), finite(layer.rel)
        if place is not None and error is not None:
            errors[int(place[1])] = errors.get(int(place[1]), 0.0) + error**2
    return errors


def _narrower_cache(record: RunRecord, words: list[str]) -> Advice:
    formats = {} if record.candidate is None else record.candidate.memory.kv_bytes_by_format
    if "e2m1" in formats and setting(record.config, "attention", "kind") != "fused":
        share = formats["e2m1"] / sum(formats.values())
        text = (
            f"4 bits are {share:.0%} of the cache: keep the newest frames, which attention looks at most, in 8 as well"
        )
        return Advice(text, command(changed(words, "kv.recent_frames=2")))
    if setting(record.config, "kv", "quantize_k") and setting(record.config, "kv", "quantize_v"):
        return Advice("K back to BF16", command(changed(words, "kv=mx_v_only")))
    late = _half(setting(record.config, "kv", "late_layers") or record.model.arch.get("n_layers"))
    text = f"quantise the cache of the last {late} layers alone"
    return Advice(text, command(changed(words, f"kv.late_layers={late}")))


def _after_doubt(record: RunRecord, check: Check, clips: int, on_record: bool) -> Advice:
    words = record.overrides
    if check.criterion == "speed":
        return _speed_doubt(check, words)
    if check.criterion == "memory":
        return Advice("measure memory on a GPU", command(changed(_untied(words), "trainer=gpu")))
    if check.needs_clips is not None:
        advice = _more_clips(record, clips, words)
        return replace(advice, text=f"{advice.text}; the baseline needs them too") if on_record else advice
    if "random weights" in check.note:
        text = "give the model's weights: speed is real on random ones, quality is not"
        files = [f"{part}.{file}=FILE" for part in ("model", "decoder") for file in ("config_file", "checkpoint")]
        kept = [word for word in words if not _key(word).startswith(OF_RANDOM)]
        return Advice(text, command(changed(kept, *files, "data=clips", "data.paths=[FOLDER]")))
    if "no number of clips" in check.note:
        return Advice(AT_THRESHOLD)
    if "fell back" in check.note:
        return Advice("judge the formats it ended with: run them by themselves (record.json, fallbacks)")
    return Advice(f"what is missing: {check.note}", command(words))


def _speed_doubt(check: Check, words: list[str]) -> Advice:
    if check.value is not None:
        again = "frames" in check.note and "Timing" not in check.note
        text = "time more frames, of every clip" if again else "run again with nothing else on the machine"
        return Advice(text, command(changed(words, "data.limit=null") if again else words))
    if "another machine" in check.note:
        return Advice("run the baseline on this machine too")
    text = "measure speed on the GPU it is for; to judge without it, add gates.without=[speed]"
    return Advice(text, command(_on_gpu(words)))


def _more_clips(record: RunRecord, clips: int, words: list[str]) -> Advice:
    available = record.data.available
    if available is not None and clips <= available:
        text = f"take about {clips} of the {available} clips there are"
        return Advice(text, command(changed(words, f"data.limit={clips}")))
    if available is not None and len(record.clips) < available:
        text = f"{clips_in_words(clips)} would decide it; take all {available} there are first"
        return Advice(text, command(changed(words, "data.limit=null")))
    if clips > MANY_CLIPS:
        return Advice(AT_THRESHOLD)
    text = f"{clips_in_words(clips)} would decide it, and there are {len(record.clips)}: add clips"
    paths = setting(record.config, "data", "paths")
    if not isinstance(paths, list) or not any("assets/doom" in str(path) for path in paths):
        return Advice(f"{text} to data.paths", command(changed(words, "data.limit=null")))
    more = clips - len(record.clips)
    play = f"python scripts/record_doom.py --out more_clips --clips {more} --seed {NEW_SEED}"
    both = changed(words, "data.limit=null", 'data.paths=["${repo:assets/doom/clips}",more_clips]')
    return Advice(f"{text}, here of Doom", f"{play} && {command(both)}")
