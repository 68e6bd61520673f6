"""The climb over made-up worlds: a fake launcher writes the records that a run would leave."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from gate_cases import scores
from omegaconf import OmegaConf
from report_cases import completed
from rich.console import Console

from harness.config import ROOT, register
from harness.config.compose import compose
from harness.ladder import rungs
from harness.ladder.child import launch_process, quoted
from harness.ladder.climb import BrokenOff, Ladder, compose_run, recommendation, same
from harness.ladder.command import main
from harness.ladder.show import gained, show
from harness.ladder.state import Failure, LadderError, locked
from harness.report.codec import read
from harness.report.gates import DO_NOT_SHIP, EXIT_CODES, SHIP, GatesConf, evaluate
from harness.report.record import RunRecord, load_record
from harness.report.sections import Calibration

register()
COMMON = ("model=smoke", "data.limit=3")
composed = functools.cache(compose_run)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each config is composed once, and nobody commits meanwhile."""
    monkeypatch.setattr("harness.ladder.climb.compose_run", lambda words: composed(tuple(words)))
    monkeypatch.setattr("harness.ladder.climb.git_state", lambda: {"commit": "here", "dirty": False})


class GateWords:
    """The gate that the words of a launch choose."""

    def __init__(self, words):
        given = dict(word.split("=", 1) for word in words)
        fields = yaml.safe_load((ROOT / "conf" / "gates" / f"{given.pop('gates')}.yaml").read_text())
        self.gate = GatesConf.of(
            {**fields, **{name.partition(".")[2]: yaml.safe_load(text) for name, text in given.items()}}
        )


class World:
    """Knows what each configuration would lose, as a run's record tells it.

    ``drops``: dB by quant and by kv, added up; ``unstable``: quants that break. ``dies_at``: the launch that is killed.
    ``spread``: of the drops over clips, as a share of the drop. ``crashes``: words whose run ends in a traceback.
    """

    def __init__(self, drops=None, unstable=(), late_factor=0.1, dies_at=None, scored=True, spread=0, crashes=()):
        self.drops, self.unstable, self.late_factor = drops or {}, unstable, late_factor
        self.dies_at, self.scored, self.spread, self.crashes = dies_at, scored, spread, crashes
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
        if any(word in words for word in self.crashes):
            return self.crash(words, folder)
        gates, words = [word for word in words if "gates" in word], [word for word in words if "gates" not in word]
        config, plan = composed(tuple(words))
        broken = f"mxfp{plan.conf.quant.bits}_{plan.conf.quant.scope}" in self.unstable and plan.conf.quant.enabled
        record = self.record(folder.name, config, plan.conf, broken)
        conf = GateWords(gates)
        if conf.gate.enabled:
            baseline = None if conf.gate.baseline is None else load_record(Path(conf.gate.baseline))
            record["gates"] = asdict(evaluate(read(RunRecord, record), conf.gate, baseline))
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
        return 1 if broken else EXIT_CODES[record["gates"]["verdict"]] if record["gates"] else 0

    def crash(self, words, folder):
        """As the real run does: exit code 1, a record without a clip, the error as its incident."""
        folder.mkdir(parents=True)
        (folder / "console.log").write_text("Traceback\nRuntimeError: out of memory\n")
        incident = {"kind": "RuntimeError", "message": "out of memory"}
        (folder / "record.json").write_text(
            json.dumps(completed({"status": "failed", "clips": [], "incidents": [incident]}))
        )
        return 1

    def record(self, name, config, conf, broken):
        drop = self.drop(conf)

        def arm(label, weights, kv):
            memory = {"weight_bytes": weights, "kv_window_bytes": kv, "kv_peak_bytes": kv}
            return {"label": label, "speed_is_meaningful": False, "memory": memory}

        arms = {"bf16": arm("BF16", 2000, 500)}
        if not conf.is_baseline:
            arms["candidate"] = arm("candidate", self.size(conf), 380 if conf.kv.enabled else 500)
        clips = [self.clip(str(number), drop, conf) for number in range(3)]
        if self.spread and not conf.is_baseline:
            clips = [self.clip(str(n), drop + (n - 1) * self.spread * drop, conf) for n in range(3)]
        incident = {"kind": "non_finite", "arm": "candidate", "message": "NaN in blocks.0", "action": "run ended"}
        content = {
            "run_id": name,
            "status": "failed" if broken else "complete",
            "config": config,
            "arms": arms,
            "clips": [] if broken else clips,
            "environment": {"gpu": None, "cpu": "CPU"},
            "incidents": [incident] if broken else [],
            "gates": None,
        }
        return completed(content)

    def clip(self, name, drop, conf):
        kept = {"bf16", "candidate", "fidelity"} if self.scored else {"fidelity"}
        kept &= {"bf16"} if conf.is_baseline else kept
        scored = {"psnr": drop, "ssim": drop / 100} if "candidate" in kept else None
        found = {arm: values for arm, values in scores(drop, 4).items() if arm in kept}
        return {"clip_id": name, "tag": "motion", "drop": scored, "scores": found}


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
        "+ KV mxfp4_kv",
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
    baseline = next(word for word in ladder.known if ladder.known[word].name == "MXFP8 all")
    assert ladder.known[baseline].interval is not None


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
    assert best.kv == ["kv=bf16"]
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
    show(ladder, best, console)
    text = console.export_text()
    assert "Rejected, step 5 MXFP4 MLP: the candidate is unstable (NaN in blocks.0)" in text
    assert text.startswith(
        "Recommended: quant=mxfp8_all kv=mx_v_only, 1.4 KiB instead of 2.4 KiB of weights and cache, +0.02"
    )
    assert recommendation(best, COMMON) in text


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
    monkeypatch.setattr("harness.ladder.climb.git_state", lambda: {"commit": "another", "dirty": False})
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
    with pytest.raises(BrokenOff, match=r"BF16 did not run.*the run ended with exit code 2; see .*console.log"):
        climb(lambda words, folder: 2)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        "NaN",
        "{",
        "[" * 100_000,
        '{"state_version": 1, "runs": {}}',
        '{"state_version": 2, "runs": []}',
        '{"state_version": 2, "runs": {"a": {"verdict": "ship"}}}',
        '{"state_version": 2, "runs": {"a": null}}',
        "\x00\x80",
        '{"state_version": "\\u001b[2J\\n\\n"}',
    ],
)
def test_a_broken_state_file_is_one_clear_error(tmp_path, capsys, text):
    (tmp_path / "ladder.json").write_text(text)
    assert main(["--out", str(tmp_path), "model=smoke"]) == 2
    err = capsys.readouterr().err
    assert "not a ladder's state" in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_in_the_states_place_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "ladder.json").mkdir()
    assert main(["--out", str(tmp_path), "model=smoke"]) == 2
    assert "not a ladder's state" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "ladder.lock"), "model=smoke"]) == 2


def test_of_two_ladders_in_one_folder_the_second_is_refused(tmp_path, capsys):
    with locked(tmp_path):
        assert main(["--out", str(tmp_path), "model=smoke"]) == 2
    assert "another ladder is at work here" in capsys.readouterr().err
    with locked(tmp_path):  # the lock went with the first one
        pass


def test_a_crashed_run_is_told_of_never_taken_for_a_result_and_tried_again(climb, tmp_path):
    crashing = World(crashes=("quant=mxfp8_all",))
    ladder, best = climb(crashing)
    assert [failure.name for failure in ladder.failed] == [
        "MXFP8 all",
        "MXFP8 all, attention in BF16",
        "MXFP8 all, last 6 layers only",
        "MXFP8 all, last 3 layers only",
    ]
    assert "exit code 1 (RuntimeError: out of memory); see" in ladder.failed[0].reason
    assert not any(name.startswith("MXFP8 all") for name in trials(ladder))
    assert json.loads(ladder.state_file.read_text())["complete"] is False
    console = Console(width=160, record=True, file=(tmp_path / "shown").open("w"))
    show(ladder, best, console)
    assert "NOT EVERYTHING RAN: MXFP8 all, " in console.export_text().splitlines()[0]
    again = World()
    ladder, best = climb(again)
    assert ladder.failed == []
    assert trials(ladder)["MXFP8 all"] == "ship"
    assert best.name == "MXFP4 all"


def test_nothing_is_recommended_where_bf16_itself_did_not_run(climb, monkeypatch, tmp_path, capsys):
    for crashes in (("quant=bf16",), ("data.limit=3",)):
        with pytest.raises(BrokenOff, match="BF16 did not run"):
            climb(World(crashes=crashes))
    monkeypatch.setattr("harness.ladder.climb.launch_process", None)
    monkeypatch.setattr(Ladder.__init__, "__defaults__", (World(crashes=("quant=bf16",)), print))
    assert main(["--out", str(tmp_path / "ladder"), *COMMON]) == 1
    said = capsys.readouterr()
    assert "start it again with --out" in said.err
    assert "Recommended" not in said.out


@pytest.mark.parametrize("code", [130, 143, -9])
def test_a_run_that_is_stopped_from_outside_stops_the_ladder(climb, code):
    with pytest.raises(BrokenOff, match=f"stopped from outside .exit code {code}"):
        climb(lambda words, folder: code)


def test_the_command_ends_with_1_where_a_run_failed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Ladder.__init__, "__defaults__", (World(crashes=("quant=mxfp4_mlp",)), print))
    assert main(["--out", str(tmp_path), *COMMON]) == 1
    said = capsys.readouterr()
    assert "Failed, step 5 MXFP4 MLP" in said.out
    assert "of the runs failed; start it again" in said.err


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_result_whose_record_is_gone_or_not_complete_is_not_reused(climb, status):
    ladder, _ = climb(World())
    records = sorted(ladder.out.glob("runs/*/record.json"))
    records[0].unlink()
    records[-1].write_text(records[-1].read_text().replace('"complete"', f'"{status}"'))
    again = World()
    ladder, _ = climb(again)
    assert len(again.launched) == 2
    assert ladder.reused == len(records) - 2


def test_what_the_state_says_of_a_run_is_read_anew_from_its_record(climb):
    """A verdict or words written into ladder.json prove nothing; nor is another run taken for this one."""
    drops = {"mxfp4_mlp": 2.0, "mxfp4_all": 2.0}
    ladder, best = climb(World(drops))
    state = json.loads(ladder.state_file.read_text())
    bad, good = (next(r for r in state["runs"].values() if r["verdict"] == verdict) for verdict in (DO_NOT_SHIP, SHIP))
    bad.update(verdict=SHIP, reason="", bytes=1, quant=["quant=mxfp4_all"])
    ladder.state_file.write_text(json.dumps(state))
    again, once_more = climb(World(drops))
    assert again.reused == len(again.results)
    assert (once_more.quant, once_more.bytes, once_more.verdict) == (best.quant, best.bytes, best.verdict)
    bad["folder"] = good["folder"]
    ladder.state_file.write_text(json.dumps(state))
    world = World(drops)
    climb(world)
    assert len(world.launched) == 1


def test_a_record_is_of_its_configuration_wherever_its_folder_lies(tmp_path):
    """What names a run's own folder in its config is another in each: all of it would be run again."""
    words = (*COMMON, "quant=mxfp8_mlp", "gates=a")
    config, _ = compose_run(words)
    ran = OmegaConf.to_container(compose(*words, folder=tmp_path / "run"), resolve=True, enum_to_str=True)
    assert ran != config
    assert same(ran, config)
    for other in ("quant=mxfp8_all", "seed=1", "data.future_frames=3", "kv=mx_v_only"):
        assert not same(ran, compose_run((*words, other))[0])


def test_words_in_another_order_are_the_same_ladder(climb):
    climb(World(), common=("model=smoke", "data.limit=3", "seed=2"))
    again = World()
    ladder, _ = climb(again, common=("seed=2", "data.limit=3", "model=smoke"))
    assert again.launched == []
    assert ladder.reused == len(ladder.results)


def test_every_clip_is_taken_unless_the_words_say_otherwise_and_a_cpus_speed_is_left_out_by_name(climb):
    world = World()
    climb(world, common=("model=smoke",))
    assert all("data.limit=null" in words for words in world.launched)
    assert all("gates.without=[speed]" in words for words in world.launched[1:])
    world = World()
    climb(world)
    assert not any("data.limit=null" in words for words in world.launched)


def test_on_a_cpu_bf16_is_rolled_out_once_and_each_core_has_clips_of_its_own(climb, monkeypatch, tmp_path):
    monkeypatch.setattr("harness.ladder.climb.usable_cores", lambda: 8)

    def words(*common):
        world = World()
        ladder, best = climb(world, common=(*COMMON, *common), out=tmp_path / str(len(common)))
        told = recommendation(best, ladder.common)
        assert not set(ladder.sparing) & set(told.split())  # what spares time is no part of it
        assert all(set(ladder.sparing) <= set(launched) for launched in world.launched)
        return ladder.sparing

    spared = ["measure.reuse_bf16=true", "measure.parts_frames=0", "measure.videos=false"]
    assert words() == [*spared, "trainer.devices=3"]  # no more processes than clips
    chosen = ("measure.reuse_bf16=false", "threads=1", "measure.videos=true")
    assert words(*chosen) == ["measure.parts_frames=0"]
    assert words("trainer=ddp_cpu") == spared


def test_where_speed_is_judged_bf16_is_rolled_out_beside_every_candidate(monkeypatch, tmp_path):
    config, plan = composed((*COMMON, "data.limit=null"))
    on_gpu = dataclasses.replace(plan, device=torch.device("cuda"))
    monkeypatch.setattr("harness.ladder.climb.compose_run", lambda words: (config, on_gpu))
    ladder = Ladder(tmp_path, COMMON, "mx_v_only", launch=World())
    assert ladder.asking == ladder.sparing == []


def test_what_noise_leaves_undecided_is_narrowed_and_says_how_many_clips_would_decide(climb, tmp_path):
    ladder, best = climb(World({"mxfp4_mlp": 0.4}, spread=0.5))
    found = trials(ladder)
    assert found["MXFP4 MLP"] == "undecided"
    assert found["MXFP4 MLP, last 6 layers only"] == "ship"
    needs = next(result.needs_clips for result in ladder.results if result.name == "MXFP4 MLP")
    assert needs > 3
    console = Console(width=160, record=True, file=(tmp_path / "shown").open("w"))
    show(ladder, best, console)
    assert f"about {needs} clips would decide" in console.export_text().splitlines()[0]


def test_a_variant_is_tried_with_every_candidate_before_the_next_narrower_one(climb, monkeypatch):
    calibrated = rungs.Variant(", with late 1", ("quant.late_layers=1",))
    monkeypatch.setattr(rungs, "VARIANTS", (*rungs.VARIANTS, calibrated))
    ladder, _ = climb(World({"mxfp8_mlp": 1.0}))
    assert list(trials(ladder))[:3] == ["BF16", "MXFP8 MLP", "MXFP8 MLP, with late 1"]
    assert trials(ladder)["MXFP8 MLP, with late 1"] == "ship"


def test_weights_are_calibrated_where_the_model_has_clips_for_it(tmp_path):
    words = {
        "a model without clips for it": ("model=smoke",),
        "the demo": ("model=doom",),
    }
    names = {
        what: [variant.name for variant in Ladder(tmp_path, own, "mx_v_only", launch=World()).variants]
        for what, own in words.items()
    }
    assert names == {
        "a model without clips for it": [""],
        "the demo": ["", ", calibrated"],
    }
    with pytest.raises(LadderError, match="calib=gptq: the ladder chooses"):
        Ladder(tmp_path, ("model=doom", "calib=gptq"), "mx_v_only", launch=World())


def test_what_is_said_of_calibration_goes_to_the_steps_that_calibrate(tmp_path):
    ladder = Ladder(tmp_path, ("model=doom", "calib.damping=0.2"), "mx_v_only", launch=World())
    launched = []
    ladder._measure = lambda rung, candidate, words, made: launched.append(words) or Failure(1, "", "", "")
    for candidate in rungs.linears(2, "MXFP8 MLP", "mxfp8_mlp", "a", ("kv=bf16",), 12).candidates[:2]:
        ladder._run(rungs.BASELINE, candidate, None)
    assert (
        ["calib.damping=0.2" in words for words in launched] == [False, True] == ["calib=gptq" in w for w in launched]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model=smoke", "calib.damping=0.2"), "paths is empty"),  # there is nothing to calibrate on
        (("model=doom", "calib.damping=7"), "damping=7.0: must be at least 0 and below 1"),
        (("model=doom", "quant.bits=4"), "the ladder chooses"),
        (("model=doom", "data.synthetic_clips=3"), "data.synthetic_clips: without effect"),
    ],
)
def test_a_word_of_which_no_step_would_take_notice_is_refused(tmp_path, words, said):
    with pytest.raises(LadderError, match=said):
        Ladder(tmp_path, words, "mx_v_only", launch=World())


def test_a_ladder_that_is_refused_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["model=smoke", "gates=d"]) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert main(["model=smoke", "--out", "file/below"]) == 2
    assert "error: --out file/below: " in (said := capsys.readouterr().err)
    assert said.endswith("file is a file; name a folder\n")


def test_the_table_says_what_calibration_gained_and_cost(climb):
    ladder, _ = climb(World())
    nearest = ladder.results[4]
    made = Calibration("gptq", ["clip"], 8, 61.4, 2**30, "cpu", 24, "abc", False)
    own = {"quant": [*nearest.quant, "calib=gptq"], "drop": nearest.drop - 0.25, "fidelity": 44.0}
    better = dataclasses.replace(nearest, **own, calibration=made)
    nearest = dataclasses.replace(nearest, fidelity=36.5)
    assert gained(better, [nearest, better]) == "+0.25 dB of drop, +7.5 dB of fidelity; 61 s, peak 1.0 GiB"
    assert gained(better, [better]) == "61 s, peak 1.0 GiB"
    assert gained(nearest, [nearest, better]) == ""


def test_one_real_run(tmp_path):
    folder = tmp_path / "it's, a=folder"
    words = ["model=smoke", "model.arch.n_layers=2", "data.limit=1", "data.future_frames=2", "measure.videos=false"]
    assert launch_process([*words, "quant=mxfp4_mlp", "gates=d"], folder) == 4
    record = load_record(folder / "record.json")
    assert record.gates.verdict == "undecided"
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


def test_a_4_bit_cache_keeps_its_newest_frames_in_8_bits_before_it_gives_up_k():
    _, plan = compose_run(["model=smoke", "kv=mxfp4_kv"])
    narrowed = rungs.narrower_kv("mxfp4_kv", plan)
    assert [name for name, _ in narrowed[:2]] == ["newest 2 frames in 8 bits too", "K back to BF16"]
    for _, words in narrowed:
        compose_run(["model=smoke", *words])
    for words in (["kv=mx_kv_e4m3"], ["kv=mxfp4_kv", "kv.recent_frames=1"]):
        _, plan = compose_run(["model=smoke", *words])
        assert all("newest" not in name for name, _ in rungs.narrower_kv("mxfp4_kv", plan))


def test_a_4_bit_cache_that_does_not_ship_is_not_narrowed_to_more_bytes_than_already_ship(climb):
    world = World(late_factor=0.5)
    lossy = world.drop
    world.drop = lambda conf: 9.0 if conf.kv.is_4_bit("v") else lossy(conf)
    ladder, best = climb(world, kv="mx_kv_e4m3")
    tried = [name for name in trials(ladder) if "mxfp4_kv" in name]
    assert tried == ["+ KV mxfp4_kv", "+ KV mxfp4_kv, newest 2 frames in 8 bits too"]
    assert best.kv == ["kv=mx_kv_e4m3"]
