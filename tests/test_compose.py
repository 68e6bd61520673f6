"""What runs is what was typed: words and files are checked before anything runs, wherever they come from."""

import os
import subprocess
import sys
import time

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from harness.config import ROOT, ConfigError, plan_run
from harness.config import sizes as sizes_room
from harness.config.command import in_hydras_order, read_command
from harness.config.compose import compose, load
from harness.config.labels import label
from harness.config.play import register_play
from harness.config.slurm import slurm_problems
from harness.models.gamerft import GameRFTConfig, GameRFTCore

UNKNOWN = "no such field; did you mean quant.late_layers?"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quant.late_layer=4"], UNKNOWN),
        (["+quant.late_layer=4"], UNKNOWN),
        (["++quant.late_layer=4"], UNKNOWN),
        (["quant={bits: 4, late_layer: 3}"], UNKNOWN),
        (["gates=d", "+gates.max_psnr_dop=-1"], "gates.max_psnr_dop: no such field; did you mean gates.max_psnr_drop?"),
        (["late_layers=4"], "did you mean quant.late_layers or kv.late_layers?"),
        (["qaunt=mxfp8_all"], "qaunt: no such field; did you mean quant?"),
        (["+model.arch.n_layer=3"], "did you mean model.arch.n_layers?"),
        (["+hydra.foo=1"], "hydra.foo: no such field"),
        (["+logger.save_dri=x"], "logger.save_dri: no such argument; did you mean save_dir?"),
        (["quant=MXFP8_all"], "no such option of quant; did you mean mxfp8_all?"),
        (["MXFP8_all"], "not of the form name=value; did you mean quant=mxfp8_all?"),
        (["quant", "mxfp8_all"], "write it without blanks: quant=mxfp8_all"),
        (["quant", "=", "mxfp8_all"], "quant = mxfp8_all: write it without blanks: quant=mxfp8_all"),
        (["quant=", "mxfp8_all"], "write it without blanks: quant=mxfp8_all"),
        (["data.paths=[a,", "b]"], "quote the whole word: 'data.paths=[a, b]'"),
        (["model.checkpoint=/my", "run/x.pt"], "quote the whole word: 'model.checkpoint=/my run/x.pt'"),
        (["model.checkpoint=/epoch=3.pt"], """put it in quotes: 'model.checkpoint="/epoch=3.pt"'"""),
        (["model.checkpoint=/a,b.pt"], """one text: 'model.checkpoint="/a,b.pt"'"""),
        (["model.checkpoint=1e3"], "read as 1000.0; put the text in quotes"),
        (["model.checkpoint=true"], "read as true; put the text in quotes"),
        (["data.paths=/x"], "data.paths=/x: must be a list"),
        (["quant=null"], "quant=null: no such option of quant"),
        (["kv=null"], "kv=null: no such option of kv"),
        (["compile=true"], "compile=true: no such option of compile"),
        (["quant=bf16,mxfp8_all"], "add -m to run each"),
        (["~quant.bits"], "a field cannot be taken away"),
        (["decoder.vae_scale=true"], "decoder.vae_scale=true: must be a number, or null"),
        (["measure.videos=5"], "measure.videos=5: must be true or false"),
        (["seed=1.5"], "seed=1.5: must be a whole number"),
        (["model.checkpoint=/tmp/\udcff.pt"], "model.checkpoint: its value is no UTF-8 text"),
        (["seed=18446744073709551616"], "must be 0 to 18446744073709551615"),
        (["threads=100000"], "threads=100000: must be at least 1 and, on this machine, at most"),
        (["drift.fidelity_psnr=inf"], "drift.fidelity_psnr=inf: must be a finite number"),
        (["quant=bf16", "kv=mx_ema", "kv.ema.floor=1e308"], "kv.ema.floor=1e+308: must be at most 3.4e+38"),
        (["drift.fidelity_psnr=-1e39"], "drift.fidelity_psnr=-1e+39: must be at most 3.4e+38"),
        (["sampler.timesteps=[nan]"], "sampler.timesteps[0]=nan: must be a finite number"),
        (["data.limit=99999999999999999999"], "data.limit=99999999999999999999: must be"),
        (["decoder.arch.latent_channels=0"], "latent_channels=0: must be at least 1"),
        (["decoder.arch.decoder_blocks_per_stage=[1,1,1000000000]"], "each of 1 to 256 blocks"),
        (["seed=${nope}"], "Interpolation key 'nope' not found"),
    ],
)
def test_what_nobody_can_have_meant_is_refused_with_what_to_write(words, said):
    with pytest.raises(ConfigError) as caught:
        plan_run(compose("model=smoke", *words))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("group", "text", "said"),
    [
        ("quant", "enabled: true\nlate_layer: 4\n", f"quant/own.yaml: quant.late_layer: {UNKNOWN}"),
        ("decoder", "vae_scale: on\n", "decoder/own.yaml: decoder.vae_scale=true: must be a number, or null"),
        ("gates", "enabled: true\ntitle: off\n", "gates/own.yaml: gates.title=false: must be text"),
        ("gates", "enabled: true\nmax_psnr_drop: .inf\n", "gates.max_psnr_drop=inf: must be a finite number"),
        (
            "experiment",
            "# @package _global_\ndata:\n  limits: 4\n",
            "data.limits: no such field; did you mean data.limit",
        ),
        ("experiment", "# @package _global_\ndefaults:\n  - override /compile: off\n", "own.yaml: Unsupported item"),
        ("kv", "storage: mx\nscales: ${model.x}\n", "Interpolation key 'model.x' not found"),
        ("quant", "bits: [\n", "quant/own.yaml: not a readable YAML file: line 2: "),
    ],
)
def test_files_are_held_to_the_same_as_words(tmp_path, group, text, said):
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        plan_run(compose("model=smoke", f"{group}=own", config_dir=tmp_path))
    assert said in str(caught.value)
    assert "\n\n" not in str(caught.value)


CALIBRATED = ["calib=gptq", "calib.clips.source=synthetic", "calib.clips.paths=[]", "calib.clips.limit=1"]


def test_all_wrong_words_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        compose("quant=mxfp5", "quant.bit=3", "seed=x")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["quant=mxfp5", "quant.bit", "seed=x"]


def test_each_value_of_a_sweep_is_checked():
    assert load(["model=smoke", "quant=bf16,mxfp8_all", "data.limit=1,2"], "run", sweep=True).quant.enabled is False
    with pytest.raises(ConfigError, match="quant=mxfp5: no such option") as caught:
        load(["quant=bf16,mxfp5", "data.limit=1,x"], "run", sweep=True)
    assert "data.limit=x: must be a whole number" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["model.arch.n_layers=1000000000"], "weights of the model 147 TB"),
        (["model.arch.d_model=10000000"], "weights of the model"),
        (["sampler.window=100000000"], "KV cache"),
        (["data.batch_size=100000000"], "generated pictures of a batch"),
        (["data.future_frames=100000000"], "generated pictures of a batch"),
        (["data.synthetic_clips=10000000000"], "the list of clips 2 TB"),
        (["data.start=10000000000"], "latents and noise of a batch 10.2 TB"),
        (
            [*CALIBRATED, "calib.clips.future_frames=1000000000"],
            "latents and noise of the clips to calibrate on 2.05 TB",
        ),
        ([*CALIBRATED, "calib.clips.start=10000000000"], "latents and noise of the clips to calibrate on 10.2 TB"),
        ([*CALIBRATED, "calib.clips.synthetic_clips=10000000000"], "the list of clips to calibrate on 2 TB"),
    ],
)
def test_what_cannot_fit_is_one_message_with_the_bytes_there_are(monkeypatch, words, what):
    monkeypatch.setattr(sizes_room, "available", lambda device: 8 * 10**9)
    with pytest.raises(ConfigError) as caught:
        plan_run(compose("model=smoke", "quant=mxfp8_all", *words))
    assert "needs at least" in str(caught.value)
    assert "has 8 GB free" in str(caught.value)
    assert what in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_bytes_of_a_model_are_those_of_its_weights():
    import torch

    for arch in (GameRFTConfig(), GameRFTConfig(n_layers=7, d_model=256, n_heads=4)):
        with torch.device("meta"):
            real = 2 * sum(parameter.numel() for parameter in GameRFTCore(arch).parameters())
        assert 0.7 * real < sizes_room.model_bytes(arch) <= real


@pytest.mark.parametrize(
    ("words", "called"),
    [
        (["quant=mxfp4_all_late8"], "mxfp4_all_late8"),
        (["quant=mxfp4_all_late8", "quant.late_layers=99"], "mxfp4_all late_layers=99"),
        (["quant=mxfp4_all_late8", "quant.late_layers=null"], "mxfp4_all"),
        (["quant=mxfp8_all", "quant.bits=4"], "mxfp4_all"),
        (["quant=mxfp8_all", "quant.scale_mode=floor"], "mxfp8_all scale_mode=floor"),
        (["quant=mxfp8_all", "quant.list=true"], "mxfp8_all"),
    ],
)
def test_labels_say_what_ran(words, called):
    cfg = compose("model=smoke", *words)
    conf = plan_run(cfg).conf
    assert label("quant", conf.quant, words[0].partition("=")[2]) == called
    folder = cfg.__dict__["hydra_part"].runtime.output_dir
    assert folder.endswith(f"_smoke_{called.replace(' ', '_')}_bf16")


def test_a_folder_is_named_after_what_chose_the_weights():
    named = compose("model=doom", "quant=mxfp4_all", "calib=gptq").__dict__["hydra_part"].runtime.output_dir
    assert named.endswith("_doom_mxfp4_all_gptq_bf16")


def test_a_config_composed_is_a_config_like_any_other():
    cfg = compose("model=smoke", "data.limit=3")
    cfg.data.limit = 1
    assert plan_run(OmegaConf.merge(cfg, {"seed": 4})).conf.data.limit == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, None),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS=x: no number, as SLURM sets it; unset it, or start the run through srun"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": ""}, "SLURM_PROCID=: no number"),
        ({"SLURM_NTASKS": "2"}, "ask SLURM for --ntasks-per-node=1, or share the clips out among 2 processes"),
    ],
)
def test_slurms_tasks_are_held_against_the_processes_of_the_run(environ, said):
    problems = list(slurm_problems(1, 1, environ))
    assert [said in problem for problem in problems] == ([True] if said else [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quant", "mxfp8_all"], "groups and fields are words of their own: quant=mxfp8_all"),
        (["--multi"], "did you mean --multirun?"),
        (["model=smoke", "hydra.run.dir=/proc/x"], "cannot write to /proc"),
        (["model=smoke", "hydra.run.dir=FILE/x"], "is a file; name a folder"),
        (["-m", "model=smoke", "quant=bf16,mxfp5"], "no such option of quant"),
        (["experiment=kv_matrix", "kv=mx_v_only,mx_kvv"], "did you mean mx_kv?"),
    ],
)
def test_the_command_ends_with_one_line_and_no_folder(tmp_path, words, said):
    (tmp_path / "FILE").touch()
    command = [sys.executable, str(ROOT / "harness" / "run.py"), *(word.replace("FILE", "./FILE") for word in words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["FILE"]


def test_without_the_demo_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("harness.config.places.ROOT", tmp_path)
    monkeypatch.setattr("harness.config.places.ASSETS", tmp_path / "assets")
    with pytest.raises(ConfigError) as caught:
        plan_run(compose("model=doom"))
    assert str(caught.value).startswith("the demo model is not part of the installed package: run in a clone")
    assert len(str(caught.value).splitlines()) == 1
    assert plan_run(compose("model=smoke")).conf.data.source == "synthetic"


def test_of_several_paths_one_of_the_absent_demo_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr("harness.config.places.ASSETS", tmp_path / "assets")
    paths = f"data.paths=[{tmp_path}/own,{tmp_path}/assets/doom/clips]"
    with pytest.raises(ConfigError, match=r"your own data\.paths"):
        plan_run(compose("model=smoke", "data=clips", paths))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a0 [x, x]\n" + "".join(f"k{n}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(12)), "values"),
        ("a: " + "[" * 20000 + "]" * 20000, "nested deeper"),
        ("a: &a [*a]\n", "within its own anchor"),
        ("a: x\n" * 300_000, "MiB; a config has at most"),
        ("defaults: [own]\n", "lead to one another in their defaults without end"),
    ],
    ids=["aliases that multiply", "brackets", "itself", "a megabyte", "defaults"],
)
def test_configs_of_ones_own_are_read_within_bounds(tmp_path, text, said):
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "own.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=said):
        load(["model=smoke", "quant=own"], "run", tmp_path)
    assert time.monotonic() - start < 20


def test_words_may_stand_before_and_behind_options():
    arguments = ["model=smoke", "-m", "quant=bf16,mxfp8_all", "--config-dir", "mine", "kv=bf16"]
    ordered = in_hydras_order(arguments, read_command(arguments))
    assert ordered == ["-m", "--config-dir", "mine", "model=smoke", "quant=bf16,mxfp8_all", "kv=bf16"]
    get_args_parser().parse_args(ordered)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=" + "9" * 5000, "seed: a number of 5000 digits; whole numbers have at most 64 bits"),
        ("+quant.late_layers=" + "9" * 200, "+quant.late_layers: a number of 200 digits"),
        ("data.paths=" + "[" * 5000 + "]" * 5000, "data.paths: 5000 brackets within brackets; at most 16"),
        ("data.paths=[" + "x," * 20_000 + "x]", "data.paths: a list of 20001; at most 4000 on the command line"),
        ("compile.options=" + "{a:" * 900 + "1" + "}" * 900, "compile.options: 900 brackets within brackets"),
    ],
)
def test_words_without_end_are_told_before_they_are_parsed(word, told):
    with pytest.raises(ConfigError) as raised:
        compose("model=smoke", word)
    assert str(raised.value).startswith(told)
    assert len(str(raised.value)) < 200


def test_digits_without_end_in_a_file_are_told_in_this_products_words(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text("limit: " + "9" * 5000)
    with pytest.raises(ConfigError, match=r"data/own.yaml: .*a number of thousands of digits"):
        compose("model=smoke", "data=own", config_dir=tmp_path)


WITHOUT_EFFECT = {
    "quant.bits=4": "quant.bits: without effect, as quant=bf16; choose an option of quant too",
    "quant={bits: 4}": "quant.bits: without effect, as quant=bf16",
    "++quant.bits=4": "quant.bits: without effect, as quant=bf16",
    "kv.late_layers=2 quant=mxfp8_all": "kv.late_layers: without effect, as kv=bf16",
    "kv=mx_v_only kv.ema.momentum=0.5": "kv.ema.momentum: without effect, as kv.scales=per_token",
    "kv=i8_k_mx_v kv.quantize_k=false": "kv.quantize_k: without effect, as kv.k_storage=i8_scale says it",
    "kv=i8_scale kv.scale_mode=floor": "kv.scale_mode: without effect, as neither K nor V is stored as mx",
    "quant=mxfp4_mlp quant.element_8bit=e5m2": "quant.element_8bit: without effect, as every Linear in scope has 4",
    "quant=mxfp8_mlp quant.bits_by_category.mlp=4 quant.bits=8": "quant.bits: without effect, as quant.bits_by",
    "calib.damping=0.2 quant=mxfp4_mlp": "calib.damping: without effect, as calib=none; choose an option of calib too",
    "model.calibration=[x] quant=mxfp4_mlp": "model.calibration: without effect, as calib=none",
    "data=doom data.synthetic_clips=9 decoder=doom": "data.synthetic_clips: without effect, as data.source=clips",
    "data.seed=3 data=doom": "data.seed: without effect, as data.source=clips: it is about synthetic clips",
    "data.fps=30 data=doom": "data.fps: without effect, as data.source=clips",
    "compile.mode=reduce-overhead": "compile.mode: without effect, as compile=off; choose an option of compile too",
    "+compile.options.max_autotune=true": "compile.options.max_autotune: without effect, as compile=off",
    "gates.max_psnr_drop=-1": "gates.max_psnr_drop: without effect, as quant=bf16 kv=bf16 is the baseline itself",
    "quant=mxfp8_mlp gates.min_fps_ratio=0.9": "gates.min_fps_ratio: without effect, as gates.without=[speed]",
    "quant=mxfp4_mlp gates=d gates.fps=total_fps": "gates.fps: without effect, as this gate does not ask for speed",
    "model.seed=3 model.checkpoint=x.pt": "model.seed: without effect, as it is about random weights",
}


@pytest.mark.parametrize("words", WITHOUT_EFFECT)
def test_a_field_that_would_change_nothing_is_told(words):
    pieces = [words] if "{" in words else words.split()
    with pytest.raises(ConfigError) as raised:
        compose("model=smoke", *pieces)
    *_, line = str(raised.value).splitlines()  # what else is wrong comes before
    assert line.startswith(WITHOUT_EFFECT[words])


@pytest.mark.parametrize(
    "words",
    [
        "quant=mxfp8_all quant.bits=4",
        "quant.enabled=true quant.bits=4",
        "quant.kernel=emulated",  # of an exported checkpoint too
        "quant=mxfp4_mlp quant.element_8bit=e5m2 quant.bits=8",
        "kv.storage=mx kv.bits=4",
        "kv=i8_k_mx_v kv.k_storage=null kv.quantize_k=true",
        "kv=mx_ema kv.ema.momentum=0.5",
        "data.seed=3 data.fps=30 data.synthetic_clips=2",
        "compile.linears=library",
        "compile=on compile.mode=default",
        "quant=mxfp8_mlp gates.min_fps_ratio=0.9 gates.without=[]",
        "quant=mxfp8_mlp gates.max_psnr_drop=0.1 gates.frames=8",
        "quant=mxfp8_mlp gates=a gates.fps=total_fps",
        "quant=mxfp4_mlp gates=d gates.without=[speed]",  # as the ladder says it of every gate
        "model.seed=3 decoder.seed=4",
        "quant=bf16 quant.bits=4",  # off by name: what words of several runs have in common goes to each
        "compile=off compile.backend=eager",
        "gates=none gates.max_psnr_drop=0.1",
    ],
)
def test_a_field_that_changes_something_is_not(words):
    compose("model=smoke", *words.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("quant.bits=4,8", "quant.bits"),
        ("quant=bf16,mxfp8_all kv=bf16,mx_v_only quant.bits=4", None),
        ("kv=bf16,mx_v_only quant.bits=4", "quant.bits"),
        ("quant.enabled=false,true quant.bits=4", None),
        ("experiment=gate_a,gate_d quant.late_layers=2", None),
        ("experiment=gate_a,gate_d kv.late_layers=2", "kv.late_layers"),
        ("experiment=kv_matrix kv.scale_mode=floor", None),
        ("experiment=kv_matrix quant.bits=4", "quant.bits"),
        ("compile=off,on compile.mode=default data.limit=range(1,3)", None),
        ("quant=glob(*) quant.bits=4", None),
    ],
)
def test_in_a_sweep_a_word_is_told_that_changes_nothing_in_any_of_its_jobs(words, told):
    pieces = ["model=smoke", *words.split()]
    if told is None:
        load(pieces, "run", sweep=True)
        return
    with pytest.raises(ConfigError, match=f"^{told}: without effect"):
        load(pieces, "run", sweep=True)


def test_an_experiments_own_fields_are_held_to_the_same(tmp_path):
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "own.yaml"
    own.write_text("# @package _global_\nquant:\n  bits: 4\n")
    with pytest.raises(ConfigError, match="^quant.bits: without effect, as quant=bf16"):
        compose("model=smoke", "experiment=own", config_dir=tmp_path)
    own.write_text("# @package _global_\ndefaults:\n  - override /quant: mxfp8_all\nquant:\n  bits: 4\n")
    assert compose("model=smoke", "experiment=own", config_dir=tmp_path).quant.bits == 4


def test_what_else_is_wrong_with_it_is_told_too():
    with pytest.raises(ConfigError) as raised:
        compose("model=smoke", "quant.bits=3")
    wrong, idle = str(raised.value).splitlines()
    assert "bits=3: allowed are 8 and 4" in wrong
    assert idle.startswith("quant.bits: without effect")


def test_play_does_not_take_what_only_a_run_does():
    register_play()
    with pytest.raises(ConfigError, match="^gates.max_psnr_drop, export: without effect, as play does nothing with it"):
        compose("model=smoke", "quant=mxfp8_all", "gates.max_psnr_drop=-1", "export=x.safetensors", name="play")
