"""Numbers against references: the shared cases, and models of other shapes against the sampler written out plainly."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rollout_cases import NaiveRollout, make_core, make_inputs
from safetensors.torch import load_file, save_file

from harness.bench.parity import BOUND, DECODER_BOUND, check_folder, main
from harness.rollout import SamplerConf

CASES = Path(__file__).parents[1] / "parity"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_gamerft_matches_its_reference():
    figures = {figure.name: figure for figure in check_folder(CASES / "gamerft_motion")}
    assert list(figures) == [
        "full pass", "prefill_out", "frames", "v_step1", "v_step2", "k_cache_layer0", "v_cache_last",
    ]  # fmt: skip
    assert {name: f.error for name, f in figures.items() if not f.error <= 1e-5} == {}
    assert {f.bound for f in figures.values()} == {BOUND} == {1e-5}


def test_decoder_matches_its_reference():
    (figure,) = check_folder(CASES / "dcae_square")
    assert figure.error <= 5e-5 == figure.bound == DECODER_BOUND


def export(folder, core, sampler, batch, frames=7, wrap=lambda state: state):
    """Write a case as a user would, with references from the plainly written sampler."""
    context, new = make_inputs(core, frames, sampler.window, batch)
    naive = NaiveRollout(core, sampler)
    io = {"roll.prefill_out": naive.prefill(*context)}
    results = [naive.next_frame(*(frame if not core.cfg.uncond else frame[:1])) for frame in new]
    io["roll.frames"] = torch.stack([latent for latent, _ in results], 1)
    for i in range(len(sampler.timesteps)):
        io[f"roll.v_step{i + 1}"] = torch.stack([velocities[i] for _, velocities in results], 1)
    io["roll.k_cache_layer0"] = naive.cached(0)[0]
    io["roll.v_cache_last"] = naive.cached(len(core.blocks) - 1)[1]
    names = ("roll.history", "roll.mouse", "roll.btn", "roll.history_noise")
    io |= dict(zip(names, context, strict=True))
    names = ("roll.noise", "roll.new_mouse", "roll.new_btn")
    io |= {name: torch.stack(x, 1) for name, x in zip(names, zip(*new, strict=True), strict=True)}
    if core.cfg.uncond:
        io = {name: x for name, x in io.items() if "mouse" not in name and "btn" not in name}
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in io.items()}, folder / "io.safetensors")
    torch.save(wrap(core.state_dict()), folder / "weights.pt")
    rollout = {
        "window_frames": sampler.window, "new_frames": frames,
        "context_noise": sampler.context_noise, "timesteps": sampler.timesteps,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": vars(core.cfg), "rollout": rollout}))


@pytest.mark.parametrize(
    ("fields", "sampler", "batch"),
    [
        ({}, SamplerConf(window=4), 2),
        ({"local_idx": 3, "global_window": 3}, SamplerConf(window=5, timesteps=[1.0, 0.6, 0.2]), 1),
        ({"rope_impl": "ortho", "n_frames": 6}, SamplerConf(window=4, timesteps=[1.0], context_noise=0.0), 3),
        ({"uncond": True, "local_window": None}, SamplerConf(window=1), 2),
    ],
    ids=["two_step", "windows_three_step", "ortho_one_step", "uncond"],
)
def test_exported_cases_of_other_shapes_pass(tmp_path, capsys, fields, sampler, batch):
    core = make_core(**fields)
    export(
        tmp_path / "case", core, sampler, batch, wrap=lambda s: {"model": {f"module.core.{k}": v for k, v in s.items()}}
    )
    assert main([str(tmp_path / "case")]) == 0
    out = capsys.readouterr().out
    assert all(f"v_step{i + 1}" in out for i in range(len(sampler.timesteps)))
    shorter = core.layer_window(2) is not None and core.layer_window(2) < sampler.window
    assert ("keeps its newest" in out) == (shorter or fields.get("global_window") == 3)


@pytest.fixture
def case(tmp_path):
    return Path(shutil.copytree(CASES / "gamerft_motion", tmp_path / "case"))


def rewrite(case, change):
    io = load_file(case / "io.safetensors")
    change(io)
    save_file(io, case / "io.safetensors")


@pytest.mark.parametrize("wrong", [2e-5, float("nan")])
def test_an_error_above_its_bound_exits_1(case, capsys, wrong):
    def change(io):
        io["roll.v_step2"][0, 3, 0, 0, 0] += wrong

    rewrite(case, change)
    assert main([str(CASES / "dcae_square"), str(case)]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line[-1] == "ABOVE"] == ["v_step2"]


def drop(name):
    return lambda io: io.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("roll.new_mouse"), "io has no tensor roll.new_mouse"),
        (lambda io: io.update({"full.t": torch.zeros(2, 7)}), r"full.t has shape (2, 7), expected (2, 8)"),
        (lambda io: io.update({"roll.v_step3": torch.zeros(1)}), "roll.v_step3: the config has 2 timesteps"),
        (lambda io: io.update({"roll.frames": torch.zeros(1, 5, 16, 4, 4)}), "frames: reference has shape (1, 5,"),
        (lambda io: [io.pop(name) for name in list(io)], "io has neither full.x, roll.history nor z"),
    ],
)
def test_unusable_tensors_exit_2(case, capsys, change, message):
    rewrite(case, change)
    assert main([str(case)]) == 2
    assert message in capsys.readouterr().err


def test_unusable_folders_exit_2_and_others_are_still_checked(case, tmp_path, capsys):
    (case / "weights.safetensors").unlink()
    text = (CASES / "gamerft_motion" / "config.yaml").read_text()
    wider = Path(shutil.copytree(CASES / "gamerft_motion", tmp_path / "wider"))
    (wider / "config.yaml").write_text(text.replace("d_model: 64", "d_model: 128"))
    window = Path(shutil.copytree(CASES / "gamerft_motion", tmp_path / "window"))
    (window / "config.yaml").write_text(text.replace("window_frames: 8", "window_frames: 6"))
    good = CASES / "dcae_square"
    assert main([str(tmp_path / "none"), str(case), str(wider), str(window), str(good)]) == 2
    printed = capsys.readouterr()
    assert "no such folder" in printed.err
    assert "no weights.safetensors (or .pt, .pth)" in printed.err
    assert "misshapen" in printed.err
    assert "rollout.window_frames is 6, roll.history has 8 frames" in printed.err
    assert "decoder" in printed.out
