"""Which shape of ``kernel=cuda`` runs for which Linear: a table of measured winners, and a rule for the rest.

``scripts/microbench.py --tune`` measures and prints entries for ``tuned/`` (see ``harness.kernels.tuned``). Names are
those of ``mx_linear.cu``.
"""

import functools
import itertools
import math
from dataclasses import astuple, dataclass, replace
from enum import StrEnum

from harness.kernels import tuned as tuned_files
from harness.kernels.cuda.packing import ROWS, decoding, element_bits, groups, tile_bytes

BUCKETS = (8, 16, 32, 64, 128, 256)
"""Rows M are rounded up to one of these for ``tuned``; more rows count as the last."""

MANY_ROWS = BUCKETS[-1]
"""Of more rows, those of a frame of many clips (docs/performance.md) or of prefill, the product is a library's."""

NORM_TILES = 8
"""Tiles of 8 rows that a product with norms has: those of a frame."""

SHARED_BYTES = 227 * 1024
"""Shared memory a block may use on compute capability 9.0, whose multiprocessors have 1 KB more for every block."""

_ALONE_BYTES, _BESIDE_BYTES = 114 * 1024, 112 * 1024
"""What a block takes at least so that there is one of its kind, and at most so that another finds room beside it."""


@dataclass(frozen=True)
class CudaConfig:
    """Shape of one launch, all fixed at compile time.

    ``m_tiles`` times 8 rows of x at once; ``row_tiles`` times 16 rows of W a warp; ``warps_n`` (a multiple of 4) by
    ``warps_k`` warps a block, side by side and splitting K; ``cluster`` blocks splitting K, ``share`` such clusters
    side by side that share what they fetch of x; ``stage_groups`` times 64 inputs in each of ``stages`` stages that a
    warp fetches ahead; ``blocks`` a multiprocessor; ``idle`` row tiles fewer a cluster than its warps could take, less
    than a warpgroup's, so that there are as many clusters as find a place.
    """

    m_tiles: int
    row_tiles: int
    warps_n: int
    warps_k: int
    cluster: int
    stage_groups: int
    stages: int
    blocks: int = 1
    share: int = 1
    idle: int = 0

    def as_ints(self) -> list[int]:
        """For an operator's signature."""
        return list(astuple(self))

    @property
    def tiles(self) -> int:
        """Row tiles of W that a cluster computes."""
        return self.row_tiles * self.warps_n - self.idle

    @property
    def warps(self) -> int:
        """Warps of a block that multiply; in a role there is one more."""
        return self.warps_n * self.warps_k


@dataclass(frozen=True)
class CudaShape:
    """A product: rows M, outputs N, inputs K, bits of the weights."""

    m: int
    n: int
    k: int
    bits: int

    @property
    def many(self) -> bool:
        """Whether the weight is unpacked for a library's product."""
        return self.m > MANY_ROWS

    @property
    def bucket(self) -> int:
        """M rounded up to one of ``BUCKETS``."""
        return next((b for b in BUCKETS if self.m <= b), BUCKETS[-1])


class Role(StrEnum):
    """What a product does for the norms around it, see ``mx_linear.cu``."""

    plain = "plain"
    norm = "norm"
    residual = "residual"


@functools.cache
def tuned(gpu: str | None = None, role: Role = Role.plain) -> dict[tuple[int, int, int, int], CudaConfig]:
    """(bits, M bucket, N, K) to the fastest shape measured on ``gpu``, or on any Hopper GPU where it has no file.

    Of blocks in a layer, of modulation alone.
    """
    found = tuned_files.shapes("harness.kernels.cuda", gpu, 90)
    alike = [s for s in found if s.get("role", Role.plain) == role]
    return {(s["bits"], s["m"], s["n"], s["k"]): CudaConfig(*s["config"]) for s in alike}


PLACES = {1: 132, 2: 132, 3: 117, 4: 120, 5: 110, 6: 102, 7: 105, 8: 120}
"""Multiprocessors that clusters of each size filled on an H100 where they were counted (``attend.cluster_of``)."""

_BYTES_PER_NS = 45.0  # what one multiprocessor takes in from HBM, L2 and its neighbours
_DECODE_NS = 10.0  # of one tile of W by all warps of a multiprocessor
_WGMMA_NS = 2.4  # of one tile of W by 8 rows of x
_CLUSTER_NS = 600.0  # starting and meeting in a cluster
_WARPS_K_NS = 150.0


def held_groups(config: CudaConfig, k: int) -> int:
    """Groups of 64 inputs that a block holds of x, at most."""
    return max(1, -(-groups(k) // config.cluster))


def layout(config: CudaConfig, k: int, bits: int, role: Role = Role.plain) -> tuple[int, bool]:
    """Bytes of shared memory a block uses, and whether partial sums must arrive where x and W were."""
    held, slots = held_groups(config, k), config.cluster * config.warps_k
    norm, residual = role is Role.norm, role is Role.residual
    operands = held * (config.m_tiles + norm) * 1024
    operands += config.warps * config.stages * config.row_tiles * config.stage_groups * tile_bytes(bits)
    across = -(-config.m_tiles // config.cluster)
    owned = config.tiles * across if residual else -(-config.tiles * config.m_tiles // config.cluster)
    partial = slots * owned * 512 if slots > 1 else 0
    rest = (held + config.warps * config.stages + 1 + norm) * 8  # barriers of x, of W, of partial sums, of norms
    rest += 32 * (config.m_tiles * norm + owned * residual)
    overlay = operands + partial + rest > _room(config)
    return (max(operands, partial) if overlay else operands + partial) + rest, overlay


def shared_bytes(config: CudaConfig, shape: CudaShape, role: Role = Role.plain) -> int:
    """Shared memory a block is given.

    Where every block can have a multiprocessor of its own, no less than what keeps a second away: launched while
    others still run (``harness.kernels.launch``), blocks would gather where there is room first, and multiprocessors
    that come free later would stay empty.
    """
    used = layout(config, shape.k, shape.bits, role)[0]
    return max(used, _ALONE_BYTES) if config.blocks == 1 and _at_once(config, shape) else used


def defines(
    config: CudaConfig, k: int, element: str, silu: bool = False, dependent: bool = False, role: Role = Role.plain
) -> dict[str, int]:
    """Compile-time parameters of ``mx_linear.cu``; ``dependent``: launched as ``harness.kernels.launch`` describes."""
    return decoding(element) | {
        "MT": config.m_tiles,
        "RT": config.row_tiles,
        "TILES": config.tiles,
        "WR": config.warps_n,
        "WK": config.warps_k,
        "CL": config.cluster,
        "CN": config.share,
        "GS": config.stage_groups,
        "ST": config.stages,
        "GX": held_groups(config, k),
        "OVERLAY": int(layout(config, k, element_bits(element), role)[1]),
        "PDL": int(dependent),
        "BLOCKS": config.blocks,
        "SILU": int(silu),
        "NORM": int(role is Role.norm),
        "RESIDUAL": int(role is Role.residual),
    }


def launch_grid(config: CudaConfig, m: int, n: int) -> tuple[int, int]:
    """Blocks along N (whole clusters) and along M."""
    clusters = -(-n // (ROWS * config.tiles * config.share))
    return clusters * config.cluster * config.share, -(-m // (8 * config.m_tiles))


def choose(shape: CudaShape, gpu: str | None = None, role: Role = Role.plain) -> CudaConfig:
    """The winner for ``shape`` measured on ``gpu``, or of the product most like it whose winner fits, or the rule's.

    In another role, of which none was measured, that of the plain product, with fewer stages where it needs the room.
    """
    if role is Role.plain:
        return _nearest(shape, tuned(gpu)) or _ranked(replace(shape, m=shape.bucket))[0]
    shape = replace(shape, m=8 * NORM_TILES)
    own = _nearest(shape, tuned(gpu, role))
    if own is not None and suits(own, shape, role):
        return own
    ranked = _ranked(shape)
    plain = _nearest(shape, tuned(gpu)) or ranked[0]
    fewer = (replace(plain, stages=stages) for stages in range(plain.stages, 0, -1))

    def squeezed(config: CudaConfig) -> bool:  # partial sums arrive where x was, as in a plain product they do not
        now, before = (layout(config, shape.k, shape.bits, each)[1] for each in (role, Role.plain))
        return now and not before

    return min((config for config in (*fewer, *ranked) if suits(config, shape, role)), key=squeezed)


def suits(config: CudaConfig, shape: CudaShape, role: Role) -> bool:
    """Whether ``config`` can have ``role``: there is room, also in registers, and a block has all rows.

    Fragments that are spilled while tensor cores are at work gave wrong results on an H100.
    """
    if role is not Role.plain:
        columns = config.m_tiles + (role is Role.norm)
        needed = config.row_tiles * (4 * columns + 20) + 24
        warps = 4 * -(-(config.warps + 1) // 4)  # those of a quarter of a multiprocessor have the same
        if config.m_tiles != NORM_TILES or shape.m > 8 * NORM_TILES or needed > 65536 // (config.blocks * warps * 32):
            return False
    return layout(config, shape.k, shape.bits, role)[0] <= _room(config)


def _nearest(shape: CudaShape, measured: dict[tuple[int, int, int, int], CudaConfig]) -> CudaConfig | None:
    def distance(key: tuple[int, int, int, int]) -> float:
        return abs(math.log2(shape.n / key[2])) + abs(math.log2(shape.k / key[3]))

    alike = [key for key in measured if key[:2] == (shape.bits, shape.bucket) and distance(key) <= 2]
    fitting = [key for key in alike if fits(measured[key], shape)]
    return measured[min(fitting, key=distance)] if fitting else None


def fits(config: CudaConfig, shape: CudaShape) -> bool:
    """Whether a block of ``config`` finds room on a multiprocessor."""
    return layout(config, shape.k, shape.bits)[0] <= _room(config)


def _room(config: CudaConfig) -> int:
    """Shared memory that a block of ``config`` may use."""
    return SHARED_BYTES if config.blocks == 1 else _BESIDE_BYTES


def candidates(shape: CudaShape, most: int) -> list[CudaConfig]:
    """What ``microbench --tune`` tries for ``shape``: the ``most`` that look best to ``estimate``, best first."""
    return list(_ranked(replace(shape, m=shape.bucket))[:most])


def candidates_in_a_layer(shape: CudaShape, most: int) -> list[CudaConfig]:
    """What ``scripts/tune_layer.py`` tries for ``shape``: ``most`` at most, of three kinds in equal parts.

    The best to ``estimate``; the best of those that leave room on a multiprocessor, where the next kernel's weights can
    be fetched meanwhile; and those that fetch most of their weight before they need x.
    """
    ranked = sorted(_ranked(replace(shape, m=shape.bucket)), key=lambda config: not _at_once(config, shape))
    small = [config for config in ranked if layout(config, shape.k, shape.bits)[0] <= _SMALL_BYTES]
    early = sorted(ranked, key=lambda config: -_fetched_ahead(config, shape))
    part = most // 3
    return list(dict.fromkeys([*ranked[:part], *small[:part], *early[:part]]))


_SMALL_BYTES = 128 * 1024
"""Shared memory of a block that leaves room."""


def _at_once(config: CudaConfig, shape: CudaShape) -> bool:
    """Whether there is a place for every block from the start."""
    across, down = launch_grid(config, shape.m, shape.n)
    return across * down <= PLACES[config.cluster * config.share] * config.blocks


def _fetched_ahead(config: CudaConfig, shape: CudaShape) -> int:
    """Bytes of W under way on the whole GPU before x is there."""
    stage = config.row_tiles * config.stage_groups * tile_bytes(shape.bits)
    needed = config.tiles * held_groups(config, shape.k) * tile_bytes(shape.bits)
    return launch_grid(config, shape.m, shape.n)[0] * min(config.warps * config.stages * stage, needed)


@functools.cache
def _ranked(shape: CudaShape) -> tuple[CudaConfig, ...]:
    m_tiles = next(t for t in (1, 2, 4, 8, 16, 32) if t == 32 or shape.m <= 8 * t)
    fitting = [
        config
        for tiles in {m_tiles, min(m_tiles, 16), min(m_tiles, 8)}
        for cluster, share in itertools.product(PLACES, (1, 2, 4))
        if cluster * share in PLACES
        for row_tiles in (1, 2, 3, 4)
        for warps_n in (4, 8, 12, 16)
        for warps_k in (1, 2, 3, 4)
        for blocks in (1, 2)
        for idle in {0, _left_out(shape, row_tiles, warps_n, cluster * share, share, blocks)}
        for config in _with_stages(
            CudaConfig(tiles, row_tiles, warps_n, warps_k, cluster, 1, 1, blocks, share, idle), shape
        )
        if _sensible(config, shape)
    ]
    return tuple(sorted(fitting, key=lambda config: estimate(shape, config)))


def _left_out(shape: CudaShape, row_tiles: int, warps_n: int, cluster: int, share: int, blocks: int) -> int:
    """Row tiles that warps leave out, where all clusters are then at work at once and none but the last has fewer."""
    at_once = PLACES[cluster] // cluster * share * blocks
    idle = row_tiles * warps_n - -(-shape.n // (ROWS * at_once))
    return idle if 0 < idle < 4 * row_tiles else 0


def _with_stages(config: CudaConfig, shape: CudaShape) -> list[CudaConfig]:
    """``config`` with two stages, four, and as many as a warp needs or as fit; nothing when not even two do."""
    needed = -(-held_groups(config, shape.k) // config.warps_k)
    grouped = replace(config, stage_groups=min(needed, 1 if shape.bits == 8 else 2))
    wanted = -(-needed // grouped.stage_groups)
    for stages in range(min(wanted, 12), 0, -1):
        staged = replace(grouped, stages=stages)
        if fits(staged, shape):
            counts = {min(stages, 2), min(stages, 4), stages}
            return [replace(staged, stages=count) for count in sorted(counts)] if stages >= min(wanted, 2) else []
    return []


def _sensible(config: CudaConfig, shape: CudaShape) -> bool:
    warps = config.warps * config.blocks
    registers = config.row_tiles * (config.m_tiles * 4 + 20) + 32
    return (
        config.warps <= 16
        and warps <= 24
        and registers <= 255
        and registers * 32 * warps <= 65536
        and config.warps_k <= held_groups(config, shape.k)
        and config.tiles <= -(-shape.n // ROWS) + config.row_tiles
    )


def estimate(shape: CudaShape, config: CudaConfig) -> float:
    """Predicted time in ns. Coarse on purpose, it only ranks shapes that nobody has measured.

    A block takes in its part of W and of x and its neighbours' partial sums, decodes and multiplies. Blocks beyond what
    the multiprocessors hold wait for a second round.
    """
    held, (across, down) = held_groups(config, shape.k), launch_grid(config, shape.m, shape.n)
    places = PLACES[config.cluster * config.share] * config.blocks
    rounds = max(1.0, across * down / places) if across * down > 4 * places else -(-across * down // places)
    w, x = config.tiles * held * tile_bytes(shape.bits), held * config.m_tiles * 1024
    sent = config.warps_k * config.tiles * config.m_tiles * 512 if config.cluster * config.warps_k > 1 else 0
    taken_in = w + x * (1 + 1 / config.share) / 2 + sent * (config.cluster - 1) / config.cluster
    compute = config.tiles * held * max(_DECODE_NS, _WGMMA_NS * config.m_tiles)
    compute *= 1 + 4 / (config.warps * config.blocks)  # one warpgroup alone decodes or multiplies
    work = taken_in / _BYTES_PER_NS + 0.5 * compute
    extra = (_CLUSTER_NS if config.cluster * config.share > 1 else 0.0) + (_WARPS_K_NS if config.warps_k > 1 else 0.0)
    return rounds * work * config.blocks + extra
