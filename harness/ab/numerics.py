"""Error of every MX Linear on the inputs it really gets: a short eager pass of the BF16 arm is watched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.ab.arm import Arm
from harness.data.datamodule import ClipBatch
from harness.mx.linears.base import MXModule
from harness.mx.numerics import linear_error
from harness.rollout.linears import is_packed

FRAMES = 2
"""Generated frames whose inputs are sampled, at most; every denoising step of them."""


class _Sample:
    """Rows of one Linear's input, spread evenly over each call."""

    def __init__(self, per_call: int) -> None:
        self.per_call = per_call
        self.rows: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2)
        count = min(self.per_call, rows.shape[0])
        self.rows.append(rows[torch.linspace(0, rows.shape[0] - 1, count, device=rows.device).long()])


@contextmanager
def _sampled(modules: dict[str, nn.Module], per_call: int) -> Iterator[dict[str, _Sample]]:
    samples = {name: _Sample(per_call) for name in modules}
    hooks = [module.register_forward_pre_hook(samples[name]) for name, module in modules.items()]
    try:
        yield samples
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def sample_inputs(
    arm: Arm, names: Sequence[str], batch: ClipBatch, noise: tuple[Tensor, Tensor], rows: int
) -> dict[str, Tensor]:
    """What the Linears ``names`` of a BF16 arm get in the first frames of a rollout, ``[at most rows, K]`` each.

    Compiled rollouts evaluate the modulation of all layers at once, so it is evaluated once more layer by layer.
    """
    context_noise, frame_noise = (part.to(arm.device) for part in noise)
    rollout, window = arm.eager(), context_noise.shape[1]
    rollout.prefill(batch.latents_context, batch.mouse[:, :window], batch.btn[:, :window], context_noise)
    steps = rollout.sampler.timesteps
    frames = min(FRAMES, frame_noise.shape[1])
    per_call = max(1, rows // (frames * len(steps)))
    with _sampled({name: arm.core.get_submodule(name) for name in names}, per_call) as samples:
        for index in range(frames):
            mouse, btn = batch.mouse[:, window + index], batch.btn[:, window + index]
            rollout.next_frame(frame_noise[:, index], mouse, btn)
            times = torch.tensor(list(steps), device=arm.device).expand(len(mouse), -1)
            held = (x[:, None].expand(-1, len(steps), -1) for x in (mouse.to(arm.device), btn.to(arm.device)))
            arm.core.modulation(arm.core.conditioning(times, *held))
    return {name: torch.cat(sample.rows)[:rows] for name, sample in samples.items()}


@torch.inference_mode()
def layer_numerics(
    bf16: Arm, candidate: Arm, batch: ClipBatch, noise: tuple[Tensor, Tensor], rows: int
) -> dict[str, Any] | None:
    """Error of every MX Linear of ``candidate`` on inputs of the same Linear in ``bf16``, for the run record.

    ``layers``: by name ``category``, ``rows`` sampled, ``in_features``, ``out_features`` and the figures of
    :func:`harness.mx.numerics.linear_error` (reference in float64 from the BF16 weights; a figure that is not finite
    is ``None``). ``categories``: by category the number of ``layers``, mean and largest ``rel``. ``worst``: name of
    the Linear with the largest ``rel``. ``clip``: whose first frames were rolled out. ``None`` without MX Linears.
    """
    names = candidate.assembled.summary.names
    if not names:
        return None
    inputs = sample_inputs(bf16, names, batch, noise, rows)
    layers: dict[str, dict[str, Any]] = {}
    for name in names:
        linear, mx = bf16.core.get_submodule(name), candidate.core.get_submodule(name)
        if is_packed(linear):
            linear = linear.plain()
        assert isinstance(linear, nn.Linear)
        assert isinstance(mx, MXModule)
        x = inputs[name]
        layers[name] = {
            "category": candidate.assembled.summary.places[name][0],
            "rows": len(x),
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            **_finite(linear_error(linear, mx, x)),
        }
    return {
        "method": f"up to {rows} rows of each Linear's BF16 input, against float64",
        "clip": batch.clip_ids[0],
        "layers": layers,
        "categories": _by_category(layers),
        "worst": max(layers, key=lambda name: _size(layers[name]["rel"])),
    }


def _size(rel: float | None) -> float:
    """A relative error to sort by: one that is not finite is the worst."""
    return math.inf if rel is None else rel


def _by_category(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for layer in layers.values():
        found.setdefault(layer["category"], []).append(_size(layer["rel"]))
    return {
        kind: _finite({"layers": len(errors), "rel_mean": sum(errors) / len(errors), "rel_max": max(errors)})
        for kind, errors in found.items()
    }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """The same with ``None`` for what JSON cannot hold."""
    return {
        name: _finite(value)
        if isinstance(value, dict)
        else (None if isinstance(value, float) and not math.isfinite(value) else value)
        for name, value in figures.items()
    }
