"""What benchmarks run on: a config from words, modules with seeded random weights, random inputs of a frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from harness.config import ConfigError, RunPlan, plan_run, register
from harness.config.compose import compose
from harness.models.config_io import ConfigFileError, gamerft_config, model_section
from harness.models.gamerft import GameRFTConfig


def read_model(name: str) -> tuple[GameRFTConfig, int]:
    """Architecture and window (frames) of a model config by name, or of a YAML file with a ``model:`` section.

    Raises:
        ConfigError: for a name or a file that gives none.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            return gamerft_config(model_section(name), name), 60
        except ConfigFileError as error:
            raise ConfigError(str(error)) from error
    register()
    conf = OmegaConf.to_container(compose(f"model={name}").model, resolve=True)
    assert isinstance(conf, dict)
    fields = model_section(conf["config_file"]) if conf["config_file"] else {}
    return gamerft_config({**fields, **conf["arch"]}, name), int(conf["window"])


def compose_plan(overrides: list[str], out: Path) -> RunPlan:
    """The checked config that ``overrides`` of ``conf/run.yaml`` give."""
    return plan_run(compose(*overrides, folder=out))


def build(module: Callable[[], Any], plan: RunPlan) -> Any:
    """A BF16 module with seeded random weights, made on the device."""
    torch.manual_seed(plan.conf.seed)
    with torch.device(plan.device):
        built = module().eval().requires_grad_(False)
    for parameter in built.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return built


def random_inputs(plan: RunPlan, batch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(history, mouse, btn, noise) of a prefill and (noise, mouse, btn) of a frame, on the device."""
    arch, window, device = plan.arch, plan.conf.sampler.window, plan.device
    latent = (arch.channels, arch.sample_size, arch.sample_size)

    def controls(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(*shape, 2, device=device), (torch.rand(*shape, arch.n_buttons, device=device) > 0.5).float()

    past, now = controls(batch, window), controls(batch)
    history, noise = (torch.randn(batch, window, *latent, device=device) for _ in range(2))
    return (history, *past, noise), (torch.randn(batch, *latent, device=device), *now)
