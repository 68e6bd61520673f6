"""The shipped demo model earns its name, computed from the shipped weights and clips."""

import statistics

import pytest

from harness.bench.world_model import MARGIN_DB, WorldModelFigures, main, world_model_figures


@pytest.mark.slow
def test_the_demo_model_predicts_play_and_listens_to_the_player():
    figures = world_model_figures(frames=16)
    assert len(figures.clip_ids) >= 6
    assert figures.mean("model") >= figures.mean("repeat") + MARGIN_DB
    assert figures.mean("model") > figures.mean("shuffled")
    obeyed = [look.action_fidelity for look in figures.looks]
    assert statistics.fmean(obeyed) > statistics.fmean(figures.disobeyed) + 0.3
    assert all(0.2 < look.sharpness < 1 for look in figures.looks)


def test_a_model_must_beat_both_baselines():
    assert WorldModelFigures(["a", "b"], [20.0, 21.0], [18.0, 18.5], [19.0, 20.0]).passes
    assert not WorldModelFigures(["a"], [20.0], [18.6], [19.0]).passes  # 1.4 dB is not enough
    assert not WorldModelFigures(["a"], [20.0], [18.0], [20.0]).passes  # actions do not matter to it


@pytest.mark.parametrize("override", ["data.paths=[nowhere]", "quant.bits=8", "no_such_field=1"])
def test_bad_input_is_one_line_and_exit_2(override, capsys):
    overrides = [override, "model.checkpoint=absent.safetensors"] if "quant" in override else [override]
    assert main(overrides) == 2
    assert "error:" in capsys.readouterr().err
