"""What is said of a config that cannot run: every problem at once, each with what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem found and what to do about it."""


LONGEST = "whole numbers have at most 64 bits"
"""What is said of one that is longer."""


@contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Turn a check's ``ValueError`` into one more problem, so that a user sees all of them at once."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``names`` that ``name`` is most likely a misspelling of; ``None`` if it is like none of them."""
    by_lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), by_lower, 1, cutoff)
    return by_lower[found[0]] if found else None


def unknown(what: str, name: str, names: Sequence[str]) -> str:
    """That ``name`` is none of ``names``: with the likely one first."""
    like = nearest(name, names)
    return f"no such {what}" + (f"; did you mean {like}? There" if like else "; there") + f" are {', '.join(names)}"
