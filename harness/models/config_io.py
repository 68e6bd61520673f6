"""Reading upstream model YAML files: a ``model:`` section (or the plain fields) and an optional ``train:`` section."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.files import text as files
from harness.models.dcae import DCAEConfig
from harness.models.gamerft import GameRFTConfig

Config = TypeVar("Config", GameRFTConfig, DCAEConfig)


class ConfigFileError(ValueError):
    """A model YAML file that cannot be read or does not describe the model asked for."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Parse a YAML mapping, within the bounds of :func:`harness.files.text.read_yaml`.

    Raises:
        ConfigFileError: if the file is missing, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        content = files.read_yaml(path, "a YAML file with a `model:` section")
    except files.FileError as error:
        raise ConfigFileError(str(error)) from error
    if not isinstance(content, dict):
        raise ConfigFileError(f"{path}: expected a mapping with a `model:` section, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def model_section(path: str | Path) -> dict[str, Any]:
    """The ``model:`` section of a YAML file, or the whole mapping where the fields stand plainly."""
    content = read_yaml(path)
    section = content.get("model", content)
    if not isinstance(section, dict):
        raise ConfigFileError(f"{path}: `model:` must be a mapping of fields, found {type(section).__name__}")
    return section


def _build(cls: type[Config], fields: dict[str, Any], origin: str) -> Config:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        # Upstream files carry training-time fields too, so an unknown one is no error; but it is said, since a
        # field that changed the model would otherwise be dropped in silence.
        warnings.warn(f"{origin}: fields not used by {cls.__name__}: {', '.join(unknown)}", stacklevel=3)
    _check_types(cls, fields, origin)
    schema = OmegaConf.structured(cls)
    try:
        # OmegaConf converts and type-checks every value (and turns YAML lists into lists).
        merged = OmegaConf.merge(schema, {key: value for key, value in fields.items() if key in known})
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigFileError(f"{origin}: {str(error).splitlines()[0]} (field {error.full_key!r})") from error
    assert isinstance(config, cls)
    try:
        config.validate()
    except ValueError as error:
        raise ConfigFileError(f"{origin}: {error}") from error
    return config


def _check_types(cls: type, fields: dict[str, Any], origin: str) -> None:
    """Refuse what OmegaConf would convert: YAML reads ``on`` as true, and true would become 1."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    problems = []
    for name, kind in kinds.items():
        value = fields.get(name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) and "bool" not in kind:
                problems.append(
                    f"{name} is {str(one).lower()} (YAML reads on, off, yes and no so); give a number or text"
                )
            elif isinstance(one, str) and "str" not in kind:
                problems.append(f"{name} is the text {one!r:.60}; give a number")
            elif isinstance(one, float) and not math.isfinite(one):
                problems.append(f"{name} is {one}; give a finite number")
            elif type(one) is int and not -(2**63) <= one < 2**63:
                problems.append(f"{name} is a number beyond 64 bits")
            elif isinstance(one, int | float) and not isinstance(one, bool) and "bool" in kind:
                problems.append(f"{name} is {one}; give true or false")
    if problems:
        raise ConfigFileError(f"{origin}: " + "; ".join(problems))


def gamerft_config(fields: dict[str, Any], origin: str = "model config") -> GameRFTConfig:
    """Build a :class:`GameRFTConfig` from plain fields.

    ``tokens_per_frame`` defaults to ``sample_size**2``; a two-element ``sample_size`` must be square.

    Raises:
        ConfigFileError: naming ``origin`` and every field that is missing, mistyped or unsupported.
    """
    fields = dict(fields)
    side = fields.get("sample_size")
    if isinstance(side, list | tuple):
        if len(side) != 2 or side[0] != side[1]:
            raise ConfigFileError(f"{origin}: sample_size={list(side)}: latents must be square")
        fields["sample_size"] = side = side[0]
    if isinstance(side, int):
        fields.setdefault("tokens_per_frame", side**2)
    required = ("n_layers", "n_heads", "d_model", "channels", "sample_size")
    missing = [name for name in required if name not in fields]
    if missing:
        raise ConfigFileError(f"{origin}: not a GameRFT config: missing {', '.join(missing)}")
    return _build(GameRFTConfig, fields, origin)


def dcae_config(fields: dict[str, Any], origin: str = "decoder config") -> DCAEConfig:
    """Build a :class:`DCAEConfig` from plain fields; an integer ``sample_size`` means square frames.

    Raises:
        ConfigFileError: naming ``origin`` and every field that is missing, mistyped or unsupported.
    """
    fields = dict(fields)
    if isinstance(fields.get("sample_size"), int):
        fields["sample_size"] = [fields["sample_size"]] * 2
    required = ("sample_size", "latent_channels", "ch_0", "ch_max", "decoder_blocks_per_stage")
    missing = [name for name in required if name not in fields]
    if missing:
        raise ConfigFileError(f"{origin}: not a DCAE config: missing {', '.join(missing)}")
    return _build(DCAEConfig, fields, origin)


def read_gamerft_config(path: str | Path) -> GameRFTConfig:
    """Read a GameRFT config from an upstream YAML file. Raises :class:`ConfigFileError`."""
    return gamerft_config(model_section(path), str(path))


def read_dcae_config(path: str | Path) -> DCAEConfig:
    """Read a DCAE config from an upstream YAML file. Raises :class:`ConfigFileError`."""
    return dcae_config(model_section(path), str(path))


def read_vae_scale(path: str | Path) -> float | None:
    """``train.vae_scale`` of an upstream YAML file, or None where the file does not give one.

    Raises:
        ConfigFileError: if the value is not a positive number.
    """
    train = read_yaml(path).get("train") or {}
    scale = train.get("vae_scale") if isinstance(train, dict) else None
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ConfigFileError(f"{path}: train.vae_scale={scale!r:.60}: give a positive number")
    return float(scale)
