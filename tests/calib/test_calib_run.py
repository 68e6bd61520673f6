"""`calib=gptq` in a run: what is recorded, what is kept from run to run, and what is refused."""

from __future__ import annotations

import functools
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from game_clips import write_game_clip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.config import ConfigError
from harness.data.clips import ClipError
from harness.run import run


@pytest.fixture(scope="module")
def calibrating(game, overrides, tmp_path_factory):
    """Words of a run over the game that keeps its calibration in a folder; its clips are others than those judged."""
    clips = tmp_path_factory.mktemp("calibration_clips")
    for number in range(3):
        write_game_clip(clips, f"other_{number}", "motion")

    def words(kept, **changed):
        own = {
            "quant": "mxfp4_mlp",
            "calib": "gptq",
            "calib.clips.paths": f"[{clips}]",
            "calib.clips.future_frames": 2,
            "calib.folder": kept,
        }
        return overrides({**game, **own}, **changed)

    return words


@pytest.fixture
def calibrated(calibrating, tmp_path):
    """The words of a calibrated run that keeps its calibration in this test's own folder."""
    return functools.partial(calibrating, tmp_path / "kept")


@pytest.fixture(scope="module")
def made_once(calibrating, recorded, tmp_path_factory):
    """A calibrated run, and where it kept its calibration."""
    folder = tmp_path_factory.mktemp("made_once")
    return recorded(folder, *calibrating(folder / "kept")), folder / "kept"


@pytest.fixture
def first(made_once, tmp_path):
    """A calibrated run, which kept its calibration in this test's own folder."""
    found, kept = made_once
    shutil.copytree(kept, tmp_path / "kept")
    return found


def stored(tmp_path):
    return sorted((tmp_path / "kept").glob("*.safetensors"))


def test_a_calibrated_run_says_so_and_the_next_one_finds_what_it_kept(first, calibrated, record, tmp_path):
    made = first.candidate.calibration
    assert (made.method, made.linears, made.frames, made.found) == ("gptq", 3, 2, False)
    assert made.clips == ["other_0", "other_1", "other_2"]
    assert made.seconds > 0
    assert made.peak_bytes > 0
    assert stored(tmp_path)[0].stem == made.fingerprint
    assert "weights by gptq" in first.candidate.numeric_path.linears
    assert "rceil" not in first.candidate.numeric_path.linears
    assert " by gptq" in first.candidate.label
    assert first.arms["bf16"].calibration is None
    again = record(*calibrated())
    assert again.candidate.calibration.found
    assert again.candidate.calibration.seconds == made.seconds
    assert again.quality.all.fidelity.psnr == pytest.approx(first.quality.all.fidelity.psnr, abs=1e-3)
    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"calib.damping": 0.02},
        {"calib.sweeps": 0},
        {"calib.clips.future_frames": 1},
        {"calib.clips.limit": 2},
        {"quant.scale_mode": "floor"},
        {"kv": "mx_v_only"},
        {"sampler.context_noise": 0.3},
    ],
    ids=str,
)
def test_what_changes_a_calibration_makes_a_new_one(first, calibrated, composed, tmp_path, changed):
    run(composed(*calibrated(**changed)))
    assert len(stored(tmp_path)) == 2


def test_another_checkpoint_makes_a_new_one(first, calibrated, composed, game, tmp_path):
    state = load_file(game["model.checkpoint"])
    name = next(iter(state))
    state[name] = state[name] * 1.01
    save_file(state, tmp_path / "other.safetensors")
    run(composed(*calibrated(**{"model.checkpoint": tmp_path / "other.safetensors"})))
    assert len(stored(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "value", "shape", "name"])
def test_a_damaged_calibration_is_made_again_and_never_used(first, calibrated, record, tmp_path, capsys, damage):
    (path,) = stored(tmp_path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = next(name for name in tensors if name.endswith("elements"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "value":
        save_file({**tensors, name: tensors[name] ^ 8}, path, metadata)
    elif damage == "shape":
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, path, metadata)
    else:
        save_file({**tensors, "surplus": torch.zeros(1)}, path, metadata)
    again = record(*calibrated())
    assert "calibrating again" in capsys.readouterr().out
    assert not again.candidate.calibration.found
    assert again.quality.all.fidelity.psnr == pytest.approx(first.quality.all.fidelity.psnr, abs=1e-3)
    assert record(*calibrated()).candidate.calibration.found


def test_what_another_process_made_meanwhile_is_not_told_as_kept(first, calibrated, record, tmp_path, monkeypatch):
    (path,) = stored(tmp_path)
    path.rename(tmp_path / "made")

    @contextmanager
    def waiting(wanted):
        (tmp_path / "made").rename(wanted)
        yield

    monkeypatch.setattr("harness.calib.source.locked", waiting)
    again = record(*calibrated()).candidate
    assert again.calibration == first.candidate.calibration  # its seconds too: it was not made twice
    assert not again.calibration.found


def test_clips_that_are_judged_are_refused_whatever_they_are_called(calibrated, composed, game, tmp_path):
    judged = tmp_path / "renamed"
    judged.mkdir()
    source = game["data.paths"].strip("[]")
    shutil.copy(f"{source}/clip_1.mp4", judged / "innocent.mp4")
    description = Path(f"{source}/clip_1.json").read_text()
    (judged / "innocent.json").write_text(description.replace("clip_1", "innocent"))
    with pytest.raises(ClipError, match=r"clip_1 shows \d+ frames of innocent"):
        run(composed(*calibrated(**{"calib.clips.paths": f"[{judged}]", "data.limit": "null"})))


def test_calibration_without_mx_weights_or_clips_is_refused_before_anything_is_loaded(calibrated, composed):
    with pytest.raises(ConfigError, match="quant=bf16 has none; use calib=none"):
        run(composed(*calibrated(quant="bf16", kv="mx_v_only")))
    with pytest.raises(ConfigError, match="calib config: damping=2.*paths is empty"):
        run(composed(*calibrated(**{"calib.damping": 2, "calib.clips.paths": "[]"})))
    with pytest.raises(ClipError, match="calib.clips"):
        run(composed(*calibrated(**{"calib.clips.future_frames": 5000})))
