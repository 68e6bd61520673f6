"""The climb over made-up worlds: a fake launcher writes the records that a run would leave."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from report_cases import completed
from rich.console import Console

from harness.config import ROOT, register
from harness.report.gates import EXIT_CODES, GatesConf, evaluate
from harness.report.record import load_record
from scripts.ladder import Ladder, LadderError, compose_run, launch_process, main, quoted, recommendation, show

register()
COMMON = ("model=smoke", "data.limit=3")
composed = functools.cache(compose_run)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each config is composed once, and nobody commits meanwhile."""
    monkeypatch.setattr("scripts.ladder.compose_run", lambda words: composed(tuple(words)))
    monkeypatch.setattr("scripts.ladder.git_state", lambda: {"commit": "here", "dirty": False})


class GateWords:
    """The gate that the words of a launch choose."""

    def __init__(self, words):
        given = dict(word.split("=", 1) for word in words)
        fields = yaml.safe_load((ROOT / "conf" / "gates" / f"{given.pop('gates')}.yaml").read_text())
        self.gate = GatesConf.of(
            {**fields, **{name.partition(".")[2]: text.strip("'") for name, text in given.items()}}
        )


class World:
    """Knows what each configuration would lose, as a run's record tells it.

    ``drops``: dB by quant and by kv, added up; ``unstable``: quants that break. ``dies_at``: the launch that is killed.
    """

    def __init__(self, drops=None, unstable=(), late_factor=0.1, dies_at=None, scored=True):
        self.drops, self.unstable, self.late_factor = drops or {}, unstable, late_factor
        self.dies_at, self.scored = dies_at, scored
        self.launched = []

    def drop(self, conf):
        quant, kv = conf.quant, conf.kv
        linears = self.drops.get(f"mxfp{quant.bits}_{quant.scope}", 0.01) if quant.enabled else 0.0
        cache = self.drops.get("k" if kv.quantize_k else "v", 0.01) if kv.enabled else 0.0
        if quant.exclude or quant.late_layers:
            linears *= self.late_factor
        if kv.late_layers:
            cache *= self.late_factor
        return linears + cache

    def size(self, conf):
        linears = {"mlp": 400, "all": 900}[conf.quant.scope] if conf.quant.enabled else 0
        if conf.quant.late_layers or conf.quant.exclude:
            linears /= 2
        return int(2000 - linears * (1 if conf.quant.bits == 8 else 1.4))

    def __call__(self, words, folder):
        self.launched.append(list(words))
        if len(self.launched) == self.dies_at:
            raise KeyboardInterrupt
        gates, words = [word for word in words if "gates" in word], [word for word in words if "gates" not in word]
        config, plan = composed(tuple(words))
        broken = f"mxfp{plan.conf.quant.bits}_{plan.conf.quant.scope}" in self.unstable and plan.conf.quant.enabled
        record = self.record(folder.name, config, plan.conf, broken)
        conf = GateWords(gates)
        if conf.gate.enabled:
            baseline = None if conf.gate.baseline is None else asdict(load_record(Path(conf.gate.baseline)))
            record["gates"] = evaluate(record, conf.gate, baseline)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
        return 1 if broken else EXIT_CODES[record["gates"]["verdict"]] if record["gates"] else 0

    def record(self, name, config, conf, broken):
        drop = self.drop(conf)

        def arm(label, weights, kv):
            memory = {"weight_bytes": weights, "kv_window_bytes": kv, "kv_peak_bytes": kv}
            return {"label": label, "speed_is_meaningful": False, "memory": memory}

        arms = {"bf16": arm("BF16", 2000, 500)}
        if not conf.is_baseline:
            arms["candidate"] = arm("candidate", self.size(conf), 380 if conf.kv.enabled else 500)
        scored = {"psnr": drop, "ssim": 0.0} if self.scored and not conf.is_baseline else None
        clips = [{"clip_id": str(number), "tag": "motion", "drop": scored, "scores": {}} for number in range(3)]
        incident = {"kind": "non_finite", "arm": "candidate", "message": "NaN in blocks.0"}
        content = {
            "run_id": name,
            "status": "failed" if broken else "complete",
            "config": config,
            "arms": arms,
            "clips": [] if broken else clips,
            "quality": {"all": {"drop": scored}},
            "environment": {"gpu": None, "cpu": "CPU"},
            "model": {"weights": "checkpoint"},
            "incidents": [incident] if broken else [],
            "gates": None,
        }
        return completed(content)


@pytest.fixture
def climb(tmp_path):
    def run(world, kv="mx_v_only", common=COMMON, out=tmp_path / "ladder"):
        ladder = Ladder(out, common, kv, launch=world, say=lambda line: None)
        return ladder, ladder.climb()

    return run


def trials(ladder):
    return {result.name: result.verdict for result in ladder.results}


def test_where_everything_ships_it_climbs_to_the_top(climb):
    ladder, best = climb(World())
    assert list(trials(ladder)) == [
        "BF16",
        "MXFP8 MLP",
        "MXFP8 all",
        "+ KV mx_v_only",
        "MXFP4 MLP",
        "MXFP4 late 8",
        "MXFP4 all",
    ]
    assert set(trials(ladder).values()) == {"ship"}
    assert recommendation(best, COMMON).endswith("data.limit=3 quant=mxfp4_all kv=mx_v_only")
    gates = {result.name: (result.gate, result.stands_on) for result in ladder.results}
    assert gates["MXFP8 all"] == ("b", "MXFP8 MLP")
    assert gates["+ KV mx_v_only"] == ("c", "MXFP8 all")
    assert gates["MXFP4 MLP"] == ("d", "+ KV mx_v_only")


def test_each_step_is_judged_on_top_of_what_it_stands_on(climb):
    """0.25 dB at A and 0.25 dB more at B: each within its 0.3 dB, together 0.5 dB."""
    ladder, _ = climb(World({"mxfp8_mlp": 0.25, "mxfp8_all": 0.5, "mxfp4_mlp": 2.0}))
    found = {result.name: result for result in ladder.results}
    assert found["MXFP8 all"].verdict == "ship"
    assert found["MXFP8 all"].drop == pytest.approx(0.5)
    assert found["MXFP8 all"].added == pytest.approx(0.25)
    baseline = next(word for word in ladder.known if ladder.known[word]["name"] == "MXFP8 all")
    assert ladder.known[baseline]["interval"] is not None


def test_a_rejected_step_is_narrowed_until_it_ships(climb):
    ladder, best = climb(World({"mxfp8_all": 1.0, "mxfp4_mlp": 9.0}))
    found = trials(ladder)
    assert found["MXFP8 all"] == "do not ship"
    assert found["MXFP8 all, attention in BF16"] == "ship"
    assert "MXFP8 all, attention in BF16, last" not in " ".join(found)
    assert [name for name in found if name.startswith("MXFP4 MLP")] == [
        "MXFP4 MLP",
        "MXFP4 MLP, last 6 layers only",
        "MXFP4 MLP, last 3 layers only",
    ]
    assert not any(name.startswith("MXFP4 late") for name in found)  # broader 4 bit needs 4-bit MLPs that ship
    assert recommendation(best, COMMON).endswith("\"quant.exclude=['*attn*']\" kv=mx_v_only")


def test_the_way_back_of_a_cache_k_first_then_layers(climb):
    ladder, best = climb(World({"k": 5.0, "v": 5.0, "mxfp4_mlp": 9.0}, late_factor=0.5), kv="mx_kv")
    names = [name for name in trials(ladder) if "KV" in name]
    assert names == [
        "+ KV mx_kv",
        "+ KV mx_kv, K back to BF16",
        "+ KV mx_kv, last 6 layers only",
        "+ KV mx_kv, last 3 layers only",
    ]
    assert best.kv == ("kv=bf16",)
    assert best.name == "MXFP8 all"


def test_an_averaged_scale_goes_back_to_one_per_token(climb):
    ladder, _ = climb(World({"v": 5.0, "mxfp4_mlp": 9.0}, late_factor=0.5), kv="mx_ema_v_only")
    assert "+ KV mx_ema_v_only, scales per token" in trials(ladder)


def test_an_unstable_step_is_rejected_with_its_incident(climb, tmp_path):
    ladder, best = climb(World(unstable=["mxfp4_mlp"]))
    failed = next(result for result in ladder.results if result.name == "MXFP4 MLP")
    assert failed.verdict == "do not ship"
    assert "NaN in blocks.0" in failed.reason
    console = Console(width=160, record=True, file=(tmp_path / "shown").open("w"))
    show(ladder.results, best, COMMON, console)
    text = console.export_text()
    assert "Rejected, step 5 MXFP4 MLP: instabilities 1, allowed <= 0" in text
    assert text.strip().endswith(recommendation(best, COMMON))


def test_what_cannot_be_decided_is_not_narrowed_and_nothing_ships_on_it(climb):
    ladder, best = climb(World(scored=False))
    assert trials(ladder) == {
        "BF16": "ship",
        "MXFP8 MLP": "undecided",
        "MXFP8 all": "undecided",
        "+ KV mx_v_only": "undecided",
        "MXFP4 MLP": "undecided",
    }
    assert best.name == "BF16"


def without_times(state):
    for result in [*state["trials"], *state["runs"].values()]:
        result["seconds"] = 0.0
        result["folder"] = result["folder"].rpartition(".")[0]
    return state


@pytest.mark.parametrize("dies_at", [1, 4])
def test_a_killed_ladder_goes_on_where_it_stopped_and_ends_the_same(climb, tmp_path, dies_at):
    drops = {"mxfp8_all": 1.0}
    climb(World(drops), out=tmp_path / "whole")
    killed = World(drops, dies_at=dies_at)
    with pytest.raises(KeyboardInterrupt):
        climb(killed, out=tmp_path / "killed")
    resumed = World(drops)
    ladder, _ = climb(resumed, out=tmp_path / "killed")
    assert ladder.reused == dies_at - 1
    assert len(resumed.launched) == len(ladder.results) - (dies_at - 1)
    ends = [json.loads((tmp_path / name / "ladder.json").read_text()) for name in ("whole", "killed")]
    assert without_times(ends[0]) == without_times(ends[1])
    again = World(drops)
    climb(again, out=tmp_path / "killed")
    assert again.launched == []


def test_a_run_of_another_config_or_commit_is_not_reused(climb, monkeypatch):
    climb(World())
    other = World()
    ladder, _ = climb(other, common=(*COMMON, "seed=1"))
    assert ladder.reused == 0
    monkeypatch.setattr("scripts.ladder.git_state", lambda: {"commit": "another", "dirty": False})
    ladder, _ = climb(World())
    assert ladder.reused == 0


@pytest.mark.parametrize(
    ("common", "kv", "said"),
    [
        (("quant=bf16",), "mx_v_only", "the ladder chooses quant, kv, gates"),
        (("model=none",), "mx_v_only", "none"),
        (("model=smoke", "data.limit=0"), "mx_v_only", "limit=0: must be at least 1"),
        (("model=smoke",), "nothing", "nothing"),
    ],
)
def test_wrong_words_are_named_before_anything_runs(tmp_path, common, kv, said):
    with pytest.raises(LadderError, match=said):
        Ladder(tmp_path, common, kv, launch=lambda *_: pytest.fail("ran"))


def test_a_run_that_leaves_no_record_stops_the_ladder(climb):
    with pytest.raises(LadderError, match=r"BF16: the run ended with exit code 2; see .*console.log"):
        climb(lambda words, folder: 2)


def test_a_state_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "ladder.json").write_text("{}")
    assert main(["--out", str(tmp_path), "model=smoke"]) == 2
    assert "not a ladder's state" in capsys.readouterr().err


def test_one_real_run(tmp_path):
    folder = tmp_path / "it's, a=folder"
    words = ["model=smoke", "model.arch.n_layers=2", "data.limit=1", "data.future_frames=2", "measure.videos=false"]
    assert launch_process([*words, "quant=mxfp4_mlp", "gates=d"], folder) == 4
    record = load_record(folder / "record.json")
    assert record.gates["verdict"] == "undecided"
    assert "UNDECIDED" in (folder / "console.log").read_text()
    assert quoted("a'b") == "'a\\'b'"


def test_the_command_explains_itself():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "ladder.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert "Climb from BF16" in done.stdout
