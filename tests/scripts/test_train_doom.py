"""The demo's training, every stage but the recording, on a few small made-up frames: it runs, learns and exports."""

import json
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import train_doom
import yaml
from doom_world.autoencoder import AutoencoderTask, load_shallower, time_cosine
from doom_world.bank import Controls, SequenceBank
from doom_world.muon import StackedMuon
from doom_world.world_model import RolloutTask
from safetensors.torch import load_file

from harness.models.checkpoint import load_decoder, load_encoder, load_gamerft, random_gamerft
from harness.models.config_io import read_dcae_config

WORLD_STAGES = ["flow", "forced", "rollout", "sharpen", "unroll", "settle", "roam", "blend"]
STAGES = [
    *("autoencoder", "decoder", "flow", "forced", "rollout", "sharpen"),
    *("unroll", "deepen", "polish", "settle", "roam", "blend", "export"),
]


@pytest.fixture
def small(monkeypatch):
    """Two layers of width 32 on 32×32 frames, 2×2 latents, a window of 4 frames."""
    blocks = {"encoder_blocks_per_stage": [1, 1, 1, 1], "decoder_blocks_per_stage": [1, 1, 1, 1]}
    dcae = replace(
        train_doom.DCAE, sample_size=[32, 32], latent_size=2, latent_channels=8, ch_0=16, ch_max=32, **blocks
    )
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 32, "channels": 8, "sample_size": 2, "tokens_per_frame": 4}
    monkeypatch.setattr(train_doom, "DCAE", dcae)
    monkeypatch.setattr(train_doom, "GAMERFT", replace(train_doom.GAMERFT, **sizes, n_frames=64, local_window=2))
    deeper = {"encoder_blocks_per_stage": [2, 1, 1, 1], "decoder_blocks_per_stage": [2, 1, 1, 2]}
    monkeypatch.setattr(train_doom, "DEEPER", deeper)
    monkeypatch.setattr(train_doom, "SAMPLER", replace(train_doom.SAMPLER, window=4))


def record(folder, frames: int = 48) -> None:
    """One shard as ``record_doom.record_many`` writes it: a square that moves with the mouse."""
    folder.mkdir(parents=True)
    pictures = np.full((frames, 32, 32, 3), 60, np.uint8)
    for i in range(frames):
        pictures[i, 8:16, i % 24 : i % 24 + 8] = 220
    arrays = {
        "frames": pictures,
        "buttons": np.zeros((frames, 11), np.uint8),
        "mouse": np.ones((frames, 2), np.float32),
        "segment": np.zeros(frames, np.int32),
    }
    for name, array in arrays.items():
        np.save(folder / f"shard_00000.{name}.npy", array)


def test_every_stage_trains_and_the_export_loads(small, tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    record(work / "recorded")
    minutes = [f"--{stage}-minutes=0.005" for stage in sorted({*STAGES} - {"blend", "export"})]
    short = ["--horizon=2", "--roam-horizon=12"]
    argv = ["train_doom.py", f"--work={work}", f"--out={out}", "--batch=2", *short, *minutes, *STAGES]
    monkeypatch.setattr("sys.argv", argv)
    train_doom.main()

    phases = [load_file(work / f"dit_{name}.safetensors") for name in WORLD_STAGES]
    states = [random_gamerft(train_doom.GAMERFT, 0).state_dict(), *phases]
    for before, after in pairwise(states):
        assert all(torch.isfinite(value).all() for value in after.values())
        assert any(not torch.equal(before[key], after[key]) for key in after)
    settled, roamed, blended = phases[-3:]
    for key, value in blended.items():
        torch.testing.assert_close(value, (settled[key] + roamed[key]) / 2)
    config = yaml.safe_load((out / "config.yaml").read_text())
    scale = json.loads((work / "autoencoder.json").read_text())["vae_scale"]
    assert config["train"]["vae_scale"] == scale > 0
    exported = load_gamerft(out / "dit.safetensors", train_doom.GAMERFT)
    torch.testing.assert_close(exported.state_dict(), phases[-1], rtol=2**-7, atol=1e-6, check_dtype=False)
    deeper = read_dcae_config(out / "dcae.yaml")
    assert deeper.decoder_blocks_per_stage == train_doom.DEEPER["decoder_blocks_per_stage"]
    latent = load_encoder(out / "encoder.safetensors", deeper)(torch.zeros(1, 3, 32, 32))
    assert load_decoder(out / "decoder.safetensors", deeper)(latent).shape == (1, 3, 32, 32)


def test_the_decoder_stage_leaves_the_latents_as_they_are(small, tmp_path, monkeypatch):
    record(tmp_path / "recorded")
    common = ["train_doom.py", f"--work={tmp_path}", "--batch=2", "--autoencoder-minutes=0.005"]
    monkeypatch.setattr("sys.argv", [*common, "autoencoder"])
    train_doom.main()
    before = load_file(tmp_path / "encoder.safetensors"), (tmp_path / "autoencoder.json").read_text()
    monkeypatch.setattr("sys.argv", [*common, "--decoder-minutes=0.005", "decoder"])
    train_doom.main()
    after = load_file(tmp_path / "encoder.safetensors"), (tmp_path / "autoencoder.json").read_text()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


def test_a_deeper_half_begins_as_the_shallower_one(small):
    shallow = AutoencoderTask(train_doom.DCAE, torch.zeros(1), 1.0, 2)
    deep = AutoencoderTask(replace(train_doom.DCAE, **train_doom.DEEPER), torch.zeros(1), 1.0, 2)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    load_shallower(deep.encoder, shallow.encoder.state_dict())
    torch.testing.assert_close(deep.encoder(x), shallow.encoder(x), rtol=0, atol=0.02)
    state = {key: value for key, value in shallow.encoder.state_dict().items() if key != "conv_in.bias"}
    with pytest.raises(ValueError, match=r"not a shallower half of this autoencoder: conv_in\.bias"):
        load_shallower(deep.encoder, state)


def test_sequences_never_cross_an_episodes_end():
    latents = torch.arange(20.0).view(20, 1, 1, 1)
    segment = torch.tensor([0] * 7 + [1] * 13)
    bank = SequenceBank(latents, Controls(torch.zeros(20, 2), torch.zeros(20, 11), segment), length=6)
    starts = bank.sample(500)[0][:, 0].flatten().unique().tolist()
    assert starts == [0.0, 1.0, *(float(i) for i in range(7, 15))]
    with pytest.raises(ValueError, match="no recorded segment is 14 frames long"):
        SequenceBank(latents, bank.controls, length=14)


@torch.no_grad()
def test_training_rollouts_use_the_weights_of_the_moment_embedding_of_time_included(small):
    latents = torch.randn(40, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    controls = Controls(torch.zeros(40, 2), torch.zeros(40, 11), torch.zeros(40, dtype=torch.int64))
    core = random_gamerft(train_doom.GAMERFT, seed=0)
    task = RolloutTask(core, SequenceBank(latents, controls, length=6), train_doom.SAMPLER, 1.0, 2, 1e-3)

    def first_frame() -> torch.Tensor:
        roll, x = task._rollout(1), latents[None, :4]
        roll.prefill(x, controls.mouse[None, :4], controls.btn[None, :4], x)
        return roll.next_frame(latents[None, 4], controls.mouse[None, 4], controls.btn[None, 4]).clone()

    before = first_frame()
    for weight in task.averaged().t_embed.parameters():
        weight.neg_()
    after = first_frame()
    assert not torch.equal(before, after)
    task = RolloutTask(task.averaged(), task.bank, task.sampler, 1.0, 2, 1e-3)
    torch.testing.assert_close(first_frame(), after, rtol=0, atol=0)


def test_the_learning_rate_follows_the_clock():
    factors = [time_cosine(seconds, 100) for seconds in (0, 1, 2, 51, 100, 1000)]
    assert factors == pytest.approx([0, 0.5, 1, 0.51, 0.02, 0.02])


def test_stacked_muon_is_torchs_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (8, 24), (24, 8), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first, begin = StackedMuon(ours, lr=0.1), [p.detach().clone() for p in ours]
    second = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b, start in zip(ours, theirs, begin, strict=True):
        torch.testing.assert_close(a, b, atol=0.1 * float((b - start).abs().max()), rtol=0)  # both in BF16 inside


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["flow"], "each stage needs what those before it wrote: record, autoencoder"),
        (["flow", "--work", "/proc/x"], "/proc/x: cannot be written to"),
    ],
)
def test_stages_out_of_order_and_a_folder_that_cannot_be_made_are_one_line(
    tmp_path, monkeypatch, capsys, arguments, said
):
    work = [] if "--work" in arguments else ["--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_doom.py", *arguments, *work])
    with pytest.raises(SystemExit) as ended:
        train_doom.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
