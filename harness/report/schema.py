"""The JSON schema of a run's record, read off its dataclasses (JSON Schema 2020-12)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
import typing
from enum import Enum
from typing import Any

from harness.report.record import SCHEMA_VERSION, RunRecord
from harness.streams import complain, patient

SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    # A float that JSON has no number for is written as text.
    float: {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]},
    types.NoneType: {"type": "null"},
    Any: {},
}


def record_schema() -> dict[str, Any]:
    """The schema of ``record.json``: each dataclass a definition of its own."""
    definitions: dict[str, Any] = {}
    top = _schema(RunRecord, definitions)
    definitions["RunRecord"]["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Record of a run",
        **top,
        "$defs": definitions,
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint in SIMPLE:
        return SIMPLE[hint]
    if dataclasses.is_dataclass(hint):
        return _reference(hint, definitions)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return {"anyOf": [_schema(part, definitions) for part in parts]}
    if origin is typing.Literal:
        return {"enum": list(parts)}
    if hint is dict or origin is dict or (origin and issubclass(origin, typing.Mapping)):
        return {"type": "object", "additionalProperties": _schema(parts[1], definitions) if parts else {}}
    if origin is tuple and Ellipsis not in parts:
        each = [_schema(part, definitions) for part in parts]
        return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}
    if hint in (list, tuple) or origin in (list, tuple) or (origin and issubclass(origin, typing.Sequence)):
        return {"type": "array", "items": _schema(parts[0], definitions) if parts else {}}
    raise TypeError(f"{hint}: no JSON schema for this type; add it to harness/report/schema.py")


def _reference(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # before its fields: a type may hold itself
        hints = typing.get_type_hints(kind)
        fields = [item for item in dataclasses.fields(kind) if not item.name.startswith("_")]
        definitions[name] = {
            "type": "object",
            "description": (inspect.getdoc(kind) or "").partition("\n")[0],
            "properties": {item.name: _schema(hints[item.name], definitions) for item in fields},
            "required": [item.name for item in fields],
        }
    return {"$ref": f"#/$defs/{name}"}


@patient
def main() -> int:
    """``mx-world schema``: print the schema."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(main.__doc__)
        return 0
    if sys.argv[1:]:
        complain(f"{sys.argv[1]:.80}: the schema takes no arguments; see --help")
        return 2
    print(json.dumps(record_schema(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
