"""Names of a package that are imported when they are first used.

The config is described by the rooms that it configures, and is composed without torch, so that ``--help`` and a
misspelt word are answered at once: a package whose ``conf`` the schema imports must import nothing else itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: ``places`` gives, for each of its modules, the names it has, with blanks between."""
    module_of = {name: module for module, names in places.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get
