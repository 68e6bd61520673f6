"""What to call what ran: the option of a config group where it is that option, and what differs from it where not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from harness.calib.conf import CalibMethod
from harness.config.places import CONF
from harness.kv.conf import KVConf
from harness.mx.conf import MXConf

if TYPE_CHECKING:
    from harness.export.read import Export

SECTIONS: dict[str, type] = {"quant": MXConf, "kv": KVConf}
SAY_NOTHING = {"list", "kernel"}
"""Fields that change nothing of the formats: what is printed, and what computes the same."""


def label(group: str, section: Any, choice: str) -> str:
    """A name for ``section``, the config of ``group`` (``quant`` or ``kv``), of which option ``choice`` was chosen.

    That option's name, if the section says what the option says. Else the name of the option that is nearest, and the
    fields that differ from it, such as ``mxfp4_all late_layers=4``.
    """
    said, options = _flat(section), _options(group)
    if choice not in options:
        choice = "bf16"  # one that follows the environment, or of the user's own: named by what it came to

    def distance(name: str) -> tuple[int, int, bool]:
        differ = _differing(said, options[name])
        named = sum(options[name].get(field) != options["bf16"].get(field) for field in differ)
        return len(differ), named, name != choice

    nearest = choice if not _differing(said, options[choice]) else min(options, key=distance)
    changes = [f"{field}={_shown(said[field])}" for field in sorted(_differing(said, options[nearest]))]
    return " ".join([nearest, *changes])


def _differing(said: Mapping[str, Any], option: Mapping[str, Any]) -> set[str]:
    return {field for field in said if said[field] != option.get(field)} - SAY_NOTHING


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        one = getattr(value, item.name)
        if dataclasses.is_dataclass(one):
            found |= _flat(one, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = one.value if isinstance(one, Enum) else one
    return found


@cache
def _options(group: str) -> dict[str, dict[str, Any]]:
    """What each option of ``conf/<group>`` says, but for those that read the environment."""
    options = {}
    for path in sorted(Path(CONF / group).glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "${" in text or "@package" in text:
            continue
        merged = OmegaConf.merge(OmegaConf.structured(SECTIONS[group]), yaml.safe_load(text) or {})
        options[path.stem] = _flat(OmegaConf.to_object(merged))
    return options


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def register_label() -> None:
    """Register ``${label:group}``, the label as part of a folder's name. May be called again.

    That of ``quant`` ends in what chose the weights, unless they are rounded to nearest: ``mxfp4_all_gptq``. Where
    ``model.checkpoint`` is an exported file, formats and calibration are the file's.
    """

    def folder_name(group: str, _root_: DictConfig) -> str:
        section, method = OmegaConf.to_object(_root_[group]), str(_root_.calib.method)
        choice = str(_root_.hydra.runtime.choices.get(group))
        if (export := _export(_root_.model.checkpoint)) is not None:
            section, choice = getattr(export, group), ""
            method = str(export.header.calibration.get("method", CalibMethod.none))
        text = label(group, section, choice)
        if group == "quant" and method != CalibMethod.none:
            text += f" {method}"
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", text).strip("_")[:80]

    OmegaConf.register_new_resolver("label", folder_name, replace=True)


def _export(checkpoint: str | None) -> Export | None:
    """The exported file that ``checkpoint`` is; None where it is none. A damaged one is told of by the plan."""
    from harness.export.layout import ExportError  # torch comes with it, and a mistyped word is told of without
    from harness.export.read import Export, is_export

    try:
        return Export(checkpoint) if checkpoint is not None and is_export(checkpoint) else None
    except ExportError:
        return None
