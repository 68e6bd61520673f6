"""Compare this package's float32 numbers with reference outputs.

    python scripts/check_parity.py FOLDER [FOLDER ...]

A folder holds ``config.yaml`` (a ``model:`` section and, for rollouts, a ``rollout:`` section with window_frames,
context_noise and timesteps), ``weights.safetensors`` (or .pt, any form that the package loads) and ``io.safetensors``
(or .pt) with inputs and reference outputs:

- GameRFT, full pass: full.x, full.t, full.mouse, full.btn -> full.out
- GameRFT, rollout: roll.history, roll.history_noise, roll.mouse, roll.btn, roll.noise, roll.new_mouse, roll.new_btn
  -> any of roll.prefill_out, roll.v_step1 ... roll.v_stepK, roll.frames, roll.k_cache_layer0, roll.v_cache_last
- DCAE decoder: z -> out

Unconditional models need no mouse and btn. Prints the largest absolute error of each figure beside its bound. Exits 0
if all are within bounds, 1 if any is not (NaN included), 2 if a folder cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.bench import arguments
from harness.kv import KVCache, KVConf
from harness.models.checkpoint import load_decoder, load_gamerft, read_state
from harness.models.config_io import read_dcae_config, read_gamerft_config, read_yaml
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.rollout import AttentionKind, CompileConf, Rollout, SamplerConf, make_cache
from harness.streams import complain, patient

BOUND, DECODER_BOUND = 1e-5, 5e-5
SUFFIXES = (".safetensors", ".pt", ".pth")


class BadInput(ValueError):
    """A folder that cannot be compared; the message says what is wrong with it."""


@dataclass(frozen=True)
class Figure:
    """One comparison: its name, the largest absolute error, the bound, and what to know about it."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound

    def line(self) -> str:
        """The comparison as a line of the report."""
        verdict = "ok" if self.passed else "ABOVE"
        return f"  {self.name:<22} {self.error:10.2e}   bound {self.bound:.0e}   {verdict}{self.note}"


def compare(name: str, ours: Tensor, reference: Tensor, bound: float, note: str = "") -> Figure:
    """Our tensor beside the reference; raises ``BadInput`` where shapes differ."""
    if ours.shape != reference.shape:
        raise BadInput(f"{name}: reference has shape {tuple(reference.shape)}, this config gives {tuple(ours.shape)}")
    return Figure(name, (ours.double() - reference.double()).abs().max().item(), bound, note)


class Case:
    """The tensors of one folder, asked for by name and shape."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BadInput("no such folder")
        self.config = _one_of(folder, "config", (".yaml", ".yml"))
        self.weights = _one_of(folder, "weights", SUFFIXES)
        self.tensors = {key: value.float() for key, value in read_state(_one_of(folder, "io", SUFFIXES)).items()}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.tensors

    def get(self, name: str, *shape: int | None) -> Tensor:
        """A tensor whose sizes are ``shape`` (None = any)."""
        if name not in self.tensors:
            raise BadInput(f"io has no tensor {name}; it has {', '.join(sorted(self.tensors))}")
        found = self.tensors[name]
        if found.numel() == 0:
            raise BadInput(f"{name} is empty: shape {tuple(found.shape)}")
        fits = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise BadInput(f"{name} has shape {tuple(found.shape)}, expected ({expected})")
        return found


def _one_of(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path:
    for suffix in suffixes:
        if (path := folder / (stem + suffix)).is_file():
            return path
    raise BadInput(f"no {stem}{suffixes[0]} (or {', '.join(suffixes[1:])}) in it")


def check_folder(folder: Path) -> Iterator[Figure]:
    """Every figure that the folder has references for.

    Raises:
        ValueError: if the folder, its config, its weights or its tensors cannot be used (BadInput and the loaders').
    """
    case = Case(folder)
    full, roll = case.has("full.x"), case.has("roll.history")
    if full or roll:
        cfg = read_gamerft_config(case.config)
        core = load_gamerft(case.weights, cfg)
        if full:
            yield full_pass(case, core, cfg)
        if roll:
            yield from rollout(case, core)
    elif case.has("z"):
        config = read_dcae_config(case.config)
        z = case.get("z", None, config.latent_channels, None, None)
        decoder = load_decoder(case.weights, config)
        yield compare("decoder", decoder(z), case.get("out", None, None, None, None), DECODER_BOUND)
    else:
        raise BadInput(f"io has neither full.x, roll.history nor z, but {', '.join(sorted(case.tensors)) or 'nothing'}")


def controls(case: Case, cfg: GameRFTConfig, mouse: str, btn: str, *batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Mouse and buttons of the case, ``[*batch, axes]`` and ``[*batch, buttons]``; None for an unconditional model."""
    if cfg.uncond:
        return None, None
    return case.get(mouse, *batch, cfg.n_mouse_axes), case.get(btn, *batch, cfg.n_buttons)


def full_pass(case: Case, core: GameRFTCore, cfg: GameRFTConfig) -> Figure:
    """All frames at once, block-causal."""
    x = case.get("full.x", None, None, cfg.channels, cfg.sample_size, cfg.sample_size)
    batch = x.shape[:2]
    mouse, btn = controls(case, cfg, "full.mouse", "full.btn", *batch)
    out = core(x, case.get("full.t", *batch), mouse, btn)
    return compare("full pass", out, case.get("full.out", *x.shape), BOUND)


def sampler_of(case: Case) -> SamplerConf:
    """The sampler of the config's ``rollout:`` section."""
    section = read_yaml(case.config).get("rollout") or {}
    window = case.get("roll.history", None, None, None, None, None).shape[1]
    if not isinstance(section, dict):
        raise BadInput("rollout: must be a mapping with window_frames, context_noise and timesteps")
    defaults = SamplerConf(window=window)
    try:
        sampler = SamplerConf(
            window=int(section.get("window_frames", window)),
            timesteps=[float(t) for t in section.get("timesteps", defaults.timesteps)],
            context_noise=float(section.get("context_noise", defaults.context_noise)),
        )
    except (TypeError, ValueError) as error:
        raise BadInput(f"rollout: section with a value that is no number: {section}") from error
    if sampler.window != window:
        raise BadInput(f"rollout.window_frames is {sampler.window}, roll.history has {window} frames")
    return sampler


def play(
    case: Case,
    core: GameRFTCore,
    attention: AttentionKind = AttentionKind.sdpa,
    compile: CompileConf | None = None,
    frames: int | None = None,
) -> tuple[dict[str, Tensor], KVCache]:
    """What ``core`` makes of the case's history and inputs, through the cache that runs use, and that cache.

    Args:
        core: on any device, in any dtype.
        attention, compile: as a run has them.
        frames: only so many new frames (None: all).

    Returns:
        Outputs on the CPU under the references' names: ``roll.prefill_out``, ``roll.frames`` and ``roll.v_step1`` ...
        ``[B, frames, C, S, S]``; and the cache after the last frame.
    """
    cfg, sampler = core.cfg, sampler_of(case)
    latent = (cfg.channels, cfg.sample_size, cfg.sample_size)
    history = case.get("roll.history", None, sampler.window, *latent)
    batch = history.shape[0]
    noise = case.get("roll.noise", batch, None, *latent)
    mouse, btn = controls(case, cfg, "roll.mouse", "roll.btn", batch, sampler.window)
    new_mouse, new_btn = controls(case, cfg, "roll.new_mouse", "roll.new_btn", batch, noise.shape[1])

    cache = make_cache(core, sampler, KVConf(), batch)
    roll = Rollout(core, cache, sampler, attention, compile)
    roll.warmup(frames=1)
    prefill = roll.prefill(history, mouse, btn, case.get("roll.history_noise", *history.shape))
    steps = range(1, len(sampler.timesteps) + 1)
    new: dict[str, list[Tensor]] = {"roll.frames": [], **{f"roll.v_step{i}": [] for i in steps}}
    for i in range(noise.shape[1])[:frames]:
        now = (None, None) if new_mouse is None or new_btn is None else (new_mouse[:, i], new_btn[:, i])
        frame = roll.next_frame_with_velocities(noise[:, i], *now)
        for name, tensor in zip(new, (frame.latent, *frame.velocities), strict=True):
            new[name].append(tensor.cpu())
    return {"roll.prefill_out": prefill.cpu()} | {name: torch.stack(xs, dim=1) for name, xs in new.items()}, cache


def rollout(case: Case, core: GameRFTCore) -> Iterator[Figure]:
    """Prefill and every new frame."""
    outputs, cache = play(case, core)
    known = {*outputs, "roll.k_cache_layer0", "roll.v_cache_last"}
    unknown = sorted(name for name in case.tensors if name.startswith("roll.v_step") and name not in known)
    if unknown:
        raise BadInput(f"{', '.join(unknown)}: the config has {len(sampler_of(case).timesteps)} timesteps")
    if not known & set(case.tensors):
        raise BadInput(f"no reference output of the rollout; expected some of {', '.join(sorted(known))}")
    for name, ours in outputs.items():
        if case.has(name):
            yield compare(name.removeprefix("roll."), ours, case.get(name, *[None] * 5), BOUND)
    yield from cache_contents(case, cache)


def cache_contents(case: Case, cache: KVCache) -> Iterator[Figure]:
    """The window after the last frame. A ring keeps only what its layer can see, perhaps less than the reference."""
    for name, layer, which in (("roll.k_cache_layer0", 0, 0), ("roll.v_cache_last", cache.layers - 1, 1)):
        if not case.has(name):
            continue
        ours, reference = cache.ordered(layer)[which], case.get(name, *[None] * 4)
        kept, given = ours.shape[2], reference.shape[2]
        note = ""
        if given > kept:
            reference = reference[:, :, -kept:]
            note = f"  (layer {layer} keeps its newest {kept // cache.tokens} of {given // cache.tokens} frames)"
        yield compare(name.removeprefix("roll."), ours, reference, BOUND, note)


@patient
@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Compare every folder; exit codes as told above."""
    status = 0
    for folder in arguments.parity().parse_args(argv).folders:
        print(folder)
        try:
            for figure in check_folder(folder):
                print(figure.line(), flush=True)
                status = max(status, 0 if figure.passed else 1)
        except ValueError as error:  # BadInput, and what the loaders raise for a config or checkpoint
            complain(f"{folder}: {error}")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
