"""Verdicts: nothing ships that is not proven, and what is open says what would decide it."""

import json

import pytest
import report_cases
from gate_cases import GPU, arm, checks, evaluate, full, gate, incident, judged, record, scores
from rich.console import Console

from harness.judge import asked_again
from harness.judge import main as judge
from harness.report.codec import encode, read
from harness.report.gates import (
    DO_NOT_SHIP,
    SHIP,
    UNDECIDED,
    GateError,
    GatesConf,
    build_table,
    next_lines,
    verdict_line,
)
from harness.report.record import RunRecord, load_record
from harness.report.verdict import Verdict


def test_gate_a_is_the_plans():
    found = evaluate(record(drops=[0.25, 0.26, 0.27], fps=99.0), gate("a"))
    assert found["verdict"] == SHIP
    psnr, fps = checks(found)["psnr"], checks(found)["speed"]
    assert (psnr["threshold"], fps["threshold"]) == (0.3, 0.97)
    assert psnr["margin"] == pytest.approx(0.04)
    assert psnr["status"] == fps["status"] == "pass"


@pytest.mark.parametrize(
    ("found", "criterion"),
    [
        (record(drops=[0.31] * 3), "psnr"),
        (record(fps=95.0), "speed"),
        (record(incidents=[incident()]), "instabilities"),
    ],
)
def test_each_condition_of_gate_a_can_fail_it(found, criterion):
    judged = evaluate(found, gate("a"))
    assert judged["verdict"] == DO_NOT_SHIP
    assert [name for name, check in checks(judged).items() if check["status"] == "fail"] == [criterion]
    assert checks(judged)[criterion]["margin"] < 0


@pytest.mark.parametrize(
    ("drops", "verdict"),
    [
        ([0.1, 0.12, 0.14, 0.1], SHIP),
        ([0.3, 0.3, 0.3], SHIP),  # at the threshold is within it
        ([-0.1, 0.1, 0.9, 0.0], UNDECIDED),
        ([-0.5, 0.4, 1.5, 0.4], UNDECIDED),
        ([0.5, 0.55, 0.6, 0.5], DO_NOT_SHIP),
    ],
)
def test_a_criterion_is_decided_by_its_whole_interval(drops, verdict):
    found = evaluate(record(drops=drops), gate("a"))
    assert found["verdict"] == verdict
    low, high = checks(found)["psnr"]["interval"]
    assert {SHIP: high <= 0.3 + 1e-9, DO_NOT_SHIP: low > 0.3, UNDECIDED: low <= 0.3 < high}[verdict]


def test_the_point_estimate_decides_only_where_asked_for_by_name_and_the_verdict_says_so():
    noisy = record(drops=[-0.1, 0.1, 0.9, 0.0])
    found = evaluate(noisy, gate("a", rule="point"))
    assert found["verdict"] == SHIP
    assert "by point estimates" in verdict_line(read(Verdict, found))
    assert "noise could have decided it" in " ".join(found["notes"])
    assert evaluate(record(drops=[-0.5, 0.4, 1.5, 0.4]), gate("a", rule="point"))["verdict"] == DO_NOT_SHIP
    assert evaluate(record(meaningful=False), gate("a", rule="point"))["verdict"] == UNDECIDED  # speed is still missing


def test_one_clip_gives_no_interval_and_so_no_verdict():
    for drop in (0.0, 5.0):
        found = evaluate(record(drops=[drop]), gate("a"))
        assert found["verdict"] == UNDECIDED
        assert checks(found)["psnr"]["interval"] is None
        assert "one clip gives no interval" in found["reason"]
    assert evaluate(record(drops=[0.0]), gate("a", rule="point", min_clips=1))["verdict"] == SHIP


def test_an_emulated_kernels_speed_neither_passes_nor_fails_and_the_verdict_says_so():
    for fps in (1.0, 1000.0):
        found = evaluate(record(fps=fps, meaningful=False), gate("a"))
        assert found["verdict"] == UNDECIDED
        assert checks(found)["speed"]["status"] == "not_measured"
        assert "emulated kernel" in found["reason"]
        assert "trainer=gpu" in found["next"]["command"]


def test_a_criterion_left_out_by_name_is_not_asked_and_the_verdict_says_so():
    found = evaluate(record(meaningful=False), gate("a", without=["speed"]))
    assert found["verdict"] == SHIP
    assert "speed" not in checks(found)
    assert "without speed" in verdict_line(read(Verdict, found))
    assert "FPS ratio" in next(note for note in found["notes"] if note.startswith("Not asked"))
    unstable = record(drops=[9.0] * 3, incidents=[incident()])
    assert evaluate(unstable, gate("a", without=["quality"]))["verdict"] == SHIP
    # Bytes are counted: one clip is enough for them, where nothing else is asked.
    assert evaluate(record(drops=[0.1], kv=700), gate("kv", without=["quality", "clips"]))["verdict"] == SHIP


def test_an_undecided_drop_says_how_many_clips_would_decide_it():
    found = evaluate(record(drops=[-0.1, 0.1, 0.5, 0.0]), gate("a"))
    needed = checks(found)["psnr"]["needs_clips"]
    assert found["verdict"] == UNDECIDED
    assert 4 < needed <= 14
    assert f"about {needed} clips" in verdict_line(read(Verdict, found))
    assert evaluate(record(drops=[-0.1, 0.1, 0.5, 0.0] * (needed // 4 + 1)), gate("a"))["verdict"] == SHIP
    at_the_threshold = judged(record(drops=[0.2, 0.4, 0.2, 0.4]), gate("a"))
    assert "no number of clips would decide it" in verdict_line(at_the_threshold)


def test_gate_b_counts_what_is_lost_on_top_of_gate_a_and_its_speed():
    before = record(drops=[0.2, 0.3, 0.1], fps=120.0)
    ours = record(drops=[0.4, 0.5, 0.3], fps=122.0)
    found = evaluate(ours, gate("b", baseline="a/record.json"), before)
    assert checks(found)["psnr"]["value"] == pytest.approx(0.2)
    assert checks(found)["speed"]["value"] == pytest.approx(122 / 120, rel=1e-3)
    assert found["verdict"] == SHIP
    # The machine ran both arms at half the speed that day: nothing changes.
    for batch in ours["timings"]:
        for spans in batch["arms"].values():
            spans["dit_ms"] = [2 * value for value in spans["dit_ms"]]
    assert evaluate(ours, gate("b", baseline="a"), before)["verdict"] == SHIP
    for batch in ours["timings"]:
        times = batch["arms"]["candidate"]
        times["dit_ms"] = [1.05 * value for value in times["dit_ms"]]
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
    assert checks(found)["memory"]["value"] == pytest.approx(1.1)
    assert checks(found)["memory"]["interval"] == (1.1, 1.1)  # counted, not sampled


def test_an_allocators_peak_has_an_interval_over_batches():
    conf = gate("kv", memory=["peak_allocated"])
    found = record()
    for name, peaks in (("bf16", [1000, 1010, 990]), ("candidate", [700, 705, 696])):
        found["arms"][name]["memory"] |= {"peak_allocated": max(peaks)}
        found["arms"][name]["memory"]["peaks"] = [{"peak_allocated": peak} for peak in peaks]
    check = checks(evaluate(found, conf))["memory"]
    assert check["status"] == "pass"
    assert check["interval"][0] < check["value"] < check["interval"][1] < 0.75
    del found["arms"]["candidate"]["memory"]["peaks"][1:], found["arms"]["bf16"]["memory"]["peaks"][1:]
    assert checks(evaluate(found, conf))["memory"]["status"] == "undecided"
    assert evaluate(record(), conf)["verdict"] == UNDECIDED


def test_gate_d_stays_open_below_three_clips():
    assert evaluate(record(drops=[0.4, 0.4]), gate("d"))["verdict"] == UNDECIDED
    assert evaluate(record(drops=[0.4, 0.4, 0.4]), gate("d"))["verdict"] == SHIP
    assert evaluate(record(drops=[0.9, 0.9]), gate("d"))["verdict"] == DO_NOT_SHIP


def test_what_was_not_measured_leaves_the_verdict_open():
    unscored = record()
    for clip in unscored["clips"]:
        clip["drop"], clip["scores"] = None, {"fidelity": clip["scores"]["fidelity"]}
    assert evaluate(unscored, gate("a"))["verdict"] == UNDECIDED
    assert "no clip was scored" in evaluate(unscored, gate("a"))["reason"]
    more = evaluate(record(drops=[0.1] * 4), gate("b", baseline="a"), record())
    assert more["verdict"] == UNDECIDED
    assert "has no clip clip_3" in more["reason"]


@pytest.mark.parametrize("part", ["weights", "decoder_weights"])
def test_random_weights_get_no_verdict_on_quality(part):
    random = record(drops=[9.0] * 3, incidents=[incident()])
    random["model"][part] = "random"
    for conf in (gate("a"), gate("a", max_psnr_drop=None, min_fidelity_psnr=1.0), gate("d", rule="point")):
        found = evaluate(random, conf)
        assert found["verdict"] == UNDECIDED
        assert "random weights" in found["reason"]
    assert evaluate(random, gate("a", without=["quality"]))["verdict"] == SHIP  # speed is real


@pytest.mark.parametrize("status", ["failed", "running", "interrupted", "", "1"])
def test_a_run_that_is_not_complete_is_never_judged(status):
    for rule in ("interval", "point"):
        found = evaluate(record(status=status), gate("a", rule=rule))
        assert (found["verdict"], found["checks"]) == (UNDECIDED, [])
    with pytest.raises(GateError, match="cannot be stood on"):
        evaluate(record(), gate("b", baseline="a"), record(status=status))


def test_a_run_that_its_candidate_broke_off_is_proven_unstable():
    found = record(status="failed", drops=[], incidents=[incident(kind="non_finite", action="run ended")])
    assert evaluate(found, gate("d"))["verdict"] == DO_NOT_SHIP
    assert evaluate(found, gate("d", without=["instabilities"]))["verdict"] == UNDECIDED
    found["incidents"].append({"kind": "Interrupted", "message": "stopped"})
    found["incidents"][0]["action"] = "recorded"
    assert evaluate(found, gate("d"))["verdict"] == UNDECIDED


def test_a_bf16_that_is_not_finite_is_never_judged():
    broken = record(incidents=[incident(arm="bf16", kind="non_finite")])
    assert evaluate(broken, gate("a"))["verdict"] == UNDECIDED
    assert "BF16 itself is not finite" in evaluate(broken, gate("a"))["reason"]
    with pytest.raises(GateError, match="BF16 itself is not finite"):
        evaluate(record(), gate("b", baseline="a"), broken)


def test_frames_after_bf16_has_lost_its_structure_prove_nothing():
    lossy = record(drops=[0.1, 0.1, 0.1])
    arms = lossy["clips"][1]["scores"]
    arms["candidate"]["frames"]["psnr"][10:] = [0.0] * 15
    lossy["clips"][1]["drop"]["psnr"] = (10 * 0.1 + 15 * 30) / 25
    assert evaluate(lossy, gate("a"))["verdict"] == UNDECIDED
    lossy["incidents"] = [incident(arm="bf16", kind="structure", clip="clip_1", frame=10)]
    found = evaluate(lossy, gate("a"))
    assert found["verdict"] == SHIP
    assert checks(found)["psnr"]["value"] == pytest.approx(0.1)
    assert "clip_1 from frame 10" in " ".join(found["notes"])
    lossy["incidents"][0]["frame"] = 0  # nothing of that clip is left
    assert evaluate(lossy, gate("a"))["verdict"] == SHIP
    lossy["incidents"] += [incident(arm="bf16", kind="black", clip=f"clip_{n}", frame=0) for n in (0, 2)]
    assert "unstable from the first frame on" in evaluate(lossy, gate("a"))["reason"]


def test_instabilities_after_bf16_lost_the_clip_do_not_count_except_nan():
    lost = incident(arm="bf16", kind="structure", frame=5)
    assert evaluate(record(incidents=[lost, incident(frame=6)]), gate("d"))["verdict"] == SHIP
    assert evaluate(record(incidents=[lost, incident(frame=4)]), gate("d"))["verdict"] == DO_NOT_SHIP
    nan = incident(kind="non_finite", frame=6)
    assert evaluate(record(incidents=[lost, nan]), gate("d"))["verdict"] == DO_NOT_SHIP


def test_the_first_frames_can_be_judged_alone_and_the_verdict_says_so():
    late = record()
    for clip in late["clips"]:
        clip["scores"]["candidate"]["frames"]["psnr"][8:] = [20.0] * 17
        clip["drop"]["psnr"] = (8 * 0.1 + 17 * 10) / 25
    assert evaluate(late, gate("a"))["verdict"] == DO_NOT_SHIP
    found = evaluate(late, gate("a", frames=8))
    assert found["verdict"] == SHIP
    assert "first 8 generated frames" in " ".join(found["notes"])


def test_a_candidate_that_changed_formats_midway_is_not_judged_on_quality():
    found = record()
    found["fallbacks"] = [{"step": "attention in BF16", "clip": "clip_0", "frame": 2}]
    assert evaluate(found, gate("d"))["verdict"] == UNDECIDED


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_speed_is_undecided_where_the_decoder_says_that_timing_cannot_be_trusted(factor):
    for fps in (120.0, 90.0):
        disturbed = record(fps=fps)
        disturbed["arms"]["candidate"] = arm("mx", fps, decoder=2.0 * factor)
        found = evaluate(disturbed, gate("a"))
        assert found["verdict"] == UNDECIDED
        assert checks(found)["speed"]["status"] == "undecided"
        assert f"the same in both arms, took {factor:.2f} times" in found["reason"]


def test_speed_is_undecided_where_a_tenth_of_the_frames_was_disturbed():
    disturbed = record(fps=120.0)
    disturbed["arms"]["bf16"]["speed"]["dit_ms"]["p90"] = 600.0
    found = evaluate(disturbed, gate("a"))
    assert found["verdict"] == UNDECIDED
    assert "one frame in ten" in found["reason"]


def test_speed_near_its_threshold_is_undecided():
    noisy = record(fps=97.5)
    for number, batch in enumerate(noisy["timings"]):
        times = batch["arms"]["candidate"]
        times["dit_ms"] = [value * (0.97, 1.0, 1.04)[number] for value in times["dit_ms"]]
    check = checks(evaluate(noisy, gate("a")))["speed"]
    assert check["status"] == "undecided"
    assert check["interval"][0] < 0.97 < check["interval"][1]


def test_a_record_without_frame_times_has_no_speed_to_judge():
    old = record(fps=150.0)
    old["timings"] = []
    found = evaluate(old, gate("a"))
    assert found["verdict"] == UNDECIDED
    assert "no frame times" in found["reason"]


def test_fidelity_can_stand_in_where_nothing_was_recorded():
    found = evaluate(record(), gate("a", max_psnr_drop=None, max_ssim_drop=0.002, min_fidelity_psnr=41.0))
    assert checks(found)["fidelity"]["margin"] == pytest.approx(-1)
    assert checks(found)["ssim"]["status"] == "pass"
    assert found["verdict"] == DO_NOT_SHIP


def test_records_of_different_runs_do_not_compare():
    other = record()
    other["config"] = {**other["config"], "model": {"window": 8}}
    with pytest.raises(GateError, match=r"model.window: 8 in the baseline, 4 here"):
        evaluate(record(), gate("b", baseline="a"), other)
    elsewhere = record()
    elsewhere["environment"] = {"gpu": {**GPU, "name": "another"}}
    found = evaluate(record(), gate("b", baseline="a"), elsewhere)
    assert checks(found)["speed"]["note"] == "the baseline ran on another machine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"against": "record"}, "give gates.baseline"),
        ({"against": "nothing"}, "nothing"),
        ({"rule": "luck"}, "luck"),
        ({"baseline": "x"}, "against=bf16"),
        ({"resamples": 100}, "at least 2000"),
        ({"fps": "fast"}, "pipeline_fps, total_fps"),
        ({"memory": ["ram"]}, "kv_window_bytes"),
        ({"min_clips": 0, "confidence": 1.0, "min_fps_ratio": 0}, "min_fps_ratio=0.*confidence=1.0.*min_clips=0"),
        ({"confidence": 0.1}, "at least 0.5"),
        ({"max_psnr_drop": float("nan")}, "max_psnr_drop=nan: must be a finite number"),
        ({"max_psnr_drop": float("inf")}, "finite"),
        ({"max_psnr_drop": "0.3"}, "finite"),
        ({"frames": 0}, "frames=0: must be at least 1"),
        ({"without": ["sped"]}, "did you mean speed"),
        ({"max_drop": 1}, "unknown max_drop"),
    ],
)
def test_wrong_gates_are_named(changes, said):
    with pytest.raises(GateError, match=said):
        evaluate(record(), gate("a", **changes))


@pytest.mark.parametrize(
    "conf",
    [
        GatesConf(enabled=True),
        GatesConf(enabled=True, no_instabilities=True, min_clips=3),
        GatesConf(enabled=True, max_psnr_drop=0.3, without=["quality"]),
        GatesConf(enabled=True, max_psnr_drop=0.3, min_fps_ratio=1.0, without=["psnr", "speed"]),
    ],
)
def test_an_enabled_gate_without_a_threshold_is_an_error(conf):
    with pytest.raises(GateError, match="needs a threshold"):
        evaluate(record(), conf)


def test_there_must_be_something_to_judge():
    baseline = record()
    del baseline["arms"]["candidate"]
    with pytest.raises(GateError, match="nothing to judge"):
        evaluate(baseline, gate("a"))
    for clip in baseline["clips"]:
        clip["drop"], clip["scores"] = None, {"bf16": scores(0.0)["bf16"]}
    assert evaluate(record(drops=[0.1] * 3, fps=105.0), gate("b", baseline="bf16"), baseline)["verdict"] == SHIP


def test_a_verdict_is_json_a_sentence_and_a_table():
    found = judged(record(), gate("a"))
    assert read(Verdict, json.loads(encode(found))) == found
    sentence = "Verdict (gate A, against BF16): SHIP, because PSNR drop 0.100 dB, at most 0.3 dB allowed; FPS ratio"
    assert verdict_line(found).startswith(sentence)
    assert next_lines(found)[1].strip().startswith("python ")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(build_table(found))
    assert "+0.2" in console.export_text()


def test_a_run_judged_again_gets_the_verdict_in_record_table_and_page(tmp_path, capsys):
    folder = report_cases.write(tmp_path / "run", report_cases.record(drift=None))
    words = [str(folder / "record.json"), "--gates", "a"]
    before = (folder / "record.json").read_bytes()
    assert judge([*words, "--print"]) == 4
    capsys.readouterr()
    assert [path.name for path in folder.iterdir()] == ["record.json"]
    assert (folder / "record.json").read_bytes() == before
    for changes, code, verdict, title in (
        (["without=[speed]", "max_psnr_drop=-1"], 3, DO_NOT_SHIP, "Do not ship"),
        (["without=[speed]", "max_psnr_drop=2"], 0, SHIP, "May ship"),
    ):
        assert judge([*words, *changes]) == code
        assert load_record(folder / "record.json").gates.verdict == verdict
        said = f"Verdict (gate A, without speed, against BF16): {verdict.upper()}, because"
        assert (folder / "table.txt").read_text().startswith(said)
        page = (folder / "report.html").read_text()
        assert f"<strong>{title}</strong>" in page
        assert "Next: " in page
        shown = capsys.readouterr().out
        assert shown.startswith(said)
        assert f"Written again: {folder / 'report.html'}" in shown
    (folder / "record.json").rename(folder / "kept.json")
    assert judge([str(folder / "kept.json"), "--gates", "a"]) == 2
    assert "with --print any file can be judged" in capsys.readouterr().err


def test_by_another_gate_the_next_command_is_that_gates_alone():
    ran = read(RunRecord, full())
    ran.overrides = ["quant=mxfp8_mlp", "gates=d", "gates.without=[speed]", "gates.max_psnr_drop=2"]
    assert asked_again(ran, "a", ["min_clips=3"]) == ["quant=mxfp8_mlp", "gates=a", "gates.min_clips=3"]
    assert asked_again(ran, None, ["frames=8"]) == [*ran.overrides, "gates.frames=8"]


def test_the_command_judges_old_records(tmp_path, capsys):
    def judge_only(words):
        return judge([*words, "--print"])

    ours, before = tmp_path / "record.json", tmp_path / "before.json"
    ours.write_text(json.dumps(full(drops=[0.4, 0.4, 0.4], fps=105.0)))
    before.write_text(json.dumps(full(drops=[0.2, 0.2, 0.2])))
    assert judge_only([str(ours), "--gates", "a"]) == 3
    assert judge_only([str(ours), "--gates", "a", "max_psnr_drop=0.5"]) == 0
    assert judge_only([str(ours), "--gates", "b", f"baseline={before}"]) == 0
    assert judge_only([str(ours), "--gates", "d", "min_clips=9"]) == 4
    assert "PSNR drop dB" in capsys.readouterr().out
    for words in (
        ["--gates", "z"],
        [],
        ["--gates", "b"],
        ["--gates", "a", "max_psnr_dop=1"],
        ["--gates", "a", "min_clips"],
        ["--gates", "a", "without=3"],
    ):
        capsys.readouterr()
        assert judge_only([str(ours), *words]) == 2
        (line,) = (said := capsys.readouterr().err).splitlines()
        assert line.startswith("error: ")
        assert ("did you mean max_psnr_drop?" in said) == ("max_psnr_dop=1" in words)
    assert judge_only([str(ours), "--gates", "z"]) == 2
    assert "allowed are a, b, c, d" in capsys.readouterr().err
