"""How a command starts: before anything large is imported, so that what keeps it from starting is one line."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.bytecode import keep_bytecode
from harness.streams import complain

PYTHON = (3, 11)
REQUIRED = {
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "torch": "torch",
    "torchao": "torchao",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "av": "av",
    "rich": "rich",
    "PIL": "pillow",
    "jinja2": "jinja2",
    "yaml": "pyyaml",
}
"""What every command needs, as pyproject.toml has it: the module, and the package that brings it."""

PARSERS = {
    "harness.bench.rollout:main": "harness.bench.arguments:rollout",
    "harness.bench.micro:main": "harness.bench.arguments:micro",
    "harness.bench.profile:main": "harness.bench.arguments:profile",
    "harness.bench.tune_layer:main": "harness.bench.arguments:tune_layer",
    "harness.bench.parity:main": "harness.bench.arguments:parity",
    "harness.bench.world_model:main": "harness.bench.arguments:world_model",
}
"""Of commands whose modules import torch: what makes their parsers, and does not."""


def why_not() -> str | None:
    """What this Python lacks, and what to install; ``None`` if nothing."""
    if sys.version_info < PYTHON:
        wanted, here = (".".join(map(str, version[:2])) for version in (PYTHON, sys.version_info))
        return f"{sys.executable} is Python {here}, and this needs {wanted} or newer"
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    clone = Path(__file__).resolve().parents[1]
    install = f"pip install -c {clone / 'constraints.txt'} -e {clone}"
    return (
        f"not installed for {sys.executable}: {', '.join(missing)}; activate the environment that has them, or install "
        f"them: {install if (clone / 'constraints.txt').is_file() else 'pip install mx-world-harness'}"
    )


def require() -> None:
    """End the process with one line, exit code 2, if something is missing that every command needs."""
    problem = why_not()
    if problem is not None:
        complain(problem)
        sys.exit(2)


def hush() -> None:
    """Ctrl-C ends the process without a traceback, whatever is being imported; where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(place: str) -> None:
    """Import ``module:function`` and :func:`call` it; the process ends with what it returns."""
    hush()
    require()
    sys.exit(call(ready(place)))


def ready(place: str) -> Callable[..., Any]:
    """What ``module:function`` names, imported once the command line is known to be one that it takes.

    So ``--help`` and what is said of a misspelt option do not wait for torch.
    """
    if place in PARSERS:
        _named(PARSERS[place])().parse_intermixed_args()
    keep_bytecode()
    return _named(place)


def _named(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a command's function. Ctrl-C ends it where it stands, what it holds is put back, and the code is 130.

    Words that make no config, and files that cannot be read, end it with their message and exit code 2.
    """
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return function(*arguments)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except ValueError as error:
        from harness.config.problems import ConfigError
        from harness.files.text import FileError

        if not isinstance(error, ConfigError | FileError):
            raise
        complain(error)
        return 2
    finally:
        hush()
