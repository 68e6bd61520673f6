"""Climb from BF16 to the most aggressive MX configuration that ships, each step judged by its gate.

python scripts/ladder.py model=doom data.limit=4
python scripts/ladder.py --out outputs/ladder --kv mx_kv data.future_frames=32

Steps: BF16; MXFP8 in the MLPs; MXFP8 in every Linear; a quantised KV cache on top; MXFP4 in the MLPs; MXFP4 in the
last 8 layers, then everywhere. A step that its gate rejects is narrowed (early layers BF16, attention BF16, K back to
BF16, fewer KV layers, scales per token) until it ships or nothing is left of it; then the ladder stays where it stood.

Words of the form name=value go to every run. Each run is a process of its own; its folder and the state of the ladder
are under --out. A ladder that was killed goes on where it stopped when it is started again with the same --out: a run
is known by its overrides, its whole config, the commit and what it stands on.

Exit code: 0 done (also if only BF16 ships), 2 wrong input, 1 a run broke.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from harness.config import RunPlan, plan_run, register
from harness.kv import KVStorage
from harness.kv.conf import KVScales
from harness.measure.environment import git_state
from harness.report.gates import DO_NOT_SHIP, FAIL, SHIP
from harness.report.record import load_record, write_atomically
from harness.report.table import bytes_text

STATE_VERSION = 1
BASELINE = "BF16"
OWN_WORDS = ("quant", "kv", "gates", "experiment", "hydra")
"""Config groups that the ladder sets itself."""
BROKE, WRONG_INPUT = 1, 2
"""Exit codes of a run that gave no verdict; see ``harness/run.py``."""
SPEED_ADVICE = "confirm the kernel that ran, try quant.kernel=triton, and compile=on and off"

FILE_WIDTH = 160
"""Columns of the table where there is no terminal."""

PATIENCE_S = 10
"""Seconds that an interrupted run has to end."""

Words = tuple[str, ...]
Launch = Callable[[Sequence[str], Path], int]
"""Runs the harness with these words, outputs in this folder; returns its exit code."""


class LadderError(RuntimeError):
    """The ladder cannot go on: a run broke without a record, or its input was wrong."""


@dataclass(frozen=True)
class Trial:
    """One configuration to be judged: what the user would type for it, and at which step of which gate."""

    step: int
    name: str
    quant: Words
    kv: Words
    gate: str


@dataclass(frozen=True)
class Result:
    """A finished trial. ``bytes`` = weights and KV window as measured; ``drop`` against BF16, dB, if it was scored."""

    step: int
    name: str
    words: Words
    quant: Words
    kv: Words
    gate: str
    stands_on: str
    key: str
    folder: str
    verdict: str
    reason: str
    drop: float | None
    added: float | None
    interval: tuple[float, float] | None
    speed: str
    bytes: int
    seconds: float


def compose_run(words: Sequence[str]) -> tuple[dict[str, Any], RunPlan]:
    """The resolved config of a run and its checked plan, without running it.

    Raises:
        ValueError: if Hydra or the harness refuse it.
    """
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("run", [*words, "hydra.runtime.output_dir=run"], return_hydra_config=True)
    except HydraException as error:
        raise ValueError(str(error)) from error
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return config, plan_run(cfg)


def launch_process(words: Sequence[str], folder: Path) -> int:
    """Run the harness as a process of its own; what it prints goes to ``console.log`` in its folder."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "harness" / "run.py"), *words, f"hydra.run.dir={quoted(folder)}"]
    with (folder / "console.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        except BaseException:
            child.send_signal(signal.SIGINT)  # Lightning waits for the end of the batch on SIGTERM
            try:
                child.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def quoted(value: object) -> str:
    """A value that Hydra's override grammar takes as it is."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def narrower_kv(name: str, plan: RunPlan) -> list[tuple[str, Words]]:
    """Ways back from a KV config, each less aggressive than the one before; the last one left is BF16."""
    kv, layers = plan.conf.kv, plan.arch.n_layers
    words: Words = (f"kv={name}",)
    ways = []
    if kv.storage_of("k") is not KVStorage.bf16 and kv.storage_of("v") is not KVStorage.bf16:
        words += tuple(f"kv.{change}" for change in ("quantize_k=false", "k_storage=null", "k_format=null"))
        words += ("kv.k_late_layers=null",)
        ways.append(("K back to BF16", words))
    if kv.scales is KVScales.per_head_ema:
        words += ("kv.scales=per_token",)
        ways.append(("scales per token", words))
    kept = min(kv.late_layers or layers, layers)
    for late in (kept // 2, kept // 4):
        if late:
            ways.append((f"last {late} layers only", (*words, f"kv.late_layers={late}")))
    return ways


def narrower_quant(name: str, layers: int) -> list[tuple[str, Words]]:
    """Ways back from a choice of Linears: attention in BF16 (where it was not), then early layers in BF16 too."""
    words: Words = (f"quant={name}",)
    ways = []
    if "mlp" not in name:
        words += ("quant.exclude=['*attn*']",)
        ways.append(("attention in BF16", words))
    if "late" not in name:
        for late in (layers // 2, layers // 4):
            if late:
                ways.append((f"last {late} layers only", (*words, f"quant.late_layers={late}")))
    return ways


class Ladder:
    """The climb.

    Args:
        out: folder of the state and the runs.
        common: words for every run.
        kv: the KV config of step 4.
        launch: runs the harness.
        say: gets a line per run.
    """

    def __init__(
        self, out: Path, common: Sequence[str], kv: str, launch: Launch = launch_process, say: Any = print
    ) -> None:
        self.out, self.common, self.kv, self.launch, self.say = out, tuple(common), kv, launch, say
        self.commit = git_state()["commit"]
        self.results: list[Result] = []
        self.reused = 0
        self.known: dict[str, Any] = self._load()
        self._check()

    @property
    def state_file(self) -> Path:
        """Where the ladder keeps what it knows."""
        return self.out / "ladder.json"

    def _load(self) -> dict[str, Any]:
        if not self.state_file.exists():
            return {}
        try:
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
            if state["state_version"] != STATE_VERSION:
                raise LadderError(f"{self.state_file}: of another version; choose another --out")
            return dict(state["runs"])
        except (ValueError, KeyError, TypeError) as error:
            raise LadderError(f"{self.state_file}: not a ladder's state ({error}); choose another --out") from error

    def _check(self) -> None:
        """Compose every step before the first one runs. Raises ``LadderError`` with what is wrong."""
        own = [word for word in self.common if word.lstrip("+~").split("=")[0].split(".")[0] in OWN_WORDS]
        if own:
            raise LadderError(f"{' '.join(own)}: the ladder chooses {', '.join(OWN_WORDS)} itself; drop it")
        try:
            _, plan = compose_run([*self.common, f"kv={self.kv}"])
            self.layers = plan.arch.n_layers
            self.kv_ways = narrower_kv(self.kv, plan)
            for name in ("mxfp8_mlp", "mxfp8_all", "mxfp4_mlp", "mxfp4_all_late8", "mxfp4_all"):
                compose_run([*self.common, f"quant={name}"])
        except ValueError as error:
            raise LadderError(str(error)) from error

    def climb(self) -> Result:
        """Run every step. Returns the result to recommend: of those that ship, the one with the fewest bytes."""
        stand = self._baseline()
        stand = self._linears(2, "MXFP8 MLP", "mxfp8_mlp", "a", stand)
        stand = self._linears(3, "MXFP8 all", "mxfp8_all", "b", stand)
        stand = self._cache(stand)
        before, stand = stand, self._linears(5, "MXFP4 MLP", "mxfp4_mlp", "d", stand)
        if stand is not before:
            before, stand = stand, self._linears(6, "MXFP4 late 8", "mxfp4_all_late8", "d", stand)
        if stand is not before and "exclude" not in " ".join(stand.quant):
            self._linears(6, "MXFP4 all", "mxfp4_all", "d", stand)
        best = min((result for result in self.results if result.verdict == SHIP), key=lambda result: result.bytes)
        self._save(best)
        return best

    def _baseline(self) -> Result:
        return self._run(Trial(1, BASELINE, ("quant=bf16",), ("kv=bf16",), "none"), None)

    def _linears(self, step: int, name: str, quant: str, gate: str, stand: Result) -> Result:
        ways = [("", (f"quant={quant}",)), *narrower_quant(quant, self.layers)]
        return self._try([Trial(step, _join(name, way), words, stand.kv, gate) for way, words in ways], stand)

    def _cache(self, stand: Result) -> Result:
        ways = [("", (f"kv={self.kv}",)), *self.kv_ways]
        name = f"+ KV {self.kv}"
        return self._try([Trial(4, _join(name, way), stand.quant, words, "c") for way, words in ways], stand)

    def _try(self, trials: Sequence[Trial], stand: Result) -> Result:
        """The first trial that ships, or ``stand``. One that is undecided is not narrowed: that decides nothing."""
        for trial in trials:
            result = self._run(trial, stand)
            if result.verdict == SHIP:
                return result
            if result.verdict != DO_NOT_SHIP:
                break
        return stand

    def _run(self, trial: Trial, stand: Result | None) -> Result:
        """The trial's result: known from before, or from a run now."""
        words: list[str] = [*self.common, *trial.quant, *trial.kv, f"gates={trial.gate}"]
        config, _ = compose_run([*words, *(["gates.against=bf16"] if stand else [])])
        parts = [words, config, self.commit, stand and stand.key]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        if key in self.known:
            self.reused += 1
            result = Result(**_tupled(self.known[key]))
            self.say(f"{_line(result)} (already run)")
        else:
            result = self._measure(trial, stand, words, key)
            self.known[key] = asdict(result)
            self.say(f"{_line(result)} ({result.seconds:.0f} s)")
        self.results.append(result)
        self._save(None)
        return result

    def _measure(self, trial: Trial, stand: Result | None, words: Sequence[str], key: str) -> Result:
        folder = self._folder(trial)
        extra: list[str] = []
        if stand is not None and stand.step > 1 and trial.gate != "d":
            extra = [
                "gates.against=record",
                f"gates.baseline={quoted(self.out.resolve() / stand.folder / 'record.json')}",
            ]
        elif stand is not None:
            extra = ["gates.against=bf16"]
        start = time.monotonic()
        code = self.launch([*words, *extra], folder.resolve())
        if code == WRONG_INPUT or not (folder / "record.json").is_file():
            raise LadderError(f"{trial.name}: the run ended with exit code {code}; see {folder / 'console.log'}")
        record = asdict(load_record(folder / "record.json"))
        if code == BROKE and not record["incidents"]:
            raise LadderError(f"{trial.name}: the run broke; see {folder / 'console.log'}")
        if code < 0 or any(incident["kind"] == "Interrupted" for incident in record["incidents"]):
            raise LadderError(f"{trial.name}: the run was interrupted; start the ladder again to go on")
        found = judge(record)
        return Result(
            **asdict(trial),
            **found,
            words=tuple(words),
            stands_on="" if stand is None else stand.name,
            key=key,
            folder=str(folder.relative_to(self.out)),
            seconds=time.monotonic() - start,
        )

    def _folder(self, trial: Trial) -> Path:
        """A folder that no earlier attempt wrote to: a killed ladder may have left a run that still writes."""
        name = "".join(letter if letter.isalnum() else "_" for letter in f"{trial.step}_{trial.name}")
        attempt = 1
        while (folder := self.out / "runs" / f"{name}.{attempt}").exists():
            attempt += 1
        return folder

    def _save(self, best: Result | None) -> None:
        state = {
            "state_version": STATE_VERSION,
            "commit": self.commit,
            "overrides": self.common,
            "complete": best is not None,
            "recommendation": None if best is None else recommendation(best, self.common),
            "trials": [asdict(result) for result in self.results],
            "runs": self.known,
        }
        write_atomically(self.state_file, json.dumps(state, indent=1) + "\n")


def _join(name: str, way: str) -> str:
    return f"{name}, {way}" if way else name


def _tupled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def judge(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the ladder keeps of a run's record."""
    arm = record["arms"].get("candidate", record["arms"]["bf16"])
    drop = ((record["quality"] or {}).get("all", {}).get("drop") or {}).get("psnr")
    gates = record["gates"]
    checks = {} if gates is None else {check["figure"]: check for check in gates["checks"]}
    psnr = checks.get("PSNR drop dB", {})
    fps = next((check for figure, check in checks.items() if figure.startswith("FPS")), None)
    speed = "" if fps is None else "not measured" if fps["value"] is None else f"{fps['value']:.2f}x"
    return {
        "verdict": SHIP if gates is None else gates["verdict"],
        "reason": "" if gates is None else _reason(gates),
        "drop": drop,
        "added": psnr.get("value"),
        "interval": None if psnr.get("interval") is None else tuple(psnr["interval"]),
        "speed": speed,
        "bytes": arm["memory"]["weight_bytes"] + arm["memory"]["kv_window_bytes"],
    }


def _reason(gates: Mapping[str, Any]) -> str:
    """Why a run was not let through, or what to know although it was."""
    failed = [check for check in gates["checks"] if check["status"] == FAIL]
    if not failed:
        return "; ".join(note.rstrip(".") for note in gates["notes"])
    texts = []
    for check in failed:
        interval = check["interval"]
        around = f", interval {interval[0]:.2f} … {interval[1]:.2f}" if interval else ""
        text = f"{check['figure']} {check['value']:.3g}, allowed {check['relation']} {check['threshold']:g}{around}"
        texts.append(text + (f" ({check['note']})" if check["note"] else ""))
    if all(check["figure"].startswith("FPS") for check in failed):
        texts.append(SPEED_ADVICE)
    return "; ".join(texts)


def _line(result: Result) -> str:
    drop = "" if result.drop is None else f", drop {result.drop:+.2f} dB"
    return f"step {result.step}  {result.name}: {'measured' if result.gate == 'none' else result.verdict}{drop}"


def recommendation(best: Result, common: Sequence[str]) -> str:
    """The command to paste."""
    words = [*common, *best.quant, *best.kv]
    return " ".join(["python harness/run.py", *(f'"{word}"' if "'" in word else word for word in words)])


def show(results: Sequence[Result], best: Result, common: Sequence[str], console: Console) -> None:
    """The climb as a table, why each rejected step failed, and the recommendation."""
    table = Table(title="Ladder", title_justify="left")
    for heading in ("step", "configuration", "gate", "stands on", "verdict"):
        table.add_column(heading, overflow="fold")
    for heading in ("drop dB", "judged dB", "95 %", "speed", "weights + KV"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            str(result.step),
            result.name + (" *" if result is best else ""),
            "" if result.gate == "none" else result.gate.upper(),
            result.stands_on,
            "measured" if result.gate == "none" else result.verdict,
            "" if result.drop is None else f"{result.drop:+.2f}",
            "" if result.added is None else f"{result.added:+.2f}",
            "" if result.interval is None else f"{result.interval[0]:.2f} … {result.interval[1]:.2f}",
            result.speed,
            bytes_text(result.bytes),
        )
    console.print(table)
    console.print(
        "drop: against BF16; judged: what the gate compares, on top of what the step stands on (D: against BF16)"
    )
    for result in results:
        if result.verdict != SHIP:
            console.print(
                f"Rejected, step {result.step} {result.name}: {result.reason}.", markup=False, highlight=False
            )
    console.print(f"* of the configurations that ship, the one with the fewest bytes: {best.name}", highlight=False)
    if best.reason:
        console.print(f"  To know: {best.reason}.", markup=False, highlight=False)
    console.print(recommendation(best, common), markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/ladder"), help="folder of the ladder; same = resume")
    parser.add_argument("--kv", default="mx_v_only", help="KV config of step 4 (default mx_v_only)")
    parser.add_argument("overrides", nargs="*", help="words for every run, such as model=doom data.limit=4")
    args = parser.parse_intermixed_args(argv)
    register()
    try:
        ladder = Ladder(args.out, args.overrides, args.kv)
        if git_state()["dirty"]:
            print("note: the working tree differs from its commit; a resumed ladder does not see such changes")
        best = ladder.climb()
    except LadderError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"stopped; start it again with --out {args.out} to go on", file=sys.stderr)
        return BROKE
    show(ladder.results, best, ladder.common, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed ladder takes its run along
    sys.exit(main())
