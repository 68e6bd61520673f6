"""What to do next: a command that can be typed as it stands, made from what the run measured."""

import shlex

import pytest
from gate_cases import checks, evaluate, gate, incident, numerics, record

from harness.config import ROOT
from harness.ladder.climb import compose_run
from harness.report.gates.advice import changed, worst_blocks


def advised(found, conf):
    judged = evaluate(found, conf)
    return judged["next"]["text"], judged["next"]["command"], judged


def words_of(command, program="harness/run.py"):
    """The words of the last command of a line."""
    parts = shlex.split(command.split(" && ")[-1])
    assert parts[:2] == ["python", program]
    assert (ROOT / program).is_file()
    return parts[2:]


def failing(errors=None, **quant):
    """A run whose drop fails its gate, with these errors of its blocks."""
    found = record(drops=[0.8, 0.81, 0.8])
    found["overrides"] = ["quant=mxfp4_mlp", "gates=d"]
    found["config"]["quant"] = {"enabled": True, "bits": 4, "exclude": [], **quant}
    if errors is not None:
        layers = {f"blocks.{block}.mlp.fc{n}": error for block, error in enumerate(errors) for n in (1, 2)}
        found["arms"]["candidate"]["numerics"] = numerics(layers)
    return found


def test_the_few_blocks_that_carry_the_error_go_back_to_bf16():
    text, command, _ = advised(failing([0.3, 0.02, 0.02, 0.02]), gate("d"))
    assert "1 of 4 carry 99% of the squared error" in text
    words = words_of(command)
    assert words == ["quant=mxfp4_mlp", "gates=d", 'quant.exclude=["*blocks.0.*"]']
    config, _ = compose_run([*words, "model=smoke"])
    assert config["quant"]["exclude"] == ["*blocks.0.*"]
    _, command, _ = advised(failing([0.3, 0.02, 0.02, 0.02], exclude=["*attn*"]), gate("d"))
    assert 'quant.exclude=["*attn*","*blocks.0.*"]' in words_of(command)


@pytest.mark.parametrize("errors", [[0.1] * 4, None])
def test_where_no_few_blocks_carry_it_four_bits_become_eight(errors):
    _, command, _ = advised(failing(errors), gate("d", max_psnr_drop=0.1))
    config, _ = compose_run([*words_of(command), "model=smoke"])
    assert config["quant"]["bits"] == 8
    mixed = failing(errors, bits=8, bits_by_category={"mlp": 4, "attn": None})
    mixed["overrides"] = ["quant=mxfp4_mlp_mxfp8_rest"]
    _, command, _ = advised(mixed, gate("d", max_psnr_drop=0.1))
    config, _ = compose_run([*words_of(command), "model=smoke"])
    assert config["quant"]["bits_by_category"]["mlp"] is None


def test_eight_bits_keep_to_the_late_layers():
    _, command, _ = advised(failing([0.1] * 4, bits=8), gate("a", without=["speed"], max_psnr_drop=0.1))
    assert "quant.late_layers=2" in words_of(command)


def test_worst_blocks_are_the_fewest_that_carry_a_share():
    assert worst_blocks({0: 1.0, 1: 5.0, 2: 4.0}, 0.5) == [1]
    assert worst_blocks({0: 1.0, 1: 5.0, 2: 4.0}, 0.6) == [1, 2]
    assert worst_blocks({0: 1.0}, 0.0) == []


@pytest.mark.parametrize(
    ("kv", "word"), [({"quantize_k": True, "quantize_v": True}, "kv=mx_v_only"), ({}, "kv.late_layers=2")]
)
def test_a_cache_that_loses_too_much_gives_up_k_then_layers(kv, word):
    found = failing()
    found["config"] |= {"quant": {"enabled": False}, "kv": kv}
    found["overrides"] = ["kv=mx_kv", "gates=kv"]
    assert word in words_of(advised(found, gate("kv", max_memory_ratio=2))[1])


def test_weights_rounded_to_nearest_are_calibrated_where_there_are_clips_to_learn_from():
    found = failing([0.3, 0.02, 0.02, 0.02])
    found["config"] |= {"calib": {"method": "none"}, "model": {"window": 4, "calibration": ["clips"]}}
    found["arms"]["candidate"]["transform"] = {"kernel": "emulated", "count": 8}
    text, command, _ = advised(found, gate("d"))
    assert "15.1% off in their outputs" in text
    assert words_of(command) == ["quant=mxfp4_mlp", "gates=d", "calib=gptq"]
    found["config"]["calib"] = {"method": "gptq"}
    assert "calib=gptq" not in words_of(advised(found, gate("d"))[1])
    found["config"] |= {"calib": {"method": "none"}, "model": {"window": 4, "calibration": []}}
    assert "calib=gptq" not in words_of(advised(found, gate("d"))[1])


def test_a_4_bit_cache_that_loses_too_much_keeps_its_newest_frames_in_8_bits():
    found = failing()
    found["config"] |= {"quant": {"enabled": False}, "kv": {"quantize_k": True, "quantize_v": True}}
    found["overrides"] = ["kv=mxfp4_kv", "gates=kv"]
    found["arms"]["candidate"]["memory"]["kv_bytes_by_format"] = {"e2m1": 300, "bfloat16": 100}
    text, command, _ = advised(found, gate("kv", max_memory_ratio=2))
    assert "75% of the cache" in text
    assert words_of(command) == ["kv=mxfp4_kv", "gates=kv", "kv.recent_frames=2"]
    compose_run([*words_of(command), "model=smoke", "gates=none"])
    found["config"]["attention"] = {"kind": "fused"}
    assert "kv=mx_v_only" in words_of(advised(found, gate("kv", max_memory_ratio=2))[1])


def test_an_unstable_candidate_falls_back():
    words = words_of(advised(record(incidents=[incident()]), gate("d"))[1])
    assert "on_instability=fallback" in words
    compose_run([*words, "model=smoke", "gates=none"])


def test_a_slow_candidate_is_compiled_then_fused_then_given_another_kernel():
    slow = record(fps=80.0)
    assert "compile=on" in words_of(advised(slow, gate("a"))[1])
    slow["config"]["compile"] = {"enabled": True}
    assert "attention=fused" in words_of(advised(slow, gate("a"))[1])
    slow["config"]["attention"] = {"kind": "fused"}
    slow["arms"]["candidate"]["transform"] = {"kernel": "triton", "count": 1}
    text, command, _ = advised(slow, gate("a"))
    assert "the kernel that ran is triton" in text
    assert "quant.kernel=cuda" in words_of(command)


def test_a_cache_that_saves_nothing_quantises_more_or_reads_it_packed():
    large = record(kv=1000)
    assert "kv=mx_kv" in words_of(advised(large, gate("kv"))[1])
    large["config"]["kv"] = {"late_layers": 4}
    assert "kv.late_layers=null" in words_of(advised(large, gate("kv"))[1])
    large["environment"]["device"] = "cuda:0"
    large["arms"]["candidate"]["memory"]["kv_scratch_bytes"] = 100
    assert "attention=fused" in words_of(advised(large, gate("kv"))[1])


def test_an_undecided_drop_asks_for_clips_that_there_are_and_then_for_new_ones():
    noisy = record(drops=[-0.1, 0.1, 0.35, 0.0])
    noisy["overrides"] = ["quant=mxfp8_mlp", "data.limit=4"]
    _, command, judged = advised(noisy, gate("a"))
    needed = checks(judged)["psnr"]["needs_clips"]
    assert words_of(command) == ["quant=mxfp8_mlp", f"data.limit={needed}"]
    noisy["data"]["available"] = needed - 1
    text, command, _ = advised(noisy, gate("a"))
    assert "data.limit=null" in words_of(command)
    assert "first" in text
    noisy["data"]["available"] = 4
    text, _, _ = advised(noisy, gate("a"))
    assert "add clips to data.paths" in text
    noisy["config"]["data"] = {"paths": [str(ROOT / "assets/doom/clips")]}
    text, command, _ = advised(noisy, gate("a"))
    assert command.startswith(f"python scripts/record_doom.py --out more_clips --clips {needed - 4} --seed ")
    config, _ = compose_run(words_of(command))
    assert config["data"]["paths"] == [str(ROOT / "assets/doom/clips"), "more_clips"]


def test_where_thousands_of_clips_were_needed_no_number_is_told_and_the_formats_are_to_change():
    near = record(drops=[-0.3, 0.8, 0.31, 0.4])  # their mean is 0.0025 dB from the threshold
    near["data"]["available"] = 12
    text, command, judged = advised(near, gate("a"))
    assert checks(judged)["psnr"]["needs_clips"] > 1000
    assert "more than 1000 clips would decide it" in checks(judged)["psnr"]["note"]
    assert "take all 12 there are first" in text
    assert "data.limit=null" in words_of(command)
    near["data"]["available"] = 4
    text, command, _ = advised(near, gate("a"))
    assert "narrow or calibrate the formats" in text
    assert command == ""


def test_a_step_on_a_record_is_told_that_its_baseline_needs_the_clips_too():
    noisy, before = record(drops=[-0.1, 0.1, 0.5, 0.0]), record(drops=[0.0] * 4)
    judged = evaluate(noisy, gate("b", baseline="a", without=["speed"]), before)
    assert judged["next"]["text"].endswith("the baseline needs them too")


def test_what_ships_is_followed_by_its_speed_on_a_gpu_or_by_the_ladder():
    cpu = record(meaningful=False)
    spared = ["measure.reuse_bf16=true", "trainer.devices=2"]  # of a CPU, and refused beside a gate that asks for speed
    cpu["overrides"] = ["quant=mxfp8_mlp", *spared, "gates=a", "gates.without=[speed]"]
    words = words_of(advised(cpu, gate("a", without=["speed"]))[1])
    assert words == ["quant=mxfp8_mlp", "gates=a", "trainer=gpu", "compile=on"]
    gpu = record()
    gpu["overrides"] = ["quant=mxfp8_mlp", "attention=fused", "gates=a", "model=doom", "data.limit=4"]
    assert words_of(advised(gpu, gate("a"))[1], "scripts/ladder.py") == ["model=doom", "data.limit=4"]


def test_missing_weights_and_missing_runs_are_asked_for():
    random = record()
    random["model"]["weights"] = "random"
    random["overrides"] = ["model=smoke", "model.arch.n_layers=2", "data.synthetic_clips=4", "quant=mxfp8_mlp"]
    words = words_of(advised(random, gate("a"))[1])
    assert {"quant=mxfp8_mlp", "model.checkpoint=FILE", "data=clips", "data.paths=[FOLDER]"} <= set(words)
    assert not any(word.startswith(("model=", "model.arch", "data.synthetic")) for word in words)
    text, command, _ = advised(record(status="running"), gate("a"))
    assert (text, words_of(command)) == ("run it again", ["quant=mxfp8_mlp", "gates=a"])


def test_words_are_replaced_by_key():
    assert changed(["a=1", "+b.c=2", "d=3"], "b.c=4", "a=5") == ["d=3", "b.c=4", "a=5"]
