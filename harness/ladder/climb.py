"""The climb: rung after rung, each standing on the last one that ships."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.config import RunPlan, plan_run
from harness.config.compose import compose
from harness.data.sources import open_source
from harness.entries import entry
from harness.ladder import rungs
from harness.ladder.child import INTERRUPTED, LOG, Launch, last_words, launch_process, quoted
from harness.ladder.rungs import BASELINE, Candidate, Rung, Variant
from harness.ladder.state import Failure, LadderError, Result, State, load, save
from harness.measure.conf import OnInstability
from harness.measure.environment import git_state
from harness.report.files import JOURNAL, is_running
from harness.report.gates import DO_NOT_SHIP, EXIT_CODES, FAIL, OPEN, SHIP, UNDECIDED, GatesConf, unsound
from harness.report.gates.reading import Unmeasured, clip_drops
from harness.report.record import FAILED, RecordError, RunRecord, load_record
from harness.report.verdict import Verdict
from harness.threads import usable_cores

OWN_WORDS = ("quant", "kv", "gates", "experiment", "hydra")
"""Config groups that the ladder sets itself."""
RAN = ("model", "decoder", "data", "quant", "kv", "calib", "attention", "compile", "sampler", "seed")
"""Sections of a config that say what a run rolled out."""
WRONG_INPUT = 2
"""Exit code of a run that cannot be what it was asked to be."""
JUDGED = tuple(EXIT_CODES.values())


def _of_calibration(word: str) -> bool:
    return word.lstrip("+~").startswith(("calib.", "model.calibration="))


def beside(common: Sequence[str], own: Sequence[str]) -> list[str]:
    """The common words and a step's own; what the user says of calibration only where the step calibrates."""
    calibrates = any(word.startswith("calib=") for word in own)
    return [*(word for word in common if calibrates or not _of_calibration(word)), *own]


class BrokenOff(RuntimeError):
    """The climb cannot go on: BF16 itself did not run, or a run was stopped from outside."""


def compose_run(words: Sequence[str]) -> tuple[dict[str, Any], RunPlan]:
    """The resolved config of a run and its checked plan, without running it.

    Raises:
        ValueError: listing what is wrong with it.
    """
    cfg = compose(*words, folder="run")
    config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return config, plan_run(cfg)


class Ladder:
    """The climb. Its folder must be this process's alone, see :func:`harness.ladder.state.locked`.

    Args:
        out: folder of the state and the runs.
        common: words for every run; without a word about ``data.limit`` every clip is taken.
        kv: the KV config of step 4.
        launch: runs the harness.
        say: gets a line per run.

    Raises:
        LadderError: with what is wrong, before anything runs.
    """

    def __init__(
        self,
        out: Path,
        common: Sequence[str],
        kv: str,
        launch: Launch = launch_process,
        say: Callable[[str], Any] = print,
    ) -> None:
        self.out, self.kv, self.launch, self.say = out, kv, launch, say
        limited = any(word.lstrip("+~").startswith("data.limit=") for word in common)
        self.common = [*common] if limited else [*common, "data.limit=null"]
        self.commit = git_state()["commit"]
        self.results: list[Result] = []
        self.failed: list[Failure] = []
        self.reused = 0
        self.known = load(self.state_file).runs
        self._check()

    @property
    def state_file(self) -> Path:
        """Where the ladder keeps what it knows."""
        return self.out / "ladder.json"

    def _check(self) -> None:
        """Compose every step before the first one runs."""
        names = {word: word.lstrip("+~").split("=")[0] for word in self.common}
        own = [word for word, name in names.items() if name.split(".")[0] in OWN_WORDS or name == "calib"]
        if own:
            raise LadderError(f"{' '.join(own)}: the ladder chooses {', '.join(OWN_WORDS)} itself; drop it")
        try:
            _, self.plan = compose_run(self._words(f"kv={self.kv}"))
            for name in rungs.QUANTS:
                compose_run(self._words(f"quant={name}"))
            _, self.four_bit_plan = compose_run(self._words(f"kv={rungs.FOUR_BIT_CACHE}"))
            self.variants = [variant for variant in rungs.VARIANTS if self._can_be_tried(variant)]
        except ValueError as error:
            raise LadderError(str(error)) from error
        # A CPU's speed says nothing about MX: it is left out by name, and every verdict says so.
        on_cpu = self.plan.device.type == "cpu"
        self.asking = ["gates.without=[speed]"] if on_cpu else []
        self.sparing = self._sparing(set(names.values())) if on_cpu else []

    def _sparing(self, said: set[str]) -> list[str]:
        """Words that spare time where no times are asked for, but for those that the user chose.

        BF16 is rolled out once, and each core gets clips of its own, since two threads do less than two processes.
        """
        words = {"measure.reuse_bf16": "true", "measure.parts_frames": "0", "measure.videos": "false"}
        conf = self.plan.conf
        alone = not said & {"trainer", "trainer.devices", "trainer.strategy", "threads"}
        if alone and conf.on_instability is not OnInstability["fallback"]:
            words["trainer.devices"] = str(max(1, min(usable_cores(), self._clips())))
        return [f"{name}={value}" for name, value in words.items() if name not in said]

    def _clips(self) -> int:
        conf = self.plan.conf.data
        try:
            found = [one for one in open_source(conf, self.plan.clip_shape).entries() if conf.tag in (None, one.tag)]
        except ValueError as error:
            raise LadderError(str(error)) from error
        return len(found[: conf.limit])

    def _words(self, *own: str) -> list[str]:
        return beside(self.common, own)

    def _can_be_tried(self, variant: Variant) -> bool:
        """Whether the model has what ``variant`` needs, such as clips to calibrate on.

        Raises:
            ValueError: if it has not, though the user said how it should be done.
        """
        try:
            compose_run(self._words(f"quant={rungs.QUANTS[0]}", *variant.words))
        except ValueError:
            if any(map(_of_calibration, self.common)):
                raise
            return not variant.words
        return True

    def climb(self) -> Result:
        """Run every step. Returns the result to recommend: of those that ship, the one with the fewest bytes.

        What broke on the way is in ``failed``.

        Raises:
            BrokenOff: if BF16 itself did not run, or a run was stopped from outside.
        """
        stand = self._baseline()
        stand = self._linears(2, "MXFP8 MLP", "mxfp8_mlp", "a", stand)
        stand = self._linears(3, "MXFP8 all", "mxfp8_all", "b", stand)
        stand = self._try(rungs.cache(4, self.kv, "c", tuple(stand.quant), self.plan), stand)
        before, stand = stand, self._linears(5, "MXFP4 MLP", "mxfp4_mlp", "d", stand)
        if stand is not before:
            before, stand = stand, self._linears(6, "MXFP4 late 8", "mxfp4_all_late8", "d", stand)
            if stand is not before and not rungs.keeps_attention(stand.quant):
                stand = self._linears(6, "MXFP4 all", "mxfp4_all", "d", stand)
            if self.kv != rungs.FOUR_BIT_CACHE:
                last = rungs.cache(7, rungs.FOUR_BIT_CACHE, "d", tuple(stand.quant), self.four_bit_plan)
                self._try(self._smaller(last, stand), stand)
        best = min((result for result in self.results if result.verdict == SHIP), key=lambda result: result.bytes)
        self._save(best)
        return best

    def _baseline(self) -> Result:
        found = self._run(BASELINE, BASELINE.candidates[0], None)
        if found is None:
            failure = self.failed[-1]
            raise BrokenOff(f"{failure.name} did not run, and nothing can be judged without it: {failure.reason}")
        return found

    def _linears(self, step: int, name: str, quant: str, gate: str, stand: Result) -> Result:
        return self._try(
            rungs.linears(step, name, quant, gate, tuple(stand.kv), self.plan.arch.n_layers, self.variants), stand
        )

    def _try(self, rung: Rung, stand: Result) -> Result:
        """The first candidate that ships, or ``stand``.

        One that noise leaves undecided, or whose run broke, is narrowed too: a narrower one may be proven. One of which
        a figure is missing is not: of the narrower ones it would be missing as well.
        """
        for candidate in rung.candidates:
            result = self._run(rung, candidate, stand)
            if result is not None and result.verdict == SHIP:
                return result
            if result is not None and result.verdict == UNDECIDED and result.needs_clips is None:
                break
        return stand

    def _smaller(self, rung: Rung, stand: Result) -> Rung:
        """``rung`` without ways back from its cache that hold no fewer bytes than the cache that already ships."""
        held = self._cache_bits(stand.kv)
        return replace(rung, candidates=tuple(c for c in rung.candidates if self._cache_bits(c.kv) < held))

    def _cache_bits(self, kv: Sequence[str]) -> float:
        _, plan = compose_run(self._words(*kv))
        return rungs.cache_bits(plan.conf.kv, plan.arch.n_layers)

    def _run(self, rung: Rung, candidate: Candidate, stand: Result | None) -> Result | None:
        """The candidate's result, known from before or from a run now; ``None`` if its run broke."""
        asked = [] if stand is None else [*self.asking]
        words = self._words(*self.sparing, *candidate.quant, *candidate.kv, f"gates={rung.gate}", *asked)
        config, _ = compose_run([*words, *(["gates.against=bf16"] if stand else [])])
        parts = [config, self.commit, stand and stand.key]  # what the words say, not how they are written
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        known = self.known.pop(key, None)
        made = partial(
            Result,
            step=rung.step,
            name=candidate.name,
            gate=rung.gate,
            words=list(words),
            quant=list(candidate.quant),
            kv=list(candidate.kv),
            stands_on="" if stand is None else stand.name,
            key=key,
        )
        result: Result | Failure | None = known and self._again(known, config, made)
        if result is not None:
            self.reused += 1
            took = "already run"
        else:
            result = self._measure(rung, candidate, [*words, *self._against(rung, stand)], made)
            took = "" if isinstance(result, Failure) else f"{result.seconds:.0f} s"
        if isinstance(result, Failure):
            self.failed.append(result)
            self.say(f"step {result.step}  {result.name}: FAILED, {result.reason}")
        else:
            self.known[key] = result
            self.results.append(result)
            self.say(f"{line(result)} ({took})")
        self._save(None)
        return None if isinstance(result, Failure) else result

    def _again(self, known: Result, config: dict[str, Any], made: Callable[..., Result]) -> Result | None:
        """The result from before, if it still stands on a record that may be judged and is of ``config``.

        All but its folder and its seconds is ``made`` anew: what the state file says of a run proves nothing.
        """
        try:
            record = load_record(self.out / known.folder / "record.json")
        except RecordError:
            return None
        found = made(folder=known.folder, seconds=known.seconds, **figures(record))
        usable = unsound(record) is None or found.verdict == DO_NOT_SHIP
        return found if usable and same(record.config, config) else None

    def _measure(
        self, rung: Rung, candidate: Candidate, words: Sequence[str], made: Callable[..., Result]
    ) -> Result | Failure:
        start = time.monotonic()
        folder, code = self._launched(rung, candidate, words)
        place = str(folder.relative_to(self.out))
        if code in INTERRUPTED or code < 0:
            raise BrokenOff(f"{candidate.name}: the run was stopped from outside (exit code {code})")
        record, why = _read_run(folder, code)
        if record is None:
            return Failure(rung.step, candidate.name, place, f"{why}; see {folder / LOG}")
        return made(folder=place, seconds=time.monotonic() - start, **figures(record))

    def _against(self, rung: Rung, stand: Result | None) -> list[str]:
        """What the gate compares with: the record of what the step stands on, or BF16."""
        if stand is None:
            return []
        if stand.step == BASELINE.step or rung.gate == "d":
            return ["gates.against=bf16"]
        record = self.out.resolve() / stand.folder / "record.json"
        return ["gates.against=record", f"gates.baseline={quoted(record)}"]

    def _launched(self, rung: Rung, candidate: Candidate, words: Sequence[str]) -> tuple[Path, int]:
        """The folder a run has written to, and its exit code; it goes on where an earlier attempt was broken off."""
        folder, begun = self._folder(rung.step, candidate.name), None
        attempts = [path for path in folder.parent.glob(f"{folder.stem}.*") if path.suffix[1:].isdecimal()]
        if attempts:
            begun = max(attempts, key=lambda path: int(path.suffix[1:]))
        if begun is not None and (begun / JOURNAL).is_dir() and not is_running(begun):
            code = self.launch([*words, "resume=true"], begun.resolve())
            if code != WRONG_INPUT:  # what that attempt was is something else by now: begin anew
                return begun, code
        return folder, self.launch(words, folder.resolve())

    def _folder(self, step: int, name: str) -> Path:
        """A folder that no earlier attempt wrote to."""
        plain = "".join(letter if letter.isalnum() else "_" for letter in f"{step}_{name}")
        attempt = 1
        while (folder := self.out / "runs" / f"{plain}.{attempt}").exists():
            attempt += 1
        return folder

    def _save(self, best: Result | None) -> None:
        state = State(
            commit=self.commit,
            overrides=sorted(self.common),
            complete=best is not None and not self.failed,
            recommendation=None if best is None else recommendation(best, self.common),
            trials=self.results,
            failed=self.failed,
            runs=self.known,
        )
        save(state, self.state_file)


def same(record: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a record is of a run of ``config``; other sections name the run's own folder, or how it was started."""
    return all(record.get(name) == config[name] for name in RAN)


def _read_run(folder: Path, code: int) -> tuple[RunRecord | None, str]:
    """The record of a run that ended with ``code``, if it may be judged, else why not."""
    said = last_words(folder)
    ended = f"the run ended with exit code {code}" + (f" ({said})" if said else "")
    if not (folder / "record.json").is_file():
        return None, ended
    try:
        record = load_record(folder / "record.json")
    except RecordError as error:
        return None, str(error)
    if record.gates is not None and record.gates.verdict == DO_NOT_SHIP and record.status == FAILED:
        return record, ""  # the harness broke it off because the candidate became unstable: that much is proven
    if code not in JUDGED:
        return None, ended
    if (why := unsound(record)) is not None:
        return None, f"{ended}: {why}"
    return record, ""


def figures(record: RunRecord) -> dict[str, Any]:
    """What the ladder keeps of a run's record."""
    arm, gates = record.candidate or record.first, record.gates
    checks = [] if gates is None else gates.checks
    psnr, fps = (None if gates is None else gates.check(name) for name in ("psnr", "speed"))
    needs = [check.needs_clips for check in checks if check.status == OPEN and check.needs_clips is not None]
    fidelity = None if record.quality is None else record.quality.all.fidelity
    return {
        "verdict": SHIP if gates is None else gates.verdict,
        "reason": "" if gates is None else reason(gates),
        "drop": _drop(record),
        "added": None if psnr is None else psnr.value,
        "interval": None if psnr is None or psnr.interval is None else list(psnr.interval),
        "needs_clips": max(needs, default=None),
        "speed": "" if fps is None else "not measured" if fps.value is None else f"{fps.value:.2f}x",
        "fidelity": None if fidelity is None else fidelity.psnr,
        "calibration": arm.calibration,
        "bytes": arm.memory.weight_bytes + arm.memory.kv_window_bytes,
    }


def _drop(record: RunRecord) -> float | None:
    """Mean drop against BF16, dB, over the frames that a gate would judge."""
    try:
        drops = clip_drops(record, "psnr", GatesConf())
    except Unmeasured:
        return None
    return sum(drops.values()) / len(drops)


def reason(gates: Verdict) -> str:
    """Why a run was not let through, and what the gate would do about it."""
    if gates.verdict == SHIP:
        return ""
    only_speed = all(check.criterion == "speed" for check in gates.checks if check.status == FAIL)
    told = gates.verdict == DO_NOT_SHIP and only_speed and gates.next is not None
    return gates.reason + (f" (next: {gates.next.text})" if told and gates.next else "")


def line(result: Result) -> str:
    """A finished trial in a line."""
    drop = "" if result.drop is None else f", drop {result.drop:+.2f} dB"
    return f"step {result.step}  {result.name}: {'measured' if result.gate == 'none' else result.verdict}{drop}"


def recommendation(best: Result, common: Sequence[str]) -> str:
    """The command to paste."""
    words = beside(common, [*best.quant, *best.kv])
    return " ".join([entry("run"), *(f'"{word}"' if "'" in word else word for word in words)])
