"""Where a run ran."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    count: int
    compute_capability: str
    memory_bytes: int
    driver: str | None = None


@dataclass
class Git:
    """The checkout that ran; both ``None`` where there is none."""

    commit: str | None = None
    dirty: bool | None = None


@dataclass
class Environment:
    """Where a run ran. ``packages``: version by name, ``None`` for one that is absent."""

    device: str = "cpu"
    gpu: Gpu | None = None
    cuda: str | None = None
    cpu: str | None = None
    cpu_count: int | None = None
    torch_threads: int | None = None
    platform: str = ""
    python: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    git: Git = field(default_factory=Git)
    processes: int = 1
