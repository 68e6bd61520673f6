"""Packages that a library of ours imports for itself wherever they are installed, though nothing here needs them.

torchmetrics imports matplotlib, scipy, transformers and torchvision for metrics that no run asks for: beside them a
command waited 4 s and more for its first line. Commands, whose process is their own, look the other way; the API does
not, since its process is someone else's, who may want to plot a metric.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

UNNEEDED = ("matplotlib", "scipy", "transformers", "torchvision", "scienceplots", "librosa", "onnxruntime", "lpips")


class _Hidden:
    """Finds none of ``UNNEEDED``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in UNNEEDED:
            raise ModuleNotFoundError(f"{name} is not needed here", name=name)
        return None


def import_torchmetrics() -> None:
    """Import torchmetrics as if what it does not need for us were not installed; nothing else sees a difference.

    It asks by name, both for a module and for its version, through ``lightning_utilities``; where that is made
    otherwise one day, it imports more, and that is all.
    """
    if "torchmetrics" in sys.modules:
        return
    asked: Any = importlib.import_module("lightning_utilities.core.imports")
    version: Any = getattr(asked, "_version", None)

    def installed(name: str) -> str:
        if name in UNNEEDED:
            raise PackageNotFoundError(name)
        return str(version(name))

    finder = _Hidden()
    sys.meta_path.insert(0, finder)
    if version is not None:
        asked._version = installed
    try:
        importlib.import_module("torchmetrics")
    finally:
        sys.meta_path.remove(finder)
        if version is not None:
            asked._version = version
