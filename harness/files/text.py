"""JSON and YAML that anyone may have written, read within bounds: bytes, depth, numbers, and what aliases multiply to.

A file that could be read two ways is refused: a key given twice, NaN and Infinity in JSON, numbers beyond 64 bits. All
errors are one kind, :class:`FileError`, and name the file; readers turn it into their own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_JSON_BYTES = 64 * 2**20
"""A clip of a million frames and a record of thousands of clips stay below this."""
MAX_YAML_BYTES = 2**20
MAX_DEPTH = 32
"""Brackets within brackets in YAML."""
MAX_JSON_DEPTH = 64
MAX_JSON_LISTS, MAX_JSON_VALUES = 2**22, 2**24
"""Brackets, and brackets and commas together, in JSON: what 64 MiB of them become takes gigabytes."""
MAX_NODES = 100_000
"""Values that a YAML file may stand for once its aliases are written out."""
MAX_CHAIN = 16
"""Interpolations that lead to one another."""


class FileError(ValueError):
    """A file that cannot be read as what it should be; the message names it and says why."""


def check_file(path: Path, what: str, limit: int | None = None) -> Path:
    """``path``, if it is a regular file of at most ``limit`` bytes.

    Raises:
        FileError: if it is missing, a folder or another thing that is no file, unreadable or larger.
    """
    try:
        if path.is_dir():
            raise FileError(f"{path}: is a folder; give {what}")
        if not path.exists():
            raise FileError(f"{path}: no such file; give {what}")
        if not path.is_file():
            raise FileError(f"{path}: not a regular file; give {what}")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read: {error}") from error
    if limit is not None and size > limit:
        raise FileError(f"{path}: {size / 2**20:.0f} MiB; {what} has at most {limit / 2**20:.0f}")
    return path


def read_text(path: Path, what: str, limit: int) -> str:
    """The file as UTF-8 text. Raises :class:`FileError`, as :func:`check_file` or if it is no such text."""
    check_file(path, what, limit)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: not readable as UTF-8 text: {error}") from error


def read_json(path: Path, what: str = "a JSON file", limit: int = MAX_JSON_BYTES) -> Any:
    """Parse strict JSON: no key twice in one object, no NaN or Infinity, numbers within 64 bits.

    Raises:
        FileError: naming the file and what is wrong with it.
    """
    text = read_text(path, what, limit)
    try:
        return parse_json(text)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """:func:`read_json` of text at hand, whose length is already bounded. Raises :class:`FileError` without a file."""
    lists = text.count("[") + text.count("{")
    if lists > MAX_JSON_LISTS or lists + text.count(",") > MAX_JSON_VALUES:
        raise FileError(f"more than {MAX_JSON_LISTS} lists and objects, or {MAX_JSON_VALUES} values")
    try:
        content = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except RecursionError as error:
        raise FileError("nested too deeply") from error
    except ValueError as error:
        raise FileError(f"not readable JSON: {error}") from error
    _check_depth(content)
    return content


def _check_depth(content: Any) -> None:
    """So that what walks through it later does not meet the recursion limit, which is another in each Python."""
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [one for value in level for one in _within(value) if isinstance(one, dict | list)]
        if not level:
            return
    raise FileError(f"nested deeper than {MAX_JSON_DEPTH}")


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r:.60} is given twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {_shortened(text)} is out of range")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"the number {_shortened(text)} does not fit into 64 bits")
    return value


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:16]}… ({len(text)} characters)"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and 1e-4 is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key != "<<" and key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r:.60} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, what: str = "a YAML file", limit: int = MAX_YAML_BYTES) -> Any:
    """Parse YAML with the safe loader, bounded before anything is built; ``${key}`` interpolations are resolved.

    An interpolation is a whole value that names a number, a text or a list of such in the same file. Nothing else is
    ever looked up: no environment variables, no resolvers.

    Raises:
        FileError: naming the file and what is wrong with it.
    """
    text = read_text(path, what, limit)
    with _told(path):
        _check_events(text)
        content = yaml.load(text, _Loader)  # a subclass of the safe loader
        return _resolved(content, content, 0)


def check_yaml(path: Path, what: str = "a YAML file", limit: int = MAX_YAML_BYTES) -> None:
    """Raise :class:`FileError` if ``path`` is no YAML within the bounds; nothing of it is built."""
    text = read_text(path, what, limit)
    with _told(path):
        _check_events(text)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, KeyError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        reason = " ".join(str(getattr(error, "problem", None) or error).split()) or type(error).__name__
        raise FileError(f"{path}: not a readable YAML file: {line}{reason:.300}") from error


def _check_events(text: str) -> None:
    """Bound depth and the number of values with aliases written out, from the parser's events alone."""
    counts: dict[str, int] = {}
    open_anchors: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in counts:
                raise FileError(f"the alias *{anchor} stands within its own anchor or has none")
            total += counts[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if anchor is not None:
                counts[anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            total += 1
            open_anchors.append((anchor, total - 1))
            if len(open_anchors) > MAX_DEPTH:
                raise FileError(f"nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_anchors.pop()
            if anchor is not None:
                counts[anchor] = total - before
        if total > MAX_NODES:
            raise FileError(f"stands for more than {MAX_NODES} values once its aliases are written out")


def _resolved(value: Any, root: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(inner, root, depth) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, root, depth) for inner in value]
    if isinstance(value, str) and "${" in value:
        return _resolved(_interpolated(value, root, depth), root, depth + 1)
    return value


def _interpolated(value: str, root: Any, depth: int) -> Any:
    match = re.fullmatch(r"\$\{([\w.]+)\}", value.strip())
    if match is None:
        raise FileError(f"{value!r:.60}: an interpolation must be a whole value that names a key, such as ${{model.x}}")
    if depth >= MAX_CHAIN:
        raise FileError(f"{value!r:.60}: interpolations lead to one another more than {MAX_CHAIN} times")
    found = root
    for key in match[1].split("."):
        if not isinstance(found, dict) or key not in found:
            raise FileError(f"{value!r:.60}: no such key in this file")
        found = found[key]
    if isinstance(found, dict) or (isinstance(found, list) and any(isinstance(one, dict | list) for one in found)):
        raise FileError(f"{value!r:.60}: names a section; name a number, a text or a list of them")
    return found
