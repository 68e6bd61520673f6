"""Every field that may be configured, read off the dataclasses: path, type, default, allowed values and meaning."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from harness.models.shapes import DCAEConfig, GameRFTConfig

SHAPES: dict[str, type] = {"model.arch": GameRFTConfig, "decoder.arch": DCAEConfig}
"""Mappings whose keys are the fields of a dataclass, though a config may give any part of them."""


@dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
        path: as it is typed, such as ``quant.late_layers``.
        hint: its type.
        default: of the schema; the chosen options of the groups may say otherwise.
        owner: the dataclass that it is a field of.
    """

    path: str
    hint: Any
    default: Any
    owner: type

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> Any:
        """The dataclass of its own fields; ``None`` if it has none."""
        hint: Any = self.hint
        return SHAPES.get(self.path) or (hint if dataclasses.is_dataclass(hint) else None)

    @property
    def optional(self) -> bool:
        """Whether null is allowed."""
        return types.NoneType in typing.get_args(self.hint)

    @property
    def kind(self) -> Any:
        """The type without null."""
        return without_none(self.hint)


def without_none(hint: Any) -> Any:
    """A type hint without its ``None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def fields_of(schema: type, prefix: str = "") -> Iterator[Field]:
    """Every field of ``schema`` and of the sections below, in order; a section comes before its fields."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if item.name.startswith("_"):
            continue
        field = Field(prefix + item.name, hints[item.name], _default(item), schema)
        yield field
        if field.section is not None:
            yield from fields_of(field.section, f"{field.path}.")


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else MISSING


def wants(hint: Any) -> str:
    """A type in words, for a message."""
    kind = without_none(hint)
    null = ", or null" if kind is not hint else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__) + null
    if typing.get_origin(kind) is list:
        (each,) = typing.get_args(kind)
        such = {int: "1,2", float: "1.0,0.5"}.get(each, "one,two")
        return f"a list, such as [{such}]{', numbers in quotes' if each is str else ''}{null}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind, "a mapping, {name: value}") + null


def mismatch(hint: Any, value: Any) -> str | None:
    """What ``value`` should have been, if it is not of type ``hint``; nothing is converted but numbers in quotes.

    An interpolation (``${…}``) is whatever it leads to.
    """
    kind = without_none(hint)
    if isinstance(value, str) and "${" in value:
        return None
    if value is None:
        return None if kind is not hint or kind is Any else wants(hint)
    return None if _fits(kind, value) else wants(hint)


def _fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is list:
        (each,) = typing.get_args(kind)
        return isinstance(value, list) and all(mismatch(each, one) is None for one in value)
    if origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, kind) or str(value).removeprefix(f"{kind.__name__}.") in kind.__members__
    if kind is bool:
        return value in (0, 1) or str(value).lower() in ("true", "false", "on", "off", "yes", "no")
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or kind not in (int, float):
        return not isinstance(value, bool)
    return _number(kind, value)


def _number(kind: type, value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, kind | int)
    try:
        kind(value)
    except ValueError:
        return False
    return True
