"""Gates are judged from plain dicts: a record needs no run."""

import json

import numpy as np
import pytest
import report_cases
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness.config import ROOT
from harness.report.gates import (
    DO_NOT_SHIP,
    SHIP,
    UNDECIDED,
    GateError,
    GatesConf,
    bootstrap_interval,
    build_table,
    evaluate,
)
from harness.report.record import load_record
from scripts.gates import main as judge

GPU = {"name": "GPU", "count": 1, "compute_capability": "9.0", "memory_bytes": 1 << 36}
GATES = {path.stem: path for path in (ROOT / "conf" / "gates").glob("*.yaml")}


def gate(name, **changes):
    return GatesConf.of({**yaml.safe_load(GATES[name].read_text()), **changes})


def arm(label="arm", fps=100.0, meaningful=True, kv=1000):
    return {
        "label": label,
        "speed_is_meaningful": meaningful,
        "speed": {"pipeline_fps": fps, "total_fps": fps},
        "memory": {"weight_bytes": 4000, "kv_window_bytes": kv, "kv_peak_bytes": kv, "peak_allocated": None},
    }


def record(drops=(0.1, 0.1, 0.1), fps=100.0, meaningful=True, kv=1000, status="complete", incidents=(), **candidate):
    clips = [
        {
            "clip_id": f"clip_{number}",
            "tag": "motion",
            "drop": {"psnr": drop, "ssim": drop / 100},
            "scores": {"fidelity": {"psnr": 40.0, "ssim": 0.9, "frames": {"psnr": [40.0], "ssim": [0.9]}}},
        }
        for number, drop in enumerate(drops)
    ]
    sections = {name: {} for name in ("decoder", "sampler", "attention", "compile", "trainer", "data")}
    return {
        "run_id": "run",
        "status": status,
        "arms": {"bf16": arm("BF16"), "candidate": arm("mx", fps, meaningful, kv)},
        "clips": clips,
        "incidents": list(incidents),
        "environment": {"gpu": GPU, "cpu": "CPU"},
        "model": {"weights": "checkpoint"},
        "config": {"model": {"window": 4}, **sections},
    }


def checks(found):
    return {check["figure"]: check for check in found["checks"]}


def test_gate_a_is_the_plans():
    found = evaluate(record(drops=[0.25, 0.3, 0.35], fps=97.0), gate("a"))
    assert found["verdict"] == SHIP
    psnr, fps = checks(found)["PSNR drop dB"], checks(found)["FPS ratio (pipeline_fps)"]
    assert (psnr["threshold"], fps["threshold"]) == (0.3, 0.97)
    assert psnr["margin"] == pytest.approx(0, abs=1e-12)
    assert psnr["status"] == fps["status"] == "pass"


@pytest.mark.parametrize(
    ("found", "figure"),
    [
        (record(drops=[0.31] * 3), "PSNR drop dB"),
        (record(fps=96.9), "FPS ratio (pipeline_fps)"),
        (record(incidents=[{"arm": "candidate", "kind": "frozen", "message": "frozen frames"}]), "instabilities"),
    ],
)
def test_each_condition_of_gate_a_can_fail_it(found, figure):
    judged = evaluate(found, gate("a"))
    assert judged["verdict"] == DO_NOT_SHIP
    assert [name for name, check in checks(judged).items() if check["status"] == "fail"] == [figure]
    assert checks(judged)[figure]["margin"] < 0


def test_an_emulated_kernels_speed_neither_passes_nor_fails_and_the_verdict_says_so():
    for fps in (1.0, 1000.0):
        found = evaluate(record(fps=fps, meaningful=False), gate("a"))
        assert found["verdict"] == SHIP
        assert checks(found)["FPS ratio (pipeline_fps)"]["status"] == "not_measured"
        assert "The verdict rests on quality alone." in found["notes"]
        assert any("emulated kernel" in note for note in found["notes"])


def test_gate_b_counts_what_is_lost_on_top_of_gate_a_and_its_speed():
    before = record(drops=[0.2, 0.3, 0.1], fps=120.0)
    ours = record(drops=[0.4, 0.5, 0.3], fps=121.0)
    found = evaluate(ours, gate("b", baseline="a/record.json"), before)
    assert checks(found)["PSNR drop dB"]["value"] == pytest.approx(0.2)
    assert checks(found)["FPS ratio (pipeline_fps)"]["value"] == pytest.approx(121 / 120)
    assert found["verdict"] == SHIP
    # The machine ran both arms at half the speed that day: nothing changes.
    for one in ours["arms"].values():
        one["speed"]["pipeline_fps"] /= 2
    assert evaluate(ours, gate("b", baseline="a"), before)["verdict"] == SHIP
    ours["arms"]["candidate"]["speed"]["pipeline_fps"] *= 0.98
    assert evaluate(ours, gate("b", baseline="a"), before)["verdict"] == DO_NOT_SHIP


def test_a_step_on_top_of_one_that_was_rejected_says_so():
    before, said = record(), "The baseline stands on nothing itself: its own verdict is do not ship."
    assert said not in evaluate(record(kv=700), gate("c", baseline="b"), before)["notes"]
    before["gates"] = evaluate(record(drops=[0.9] * 3), gate("a"))
    assert said in evaluate(record(kv=700), gate("c", baseline="b"), before)["notes"]


def test_gate_c_wants_a_smaller_cache_scratch_included():
    before = record(kv=1000)
    assert evaluate(record(kv=700), gate("c", baseline="b"), before)["verdict"] == SHIP
    wasteful = record(kv=700)
    wasteful["arms"]["candidate"]["memory"]["kv_peak_bytes"] += 400
    found = evaluate(wasteful, gate("c", baseline="b"), before)
    assert found["verdict"] == DO_NOT_SHIP
    assert checks(found)["memory ratio (kv_peak_bytes)"]["value"] == pytest.approx(1.1)


def test_gate_d_stays_open_below_three_clips():
    assert evaluate(record(drops=[0.4, 0.4]), gate("d"))["verdict"] == UNDECIDED
    assert evaluate(record(drops=[0.4, 0.4, 0.4]), gate("d"))["verdict"] == SHIP
    assert evaluate(record(drops=[0.9, 0.9]), gate("d"))["verdict"] == DO_NOT_SHIP


def test_what_was_not_measured_leaves_the_verdict_open():
    synthetic = record()
    for clip in synthetic["clips"]:
        clip["drop"] = None
    assert evaluate(synthetic, gate("a"))["verdict"] == UNDECIDED
    random = record()
    random["model"]["weights"] = "random"
    assert evaluate(random, gate("a"))["verdict"] == UNDECIDED
    assert evaluate(random, gate("a", max_psnr_drop=None, min_fidelity_psnr=1.0))["verdict"] == UNDECIDED
    assert evaluate(record(status="failed"), gate("a"))["verdict"] == UNDECIDED
    unmeasured = gate("c", baseline="b", memory=["peak_allocated"])
    assert evaluate(record(), unmeasured, record())["verdict"] == UNDECIDED
    more = evaluate(record(drops=[0.1] * 4), gate("b", baseline="a"), record())
    assert more["verdict"] == UNDECIDED
    assert "has no clip clip_3" in " ".join(more["notes"])


def test_a_gate_that_noise_could_flip_says_so():
    noisy = evaluate(record(drops=[-0.5, 0.1, 0.9, 0.0]), gate("a"))
    assert noisy["verdict"] == SHIP
    assert any("pass, but the 95% interval crosses the threshold" in note for note in noisy["notes"])
    noisy = evaluate(record(drops=[-0.5, 0.4, 1.5, 0.4]), gate("a"))
    assert noisy["verdict"] == DO_NOT_SHIP
    assert any("fail, but the 95% interval crosses" in note for note in noisy["notes"])
    sure = evaluate(record(drops=[0.1, 0.12, 0.11, 0.1]), gate("a"))
    assert not any("crosses" in note for note in sure["notes"])


def test_fidelity_can_stand_in_where_nothing_was_recorded():
    found = evaluate(record(), gate("a", max_psnr_drop=None, max_ssim_drop=0.002, min_fidelity_psnr=41.0))
    assert checks(found)["fidelity PSNR dB"]["margin"] == pytest.approx(-1)
    assert checks(found)["SSIM drop"]["status"] == "pass"
    assert found["verdict"] == DO_NOT_SHIP


def test_records_of_different_runs_do_not_compare():
    other = record()
    other["config"] = {**other["config"], "model": {"window": 8}}
    with pytest.raises(GateError, match=r"model.window: 8 in the baseline, 4 here"):
        evaluate(record(), gate("b", baseline="a"), other)
    elsewhere = record()
    elsewhere["environment"] = {"gpu": {"name": "another"}}
    found = evaluate(record(), gate("b", baseline="a"), elsewhere)
    assert checks(found)["FPS ratio (pipeline_fps)"]["note"] == "the baseline ran on another machine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"against": "record"}, "give gates.baseline"),
        ({"baseline": "x"}, "against=bf16"),
        ({"resamples": 100}, "at least 2000"),
        ({"fps": "fast"}, "pipeline_fps, total_fps"),
        ({"memory": ["ram"]}, "kv_window_bytes"),
        ({"min_clips": 0, "confidence": 1.0, "min_fps_ratio": 0}, "min_clips=0.*confidence=1.0.*min_fps_ratio=0"),
        ({"max_drop": 1}, "unknown max_drop"),
    ],
)
def test_wrong_gates_are_named(changes, said):
    with pytest.raises(GateError, match=said):
        evaluate(record(), gate("a", **changes))


def test_there_must_be_something_to_judge():
    baseline = record()
    del baseline["arms"]["candidate"]
    with pytest.raises(GateError, match="nothing to judge"):
        evaluate(baseline, gate("a"))
    assert evaluate(record(drops=[0.1] * 3), gate("b", baseline="bf16"), baseline)["verdict"] == SHIP


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_interval_lies_within_the_sample_and_repeats(values):
    low, high = bootstrap_interval(values, seed=3)
    slack = 1e-9
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert bootstrap_interval(values, seed=3) == (low, high)
    assert bootstrap_interval(values[:1]) is None


def test_the_interval_covers_the_mean_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.normal(1.0, 0.5, 30))
        hits += low <= 1.0 <= high
    assert 0.88 < hits / 200 <= 0.99


def test_a_verdict_is_json_and_a_table():
    found = evaluate(record(), gate("a"))
    json.dumps(found, allow_nan=False)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(build_table(found))
    text = console.export_text()
    assert "Verdict (gate A, against BF16): SHIP" in text
    assert "+0.2" in text


def full(**changes):
    """A record that the loader takes."""
    return report_cases.completed({**record(**changes), "quality": {"all": {"clips": 3}}})


def test_a_run_judged_again_gets_the_verdict_in_record_table_and_page(tmp_path, capsys):
    folder = report_cases.write(tmp_path / "run", report_cases.record(drift=None))
    words = [str(folder / "record.json"), "--gates", "a"]
    before = (folder / "record.json").read_bytes()
    assert judge([*words, "--print"]) == 3
    assert [path.name for path in folder.iterdir()] == ["record.json"]
    assert (folder / "record.json").read_bytes() == before
    for change, code, verdict, title in (
        ((), 3, DO_NOT_SHIP, "Do not ship"),
        (["max_psnr_drop=0.9", "min_fps_ratio=0.4"], 0, SHIP, "May ship"),
    ):
        assert judge([*words, *change]) == code
        assert load_record(folder / "record.json").gates["verdict"] == verdict
        assert f"VERDICT (GATE A, AGAINST BF16): {verdict}".upper() in (folder / "table.txt").read_text().upper()
        assert f"<strong>{title}</strong>" in (folder / "report.html").read_text()
    (folder / "record.json").rename(folder / "kept.json")
    assert judge([str(folder / "kept.json"), "--gates", "a"]) == 2
    assert "with --print any file can be judged" in capsys.readouterr().err


def test_the_command_judges_old_records(tmp_path, capsys):
    def judge_only(words):
        return judge([*words, "--print"])

    ours, before = tmp_path / "record.json", tmp_path / "before.json"
    ours.write_text(json.dumps(full(drops=[0.4, 0.4, 0.4])))
    before.write_text(json.dumps(full(drops=[0.2, 0.2, 0.2])))
    assert judge_only([str(ours), "--gates", "a"]) == 3
    assert judge_only([str(ours), "--gates", "a", "max_psnr_drop=0.5"]) == 0
    assert judge_only([str(ours), "--gates", "b", f"baseline={before}"]) == 0
    assert judge_only([str(ours), "--gates", "d", "min_clips=9"]) == 4
    assert "PSNR drop dB" in capsys.readouterr().out
    for words in (["--gates", "z"], [], ["--gates", "b"], ["--gates", "a", "max_psnr=1"]):
        assert judge_only([str(ours), *words]) == 2
    assert "allowed are a, b, c, d" in capsys.readouterr().err
