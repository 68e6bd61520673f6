"""Dataclasses as strict JSON and back, every value checked against the type of its field.

A float that JSON has no word for is written as the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, as the JSON
mapping of Protocol Buffers has it; where a field is a float those strings are read as what they stand for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.files.text import FileError, parse_json

T = TypeVar("T")
WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class CodecError(ValueError):
    """JSON that does not fit its type."""


def encode(value: Any, indent: int | None = None) -> str:
    """A dataclass, or plain data, as strict JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_worded(value), indent=indent, allow_nan=False)


def _worded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _worded(inner) for key, inner in value.items()}
    return [_worded(inner) for inner in value] if isinstance(value, list | tuple) else value


def decode(text: str) -> Any:
    """Strict JSON as plain data.

    Raises:
        CodecError: for anything else: bare ``NaN``, numbers beyond 64 bits, keys given twice, nesting without end.
    """
    try:
        return parse_json(text)
    except FileError as error:
        raise CodecError(str(error)) from error


def read(kind: type[T], value: Any, where: str = "") -> T:
    """``value``, plain data, as ``kind``: a dataclass with all its sections.

    Raises:
        CodecError: naming the first field that is missing, unknown or of another type.
    """
    found: T = _read(kind, value, where)
    return found


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (one for one in arguments if one is not type(None))
        return _read(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(
            _read(one, inner, f"{where}[{i}]") for i, (one, inner) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], inner, f"{where}.{key}") for key, inner in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return value
        if isinstance(value, str) and value in WORDS:
            return WORDS[value]
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = getattr(get_origin(kind) or kind, "__name__", str(kind))
    raise CodecError(f"{where}: {str(value)[:40]!r} is no {name}")


def _section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise CodecError(f"{where or 'the record'}: {str(value)[:40]!r} is no section")
    hints, needed = _fields(kind)
    unknown, missing = sorted(value.keys() - hints.keys()), sorted(needed - value.keys())
    if unknown or missing:
        told = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise CodecError(f"{where or 'the record'} {' and '.join(told)}")
    prefix = f"{where}." if where else ""
    return kind(**{name: _read(hints[name], inner, f"{prefix}{name}") for name, inner in value.items()})


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types by field, and the fields without a default."""
    fields = [field for field in dataclasses.fields(kind) if field.init]
    needed = (
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields}, frozenset(needed)
