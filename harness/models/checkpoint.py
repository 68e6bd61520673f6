"""Loading checkpoints in every form found in the wild, without ever running code from them.

Accepted: ``.safetensors``; and ``.pt`` files (``weights_only=True``) holding a bare state dict, ``{'ema': …}`` or
``{'model': …}``, with the prefixes that EMA, DDP and ``torch.compile`` wrappers leave behind.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.models.dcae import DCAEConfig, DCAEDecoder, DCAEEncoder
from harness.models.gamerft import GameRFTConfig, GameRFTCore

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DDP and ``torch.compile``; stripped in any order and number, with a stray leading dot."""

_BLOCK = re.compile(r"((?:\S*transformer\.blocks\.(?=\d))?)(\d*)(.*)", re.DOTALL)
"""A key (or what is wrong with one) around the number of its transformer block, which is empty outside of them."""

GAIN, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message names the file and what is wrong."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint into a flat state dict on the CPU, wrappers unwrapped.

    Raises:
        CheckpointError: if the file is missing, corrupt, holds anything but tensors, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a .safetensors or .pt file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _unwrap(content, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it is not a plain file of tensors, and loading it could run code "
            f"({refused_content(error)}). Save a state dict of tensors with torch.save, or convert it to .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: not a readable PyTorch checkpoint: {_first_line(error)}") from error


def refused_content(error: pickle.UnpicklingError) -> str:
    """What ``torch.load(weights_only=True)`` would not unpickle; torch's own text advises to load it all the same."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {found[1]}" if found else "it holds other objects than tensors"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, found {type(content).__name__}")
    for key in ("ema", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    # An EMA wrapper keeps its own counters and the online model beside the averaged one.
    averaged = {key: value for key, value in content.items() if str(key).startswith("ema_model.")}
    state = {_strip(str(key)): value for key, value in (averaged or content).items()}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{path}: not a state dict: {_listed(other)} hold no tensors; "
            "a checkpoint is a state dict, {'ema': state dict} or {'model': state dict}"
        )
    return state


def _strip(key: str) -> str:
    key = key.removeprefix("ema_model.")
    while True:
        bare = key.removeprefix(".")
        for prefix in WRAPPERS:
            bare = bare.removeprefix(prefix)
        if bare == key:
            return key
        key = bare


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold weight normalisation: ``w = g * v / ||v||`` with one norm per output channel, in float32.

    ``g`` and ``v`` are the parametrisation's ``original0`` and ``original1``; other entries pass unchanged.
    Raises ``CheckpointError`` if one of a pair is missing.
    """
    folded = {}
    for key, value in state.items():
        if key.endswith(GAIN) and key.removesuffix(GAIN) + DIRECTION not in state:
            raise CheckpointError(f"{key}: weight norm without its direction (original1)")
        if key.endswith(DIRECTION):
            name = key.removesuffix(DIRECTION)
            if name + GAIN not in state:
                raise CheckpointError(f"{key}: weight norm without its gain (original0)")
            gain, direction = state[name + GAIN].float(), value.float()
            folded[name + ".weight"] = gain * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        elif not key.endswith(GAIN):
            folded[key] = value
    return folded


def load_into(module: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Copy ``state`` into ``module`` (dtype converted), or raise one ``CheckpointError`` listing all that is wrong.

    Listed: missing, unexpected and misshapen keys, and tensors with NaN or infinite values.
    """
    target = module.state_dict()
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    shared = [key for key in target if key in state]
    misshapen = [
        f"{key} is {_shape(state[key])}, the model needs {_shape(target[key])}"
        for key in shared
        if state[key].shape != target[key].shape
    ]
    non_finite = [key for key in shared if not torch.isfinite(state[key].float()).all()]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not finite": non_finite}
    problems = [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise CheckpointError(
            f"{origin}: the checkpoint does not fit the model config:\n  "
            + "\n  ".join(problems)
            + "\n  Check that the config belongs to this checkpoint (width, depth, channels, uncond)."
        )
    module.load_state_dict(dict(state))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _listed(entries: list[str], limit: int = 200) -> str:
    """Entries that differ in the block's number alone are one, such as ``transformer.blocks.{0-11}.attn.out.bias``."""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        before, number, after = _BLOCK.match(entry).groups()  # type: ignore[union-attr]  # it matches everything
        blocks.setdefault((before, after), []).append(number or "")
    folded = [before + _span(numbers) + after for (before, after), numbers in blocks.items()]
    return ", ".join(folded[:limit]) + (f", and {len(folded) - limit} more" if len(folded) > limit else "")


def _span(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    found = [int(number) for number in numbers]
    whole = found == list(range(found[0], found[-1] + 1))
    return f"{{{found[0]}-{found[-1]}}}" if whole else "{" + ",".join(numbers) + "}"


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return part or state


def load_gamerft(path: str | Path, cfg: GameRFTConfig) -> GameRFTCore:
    """Build the velocity model and load a full (``core.``) or core-only checkpoint into it, float32, eval mode.

    Raises:
        CheckpointError: see :func:`read_state` and :func:`load_into`.
        ValueError: if ``cfg`` cannot be built.
    """
    state = read_state(path)
    if any(key.startswith("core.") for key in state):
        # Keys outside core. would be parts of a full model that this one lacks: report them, do not drop them.
        state = {key.removeprefix("core."): value for key, value in state.items()}
    core = GameRFTCore(cfg)
    load_into(core, state, path)
    return core.eval().requires_grad_(False)


def load_decoder(path: str | Path, cfg: DCAEConfig) -> DCAEDecoder:
    """Build the decoder and load a decoder-only or whole-VAE checkpoint, weight norm folded, float32, eval mode.

    Raises as :func:`load_gamerft`.
    """
    decoder = DCAEDecoder(cfg)
    load_into(decoder, fold_weight_norm(_part(read_state(path), "decoder.")), path)
    return decoder.eval().requires_grad_(False)


def load_encoder(path: str | Path, cfg: DCAEConfig) -> DCAEEncoder:
    """Build the encoder and load an encoder-only or whole-VAE checkpoint, weight norm folded, float32, eval mode.

    Raises as :func:`load_gamerft`.
    """
    encoder = DCAEEncoder(cfg)
    load_into(encoder, fold_weight_norm(_part(read_state(path), "encoder.")), path)
    return encoder.eval().requires_grad_(False)


def random_gamerft(cfg: GameRFTConfig, seed: int) -> GameRFTCore:
    """A velocity model with seeded random weights: its speed is real, its pictures are noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GameRFTCore(cfg).eval().requires_grad_(False)


def random_decoder(cfg: DCAEConfig, seed: int) -> DCAEDecoder:
    """A decoder with seeded random weights: its speed is real, its pictures are noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DCAEDecoder(cfg).eval().requires_grad_(False)
