"""Upstream YAML files are read as they are; what cannot be built is named."""

import pytest

from harness.models.config_io import (
    ConfigFileError,
    read_dcae_config,
    read_gamerft_config,
    read_vae_scale,
)

FIELDS = "n_layers: 2\nn_heads: 2\nd_model: 32\nchannels: 4\nsample_size: 2\ntokens_per_frame: 4\nn_frames: 8\n"


def write(tmp_path, text):
    path = tmp_path / "model.yml"
    path.write_text(text)
    return path


def sectioned(fields, train=""):
    return "model:\n" + "".join(f"  {line}\n" for line in fields.strip().splitlines()) + train


def test_plain_and_sectioned_files_are_the_same(tmp_path):
    plain = read_gamerft_config(write(tmp_path, FIELDS))
    assert plain == read_gamerft_config(write(tmp_path, sectioned(FIELDS, "train:\n  vae_scale: 0.63\n")))
    assert (plain.n_layers, plain.d_model, plain.local_idx, plain.uncond) == (2, 32, 4, False)


def test_vae_scale_is_read_from_the_train_section(tmp_path):
    assert read_vae_scale(write(tmp_path, sectioned(FIELDS, "train:\n  vae_scale: 0.63\n"))) == 0.63
    assert read_vae_scale(write(tmp_path, FIELDS)) is None
    with pytest.raises(ConfigFileError, match="vae_scale='big'"):
        read_vae_scale(write(tmp_path, sectioned(FIELDS, "train:\n  vae_scale: big\n")))


def test_uncond_cfg_and_square_lists_are_accepted(tmp_path):
    text = FIELDS.replace("sample_size: 2", "sample_size: [2, 2]") + "uncond: true\ncfg_prob: 0.1\n"
    cfg = read_gamerft_config(write(tmp_path, text))
    assert cfg.uncond
    assert cfg.sample_size == 2


def test_unused_fields_are_said(tmp_path):
    with pytest.warns(UserWarning, match="not used by GameRFTConfig: gradient_checkpointing"):
        read_gamerft_config(write(tmp_path, FIELDS + "gradient_checkpointing: true\n"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("n_heads: 3", "not divisible by n_heads=3"),
        ("tokens_per_frame: 5", "tokens_per_frame=5 is not"),
        ("rope_impl: spiral", "allowed are motion, ortho"),
        ("backbone: mmdit", "only dit is supported"),
        ("has_audio: true", "audio is not supported"),
        ("n_layers: many", "n_layers"),
        ("local_window: 0", "local_window=0"),
        ("n_buttons: " + "9" * 400, "n_buttons is a number beyond 64 bits"),
    ],
)
def test_what_cannot_be_built_is_named(change, message, tmp_path):
    field = change.split(":")[0]
    kept = "".join(line + "\n" for line in FIELDS.splitlines() if not line.startswith(field + ":"))
    with pytest.raises(ConfigFileError, match=message) as error:
        read_gamerft_config(write(tmp_path, kept + change + "\n"))
    assert "model.yml" in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: 3\n", "model: [unclosed\n", "model:\n  d_model: 3\n"])
def test_files_that_are_no_model_config_are_named(text, tmp_path):
    with pytest.raises(ConfigFileError, match=r"model\.yml"):
        read_gamerft_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigFileError, match="no such file; give a YAML file"):
        read_gamerft_config(tmp_path / "absent.yml")


def test_dcae_configs_that_do_not_add_up_are_named(tmp_path):
    good = (
        "sample_size: 32\nlatent_size: 8\nlatent_channels: 4\nch_0: 16\nch_max: 32\ndecoder_blocks_per_stage: [1, 1]\n"
    )
    assert read_dcae_config(write(tmp_path, good)).sample_size == [32, 32]
    with pytest.raises(ConfigFileError, match="give 64×64"):
        read_dcae_config(write(tmp_path, good.replace("latent_size: 8", "latent_size: 16")))
    with pytest.raises(ConfigFileError, match="multiple of latent_channels"):
        read_dcae_config(write(tmp_path, good.replace("latent_channels: 4", "latent_channels: 5")))
    with pytest.raises(ConfigFileError, match="must halve"):
        read_dcae_config(write(tmp_path, good.replace("ch_max: 32", "ch_max: 24")))
    with pytest.raises(ValueError, match="channels=1: a frame has 3"):
        read_dcae_config(write(tmp_path, good + "\nchannels: 1\n"))
