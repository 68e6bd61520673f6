"""What a library of ours imports for itself, though nothing here needs it, or not yet.

torchmetrics imports matplotlib, scipy, transformers and torchvision for metrics that no run asks for: beside them a
command waited 4 s and more for its first line. Lightning imports torch's compiler, and with it sympy, to ask whether a
module is a compiled one: half of the time until the first line, for which runs that compile nothing had no use.
Commands, whose process is their own, look the other way; the API does not, since its process is someone else's, who may
want to plot a metric.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

from harness.bytecode import keep_bytecode

COMPILER = "torch._dynamo"

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


class _AnyCompiled(type):
    """Of a compiled module there is none before torch's compiler is imported."""

    def __instancecheck__(cls, instance: object) -> bool:
        compiler = sys.modules.get(COMPILER)
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _OptimizedModule(metaclass=_AnyCompiled):
    """Stands for ``torch._dynamo.OptimizedModule`` where Lightning asks whether something is one."""


def _left_as_it_is(function: Any, recursive: bool = True, reason: str | None = None) -> Any:
    """``torch._dynamo.disable``: Lightning marks so what it does with logged results, which nobody compiles."""
    return function


def import_lightning() -> None:
    """Import Lightning, and torchmetrics first, without torch's compiler, which comes once something is compiled.

    Where Lightning asks the compiler for more one day than it does now, it is imported with it. What is imported from
    here on has its bytecode kept.
    """
    keep_bytecode()
    import_torchmetrics()
    if "lightning" in sys.modules or COMPILER in sys.modules:
        return
    there = set(sys.modules)
    standing_in: Any = ModuleType(COMPILER)
    standing_in.OptimizedModule, standing_in.disable = _OptimizedModule, _left_as_it_is
    sys.modules[COMPILER] = standing_in
    try:
        importlib.import_module("lightning.pytorch")
        importlib.import_module("lightning")
    except (ImportError, AttributeError):
        for name in set(sys.modules) - there:
            if name.partition(".")[0] == "lightning":
                del sys.modules[name]
    finally:
        if sys.modules.get(COMPILER) is standing_in:
            del sys.modules[COMPILER]
