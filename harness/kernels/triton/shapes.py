"""Which shape of ``kernel=triton`` runs for which Linear: a table of measured winners, and a rule for the rest.

``scripts/microbench.py --tune`` measures and prints entries for files in ``tuned/``
(``harness.kernels.tuned``), of which there are none yet.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from harness.kernels import tuned as tuned_files

Path = Literal["bf16", "fp8"]

BUCKETS = (16, 64, 256, 1024)
"""Rows M are rounded up to one of these for ``tuned``; more rows count as the last."""


@dataclass(frozen=True)
class GemmConfig:
    """Shape of one launch: rows and outputs of a block, ways K is split, warps, pipeline stages, operands swapped."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    swap: bool

    def as_ints(self) -> list[int]:
        """For an operator's signature."""
        return [self.block_m, self.block_n, self.split_k, self.warps, self.stages, int(self.swap)]

    @classmethod
    def from_ints(cls, values: list[int]) -> "GemmConfig":
        """Back from ``as_ints``."""
        block_m, block_n, split_k, warps, stages, swap = values
        return cls(block_m, block_n, split_k, warps, stages, bool(swap))


@dataclass(frozen=True)
class Shape:
    """A product: rows M, outputs N, inputs K, bits of the weights, by way of BF16 or FP8 tensor cores."""

    m: int
    n: int
    k: int
    bits: int
    path: Path

    @property
    def bucket(self) -> int:
        """M rounded up to one of ``BUCKETS``."""
        return next((b for b in BUCKETS if self.m <= b), BUCKETS[-1])


@functools.cache
def tuned(gpu: str | None, capability: tuple[int, int]) -> dict[tuple[str, int, int, int, int], GemmConfig]:
    """(path, bits, M bucket, N, K) to the fastest shape measured on ``gpu``, or on one of its compute capability."""
    found = tuned_files.shapes("harness.kernels.triton", gpu, 10 * capability[0] + capability[1])
    return {(s["path"], s["bits"], s["m"], s["n"], s["k"]): GemmConfig.from_ints(s["config"]) for s in found}


_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""Shared memory one block may use, by compute capability; 99 KiB on the others from 8.0 on."""

_BYTES_PER_NS = 60.0  # what one multiprocessor takes in from HBM and L2 at best
_L2_BYTES_PER_NS = 5000.0  # partial sums written and read back, all multiprocessors together
_SPLIT_NS = 500.0  # one more round trip: announcing and collecting partial sums


@functools.cache
def machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; those of an H200 where Triton's interpreter runs."""
    if device.type != "cuda":
        return (9, 0), 132
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


def choose(shape: Shape, capability: tuple[int, int], multiprocessors: int, gpu: str | None = None) -> GemmConfig:
    """The measured winner for ``shape``, or what the rule says."""
    measured = tuned(gpu, capability).get((shape.path, shape.bits, shape.bucket, shape.n, shape.k))
    return measured or rule(shape, capability, multiprocessors)


def rule(shape: Shape, capability: tuple[int, int], multiprocessors: int) -> GemmConfig:
    """The candidate with the lowest ``estimate``, as many pipeline stages as let two blocks share a multiprocessor.

    The swapped form is left to small M, where it wastes no rows of the tensor cores, and to FP8, where it needs fewer
    instructions (compiled code, counted).
    """
    block_m = 16 if shape.m <= 16 else 64 if shape.m < 1024 else 128
    swap = block_m < 64 or (block_m == 64 and shape.path == "fp8")
    shapes = [
        GemmConfig(block_m, block_n, split, warps=8 if block_m * block_n > 4096 else 4, stages=2, swap=swap)
        for block_n in (64, 128)
        for split in range(1, 9)
        if split == 1 or (steps(shape) >= 2 * split and shape.m < 1024)
    ]
    best = min(shapes, key=lambda config: estimate(shape, config, multiprocessors))
    room = _SHARED_KIB.get(capability, 99) * 1024
    for stages, share in ((4, 2), (3, 2), (4, 1), (3, 1)):
        deeper = replace(best, stages=stages)
        if shared_bytes(shape, deeper) <= room // share:
            return deeper
    return best


def tile_width(bits: int, path: Path) -> int:
    """Bytes of a packed tile's rows. At 4 bits BF16 activations fill shared memory, so their tiles are half as wide."""
    return 32 if path == "fp8" else 128 if bits == 8 else 64


def steps(shape: Shape) -> int:
    """Steps of the kernels' loop over all of K: 128 bytes of a weight row each, 64 where tiles are 64 wide."""
    width = 64 if shape.path == "bf16" and shape.bits == 4 else 128
    return -(-shape.k * shape.bits // (width * 8))


def estimate(shape: Shape, config: GemmConfig, multiprocessors: int) -> float:
    """Predicted time in ns: the busiest multiprocessor's traffic of weights and activations, and that of partial sums.

    Every block of outputs reads all of x, so wide blocks save traffic, while splitting K spreads it. Coarse on
    purpose, it only ranks shapes that nobody has measured.
    """
    blocks = -(-shape.n // config.block_n) * -(-shape.m // config.block_m)
    x_bytes = 2.0 if shape.path == "bf16" else 1.125
    whole_k = shape.k * (config.block_n * shape.bits / 8 + config.block_m * x_bytes)
    rounds = -(-blocks * config.split_k // multiprocessors)
    time = rounds * whole_k / config.split_k / _BYTES_PER_NS
    if config.split_k > 1:
        partial = blocks * config.split_k * config.block_m * config.block_n * 8
        time += _SPLIT_NS + partial / _L2_BYTES_PER_NS
    return time


def shared_bytes(shape: Shape, config: GemmConfig) -> int:
    """Shared memory a block needs, at most (from compiled code): stages in flight, and decoded weights twice."""
    halves = 8 // shape.bits
    if shape.path == "fp8":
        return (config.stages - 1) * 128 * (config.block_n + config.block_m * halves) + 8192
    width = tile_width(shape.bits, "bf16")
    stage = width * (config.block_n + config.block_m * 2 * halves) + config.block_n * 4 * halves
    return (config.stages - 1) * stage + config.block_n * width * 2 * halves * 2


def candidates(shape: Shape, capability: tuple[int, int]) -> list[GemmConfig]:
    """What ``microbench --tune`` tries for ``shape``."""
    block_m = [16] if shape.m <= 16 else [64] if shape.m <= 64 else [64, 128]
    room = _SHARED_KIB.get(capability, 99) * 1024
    every = [
        GemmConfig(bm, bn, split, warps, stages, swap)
        for bm in block_m
        for bn in (64, 128)
        for split in (1, 2, 3, 4, 6, 8)
        for warps in ((4,) if bn * bm < 128 * 64 else (4, 8))
        for stages in (3, 4, 6)
        for swap in ((True,) if bm < 64 else (False, True))
    ]
    return [c for c in every if steps(shape) >= 2 * c.split_k - 1 and shared_bytes(shape, c) <= room]
