"""What a run ran on. Everything absent is ``None``: a record from any machine has the same keys."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchao",
    "triton",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "safetensors",
    "numpy",
    "av",
)
COMPUTING = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_", "TORCHINDUCTOR_")
"""How variables begin by which libraries choose how they compute."""
ROOT = Path(__file__).resolve().parents[2]
"""The repository (or whatever folder holds the installed package)."""


def _output(*command: str) -> str | None:
    """Standard output of a short command, stripped; ``None`` if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that decides the figures."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_name() -> str | None:
    """The processor's marketing name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def gpu(index: int = 0) -> dict[str, Any] | None:
    """Name, compute capability, memory and driver of one GPU; ``None`` without CUDA."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}")
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": driver,
    }


def git_state(folder: Path = ROOT) -> dict[str, Any]:
    """Commit and whether the tree differs from it; both ``None`` where ``folder`` is no checkout's root."""
    top = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return {"commit": None, "dirty": None}
    status = _output("git", "-C", str(folder), "status", "--porcelain")
    return {
        "commit": _output("git", "-C", str(folder), "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def what_computes() -> dict[str, Any]:
    """What the last bit of a result on this CPU depends on, beside code and inputs."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith(COMPUTING)}
    return {
        "torch": torch.__config__.show(),
        "version": torch.__version__,
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "environment": chosen,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The environment section of a run record."""
    return {
        "device": str(device),
        "gpu": gpu(device.index or 0) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_state(),
    }
