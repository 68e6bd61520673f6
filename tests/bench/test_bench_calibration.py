"""The table of what formats cost, at a size that says nothing: rows, columns and refusals."""

from __future__ import annotations

import pytest

from harness.bench.calibration import ROWS, main, signal_over_error
from harness.bench.inputs import compose_plan

SMOKE = ["model=smoke", "calib.clips.source=synthetic", "calib.clips.limit=2", "calib.clips.future_frames=2"]


def test_every_row_composes(tmp_path):
    for row in ROWS:
        calib = ["calib=gptq"] if row.linears else []
        plan = compose_plan(["model=doom", *row.words, *calib], tmp_path)
        assert plan.conf.quant.enabled == row.linears


def test_a_table_tells_drop_fidelity_velocities_and_cost(tmp_path, capsys):
    words = [*SMOKE, f"calib.folder={tmp_path}", "model.arch.n_layers=2"]
    assert (
        main([*words, "--clips", "2", "--frames", "2", "--match", "^mxfp8_all$|mxfp4_kv$", "--out", str(tmp_path)]) == 0
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == [
        "mxfp8_all",
        "mxfp8_all, calibrated",
        "kv=mxfp4_kv",
        "mxfp4_all kv=mxfp4_kv",
        "mxfp4_all kv=mxfp4_kv, calibrated",
    ]
    assert {line.count("|") for line in lines} == {7}
    assert " s, " in lines[3].split("|")[5]
    eight, four = (float(lines[i].split("|")[3].split("(")[0]) for i in (2, 5))
    assert eight > four


def test_calibration_alone_tells_seconds_and_peak(tmp_path, capsys):
    words = [*SMOKE, f"calib.folder={tmp_path}", "model.arch.n_layers=2", "quant=mxfp8_mlp"]
    assert main(["--only-calibrate", *words]) == 0
    assert "4 Linears from 2 clips, 2 frames each, on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--match", "nothing like it"], ["model=nothing"], ["quant=mxfp3"]])
def test_words_that_make_no_table_are_refused(words, capsys):
    assert main([*words, "--clips", "1", "--frames", "1"]) == 2
    assert "error: " in capsys.readouterr().err


def test_signal_over_error_is_in_decibels():
    import torch

    x = torch.full((4,), 10.0)
    assert signal_over_error(x + 1, x) == pytest.approx(20)
