"""Composing and running whole configs inside the test process: importing torch anew takes longer than a smoke run."""

import os

# One thread a test process, and in what it starts: the tensors are tiny, and threads would spin waiting for one another
# on cores that other test processes use. Before torch is imported, whose thread pool reads it then.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own library reads it then

import dataclasses
import importlib.util
import itertools
import shutil
import sys

import chromium
import interpreter
import pytest
import torch._dynamo
import yaml
from game_clips import write_game_clip
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import save_file

from harness.config import register
from harness.config.compose import compose
from harness.config.flags import FLAGS
from harness.kernels.cache import place_compilers
from harness.models.checkpoint import random_decoder, random_gamerft
from harness.models.config_io import dcae_config, gamerft_config
from harness.models.dcae import DCAEEncoder
from harness.report.record import load_record
from harness.run import cli, run

register()
place_compilers()  # one place for all test processes, and for those that they start
torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    interpreter.quicken()
TINY_MODEL = {
    "n_layers": 2,
    "n_heads": 1,
    "d_model": 32,
    "channels": 8,
    "sample_size": 4,
    "n_buttons": 11,
    "local_window": 2,
    "local_idx": 2,
}
TINY_DCAE = {
    "sample_size": 32,
    "latent_size": 4,
    "latent_channels": 8,
    "ch_0": 8,
    "ch_max": 16,
    "encoder_blocks_per_stage": [1, 1, 1],
    "decoder_blocks_per_stage": [1, 1, 1],
}


def pytest_collection_modifyitems(config, items):
    """Modules with slow tests first, shared out among the workers: else one may be left working alone at the end.

    ``--dist worksteal`` gives every worker a stretch of the same length to begin with.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    modules = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    slow = [tests for tests in modules.values() if any(test.get_closest_marker("slow") for test in tests)]
    stretches = [list(itertools.chain(*slow[worker::workers])) for worker in range(workers)]
    rest = [test for tests in modules.values() if tests not in slow for test in tests]
    for stretch in stretches:
        room = max(0, len(items) // workers - len(stretch))
        stretch += rest[:room]
        del rest[:room]
    items[:] = [*itertools.chain(*stretches), *rest]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, one for the tests of a module."""
    with chromium.opened(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def no_flags(monkeypatch):
    """None of the old environment flags is set."""
    for name in FLAGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh_compiler():
    """Nothing that another test compiled is left: the compiler gives up on a function after a few variants of it."""
    torch._dynamo.reset()


@pytest.fixture
def composed(tmp_path):
    """Compose overrides as the command line would, with outputs in ``tmp_path``."""

    def compose_run(*overrides):
        return compose(*overrides, folder=tmp_path / "run")

    yield compose_run
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def game(tmp_path_factory):
    """A tiny model, its autoencoder and four recorded clips, as a user would bring them: overrides that name them."""
    folder = tmp_path_factory.mktemp("game")
    model, dcae = gamerft_config(TINY_MODEL), dcae_config(TINY_DCAE)
    torch.manual_seed(0)
    modules = {"dit": random_gamerft(model, 1), "decoder": random_decoder(dcae, 1), "encoder": DCAEEncoder(dcae)}
    for name, module in modules.items():
        save_file(
            {key: value.contiguous() for key, value in module.state_dict().items()}, folder / f"{name}.safetensors"
        )
    for name, config in (("config", model), ("dcae", dcae)):
        content = {"model": dataclasses.asdict(config), "train": {"vae_scale": 0.5}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    for number, tag in enumerate(("motion", "motion", "motion", "stand_still")):
        write_game_clip(folder / "clips", f"clip_{number}", tag)
    return {
        "model.config_file": folder / "config.yaml",
        "model.checkpoint": folder / "dit.safetensors",
        "model.window": 3,
        "decoder.config_file": folder / "dcae.yaml",
        "decoder.checkpoint": folder / "decoder.safetensors",
        "decoder.encoder": folder / "encoder.safetensors",
        "data.paths": f"[{folder / 'clips'}]",
        "data.future_frames": 4,
        "data.limit": 2,
        "measure.videos": "false",
        "measure.parts_frames": 0,
    }


@pytest.fixture(scope="module")
def recorded():
    """Run a config once for the tests of a module, in a folder of its own, and load its record."""

    def run_and_load(folder, *words):
        run(compose(*words, folder=folder / "run"))
        HydraConfig.instance().cfg = None
        return load_record(folder / "run" / "record.json")

    return run_and_load


@pytest.fixture
def record(composed, tmp_path):
    """Run a config in this process and load its record."""

    def run_and_load(*words):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run(composed(*words))
        return load_record(tmp_path / "run" / "record.json")

    return run_and_load


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Run the command's function with these words; returns its exit code and what it wrote to stderr."""

    def run_words(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        monkeypatch.chdir(tmp_path)
        GlobalHydra.instance().clear()
        code = 0
        try:
            cli()
        except SystemExit as stop:
            code = stop.code
        return code, capfd.readouterr().err

    return run_words


@pytest.fixture(scope="session")
def overrides():
    """Turn a mapping of overrides into the command line's words."""
    return lambda mapping, **changed: [f"{key}={value}" for key, value in {**mapping, **changed}.items()]
