"""Loading checkpoints in every form found in the wild, without ever running code from them.

Accepted: ``.safetensors``; and ``.pt`` files (``weights_only=True``) holding a bare state dict, ``{'ema': …}`` or
``{'model': …}``, with the prefixes that EMA, DDP and ``torch.compile`` wrappers leave behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harness.files.tensors import read_pickle, read_safetensors
from harness.files.text import FileError
from harness.models.dcae import DCAEConfig, DCAEDecoder, DCAEEncoder
from harness.models.gamerft import GameRFTConfig, GameRFTCore

Half = TypeVar("Half", DCAEDecoder, DCAEEncoder)

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DDP and ``torch.compile``; stripped in any order and number, with a stray leading dot."""

_BLOCK = re.compile(r"((?:\S*transformer\.blocks\.(?=\d))?)(\d*)(.*)", re.DOTALL)
"""A key (or what is wrong with one) around the number of its transformer block, which is empty outside of them."""

GAIN, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A flat state dict on the CPU, wrappers unwrapped, and where it came from.

    ``taken``: the key of the set of weights that was taken from a file that holds several, or what names it; empty
    where there is but one. ``others``: the sets that were left.
    """

    path: Path
    state: dict[str, Tensor]
    taken: str = ""
    others: tuple[str, ...] = ()

    @property
    def choice(self) -> str | None:
        """What was taken and what was left, in a sentence; ``None`` where there was nothing to choose."""
        return f"weights of {self.taken!r}, not of {', '.join(map(repr, self.others))}" if self.others else None


def read_checkpoint(path: str | Path, weights: str | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: ``.safetensors``, or anything that ``torch.save`` wrote.
        weights: key of the set of weights to take where a file holds several. ``None`` takes the averaged (EMA) set
            where there is exactly one, else the only set, else ``model``.

    Raises:
        CheckpointError: if the file is missing, corrupt, holds anything but tensors, would run code, or holds several
            sets of weights of which none is the one to take.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return _chosen(read_safetensors(path), path, weights)
        return _chosen(read_pickle(path), path, weights)
    except FileError as error:
        raise CheckpointError(str(error)) from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of :func:`read_checkpoint`."""
    return read_checkpoint(path).state


def _chosen(content: Any, path: Path, weights: str | None) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, found {type(content).__name__}")
    sets = {str(key): value for key, value in content.items() if _is_state(value)}
    if sets:
        taken = _pick(sets, path, weights)
        content = sets.pop(taken)
    elif weights is not None:
        raise CheckpointError(f"{path}: model.weights={weights}: the file holds one state dict; leave it out")
    else:
        taken = ""
    # An EMA wrapper keeps its own counters and the online model beside the averaged one.
    averaged = {key: value for key, value in content.items() if str(key).startswith("ema_model.")}
    if averaged and any(str(key).startswith("online_model.") for key in content):
        sets["online_model"], taken = {}, taken or "ema_model"
    state = {_strip(str(key)): value for key, value in (averaged or content).items()}
    if len(state) < len(averaged or content):
        raise CheckpointError(f"{path}: two of its keys are one once wrappers' prefixes are taken off")
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{path}: not a state dict: {_listed(other)} hold no tensors; "
            "a checkpoint is a state dict, {'ema': state dict} or {'model': state dict}"
        )
    return Checkpoint(path, state, taken, tuple(sets))


def _is_state(value: Any) -> bool:
    """Whether ``value`` is a set of weights: a mapping that holds tensors (an optimiser's holds mappings and lists)."""
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _pick(sets: Mapping[str, Any], path: Path, weights: str | None) -> str:
    if weights is not None:
        if weights not in sets:
            raise CheckpointError(f"{path}: model.weights={weights}: it holds {', '.join(map(repr, sets))}")
        return weights
    averaged = [key for key in sets if "ema" in key.lower().split("_")]
    likely = averaged or list(sets)
    named = [key for key in likely if key in ("ema", "model", "state_dict")]
    if len(likely) == 1 or len(named) == 1:
        return likely[0] if len(likely) == 1 else named[0]
    raise CheckpointError(
        f"{path}: holds several sets of weights, {', '.join(map(repr, sets))}; say which with model.weights={likely[0]}"
    )


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
            folded[name + ".weight"] = _folded(name, state[name + GAIN], value)
        elif not key.endswith(GAIN):
            folded[key] = value
    return folded


def _folded(name: str, gain: Tensor, direction: Tensor) -> Tensor:
    if direction.ndim != 4 or gain.shape != (direction.shape[0], 1, 1, 1):
        raise CheckpointError(f"{name}: weight norm of {_shape(direction)} with a gain of {_shape(gain)}")
    if gain.dtype not in DTYPES or direction.dtype not in DTYPES:
        raise CheckpointError(f"{name}: weight norm of {direction.dtype} and {gain.dtype}, which are no weights")
    gain, direction = gain.float(), direction.float()
    return gain * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def load_into(module: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Copy ``state`` into ``module`` (dtype converted), or raise one ``CheckpointError`` listing all that is wrong.

    Listed: missing, unexpected and misshapen keys, elements that are no floating-point numbers, and tensors with NaN or
    infinite values.
    """
    check_fits(module.state_dict(), state, origin, type(module).__name__)
    module.load_state_dict(dict(state))


def check_fits(target: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str | Path, what: str) -> None:
    """Raise ``CheckpointError`` unless ``state`` can be loaded into ``target``, of which shapes alone are looked at."""
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    shared = [key for key in target if key in state]
    misshapen = [
        f"{key} is {_shape(state[key])}, the model needs {_shape(target[key])}"
        for key in shared
        if state[key].shape != target[key].shape
    ]
    strange = [f"{key} is {state[key].dtype}" for key in shared if state[key].dtype not in DTYPES]
    # Values are read only of what has the size that the config says.
    readable = [key for key in shared if state[key].shape == target[key].shape and state[key].dtype in DTYPES]
    non_finite = [key for key in readable if not torch.isfinite(state[key]).all()]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not of real numbers": strange,
        "not finite": non_finite,
    }
    if not any(kinds.values()):
        return
    looks = _looks_like(state) if len(shared) < len(target) // 2 else None
    problems = [f"{len(keys)} {kind}: {_listed(keys, 6 if looks else 60)}" for kind, keys in kinds.items() if keys]
    raise CheckpointError(
        f"{origin}: the checkpoint does not fit the {what} of this config"
        + (f". It looks like {looks}" if looks else "")
        + f": {'; '.join(problems)}. Check that the config belongs to this checkpoint (width, depth, channels, uncond)"
    )


def _looks_like(state: Mapping[str, Tensor]) -> str | None:
    """What a state dict is, by its keys."""
    for mark, what in _MARKS.items():
        if any(re.match(mark, key) for key in state):
            return what
    return None


_MARKS = {
    r"(core\.)?transformer\.blocks\.": "a GameRFT model, which goes to model.checkpoint",
    r"(encoder|decoder)\.": "a whole autoencoder, which goes to decoder.checkpoint",
    r"blocks\.\d+\.up\.": "a decoder, which goes to decoder.checkpoint",
    r"blocks\.\d+\.down\.": "an encoder, which goes to decoder.encoder",
}
"""By how some key begins."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Elements of weights that are loaded as numbers."""


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _listed(entries: list[str], limit: int = 60) -> str:
    """Entries that differ in the block's number alone are one, such as ``transformer.blocks.{0-11}.attn.out.bias``."""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for entry in (entry if entry.isprintable() else f"{entry!r:.80}" for entry in (one[:500] for one in entries)):
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


def load_gamerft(path: str | Path, cfg: GameRFTConfig, weights: str | None = None) -> GameRFTCore:
    """Build the velocity model and load a full (``core.``) or core-only checkpoint into it, float32, eval mode.

    Raises:
        CheckpointError: see :func:`read_checkpoint` and :func:`load_into`.
        ValueError: if ``cfg`` cannot be built.
    """
    return gamerft_of(read_checkpoint(path, weights), cfg)


def gamerft_of(checkpoint: Checkpoint, cfg: GameRFTConfig) -> GameRFTCore:
    """:func:`load_gamerft` of a checkpoint that has been read; built only if the checkpoint fits."""
    state = checkpoint.state
    if any(key.startswith("core.") for key in state):
        # Keys outside core. would be parts of a full model that this one lacks: report them, do not drop them.
        state = {key.removeprefix("core."): value for key, value in state.items()}
    with torch.device("meta"):
        target = GameRFTCore(cfg).state_dict()
    check_fits(target, state, checkpoint.path, "GameRFT model")
    core = GameRFTCore(cfg)
    core.load_state_dict(state)
    core.weights_choice = checkpoint.choice
    return core.eval().requires_grad_(False)


def load_decoder(path: str | Path, cfg: DCAEConfig) -> DCAEDecoder:
    """Build the decoder and load a decoder-only or whole-VAE checkpoint, weight norm folded, float32, eval mode.

    Raises as :func:`load_gamerft`.
    """
    return _load_half(path, DCAEDecoder, cfg, "decoder.")


def load_encoder(path: str | Path, cfg: DCAEConfig) -> DCAEEncoder:
    """Build the encoder and load an encoder-only or whole-VAE checkpoint, weight norm folded, float32, eval mode.

    Raises as :func:`load_gamerft`.
    """
    return _load_half(path, DCAEEncoder, cfg, "encoder.")


def _load_half(path: str | Path, kind: Callable[[DCAEConfig], Half], cfg: DCAEConfig, prefix: str) -> Half:
    half = kind(cfg)
    try:
        state = fold_weight_norm(_part(read_state(path), prefix))
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    load_into(half, state, path)
    return half.eval().requires_grad_(False)


def random_gamerft(cfg: GameRFTConfig, seed: int, device: torch.device | str = "cpu") -> GameRFTCore:
    """A velocity model with random weights: its speed is real, its pictures are noise.

    Drawn on ``device``, where that takes no time: a seed means other weights on a GPU than on a CPU.
    """
    with _seeded(seed, torch.device(device)):
        return GameRFTCore(cfg).eval().requires_grad_(False)


def random_decoder(cfg: DCAEConfig, seed: int, device: torch.device | str = "cpu") -> DCAEDecoder:
    """A decoder with random weights, likewise."""
    with _seeded(seed, torch.device(device)):
        return DCAEDecoder(cfg).eval().requires_grad_(False)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Modules made meanwhile are on ``device``, with weights of ``seed``; the caller's generators stay as they are."""
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), device:
        torch.manual_seed(seed)
        yield
