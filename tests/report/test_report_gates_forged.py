"""Records from anywhere: whatever is broken in one, it neither ships nor ends in a traceback."""

import contextlib
import copy
import json
from dataclasses import asdict

import pytest
from gate_cases import full, gate, incident
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.judge import main as judge
from harness.report import gates
from harness.report.codec import CodecError, read
from harness.report.gates import DO_NOT_SHIP, SHIP, GateError
from harness.report.record import RunRecord

NONSENSE = [
    None,
    1e308,
    "fast",
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    [],
    {},
    [None],
    {"psnr": "x"},
    10**400,
]
ASKED = {"max_ssim_drop": 0.02, "min_fidelity_psnr": 30.0, "max_memory_ratio": 1.0}
DECISIVE = [
    ("status",),
    ("clips",),
    ("incidents",),
    ("model",),
    ("model", "weights"),
    ("model", "decoder_weights"),
    ("arms", "bf16"),
    ("arms", "candidate", "speed_is_meaningful"),
    ("arms", "candidate", "speed"),
    ("arms", "candidate", "memory"),
    ("arms", "candidate", "memory", "kv_peak_bytes"),
    ("arms", "bf16", "memory", "kv_peak_bytes"),
    ("clips", 1),
    ("clips", 1, "clip_id"),
    ("clips", 1, "drop"),
    ("clips", 1, "drop", "psnr"),
    ("clips", 1, "scores"),
    ("clips", 1, "scores", "bf16"),
    ("clips", 1, "scores", "candidate", "frames"),
    ("clips", 1, "scores", "candidate", "frames", "psnr"),
    ("clips", 1, "scores", "candidate", "frames", "psnr", 3),
    ("clips", 1, "scores", "candidate", "frames", "ssim", 3),
    ("clips", 1, "scores", "fidelity", "frames", "psnr", 3),
    ("timings", 1, "arms", "candidate"),
    ("timings", 1, "arms", "bf16", "dit_ms"),
    ("timings", 1, "arms", "bf16", "dit_ms", 4),
]


def replaced(whole, path, value):
    found = copy.deepcopy(whole)
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


def without(whole, path):
    found = copy.deepcopy(whole)
    place = found
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return found


def verdict(found):
    """Of a record as a file holds it; None where the reader or the gate refuses it."""
    try:
        judged = gates.evaluate(read(RunRecord, found), gate("a", **ASKED))
    except (CodecError, GateError):
        return None
    json.dumps(asdict(judged), allow_nan=False)
    return judged.verdict


def test_the_record_that_is_forged_below_would_ship():
    assert verdict(full()) == SHIP


@pytest.mark.parametrize("path", DECISIVE, ids=lambda path: ".".join(map(str, path)))
def test_what_is_broken_never_passes(path):
    whole = full()
    for value in NONSENSE:
        if path == ("arms", "candidate", "speed_is_meaningful") and value is True:
            continue
        if (path, value) in ((("incidents",), []), (("clips", 1, "clip_id"), "fast")):
            continue
        if path == ("clips", 1) and value == {}:
            value = {"clip_id": "clip_1"}
        assert verdict(replaced(whole, path, value)) != SHIP, value
    if not isinstance(path[-1], int):
        assert verdict(without(whole, path)) != SHIP


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_single_value_put_anywhere_ends_in_a_traceback(data):
    whole = full(incidents=[incident(arm="bf16", kind="structure"), incident(frame=20)])
    place, path = whole, []
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        path.append(data.draw(st.sampled_from(list(keys))))
        place = place[path[-1]]
        if data.draw(st.booleans()):
            break
    forged = replaced(whole, path, data.draw(st.sampled_from(NONSENSE)))
    verdict(forged)
    if forged.get("status") == "complete":
        with contextlib.suppress(CodecError, GateError):  # a judgement, or one of these: nothing else
            gates.evaluate(read(RunRecord, full()), gate("b", baseline="x"), read(RunRecord, forged))
    else:
        with pytest.raises((CodecError, GateError)):
            gates.evaluate(read(RunRecord, full()), gate("b", baseline="x"), read(RunRecord, forged))


def test_a_clip_told_twice_is_no_second_clip():
    twice = full(drops=[0.1, 0.1])
    twice["clips"].append(copy.deepcopy(twice["clips"][0]))
    assert verdict(twice) != SHIP


def test_clips_that_are_left_out_of_a_record_are_missed():
    chosen = full(drops=[0.1, 0.1, 0.1, 9.0])
    chosen["data"]["clips"] = [{"id": f"clip_{number}", "tag": "motion"} for number in range(4)]
    assert verdict(chosen) != SHIP
    del chosen["clips"][3:], chosen["timings"][3:]
    assert verdict(chosen) != SHIP
    del chosen["data"]["clips"][3:]
    assert verdict(chosen) == SHIP


@pytest.mark.parametrize("value", [1e308, -1e308, 1e16, 101.0, -50.0])
def test_scores_that_no_picture_has_do_not_count(value):
    forged = full()
    for clip in forged["clips"]:
        clip["scores"]["candidate"]["frames"]["psnr"] = [value] * 25
        clip["drop"]["psnr"] = 30.0 - value
    assert verdict(forged) not in (SHIP, DO_NOT_SHIP)


def test_a_drop_that_its_frames_contradict_does_not_count():
    forged = full(drops=[0.9] * 3)
    for clip in forged["clips"]:
        clip["drop"]["psnr"] = 0.0
    assert verdict(forged) not in (SHIP, DO_NOT_SHIP)


@pytest.mark.parametrize("where", ["bf16", "candidate"])
def test_negative_and_absurd_figures_do_not_pass(where):
    for value in (-5, 0):
        assert verdict(replaced(full(), ("arms", where, "memory", "kv_peak_bytes"), value)) != SHIP or (
            where == "candidate" and value == 0
        )
    assert verdict(replaced(full(), ("timings", 0, "arms", where, "dit_ms", 2), -1.0)) != SHIP


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"fast"', "[1]", "{}"])
def test_the_command_answers_a_forged_file_without_a_traceback(tmp_path, capsys, value):
    text = json.dumps(full(drops=[0.125] * 3))
    for name, old in (("drop", '"psnr": 0.125'), ("arms", '"arms": {'), ("status", '"complete"')):
        new = {"drop": f'"psnr": {value}', "arms": f'"arms": {value}, "other": {{', "status": value}[name]
        file = tmp_path / "record.json"
        file.write_text(text.replace(old, new))
        assert judge([str(file), "--gates", "a", "--print"]) in (2, 4)
        assert judge([str(file), "--gates", "a"]) in (2, 4)
        assert "Traceback" not in capsys.readouterr().err
