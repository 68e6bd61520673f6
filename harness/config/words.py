"""Checks what was typed, and what YAML files say, against the groups and fields that there are.

Hydra composes a config from words and files, and converts each value to its field's type. What it would take although
nobody can have meant it (a field that does not exist, added with ``+`` or by a file; a value that becomes another one)
and what it would refuse in its own terms is refused here before, wherever it comes from.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from harness.config.fields import Field, mismatch
from harness.config.problems import LONGEST, nearest, unknown

OPEN = ("logger", "compile.options", "flags")
"""Mappings that take any key here; what they are passed to checks them."""

DIGITS = re.compile(r"[0-9]+")
MOST_DIGITS = 100
"""Of a number; a SHA-256 in a path has 64."""
MOST_BRACKETS = 16
MOST_LISTED = 4000


@dataclass(frozen=True)
class Vocabulary:
    """What may be said: the options of each config group, and every field by its path."""

    groups: Mapping[str, list[str]]
    fields: Mapping[str, Field]

    @property
    def own_groups(self) -> list[str]:
        """The groups that are not Hydra's."""
        return [group for group in self.groups if not group.startswith("hydra")]

    def option(self, word: str) -> str | None:
        """``group=option`` where ``word`` is an option's name, or nearly so."""
        owners = {option: group for group in reversed(self.own_groups) for option in self.groups[group]}
        like = word if word in owners else nearest(word, owners, 0.85)
        return f"{owners[like]}={like}" if like is not None else None

    def known(self, path: str) -> bool:
        """Whether ``path`` is a field, or lies in a mapping that takes any key."""
        return path in self.fields or any(path.startswith(f"{name}.") for name in OPEN)

    def unknown(self, path: str) -> str:
        """That there is no field ``path``, and which one may have been meant."""
        section, _, name = path.rpartition(".")
        beside = [field.name for field in self.fields.values() if field.path.rpartition(".")[0] == section]
        like = nearest(name, beside)
        if like is not None:
            return f"{path}: no such field; did you mean {section}{'.' * bool(section)}{like}?"
        if not section and name in self.groups:
            return f"{path}: no such field"
        elsewhere = [field.path for field in self.fields.values() if field.name == name]
        others = [name for name in (*self.fields, *self.own_groups) if not path.startswith(f"{name}.")]
        like = nearest(path, others, 0.75)
        if elsewhere or like is not None:
            return f"{path}: no such field; did you mean {' or '.join(elsewhere or [str(like)])}?"
        where = f"there are {', '.join(self.own_groups)}"
        if section and beside:
            where = f"{section} has {', '.join(beside)}"
        return f"{path}: no such field; {where}; all fields: --fields [NAME]"

    def value_problems(self, path: str, value: Any) -> Iterator[str]:
        """What is wrong with setting ``path`` to ``value``: names that do not exist, and values of another type."""
        field = self.fields.get(path)
        if isinstance(value, dict) and (field is None or field.section is not None):
            if field is None and not self.known(path):
                yield self.unknown(path)
                return
            for name, one in value.items():
                yield from self.value_problems(f"{path}.{name}", one)
        elif field is None:
            if not self.known(path):
                yield self.unknown(path)
        elif (wanted := mismatch(field.hint, value)) is not None:
            yield f"{path}={shown(value)}: must be {wanted}"


def shown(value: Any) -> str:
    """A value as YAML and the command line write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value!s:.80}"


def word_problems(words: Sequence[str], vocabulary: Vocabulary, sweep: bool) -> list[str]:
    """What is wrong with each of ``words`` by itself; ``sweep``: whether one may hold several values."""
    parser, problems, index = OverridesParser.create(), [], 0
    while index < len(words):
        taken = _pieces(words, index, vocabulary)
        if taken > 1:
            problems.append(_written_together(words[index : index + taken], vocabulary))
        else:
            problems += _one_word(words[index], parser, vocabulary, sweep)
        index += taken
    return problems


def _pieces(words: Sequence[str], index: int, vocabulary: Vocabulary) -> int:
    """How many words from ``index`` on the shell has made of one, at a blank."""
    word, rest = words[index], words[index + 1 :]
    name, equals, value = word.partition("=")
    if rest and not equals and rest[0].startswith("="):
        return 3 if rest[0] == "=" and len(rest) > 1 else 2
    if not equals:
        return 2 if word in vocabulary.groups and rest and vocabulary.option(rest[0]) else 1
    if opened := _opened(value):
        for count, other in enumerate(rest, 2):
            opened += _opened(other)
            if opened <= 0:
                return count
    if rest and not value and "=" not in rest[0]:
        return 2
    field = vocabulary.fields.get(name.lstrip("+"))
    count = 0
    while field is not None and count < len(rest) and _continues(rest[count:], vocabulary):
        count += 1
    return 1 + count


def _opened(text: str) -> int:
    """Brackets that ``text`` opens and does not close."""
    return text.count("[") + text.count("{") - text.count("]") - text.count("}")


def _continues(words: Sequence[str], vocabulary: Vocabulary) -> bool:
    """Whether the first of ``words`` can only be the rest of the one before."""
    word = words[0]
    alone = "=" in word or word.startswith(("~", "+")) or (len(words) > 1 and words[1].startswith("="))
    return not alone and word not in vocabulary.fields and vocabulary.option(word) is None


def _written_together(pieces: Sequence[str], vocabulary: Vocabulary) -> str:
    """How to write what the shell has split."""
    name, _, value = " ".join(pieces).partition("=" if any("=" in piece for piece in pieces) else " ")
    name, value = name.strip(), value.strip()
    typed = " ".join(pieces)
    if " " not in value:
        return f"{typed}: write it without blanks: {name}={value}"
    return f"{typed}: the shell splits this at its blanks; quote the whole word: {_quoted(name, value)}"


def _quoted(name: str, value: str) -> str:
    """A word as typed into a shell, its value in quotes of its own where Hydra's grammar needs them."""
    try:
        OverridesParser.create().parse_override(f"{name}={value}")
        inner = value
    except HydraException:
        inner = '"' + value.replace('"', '\\"') + '"'
    return shlex.quote(f"{name}={inner}")


def _endless(word: str) -> str | None:
    """What the grammar's parser would stumble over: digits or brackets without end, bytes that are no text."""
    name = word.partition("=")[0][:80]
    if not word.isascii() and word.encode("utf-8", "replace").decode() != word:
        return f"{name}: its value is no UTF-8 text; give what it names another name"
    if (digits := max(map(len, DIGITS.findall(word)), default=0)) > MOST_DIGITS:
        return f"{name}: a number of {digits} digits; {LONGEST}"
    if (depth := max(accumulate(map(_opened, word)), default=0)) > MOST_BRACKETS:
        return f"{name}: {depth} brackets within brackets; at most {MOST_BRACKETS}"
    if (listed := word.count(",") + 1) > MOST_LISTED:
        return (
            f"{name}: a list of {listed}; at most {MOST_LISTED} on the command line: name a folder, or use a YAML file"
        )
    return None


def _one_word(word: str, parser: OverridesParser, vocabulary: Vocabulary, sweep: bool) -> Iterator[str]:
    if (problem := _endless(word)) is not None:
        yield problem
        return
    try:
        override = parser.parse_override(word)
    except HydraException:
        yield _not_grammar(word, vocabulary)
        return
    key = override.key_or_group
    if override.package is not None:
        yield f"{word}: an option goes to its own place here; write {key}=…"
    elif key in vocabulary.groups and not isinstance(override.value(), dict):
        yield from _group_problems(word, override, vocabulary, sweep)
    elif key.partition(".")[0] != "hydra" and key.partition("/")[0] != "hydra":
        yield from _field_problems(word, override, vocabulary, sweep)


def _not_grammar(word: str, vocabulary: Vocabulary) -> str:
    name, equals, value = word.partition("=")
    if not equals:
        meant = vocabulary.option(word)
        return f"{word}: not of the form name=value" + (f"; did you mean {meant}?" if meant else "")
    plain = name.lstrip("+~")
    if not vocabulary.known(plain) and plain not in vocabulary.groups and not plain.startswith("hydra"):
        return vocabulary.unknown(plain.replace("-", "_"))
    return f"{word}: its value has characters of the grammar's own; put it in quotes: {_quoted(name, value)}"


def _values(override: Override) -> list[Any] | None:
    """Each value of an override that has several (``a,b``, ``range(1,3)``); ``None`` if it has one."""
    if not override.is_sweep_override():
        return None
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator()]


def _no_sweep(word: str) -> str:
    name, _, value = word.partition("=")
    as_list, as_text = shlex.quote(f"{name}=[{value}]"), shlex.quote(_in_quotes(word))
    return f"{word}: several values are a sweep; add -m to run each. One list: {as_list}; one text: {as_text}"


def _group_problems(word: str, override: Override, vocabulary: Vocabulary, sweep: bool) -> Iterator[str]:
    group = override.key_or_group
    options, hydra = vocabulary.groups[group], group.startswith("hydra")
    if not hydra and (override.is_delete() or override.is_force_add() or override.is_add()):
        yield f"{word}: an option of {group} is chosen, not added or taken away: {group}={'|'.join(options[:3])}…"
        return
    values = _values(override)
    if values is not None and not sweep and not hydra:
        yield f"{word}: several values are a sweep; add -m to run each"
        return
    for value in [override.value()] if values is None else values:
        if hydra and (value is None or override.is_delete()):
            continue
        if not isinstance(value, str) or value not in options:
            yield f"{group}={shown(value)}: {unknown(f'option of {group}', shown(value), options)}"


def _field_problems(word: str, override: Override, vocabulary: Vocabulary, sweep: bool) -> Iterator[str]:
    key = override.key_or_group
    if "/" in key or not vocabulary.known(key):
        yield vocabulary.unknown(key)
        return
    if key.partition(".")[0] == "flags":
        yield f"{word}: flags are read from the environment; set the variable, or the field it stands for"
        return
    if override.is_delete():
        if key in vocabulary.fields and not key.startswith(("model.arch.", "decoder.arch.")):
            yield f"{word}: a field cannot be taken away; set it (null where it may be)"
        return
    values = _values(override)
    if values is not None and not sweep:
        yield _no_sweep(word)
        return
    for value in [override.value()] if values is None else values:
        if values is None and _is_text(vocabulary.fields.get(key)) and not isinstance(value, str | dict | None):
            if str(value) != override.get_value_string().strip():
                yield f"{word}: read as {shown(value)}; put the text in quotes: {shlex.quote(_in_quotes(word))}"
            continue
        yield from vocabulary.value_problems(key, value)


def _is_text(field: Field | None) -> bool:
    return field is not None and field.kind is str


def _in_quotes(word: str) -> str:
    name, _, value = word.partition("=")
    return f'{name}="{value}"'


def file_problems(origin: str, package: str, content: DictConfig, vocabulary: Vocabulary) -> list[str]:
    """What is wrong with the fields that a config file sets, before they are converted to their types."""
    found: Any = OmegaConf.to_container(content, resolve=False)
    for part in reversed(package.split(".") if package not in ("", "_global_") else []):
        found = {part: found}
    problems = []
    for name, value in found.items():
        if name != "hydra":
            problems += [f"{origin}: {problem}" for problem in vocabulary.value_problems(str(name), value)]
    return problems
