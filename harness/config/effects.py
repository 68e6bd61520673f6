"""What was typed and would change nothing: a field of a section that is off, or that another field overrules.

Somebody who types ``quant.bits=4`` wants four bits. Where no Linear becomes MX the run would be another than they
meant, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.kv.conf import TENSORS, KVScales, KVStorage
from harness.report.gates.conf import THRESHOLDS

STILL = ("quant.kernel", "quant.list")
"""Fields of a section that is off which an exported checkpoint, whose formats hold, still asks for."""
COMPILED = ("mode", "backend", "options", "scope")
"""Fields of ``compile`` that matter to compiled code alone."""
UNPLAYED = ("gates", "export", "resume", "overwrite")
"""What play does nothing with, though its config is a run's."""


@dataclass(frozen=True)
class _Chosen:
    """The sections of a composed config, and the option that was chosen for each."""

    sections: dict[str, Any]
    options: dict[str, Any]
    typed: Sequence[str]

    def __getattr__(self, name: str) -> Any:
        return self.sections[name]

    def off(self, group: str) -> str | None:
        """That ``group`` is off, and what to choose; ``None`` if its option was typed: off is then what was meant."""
        option = f"{group}={self.options.get(group)}"
        return None if group in self.typed else f"{option}; choose an option of {group} too"

    def option(self, group: str) -> str:
        return f"{group}={self.options.get(group)}"

    @property
    def is_baseline(self) -> bool:
        if self.quant.enabled or self.kv.enabled:
            return False
        if self.model.checkpoint is None:
            return True
        from harness.export.read import is_export  # torch, which composing does without

        return not is_export(self.model.checkpoint)


def typed_fields(words: Sequence[str]) -> Iterator[str]:
    """The paths of the fields that ``words``, which are of Hydra's grammar, set: ``quant={bits: 4}`` sets one."""
    parser = OverridesParser.create()
    for word in words:
        override = parser.parse_override(word)
        if not override.is_delete():
            yield from fields_in(override.value(), override.key_or_group)


def fields_in(value: Any, path: str) -> Iterator[str]:
    """``path``, or the paths of the fields below it where ``value`` is a mapping."""
    if not isinstance(value, dict):
        yield path
        return
    for name, one in value.items():
        yield from fields_in(one, f"{path}.{name}" if path else str(name))


def without_effect(fields: Sequence[str], cfg: DictConfig, name: str = "run") -> dict[str, str]:
    """Of ``fields``, paths that were typed, those that change nothing in ``cfg``: by path, why, and what to do.

    Args:
        fields: see :func:`typed_fields`, groups among them: a section that is off by name is meant to be.
        cfg: the composed config with Hydra's part.
        name: of the config, ``run`` or ``play``.
    """
    try:
        sections = {
            part: OmegaConf.to_object(cfg[part])
            for part in ("model", "decoder", "data", "quant", "kv", "calib", "compile", "gates")
        }
    except OmegaConfBaseException:
        return {}  # whoever plans the run says what is wrong with it
    chosen = _Chosen(sections, cfg.hydra.runtime.choices, fields)
    found = {}
    for field in dict.fromkeys(fields):
        section, _, rest = field.partition(".")
        if name == "play" and section in UNPLAYED:
            why: str | None = "play does nothing with it; judge by a run"
        elif rest and section in _RULES:
            why = _RULES[section](rest, chosen)
        else:
            why = None
        if why is not None:
            found[field] = why
    return found


def told(found: dict[str, str]) -> Iterator[str]:
    """A line for each reason, with the fields it concerns."""
    for why in dict.fromkeys(found.values()):
        yield f"{', '.join(field for field in found if found[field] == why)}: without effect, as {why}"


def _quant(field: str, chosen: _Chosen) -> str | None:
    conf = chosen.quant
    if not conf.enabled:
        return None if field == "enabled" or f"quant.{field}" in STILL else chosen.off("quant")
    bits = set(map(conf.bits_of, conf.categories))
    if field == "bits" and not conf.include and all(getattr(conf.bits_by_category, name) for name in conf.categories):
        return "quant.bits_by_category says it for each category in scope"
    if field == "element_8bit" and bits == {4} and not conf.include:
        return "every Linear in scope has 4 bits; use quant.bits=8"
    return None


def _kv(field: str, chosen: _Chosen) -> str | None:
    conf = chosen.kv
    if not conf.enabled:
        return chosen.off("kv")
    own = {name: getattr(conf, f"{name}_storage") for name in TENSORS}
    mx = [name for name in TENSORS if conf.storage_of(name) is KVStorage.mx]
    if field.startswith("ema.") and conf.scales is not KVScales.per_head_ema:
        return f"kv.scales={conf.scales.value}; use kv.scales=per_head_ema"
    if field in ("bits", "scale_mode") and not mx:
        return "neither K nor V is stored as mx; use kv.storage=mx"
    if field == "bits" and all(getattr(conf, f"{name}_format") for name in mx):
        return "kv.k_format and kv.v_format say it; set those"
    if field == "storage" and all(own.values()):
        return "kv.k_storage and kv.v_storage say it; set those"
    if field in ("quantize_k", "quantize_v") and own[field[-1]] is not None:
        return f"kv.{field[-1]}_storage={own[field[-1]].value} says it; set that, or null"
    return None


def _calib(field: str, chosen: _Chosen) -> str | None:
    if not chosen.calib.enabled:
        return None if field == "method" else chosen.off("calib")
    return _data(field.removeprefix("clips."), chosen, "calib.clips") if field.startswith("clips.") else None


def _data(field: str, chosen: _Chosen, path: str = "data") -> str | None:
    conf = chosen.data if path == "data" else chosen.calib.clips
    if field in ("seed", "synthetic_clips") and conf.source != "synthetic":
        return f"{path}.source={conf.source.value}: it is about synthetic clips"
    if field == "fps" and conf.source == "clips":
        return f"{path}.source=clips: recorded clips say their own rate"
    return None


def _compile(field: str, chosen: _Chosen) -> str | None:
    if chosen.compile.enabled or field.partition(".")[0] not in COMPILED:
        return None
    return chosen.off("compile")


def _gates(field: str, chosen: _Chosen) -> str | None:
    conf = chosen.gates
    if not conf.enabled:
        return None if field in ("enabled", "implied") else chosen.off("gates")
    if conf.implied and chosen.is_baseline and field not in ("enabled", "implied"):
        return f"{chosen.option('quant')} {chosen.option('kv')} is the baseline itself; choose what to judge"
    for criterion, threshold in THRESHOLDS.items():
        if field == threshold and getattr(conf, threshold) is not None and criterion in conf.left_out:
            return f"gates.without=[{','.join(conf.without)}] leaves {criterion} out; take it from there"
    for figure, criterion in (("fps", "speed"), ("memory", "memory")):
        if field == figure and not conf.asks(criterion):
            return f"this gate does not ask for {criterion}; set gates.{THRESHOLDS[criterion]}"
    return None


def _model(field: str, chosen: _Chosen) -> str | None:
    if field == "calibration" and not chosen.calib.enabled:
        return chosen.off("calib")
    return _random(field, chosen.model.checkpoint)


def _decoder(field: str, chosen: _Chosen) -> str | None:
    return _random(field, chosen.decoder.checkpoint)


def _random(field: str, checkpoint: str | None) -> str | None:
    if field != "seed" or checkpoint is None:
        return None
    return f"it is about random weights, and these are of {Path(checkpoint).name}; use seed=… for noise"


_RULES = {
    "quant": _quant,
    "kv": _kv,
    "calib": _calib,
    "data": _data,
    "compile": _compile,
    "gates": _gates,
    "model": _model,
    "decoder": _decoder,
}
"""By section: why a field of it has no effect, or ``None``."""
