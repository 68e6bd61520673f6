import itertools

import pytest
import torch
from omegaconf import OmegaConf

from harness.config import ROOT, ConfigError, RunConf, plan_run
from harness.config.extras import missing_launcher

GROUPS = {
    path.name: sorted(option.stem for option in path.glob("*.yaml"))
    for path in sorted((ROOT / "conf").iterdir())
    if path.is_dir()
}
CASES = list(itertools.chain.from_iterable([(group, option) for option in GROUPS[group]] for group in GROUPS))


@pytest.mark.parametrize(("group", "option"), CASES, ids=[f"{g}={o}" for g, o in CASES])
def test_every_option_of_every_group_composes_into_the_schema(composed, group, option):
    if group == "sweep" and (missing := missing_launcher([f"{group}={option}"])) is not None:
        pytest.skip(missing)
    conf = OmegaConf.to_object(composed("model=smoke", f"{group}={option}"))
    assert isinstance(conf, RunConf)


@pytest.mark.parametrize("option", GROUPS["quant"])
def test_every_quant_option_can_run_on_a_cpu(composed, option):
    plan = plan_run(composed("model=smoke", f"quant={option}"))
    assert plan.conf.quant.enabled == (option != "bf16")


@pytest.mark.parametrize("option", GROUPS["kv"])
def test_every_kv_option_fits_the_smoke_model(composed, option):
    assert plan_run(composed("model=smoke", f"kv={option}")).conf.is_baseline == (option == "bf16")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.arch.d_model=80",), "12 of 24 selected Linears cannot become MX"),
        (("quant.exclude=['*.qvk']",), "exclude pattern '.*qvk' matches no Linear"),
    ],
)
def test_what_mx_cannot_do_with_a_model_is_said_before_it_is_loaded(composed, words, said):
    with pytest.raises(ConfigError, match=said):
        plan_run(composed("model=smoke", "quant=mxfp8_mlp", *words))


def test_bits_of_a_category_are_a_word_on_the_command_line(composed):
    conf = plan_run(composed("model=smoke", "quant=mxfp4_mlp_mxfp8_rest", "quant.bits_by_category.attn=4")).conf.quant
    assert [conf.bits_of(name) for name in conf.categories] == [4, 4, 8]


def test_the_groups_a_user_is_promised_exist():
    assert {"doom", "smoke", "dit_v4", "dit_v4_5b"} <= set(GROUPS["model"]) == set(GROUPS["decoder"])
    assert {"bf16", "mxfp8_mlp", "mxfp8_attn", "mxfp8_all", "mxfp4_mlp"} <= set(GROUPS["quant"])
    assert {"bf16", "mx_v_only"} <= set(GROUPS["kv"])
    assert {"on", "off", "env"} <= set(GROUPS["compile"])
    assert {"doom", "owl_cache"} <= set(GROUPS["data"])
    assert set(GROUPS["logger"]) == {"csv", "tensorboard", "mlflow", "wandb"}
    assert set(GROUPS["trainer"]) == {"cpu", "gpu", "ddp", "ddp_cpu"}
    assert set(GROUPS["sweep"]) == {"joblib", "submitit_local", "submitit_slurm", "ray"}


def test_dit_v4_runs_without_further_words_on_synthetic_clips(composed):
    plan = plan_run(composed("model=dit_v4", "quant=mxfp8_all", "compile=on"))
    assert plan.conf.data.source == "synthetic"
    assert plan.conf.model.checkpoint is None
    assert plan.clip_shape.window == 60
    assert plan.clip_shape.frame_size == (360, 640)
    assert (plan.arch.n_layers, plan.arch.d_model, plan.arch.channels) == (16, 1536, 128)


def test_dit_v4_5b_is_the_same_but_for_its_size(composed):
    plan = plan_run(composed("model=dit_v4_5b"))
    assert (plan.arch.n_layers, plan.arch.d_model, plan.arch.head_dim) == (36, 2560, 128)
    assert plan.arch.local_window == 16


def test_a_users_choice_of_data_beats_the_models(composed):
    cfg = composed("model=dit_v4", "data=owl_cache", "data.paths=[somewhere]")
    assert plan_run(cfg).conf.data.source == "owl_cache"


def test_the_window_follows_the_model_and_the_seed_reaches_everyone(composed):
    conf = plan_run(composed("model=smoke", "model.window=9", "seed=5")).conf
    assert (conf.sampler.window, conf.sampler.seed, conf.data.seed) == (9, 5, 5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("quant=mxfp5", "mxfp8_mlp"),
        ("kv=int4", "mx_v_only"),
        ("quant.scope=everything", "must be one of mlp, attn, modulation, all"),
        ("quant.kernel=cublas", "must be one of auto, cutlass, cuda, triton, emulated"),
        ("kv.storage=fp8", "must be one of bf16"),
        ("attention.kind=flash", "must be one of sdpa, flex"),
        ("data.limit=many", "data.limit=many: must be a whole number, or null"),
        ("quant.bitz=8", "quant.bitz: no such field; did you mean quant.bits?"),
        ("unknown=1", "unknown: no such field"),
    ],
)
def test_wrong_names_and_types_fail_while_composing(composed, override, said):
    with pytest.raises(ConfigError) as caught:
        composed("model=smoke", override)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quant.bits=3"], "bits=3: allowed are 8 and 4"),
        (["quant=mxfp8_mlp", "quant.activation=mx", "quant.kernel=cutlass"], "Use kernel=emulated"),
        (["kv=mx_kv", "kv.late_layers=0"], "late_layers=0: must be at least 1"),
        (["kv=mx_v_only", "model.arch.n_heads=4"], "head size 16 is not divisible by 32"),
        (["sampler.timesteps=[0.2,0.5]"], "timesteps=[0.2, 0.5]"),
        (["data=owl_cache"], "paths is empty"),
        (["model.arch.d_model=65"], "d_model=65 is not divisible by n_heads=2"),
        (["model.arch.channels=8"], "the decoder takes 16×4×4"),
        (["model.checkpoint=/no/such/file.pt"], "model.checkpoint=/no/such/file.pt: no such file"),
        (["decoder.vae_scale=null"], "decoder.vae_scale is not given"),
        (["compile.mode=fast"], "mode='fast': allowed are"),
        (["compile.cuda_graph=true"], "CUDA graphs need a CUDA device"),
        (["decoder.groups=fused"], "decoder.groups=fused: its kernels need an NVIDIA GPU; this decoder is on cpu"),
        (["measure.warmup_frames=0"], "measure.warmup_frames=0: must be at least 1"),
        (["trainer.accelerator=tpu"], "allowed are cpu, gpu"),
    ],
)
def test_values_that_cannot_run_are_refused_with_what_can(composed, words, said):
    with pytest.raises(ConfigError) as caught:
        plan_run(composed("model=smoke", *words))
    assert said in str(caught.value)


def test_all_problems_are_told_at_once(composed):
    with pytest.raises(ConfigError) as caught:
        plan_run(composed("model=smoke", "quant.bits=3", "sampler.window=0", "data.batch_size=0"))
    assert all(name in str(caught.value) for name in ("bits=3", "window=0", "batch_size=0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_a_missing_gpu_is_said_before_anything_is_loaded(composed):
    with pytest.raises(ConfigError, match="trainer=gpu: no CUDA GPU"):
        plan_run(composed("model=smoke", "trainer=gpu"))


def test_fields_of_a_config_file_can_be_replaced(composed, game, overrides):
    plan = plan_run(composed(*overrides(game), "+model.arch.local_window=3"))
    assert (plan.arch.local_window, plan.arch.d_model) == (3, 32)
    assert plan.vae_scale == 0.5


def test_a_file_beside_a_named_model_of_another_width_is_refused(composed, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {d_model: 192}")
    with pytest.raises(ConfigError, match=r"has d_model=192, model.arch d_model=64: .*leave model= out"):
        plan_run(composed("model=smoke", f"model.config_file={file}"))


def test_a_set_of_weights_is_not_chosen_of_nothing(composed):
    with pytest.raises(ConfigError, match="model.weights=ema chooses a set of model.checkpoint, and there is none"):
        plan_run(composed("model=smoke", "model.weights=ema"))


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["data=clips", "data.paths=[mine]"], True),
        (["data=clips", "data.paths=[mine]", "decoder.encoder=null"], False),
        (["data=clips", "data.paths=[mine]", "decoder.encoder={own}"], False),
        (["data=synthetic", "data.paths=[]"], False),
        (["data=synthetic", "data.paths=[]", "quant=mxfp4_mlp", "calib=gptq"], True),
    ],
)
def test_a_decoder_of_ones_own_is_not_read_through_the_demos_encoder(composed, tmp_path, words, refused):
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"")
    cfg = composed(f"decoder.checkpoint={own}", *(word.format(own=own) for word in words))
    if not refused:
        plan = plan_run(cfg)
        given = next((str(own) for word in words if word.startswith("decoder.encoder")), None)
        assert plan.encoder_file == given, "where nothing is encoded: none, rather than the demo's"
        return
    with pytest.raises(ConfigError) as raised:
        plan_run(cfg)
    (said,) = str(raised.value).splitlines()
    assert said.endswith("or decoder.encoder=null where decoder.checkpoint has both")
    assert "the demo's encoder beside decoder.checkpoint=" in said


def test_the_demos_decoder_keeps_its_encoder_beside_another_config_file(composed, tmp_path):
    copy = tmp_path / "dcae.yaml"
    copy.write_text((ROOT / "assets" / "doom" / "dcae.yaml").read_text())
    assert plan_run(composed(f"decoder.config_file={copy}")).conf.decoder.config_file == str(copy)
