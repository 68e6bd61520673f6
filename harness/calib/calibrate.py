"""Choosing the MX weights of a model, one Linear after the other, each on what the ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.calib.gptq import damped, gptq, inverse
from harness.calib.sequences import Clips, Recorded, Stream, record_rollout
from harness.calib.statistics import Moments, every
from harness.formats.mx import MXBlocks, decode, encode
from harness.kv import KVConf
from harness.models import bf16
from harness.models.gamerft import GameRFTCore
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.rollout import SamplerConf

GROUP_VALUES = 1 << 27
"""Hidden values of an MLP that are worked on at a time: clips are walked over in groups of no more than that."""


def calibrate(
    core: GameRFTCore,
    formats: Mapping[str, LinearFormat],
    clips: Clips,
    sampler: SamplerConf,
    kv: KVConf,
    damping: float = 0.1,
    sweeps: int = 2,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, MXWeight]:
    """MX weights of a BF16 ``core``, which is left as it is.

    Args:
        core: on the device to work on.
        formats: which Linears to choose weights for, by their name in ``core``.
        clips: what to learn from.
        sampler: of the candidate's rollouts.
        kv: of the candidate's cache.
        damping: see :func:`harness.calib.gptq.damped`.
        sweeps: see :func:`harness.calib.gptq.gptq`.
        on_layer: called after each layer.

    Raises:
        ValueError: if the clips say too little to invert their statistics.
    """
    with torch.no_grad():
        recorded = [record_rollout(core, sampler, group) for group in clips.split(_group_size(core, sampler, clips))]
        walk = _Walk(core, formats, recorded, sampler, kv, damping, sweeps)
        for layer in range(core.cfg.n_layers):
            walk.through(layer)
            on_layer()
    return walk.weights


def _group_size(core: GameRFTCore, sampler: SamplerConf, clips: Clips) -> int:
    frames = sampler.window + len(sampler.timesteps) * clips.frames
    return max(1, GROUP_VALUES // (frames * core.cfg.tokens_per_frame * 4 * core.cfg.d_model))


class _Walk:
    """Two streams side by side, BF16's and the candidate's, and the candidate's weights as they are chosen."""

    def __init__(
        self,
        core: GameRFTCore,
        formats: Mapping[str, LinearFormat],
        recorded: list[Recorded],
        sampler: SamplerConf,
        kv: KVConf,
        damping: float,
        sweeps: int,
    ) -> None:
        self.core, self.formats, self.damping, self.sweeps = core, formats, damping, sweeps
        self.bf16 = [Stream(core, sampler, KVConf(), group) for group in recorded]
        self.candidate = [Stream(core, sampler, kv, group) for group in recorded]
        self.weights: dict[str, MXWeight] = {}

    def through(self, layer: int) -> None:
        """Choose the weights of ``layer`` and take both streams past it."""
        path = f"{self.core.blocks_path}.{layer}."
        linears = {spec.name: self.core.get_submodule(path + spec.name) for spec in self.core.block_linears}
        self._choose_modulation([path + spec.name for spec in self.core.block_linears if spec.per_frame])
        for stream in self.bf16:
            stream.enter(layer, lambda name, x: _multiply(linears[name], x))
        for stream in self.candidate:
            stream.enter(layer, lambda name, x: self._multiply(path + name, linears[name], x))
        for spec in self.core.block_linears:
            if spec.per_frame:
                continue
            if path + spec.name in self.formats:
                self._choose([path + spec.name], spec.name)
            for stream in (*self.bf16, *self.candidate):
                stream.leave(spec.name)

    def _choose_modulation(self, paths: list[str]) -> None:
        """Choose what reads the conditions: at once what has one format, since it has one input."""
        groups: dict[LinearFormat, list[str]] = {}
        for path in paths:
            if path in self.formats:
                groups.setdefault(self.formats[path], []).append(path)
        for group in groups.values():
            self._choose(group, None)

    def _choose(self, paths: list[str], within: str | None) -> None:
        """Choose the weights of Linears of one format that read the block's input ``within``; None: the conditions."""
        linears, fmt = [self.core.get_submodule(path) for path in paths], self.formats[paths[0]]
        weight, bias = _joined(linears)
        streams = [stream.conditions if within is None else stream.tokens for stream in self.candidate]
        count = sum(part.shape[:-1].numel() for parts in streams for part in parts)
        moments = Moments(weight, bias, every(count, weight.shape[1]))
        for ours, theirs in zip(self.candidate, self.bf16, strict=True):
            rows = zip(
                ours.conditions if within is None else ours.inputs(within),
                theirs.conditions if within is None else theirs.inputs(within),
                ours.lags(within, theirs),
                strict=True,
            )
            for y, x, lag in rows:
                moments.add(_encoded(y, fmt), x, lag)
        self.weights |= zip(paths, choose(moments, fmt, linears, self.damping, self.sweeps), strict=True)

    def _multiply(self, path: str, linear: nn.Module, x: Tensor) -> Tensor:
        weight = self.weights.get(path)
        if weight is None:
            return _multiply(linear, x)
        return bf16.linear(_encoded(x, weight.fmt), decode(weight.blocks, weight.fmt.element), weight.bias)


def choose(
    moments: Moments, fmt: LinearFormat, linears: Sequence[nn.Module], damping: float, sweeps: int
) -> list[MXWeight]:
    """MX blocks and biases of ``linears``, whose weights and biases, one after the other, ``moments`` is of."""
    inputs = moments.weight.shape[1]
    hessian = damped(moments.covariance(), damping + inputs / moments.rows)  # few rows say little of so many inputs
    inverted = inverse(hessian)
    whole = gptq(moments.target(inverted), hessian, inverted, fmt.element, sweeps).blocks
    biases = moments.fitted_bias(decode(whole, fmt.element, torch.float32))
    sizes = [linear.out_features for linear in linears if isinstance(linear, nn.Linear)]
    parts = zip(*(part.split(sizes) for part in whole), strict=True)
    split = [None] * len(sizes) if biases is None else biases.split(sizes)
    return [
        MXWeight(MXBlocks(*(part.clone() for part in blocks)), None if bias is None else bias.clone(), fmt)
        for blocks, bias in zip(parts, split, strict=True)
    ]


def _joined(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of Linears, one after the other; where any has no bias, none must have one."""
    weights = [linear.weight.detach() for linear in linears if isinstance(linear, nn.Linear)]
    biases = [linear.bias.detach() for linear in linears if isinstance(linear, nn.Linear) and linear.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _multiply(linear: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return bf16.linear(x, linear.weight, linear.bias)


def _encoded(x: Tensor, fmt: LinearFormat) -> Tensor:
    """``x`` as the candidate's Linear reads it."""
    element = fmt.activation_element
    return x if element is None else decode(encode(x, element, fmt.scale_mode), element)
