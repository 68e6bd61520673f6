"""Every checkpoint form loads to the same weights; what does not fit is one error that lists all of it."""

import dataclasses
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.parametrizations import weight_norm

from harness.models.checkpoint import (
    CheckpointError,
    fold_weight_norm,
    load_decoder,
    load_encoder,
    load_gamerft,
    random_decoder,
    random_gamerft,
    read_checkpoint,
)
from harness.models.dcae import DCAEConfig, DCAEDecoder, DCAEEncoder
from harness.models.gamerft import GameRFTConfig

CFG = GameRFTConfig(n_layers=2, n_heads=2, d_model=32, channels=4, sample_size=2, tokens_per_frame=4, n_frames=8)
DCAE = DCAEConfig(
    sample_size=[16, 16], latent_size=4, latent_channels=4, ch_0=8, ch_max=16,
    encoder_blocks_per_stage=[1, 1], decoder_blocks_per_stage=[1, 1],
)  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return random_gamerft(CFG, seed=1).state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "bare core": lambda s: s,
    "full model": lambda s: prefixed(s, "core."),
    "ema": lambda s: {
        "ema": {**prefixed(s, "ema_model.core."), "initted": torch.tensor(True), "step": torch.tensor(3)}
    },
    "ema ddp": lambda s: {"ema": prefixed(s, "ema_model.module.core."), "model": {"x": torch.zeros(1)}},
    "ema compiled ddp": lambda s: {"ema": prefixed(s, "ema_model._orig_mod.module.core.")},
    "ema with online model": lambda s: {
        "ema": {**prefixed(s, "ema_model.core."), **{f"online_model.core.{k}": v + 1 for k, v in s.items()}}
    },
    "model": lambda s: {"model": prefixed(s, "core."), "opt": {"lr": 1e-3}, "step": 7},
    "model ddp": lambda s: {"model": prefixed(s, "module.core.")},
    "model compiled ddp": lambda s: {"model": prefixed(s, "._orig_mod.module.core.")},
    "model core only": lambda s: {"model": s},
    "bf16": lambda s: {key: value.bfloat16() for key, value in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_pt_form_loads_to_the_same_weights(form, state, tmp_path):
    torch.save(FORMS[form](state), tmp_path / "model.pt")
    loaded = load_gamerft(tmp_path / "model.pt", CFG).state_dict()
    for key, value in state.items():
        expected = value.bfloat16().float() if form == "bf16" else value
        assert torch.equal(loaded[key], expected), key


def test_safetensors_loads(state, tmp_path):
    save_file(prefixed(state, "core."), tmp_path / "model.safetensors")
    loaded = load_gamerft(tmp_path / "model.safetensors", CFG).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_all_misfits_are_listed_at_once(state, tmp_path):
    bad = dict(state)
    del bad["proj_in.weight"]
    bad["transformer.blocks.0.attn.qkv.bias"] = torch.zeros(7)
    bad["transformer.blocks.9.attn.out.bias"] = torch.zeros(32)
    bad["transformer.blocks.1.mlp.fc1.bias"] = torch.full((128,), float("nan"))
    torch.save(bad, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as error:
        load_gamerft(tmp_path / "model.pt", CFG)
    text = str(error.value)
    assert "model.pt" in text
    assert "1 missing: proj_in.weight" in text
    assert "1 unexpected: transformer.blocks.9.attn.out.bias" in text
    assert "transformer.blocks.0.attn.qkv.bias is 7, the model needs 96" in text
    assert "1 not finite: transformer.blocks.1.mlp.fc1.bias" in text
    assert text.isprintable(), "one line"


def test_misfits_of_many_blocks_are_one_entry(tmp_path):
    wide = dataclasses.replace(CFG, d_model=CFG.d_model * 2)
    torch.save(random_gamerft(wide, 0).state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as error:
        load_gamerft(tmp_path / "model.pt", CFG)
    text = str(error.value)
    assert f"transformer.blocks.{{0-{CFG.n_layers - 1}}}.attn.out.bias is 64, the model needs 32" in text
    assert "blocks.1." not in text
    assert "more" not in text


def test_parts_outside_the_core_are_not_dropped_in_silence(state, tmp_path):
    torch.save({**prefixed(state, "core."), "head.weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="unexpected: head.weight"):
        load_gamerft(tmp_path / "model.pt", CFG)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path):
    save({"model": Bomb(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError,
        match=r"refused: .* could run code \((it asks for posix\.mkdir|it holds other objects than tensors)\)",
    ):
        load_gamerft(tmp_path / "model.pt", CFG)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04"])
def test_a_corrupt_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_gamerft(tmp_path / name, CFG)


def test_a_truncated_file_is_named(state, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_gamerft(tmp_path / "model.pt", CFG)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file; give a .safetensors"):
        load_gamerft(tmp_path / "absent.pt", CFG)


def test_a_state_dict_of_other_things_is_refused(tmp_path):
    torch.save({"weights": [1, 2], "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="weights, epoch hold no tensors"):
        load_gamerft(tmp_path / "model.pt", CFG)


def weight_normed(module):
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            weight_norm(layer)
            layer.parametrizations.weight.original0.data.mul_(1.5)
    return module


@pytest.mark.parametrize("whole", [True, False])
def test_vae_checkpoints_whole_or_in_part_with_weight_norm(whole, tmp_path):
    torch.manual_seed(0)
    parts = {"decoder": weight_normed(DCAEDecoder(DCAE)), "encoder": weight_normed(DCAEEncoder(DCAE))}
    if whole:
        both = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        torch.save({"ema": prefixed(both, "ema_model.")}, tmp_path / "vae.pt")
        paths = {"decoder": tmp_path / "vae.pt", "encoder": tmp_path / "vae.pt"}
    else:
        paths = {name: tmp_path / f"{name}.pt" for name in parts}
        for name, part in parts.items():
            torch.save(part.state_dict(), paths[name])
    z, x = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load_decoder(paths["decoder"], DCAE)(z), parts["decoder"](z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_encoder(paths["encoder"], DCAE)(x), parts["encoder"](x), atol=1e-5, rtol=1e-5)


def test_half_a_weight_norm_is_an_error():
    with pytest.raises(CheckpointError, match="original0"):
        fold_weight_norm({"conv.parametrizations.weight.original1": torch.ones(2, 2, 1, 1)})
    with pytest.raises(CheckpointError, match="original1"):
        fold_weight_norm({"conv.parametrizations.weight.original0": torch.ones(2, 1, 1, 1)})


def test_random_weights_come_from_the_seed_alone():
    before = torch.random.get_rng_state()
    a, b, c = random_gamerft(CFG, 3), random_gamerft(CFG, 3), random_gamerft(CFG, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.proj_in.weight, b.proj_in.weight)
    assert not torch.equal(a.proj_in.weight, c.proj_in.weight)
    assert random_decoder(DCAE, 1)(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 16, 16)


def test_the_averaged_set_of_several_is_taken_and_said(state, tmp_path):
    worse = {key: value + 1 for key, value in state.items()}
    for key in ("ema", "model_ema", "ema_state_dict"):
        torch.save({"model": worse, key: state, "optimizer": {"state": {}, "lr": 1.0}}, tmp_path / "model.pt")
        found = read_checkpoint(tmp_path / "model.pt")
        assert found.choice == f"weights of '{key}', not of 'model'"
        assert torch.equal(found.state["proj_in.weight"], state["proj_in.weight"])
    online = read_checkpoint(tmp_path / "model.pt", "model")
    assert torch.equal(online.state["proj_in.weight"], worse["proj_in.weight"])


def test_sets_of_which_none_stands_out_are_for_the_user_to_choose(state, tmp_path):
    torch.save({"ema_0.99": state, "ema_0.9999": state, "model": state}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"several sets .*'ema_0.99', 'ema_0.9999', 'model'; say which with"):
        read_checkpoint(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="model.weights=best: it holds 'ema_0.99'"):
        read_checkpoint(tmp_path / "model.pt", "best")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="the file holds one state dict"):
        read_checkpoint(tmp_path / "model.pt", "ema")


def test_elements_that_are_no_weights_are_named(state, tmp_path):
    bad = {**state, "proj_in.weight": state["proj_in.weight"].to(torch.complex64)}
    bad["transformer.blocks.0.attn.qkv.bias"] = torch.zeros(96, dtype=torch.int32)
    torch.save(bad, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="2 not of real numbers: proj_in.weight is torch.complex64"):
        load_gamerft(tmp_path / "model.pt", CFG)


def test_another_kind_of_checkpoint_is_called_what_it_is(state, tmp_path):
    save_file(DCAEDecoder(DCAE).state_dict(), tmp_path / "decoder.safetensors")
    with pytest.raises(CheckpointError, match="It looks like a decoder, which goes to decoder.checkpoint") as error:
        load_gamerft(tmp_path / "decoder.safetensors", CFG)
    assert len(str(error.value)) < 1500
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match="It looks like a GameRFT model, which goes to model.checkpoint"):
        load_decoder(tmp_path / "dit.safetensors", DCAE)
