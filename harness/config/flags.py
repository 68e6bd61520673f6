"""The environment flags of the program this harness replaces, as OmegaConf resolvers: ``quant=env kv=env compile=env``.

``${flag:NAME}`` is a flag's value, checked and typed; ``${kv_flag:FIELD}`` a field of :class:`harness.kv.KVConf` that
several flags decide together; ``${profile_frames:}`` what OWL_PROFILE_KV means in frames; ``${flags_set:}`` every flag
that is set, for the run record. Nothing else in the harness
reads the environment.

Old default: ``causvid_pipeline.py`` took the defaults of its ``InferenceConfig`` where a variable was unset, so an
unset flag means those here too (MXFP8 in every Linear, 8-bit V in the last 12 layers). An empty value counts as unset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

PREFIXES = ("OWL_MXFP", "OWL_FP8", "OWL_K_", "OWL_KV", "OWL_COMPILE", "OWL_PROFILE")
"""Variables that begin so are ours: one of them that is no flag is a misspelling."""

GROUPS = ("quant", "kv", "compile")
"""Config groups that have an option ``env``."""

PROFILE_FRAMES = 4
"""Frames that OWL_PROFILE_KV splits into their parts."""

_SWITCH = {"1": True, "true": True, "0": False, "false": False}


class FlagError(ValueError):
    """A flag with a value that it cannot have, or flags that contradict each other."""


@dataclass(frozen=True)
class Flag:
    """One flag: how its text is read, what is allowed (for the error), and its value when it is unset."""

    read: Callable[[str], Any]
    allowed: str
    default: Any


def _choice(*names: str, default: Any) -> Flag:
    values = {name: name for name in names}
    return Flag(lambda text: values[text.lower()], ", ".join(names), default)


def _number(*numbers: int, default: int) -> Flag:
    values = {str(number): number for number in numbers}
    return Flag(values.__getitem__, ", ".join(values), default)


def _switch(default: Any) -> Flag:
    return Flag(lambda text: _SWITCH[text.lower()], "1, 0", default)


def _layers(text: str) -> int | None:
    if text.lower() == "all":
        return None
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


FLAGS: dict[str, Flag] = {
    "OWL_MXFP_ENABLE": _switch(True),
    "OWL_MXFP_BITS": _number(8, 4, default=8),
    "OWL_MXFP_SCOPE": _choice("mlp", "attn", "modulation", "all", default="all"),
    # The old default, cutlass, runs on Blackwell alone; auto takes it there and says what it took elsewhere.
    "OWL_MXFP_KERNEL": _choice("cutlass", "cuda", "triton", "emulated", "auto", default="auto"),
    "OWL_MXFP_LIST": _switch(False),
    "OWL_FP8_KV": _switch(None),
    "OWL_K_FP8": _switch(False),
    "OWL_KV_LATE_LAYERS": Flag(_layers, "a whole number from 1, all", 12),
    "OWL_KV_STORAGE": _choice("bf16", "i8_scale", "mxfp", default=None),
    "OWL_KV_BITS": _number(8, 4, default=8),
    "OWL_COMPILE": _switch(False),
    "OWL_PROFILE_KV": _switch(True),
}


def flags_set(environ: Mapping[str, str]) -> dict[str, str]:
    """Every variable of ours that is set and not empty, known or not, by name."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(PREFIXES) and environ[name].strip()}


def flag(name: str, environ: Mapping[str, str]) -> Any:
    """The value of flag ``name``.

    Raises:
        FlagError: if it cannot have the value it has, saying what is allowed; or if any variable of ours is no flag.
    """
    unknown = [other for other in (name, *flags_set(environ)) if other not in FLAGS]
    if unknown:
        raise FlagError(f"{', '.join(unknown)}: no such flag; there are {', '.join(FLAGS)}")
    known, text = FLAGS[name], environ.get(name, "").strip()
    if not text:
        return known.default
    try:
        return known.read(text)
    except (KeyError, ValueError):
        raise FlagError(f"{name}={text}: allowed are {known.allowed} (or unset: {_shown(known.default)})") from None


def _shown(default: Any) -> str:
    return {True: "1", False: "0", None: "decided by the other flags"}.get(default, str(default))


def kv_flag(field: str, environ: Mapping[str, str]) -> Any:
    """Field ``field`` of the KV cache's config, as the KV flags together say.

    ``OWL_FP8_KV`` switches quantised storage on (its 8 bits were integers with a scale per token and head: i8_scale),
    ``OWL_KV_STORAGE`` names the storage. Where the cache stays BF16 the other KV flags say nothing.

    Raises:
        FlagError: for a bad value, or flags that contradict each other.
    """
    values = {name: flag(name, environ) for name in FLAGS if name.startswith(("OWL_FP8", "OWL_K"))}
    storage, switched = values["OWL_KV_STORAGE"], values["OWL_FP8_KV"]
    if storage is not None and switched is not None and switched == (storage == "bf16"):
        raise FlagError(f"OWL_FP8_KV={int(switched)} contradicts OWL_KV_STORAGE={storage}; unset one of them")
    if storage is None:
        storage = "bf16" if switched is False else "i8_scale"
    if storage == "i8_scale" and values["OWL_KV_BITS"] == 4:
        raise FlagError("OWL_KV_BITS=4: i8_scale has 8 bits; set OWL_KV_STORAGE=mxfp too")
    quantised = storage != "bf16"
    return {
        "storage": "mx" if storage == "mxfp" else storage,
        "quantize_k": quantised and values["OWL_K_FP8"],
        "bits": values["OWL_KV_BITS"] if quantised else 8,
        "late_layers": values["OWL_KV_LATE_LAYERS"] if quantised else None,
    }[field]


def ignored(flags: Mapping[str, str], choices: Mapping[str, str]) -> str | None:
    """A note where ``flags`` are set but no config group listens to them; ``choices`` is the option by group."""
    if not flags or any(choices.get(group) == "env" for group in GROUPS):
        return None
    listening = " ".join(f"{group}=env" for group in GROUPS)
    return f"{', '.join(flags)}: set in the environment, without effect here; {listening} follow them."


def register_flags() -> None:
    """Register the resolvers. May be called again."""
    resolvers: dict[str, Callable[..., Any]] = {
        "flag": lambda name: flag(name, os.environ),
        "kv_flag": lambda field: kv_flag(field, os.environ),
        "profile_frames": lambda: PROFILE_FRAMES if flag("OWL_PROFILE_KV", os.environ) else 0,
        "flags_set": lambda: flags_set(os.environ),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
