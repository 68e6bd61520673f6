"""Attention of one frame from its projection on, in one launch: to its window in the ring beside its own K and V.

Split over the window (split-KV, as in Flash-Decoding, Dao et al. 2023): each program attends to a share of the window
for one head and leaves unnormalised sums; some of them combine a share of its queries each, in the order of the splits,
so that results do not depend on which one arrived when. Of heads up to 64 they ask for the sums themselves until none
is missing, which takes one way through L2 where counters take three (:func:`combine_share`). Of larger heads, of which
asking again costs more than it saves, they count who has arrived (:func:`shares_to_combine`).

The window is read in order of age, oldest first: the ring from the frame after ``slot`` around to the one before it.
What lies in ``slot`` has left the window and is read by nobody. So the last split of a head, which attends to the
frame's own K and V, straight from the projection, can store them there in the same launch.

Scores need no running maximum: queries and keys are RMS-normalised, so that by Cauchy and Schwarz none is larger than
sqrt(Dh), give or take a stored key's rounding, and the sums of their exponentials are far from float32's limits.

Packed tiles are decoded in registers; the window is nowhere unpacked in memory. E2M1 packs neighbouring columns into a
byte. Rather than interleaving them again, which moves data between threads, K's even and odd columns meet those of the
queries in two products, and V's fill two accumulators.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005  (Triton knows sums of tuples, no unpacking)

import triton
import triton.language as tl

from harness.kernels.triton.blocks import decode_bytes, decode_nibbles, scale_values
from harness.kernels.triton.heads import load_angles, load_rows, rotated, store_tile, turned


@triton.jit
def even_odd(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Even and odd columns of ``x [ROWS, DIM]``."""
    return tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))


@triton.jit
def halves_of(x, PAIRED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """``x`` twice, or its even and odd columns if ``PAIRED``."""
    if PAIRED:
        first, second = even_odd(x, ROWS, DIM)
    else:
        first, second = x, x
    return first, second


@triton.jit
def ring_rows(start, place, TOKENS: tl.constexpr, LENGTH: tl.constexpr, PARTIAL: tl.constexpr):
    """Where the rows at ``place`` in order of age lie in a ring of ``LENGTH`` rows whose oldest is at ``start``.

    ``PARTIAL``: some may be past the newest stored one; they get its row, and are for the caller to mask.
    """
    row = start + (tl.minimum(place, LENGTH - TOKENS - 1) if PARTIAL else place)
    return tl.where(row >= LENGTH, row - LENGTH, row)


@triton.jit
def ask_for(memory, row, BYTES: tl.constexpr):
    """Have rows of ``BYTES`` bytes brought into L2; waits for nothing."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    lines = (
        memory.to(tl.pointer_type(tl.int8), bitcast=True) + row[:, None] * BYTES + tl.arange(0, LINES)[None, :] * 128
    )
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def ask_for_share(
    k_data,
    k_factors,
    v_data,
    v_factors,
    start,
    begin,
    end,
    K_BYTES: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    V_BYTES: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Have a program's tiles of the window brought into L2 while what its queries come from is still computed.

    ``BYTES`` of a row; ``BLOCKS``: whether it has a scale for every 32 columns; ``start``: row of the oldest frame.
    """
    for tile in range(begin, end):
        row = ring_rows(start, tile * ROWS + tl.arange(0, ROWS), TOKENS, LENGTH, False)
        ask_for(k_data, row, K_BYTES)
        ask_for(v_data, row, V_BYTES)
        if K_BLOCKS:
            ask_for(k_factors, row // 16, DIM // 2)
        if V_BLOCKS:
            ask_for(v_factors, row // 16, DIM // 2)


@triton.jit
def load_factors(
    scales,
    start,
    first,
    FORMAT: tl.constexpr,
    PER: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Scales of ``ROWS`` rows from ``first`` on in order of age, float32 ``[ROWS, DIM/32]``, or ``[ROWS, 1]``.

    ``PER``: what has a scale of its own, a "block" of 32 columns, a "token" or a "frame" of ``TOKENS`` rows.
    """
    COLUMNS: tl.constexpr = DIM // 32 if PER == "block" else 1
    BYTES: tl.constexpr = COLUMNS * (2 if FORMAT == "i8" else 1)  # of a row
    if PER == "frame" or TOKENS * BYTES % 4 != 0:
        row = ring_rows(start, first + tl.arange(0, ROWS), TOKENS, LENGTH, PARTIAL)
        place = row // TOKENS if PER == "frame" else row
        stored = tl.load(scales + place[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
        factors = stored.to(tl.float32) if FORMAT == "i8" else scale_values(stored)
    else:
        # Words of 4 bytes: Hopper's asynchronous copies take no less, and a load that is not asynchronous makes every
        # tile wait for memory.
        WORDS: tl.constexpr = ROWS * BYTES // 4
        row = ring_rows(start, first + tl.arange(0, WORDS) * (4 // BYTES), TOKENS, LENGTH, PARTIAL)
        words = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + row // (4 // BYTES))
        if FORMAT == "i8":  # BF16 is a float32's upper half
            halves = (words[:, None] >> (tl.arange(0, 2) * 16)[None, :]) << 16
            factors = tl.reshape(halves, (ROWS, COLUMNS)).to(tl.float32, bitcast=True)
        else:
            bytes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 0xFF
            factors = scale_values(tl.reshape(bytes, (ROWS, COLUMNS)))
    return factors


@triton.jit
def load_tile(
    data,
    scales,
    start,
    first,
    FORMAT: tl.constexpr,
    PER: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    PARTIAL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows of a ring as ``DTYPE``: all columns (twice), or for E2M1 the even and the odd ones.

    ``ROWS`` rows from ``first`` on in order of age; ``start``: row of the oldest frame. See :func:`load_factors`
    and :func:`ring_rows`.
    """
    WIDTH: tl.constexpr = DIM // 2 if FORMAT == "e2m1" else DIM
    SCALES: tl.constexpr = DIM // 32 if PER == "block" else 1
    row = ring_rows(start, first + tl.arange(0, ROWS), TOKENS, LENGTH, PARTIAL)
    stored = tl.load(data + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    if FORMAT == "plain":
        one, other = stored, stored
    else:
        factors = load_factors(scales, start, first, FORMAT, PER, ROWS, DIM, TOKENS, LENGTH, PARTIAL)
        if FORMAT == "e2m1":
            one, other = decode_nibbles(stored, factors, ROWS, DIM, SCALES)
        else:
            one = decode_bytes(stored, factors, FORMAT, ROWS, DIM, SCALES)
            other = one
    return one.to(DTYPE), other.to(DTYPE)


@triton.jit
def attend_tile(
    q0,
    q1,
    k0,
    k1,
    v0,
    v1,
    ok,
    total,
    sum0,
    sum1,
    scale,
    MASKED: tl.constexpr,
    K_PAIRED: tl.constexpr,
    V_PAIRED: tl.constexpr,
):
    """Add a tile of keys, those that are ``ok``, to each query's total of weights and weighted sums of values."""
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if K_PAIRED:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    p = tl.exp2(scores * scale)
    if MASKED:
        p = tl.where(ok[None, :], p, 0.0)
        v0 = tl.where(ok[:, None], v0, 0.0)  # a weight of 0 does not silence a NaN or an infinity
        v1 = tl.where(ok[:, None], v1, 0.0)
    total += tl.sum(p, 1)
    weights = p.to(v0.dtype)
    sum0 = tl.dot(weights, v0, sum0, input_precision="ieee")
    if V_PAIRED:
        sum1 = tl.dot(weights, v1, sum1, input_precision="ieee")
    return total, sum0, sum1


@triton.jit
def own_rows(
    part,
    kept_keys,
    kept_values,
    cos,
    sin,
    token,
    PIECE: tl.constexpr,
    KEPT: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
):
    """Keys, normalised and rotated, and values of rows ``token`` of a head, whose queries are at ``part``.

    Each in the Hadamard basis where it is to be turned. ``KEPT`` pieces of rows are in registers as they were
    projected.
    """
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    ok = token < TOKENS
    if PIECE < KEPT:
        raw, values = kept_keys[PIECE], kept_values[PIECE]
    else:
        raw = load_rows(part + HEADS * DIM, token, ok, STRIDE, DIM)
        values = load_rows(part + 2 * HEADS * DIM, token, ok, STRIDE, DIM)
    cosine, sine = load_angles(cos, sin, token, ok, DIM)
    keys = rotated(raw, cosine, sine, ROWS, DIM, EPS)
    if K_TURN:
        keys = turned(keys, DIM).to(keys.dtype)
    if V_TURN:
        values = turned(values, DIM).to(values.dtype)
    return keys, values


@triton.jit
def attend_own(
    q,
    part,
    kept_keys,
    kept_values,
    cos,
    sin,
    total,
    sums,
    scale,
    KEPT: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
):
    """Add the frame's own keys and values, in pieces of ``ROWS``, to each query's total and weighted sums."""
    for piece in tl.static_range((TOKENS + ROWS - 1) // ROWS):
        rows = piece * ROWS + tl.arange(0, ROWS)
        keys, values = own_rows(
            part, kept_keys, kept_values, cos, sin, rows, piece, KEPT, HEADS, TOKENS, ROWS, DIM, EPS, K_TURN, V_TURN
        )
        total, sums, _ = attend_tile(
            q, q, keys, keys, values, values, rows < TOKENS, total, sums, sums, scale, True, False, False
        )
    return total, sums


@triton.jit
def store_piece(
    keys,
    values,
    rows,
    slot,
    mine,
    k_data,
    k_factors,
    v_data,
    v_factors,
    own_k,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_STORE: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_EMAX: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_STORE: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_EMAX: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    KEEP_K: tl.constexpr,
):
    """Encode ``rows`` of the frame's own keys and values, those that are ``mine``, into ``slot`` of a head's rings;
    ``KEEP_K``: keys also to ``own_k``."""
    stored = slot * TOKENS + rows
    if K_STORE:
        store_tile(keys, k_data, k_factors, stored, mine, K_FORMAT, K_LARGEST, K_EMAX, K_THRESHOLD, ROWS, DIM)
    if V_STORE:
        store_tile(values, v_data, v_factors, stored, mine, V_FORMAT, V_LARGEST, V_EMAX, V_THRESHOLD, ROWS, DIM)
    if KEEP_K:
        tl.store(own_k + rows[:, None] * DIM + tl.arange(0, DIM)[None, :], keys, mask=mine[:, None])


@triton.jit
def attend_and_store_own(
    q,
    part,
    cos,
    sin,
    slot,
    total,
    sums,
    scale,
    stores,
    k_data,
    k_factors,
    v_data,
    v_factors,
    own_k,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_STORE: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_EMAX: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_STORE: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_EMAX: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    KEEP_K: tl.constexpr,
):
    """:func:`attend_own` and, if it ``stores``, :func:`store_own` piece by piece, each made once."""
    for piece in tl.range(0, (TOKENS + ROWS - 1) // ROWS, num_stages=1):
        rows = piece * ROWS + tl.arange(0, ROWS)
        keys, values = own_rows(part, (), (), cos, sin, rows, 0, 0, HEADS, TOKENS, ROWS, DIM, EPS, K_TURN, V_TURN)
        total, sums, _ = attend_tile(
            q, q, keys, keys, values, values, rows < TOKENS, total, sums, sums, scale, True, False, False
        )
        store_piece(
            keys, values, rows, slot, (rows < TOKENS) & stores, k_data, k_factors, v_data, v_factors, own_k,
            TOKENS, ROWS, DIM, K_FORMAT, K_STORE, K_LARGEST, K_EMAX, K_THRESHOLD,
            V_FORMAT, V_STORE, V_LARGEST, V_EMAX, V_THRESHOLD, KEEP_K,
        )  # fmt: skip
    return total, sums


@triton.jit
def store_own(
    part,
    kept_keys,
    kept_values,
    cos,
    sin,
    slot,
    k_data,
    k_factors,
    v_data,
    v_factors,
    own_k,
    KEPT: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_STORE: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_EMAX: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_STORE: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_EMAX: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    KEEP_K: tl.constexpr,
):
    """Encode the frame's own keys and values into ``slot`` of a head's rings; ``KEEP_K``: keys also to ``own_k``."""
    for piece in tl.static_range((TOKENS + ROWS - 1) // ROWS):
        rows = piece * ROWS + tl.arange(0, ROWS)
        keys, values = own_rows(
            part, kept_keys, kept_values, cos, sin, rows, piece, KEPT, HEADS, TOKENS, ROWS, DIM, EPS, K_TURN, V_TURN
        )
        store_piece(
            keys, values, rows, slot, rows < TOKENS, k_data, k_factors, v_data, v_factors, own_k,
            TOKENS, ROWS, DIM, K_FORMAT, K_STORE, K_LARGEST, K_EMAX, K_THRESHOLD,
            V_FORMAT, V_STORE, V_LARGEST, V_EMAX, V_THRESHOLD, KEEP_K,
        )  # fmt: skip


@triton.jit
def combine(
    parts,
    totals,
    out,
    rows,
    stride,
    queries,
    asked,
    most,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """Softmax over the whole window from each split's sums; ``rows``: a head's, ``stride`` from split to split.

    Asks for them at most ``most`` times, until none is ``EMPTY``, and returns whether that came about: then what was
    read is ``EMPTY`` again, for the next launch.
    """
    # As many copies of the totals as there are threads: so all of these must agree on what is missing.
    totals += rows[:, None] + tl.zeros((ROWS, 128 // ROWS), tl.int32)
    known = asked[:, None] & tl.full((ROWS, 128 // ROWS), 1, tl.int1)
    columns = tl.arange(0, DIM)
    place = rows[:, None] * DIM + columns[None, :]
    missing, asks = 1, 0
    total = tl.zeros((ROWS, 128 // ROWS), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    while (missing != 0) & (asks < most):
        waiting = 1  # totals come last: as long as one is missing, the sums are no traffic in the others' way
        while (waiting != 0) & (asks < most):
            lacks = tl.zeros((ROWS, 128 // ROWS), tl.int32)
            for split in tl.static_range(SPLITS):
                weight = tl.load(totals + split * stride, mask=known, other=0, volatile=True)
                lacks |= (weight == EMPTY).to(tl.int32)
            waiting = tl.max(tl.max(lacks, 1), 0)
            asks += 1
        total = tl.zeros((ROWS, 128 // ROWS), tl.float32)
        result = tl.zeros((ROWS, DIM), tl.float32)
        absent = tl.zeros((ROWS, 128 // ROWS), tl.int32)
        lacking = tl.zeros((ROWS, DIM), tl.int32)
        for split in tl.static_range(SPLITS):
            # Volatile: from L2 each time, never from L1 or from an earlier turn.
            weight = tl.load(totals + split * stride, mask=known, other=0, volatile=True)
            part = tl.load(parts + split * stride * DIM + place, mask=asked[:, None], other=0, volatile=True)
            absent |= (weight == EMPTY).to(tl.int32)
            lacking |= (part == EMPTY).to(tl.int32)
            total += weight.to(tl.float32, bitcast=True)
            result += part.to(tl.float32, bitcast=True)
        missing = tl.max(tl.max(absent, 1), 0) | tl.max(tl.max(lacking, 1), 0)
        asks += 1
    there = missing == 0
    if there:
        weights = tl.where(asked, tl.max(total, 1), 1.0)
        target = out + queries[:, None] * (HEADS * DIM) + columns[None, :]
        tl.store(target, (result / weights[:, None]).to(out.dtype.element_ty), mask=asked[:, None])
        tl.debug_barrier()  # all threads have read what is overwritten
        nothing = tl.full((ROWS, DIM), EMPTY, tl.int32)
        for split in tl.static_range(SPLITS):
            tl.store(parts + split * stride * DIM + place, nothing, mask=asked[:, None])
            tl.store(totals + split * stride, tl.full((ROWS, 128 // ROWS), EMPTY, tl.int32), mask=known)
    return there


@triton.jit
def combine_share(
    parts,
    totals,
    out,
    first,
    head_row,
    stride,
    arrived,
    share,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    EMPTY: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Combine ``ROWS`` of a head's queries from ``first`` on, or leave them to a program that is yet to begin.

    A program waits for the others of its head, which is safe once all have begun. Should they not begin, because the
    GPU has no room for them beside those that wait, it leaves its share to the last one: bit 16 + ``share`` of
    ``arrived``, whose lower bits count those that have begun.
    """
    queries = first + tl.arange(0, ROWS)
    asked = queries < TOKENS
    waits = share >= 0
    while waits:
        if combine(
            parts, totals, out, head_row + queries, stride, queries, asked, POLLS, HEADS, DIM, SPLITS, ROWS, EMPTY
        ):
            waits = share < 0
        else:
            count = tl.atomic_or(arrived, 1 << (16 + share), sem="relaxed", scope="gpu") & 0xFFFF
            if (count == SPLITS) | (count == 0):  # all have begun since; the last may have put it back to 0
                tl.atomic_and(arrived, 0xFFFF, sem="relaxed", scope="gpu")
            else:
                waits = share < 0


@triton.jit
def combine_arrived(
    parts,
    totals,
    out,
    rows,
    stride,
    queries,
    asked,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """:func:`combine` of sums that are all there. Reads around the L1 cache, which may hold what lay there before."""
    CHUNK: tl.constexpr = min(DIM, 64)  # columns whose parts are all on their way at once: as many as registers hold
    total = tl.zeros((ROWS,), tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.load(totals + split * stride + rows, mask=asked, other=0, cache_modifier=".cg")
        total += weight.to(tl.float32, bitcast=True)
    total = tl.where(asked, total, 1.0)
    for first in range(0, DIM, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        result = tl.zeros((ROWS, CHUNK), tl.float32)
        for split in tl.static_range(SPLITS):
            place = (split * stride + rows)[:, None] * DIM + columns[None, :]
            part = tl.load(parts + place, mask=asked[:, None], other=0, cache_modifier=".cg")
            result += part.to(tl.float32, bitcast=True)
        values = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + queries[:, None] * (HEADS * DIM) + columns[None, :], values, mask=asked[:, None])


@triton.jit
def shares_to_combine(arrived, epoch, before, split, SPLITS: tl.constexpr, SHARES: tl.constexpr, POLLS: tl.constexpr):
    """Bits of the shares of a head's queries that this program combines, once all ``SPLITS`` have arrived.

    Split i combines share i, of ``SHARES``. It waits for the others by polling ``epoch``, which the last to arrive
    moves on from ``before``. Should they not come, because the GPU has no room for them beside those that wait, it
    leaves its share to the last one: bit 16 + i of ``arrived``, whose lower bits count.
    """
    mine = tl.where(split < SHARES, 1 << split, 0)
    seen = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if (seen & 0xFFFF) == SPLITS - 1:
        mine |= seen >> 16
        tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")
        tl.atomic_xchg(epoch, before + 1, sem="release", scope="gpu")
    elif mine != 0:
        polls, now = 0, before
        while (now == before) & (polls < POLLS):
            now = tl.atomic_add(epoch, 0, sem="acquire", scope="gpu")
            polls += 1
        if now == before:
            count = tl.atomic_or(arrived, mine << 16, sem="acq_rel", scope="gpu") & 0xFFFF
            if (count == SPLITS) | (count == 0):  # all have arrived since; the last may have put it back to 0
                tl.atomic_and(arrived, 0xFFFF, sem="relaxed", scope="gpu")
            else:
                mine = 0
    return mine


@triton.jit
def window_kernel(
    qkv,
    cos,
    sin,
    k_ring,
    k_scales,
    v_ring,
    v_scales,
    slot,
    out,
    own_k,
    parts,
    arrived,
    scale,
    programs,
    HEADS: tl.constexpr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_PER: tl.constexpr,
    K_STORE: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_EMAX: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_PER: tl.constexpr,
    V_STORE: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_EMAX: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    KEEP_K: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    OWN: tl.constexpr,
    SHARES: tl.constexpr,
    EMPTY: tl.constexpr,
    POLLS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    HELD: tl.constexpr,
):
    """Grid (splits, B*H, blocks of queries). Contiguous ``qkv [B, TOKENS, 3*HEADS*DIM]``.

    Rings ``[B, H, FRAMES, TOKENS, width]``; ``cos, sin [TOKENS, DIM/2]`` float32. ``SHARE`` tiles of ``BLOCK_N`` rows
    a split; the last split also takes what is left over, in a tile of ``REST`` rows (0: nothing is), and the frame's
    own, in tiles of ``OWN``. Writes ``out [B, TOKENS, H, DIM]``; where told to store, slot ``slot`` of the rings;
    with ``KEEP_K`` the normalised, rotated keys to ``own_k [B, H, TOKENS, DIM]``. ``K_TURN, V_TURN``: the ring is in
    the Hadamard basis, into which queries, keys and values are turned, and their sums back.

    With more than one split: int32 ``parts``, which for every split holds float32 sums ``[B*H, TOKENS, DIM]``, and
    after those of all splits totals ``[B*H, TOKENS]``; ``arrived`` int32 ``[2, blocks of queries, B*H]``, counts, 0
    before and after, and epochs. Of heads up to 64 ``parts`` are ``EMPTY`` before and after, and programs meet as
    :func:`combine_share` says; of larger ones as :func:`shares_to_combine` says. ``SHARES`` and ``POLLS`` belong to
    both. ``programs`` is B*H; ``scale`` includes log2(e).

    ``DEPENDENT``: launched as ``harness.kernels.launch`` describes. Then a program has the first ``HELD`` of its tiles
    in registers, and the others asked for (:func:`ask_for_share`), when its queries come. ``slot``, ``cos``, ``sin``
    and other frames' K and V must come from before the last kernel not launched so.
    """
    K_PAIRED: tl.constexpr = K_FORMAT == "e2m1"
    V_PAIRED: tl.constexpr = V_FORMAT == "e2m1"
    V_WIDTH: tl.constexpr = DIM // 2 if V_PAIRED else DIM
    K_WIDTH: tl.constexpr = DIM // 2 if K_PAIRED else DIM
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    LENGTH: tl.constexpr = FRAMES * TOKENS
    PAST: tl.constexpr = LENGTH - TOKENS
    TILES: tl.constexpr = PAST // BLOCK_N
    COUNTED: tl.constexpr = DIM > 64
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    queries = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = queries < TOKENS
    k_data, v_data = k_ring + row * (LENGTH * K_WIDTH), v_ring + row * (LENGTH * V_WIDTH)
    K_SCALES: tl.constexpr = FRAMES if K_PER == "frame" else LENGTH * (DIM // 32 if K_PER == "block" else 1)
    V_SCALES: tl.constexpr = FRAMES if V_PER == "frame" else LENGTH * (DIM // 32 if V_PER == "block" else 1)
    k_factors, v_factors = k_scales + row * K_SCALES, v_scales + row * V_SCALES
    part = qkv + batch * (TOKENS * STRIDE) + head * DIM
    begin, end = split * SHARE, tl.minimum((split + 1) * SHARE, TILES)
    token = tl.arange(0, OWN)
    latest = split == SPLITS - 1
    current = tl.load(slot, cache_modifier=".cg").to(tl.int32)  # not from L1, which would keep it
    start = (current + 1) * TOKENS
    cosine, sine = load_angles(cos, sin, queries, asked, DIM)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    held_k0, held_k1, held_v0, held_v1 = (), (), (), ()
    for ahead in tl.static_range(HELD):
        first = tl.minimum(begin + ahead, TILES - 1) * BLOCK_N
        k0, k1 = load_tile(k_data, k_factors, start, first, K_FORMAT, K_PER, BLOCK_N, DIM, TOKENS, LENGTH, False, DTYPE)
        v0, v1 = load_tile(v_data, v_factors, start, first, V_FORMAT, V_PER, BLOCK_N, DIM, TOKENS, LENGTH, False, DTYPE)
        held_k0, held_k1, held_v0, held_v1 = held_k0 + (k0,), held_k1 + (k1,), held_v0 + (v0,), held_v1 + (v1,)
    if DEPENDENT:
        K_BYTES: tl.constexpr = K_WIDTH * k_ring.dtype.element_ty.primitive_bitwidth // 8
        V_BYTES: tl.constexpr = V_WIDTH * v_ring.dtype.element_ty.primitive_bitwidth // 8
        ask_for_share(
            k_data,
            k_factors,
            v_data,
            v_factors,
            start,
            begin + HELD,
            end,
            K_BYTES,
            K_FORMAT != "plain" and K_PER == "block",
            V_BYTES,
            V_FORMAT != "plain" and V_PER == "block",
            BLOCK_N,
            DIM,
            TOKENS,
            LENGTH,
        )
        tl.extra.cuda.gdc_wait()
    counter = arrived + tl.program_id(2) * programs + row
    epoch = counter + tl.num_programs(2) * programs
    before = tl.load(epoch, cache_modifier=".cg") if SPLITS > 1 and COUNTED else 0
    raw = load_rows(part, queries, asked, STRIDE, DIM)
    # With the queries, not after them: the last split would be late. Registers hold none of larger heads.
    PIECES: tl.constexpr = (TOKENS + OWN - 1) // OWN
    KEPT: tl.constexpr = 0 if COUNTED else min(PIECES, 128 // DIM)
    kept_keys, kept_values = (), ()
    for piece in tl.static_range(KEPT):
        rows = piece * OWN + token
        ok = (rows < TOKENS) & latest
        kept_keys += (load_rows(part + HEADS * DIM, rows, ok, STRIDE, DIM),)
        kept_values += (load_rows(part + 2 * HEADS * DIM, rows, ok, STRIDE, DIM),)
    # Behind these loads, since all threads wait for what it gives.
    begun = tl.atomic_add(counter, 1, sem="relaxed", scope="gpu") if SPLITS > 1 and not COUNTED else 0
    q = rotated(raw, cosine, sine, BLOCK_M, DIM, EPS)
    if K_TURN:
        q = turned(q, DIM).to(q.dtype)
    q0, q1 = halves_of(q, K_PAIRED, BLOCK_M, DIM)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sum0 = tl.zeros((BLOCK_M, V_WIDTH), tl.float32)
    sum1 = tl.zeros((BLOCK_M, V_WIDTH), tl.float32)
    # Of the frame's own values, which are not paired.
    own_sum = tl.zeros((BLOCK_M, DIM if V_PAIRED else 16), tl.float32)
    for ahead in tl.static_range(HELD):
        if begin + ahead < end:
            total, sum0, sum1 = attend_tile(
                q0, q1, held_k0[ahead], held_k1[ahead], held_v0[ahead], held_v1[ahead], None,
                total, sum0, sum1, scale, False, K_PAIRED, V_PAIRED,
            )  # fmt: skip
    for tile in range(begin + HELD, end):
        first = tile * BLOCK_N
        k0, k1 = load_tile(k_data, k_factors, start, first, K_FORMAT, K_PER, BLOCK_N, DIM, TOKENS, LENGTH, False, DTYPE)
        v0, v1 = load_tile(v_data, v_factors, start, first, V_FORMAT, V_PER, BLOCK_N, DIM, TOKENS, LENGTH, False, DTYPE)
        total, sum0, sum1 = attend_tile(
            q0, q1, k0, k1, v0, v1, None, total, sum0, sum1, scale, False, K_PAIRED, V_PAIRED
        )
    if latest:
        if REST > 0:
            past = TILES * BLOCK_N
            rest_k0, rest_k1 = load_tile(
                k_data, k_factors, start, past, K_FORMAT, K_PER, REST, DIM, TOKENS, LENGTH, True, DTYPE
            )
            rest_v0, rest_v1 = load_tile(
                v_data, v_factors, start, past, V_FORMAT, V_PER, REST, DIM, TOKENS, LENGTH, True, DTYPE
            )
            known = past + tl.arange(0, REST) < PAST
            total, sum0, sum1 = attend_tile(
                q0, q1, rest_k0, rest_k1, rest_v0, rest_v1, known, total, sum0, sum1, scale, True, K_PAIRED, V_PAIRED
            )
        own = own_sum if V_PAIRED else sum0
        if COUNTED:
            total, own = attend_and_store_own(
                q, part, cos, sin, current, total, own, scale, tl.program_id(2) == 0,
                k_data, k_factors, v_data, v_factors, own_k + row * (TOKENS * DIM),
                HEADS, TOKENS, OWN, DIM, EPS, K_TURN, V_TURN,
                K_FORMAT, K_STORE, K_LARGEST, K_EMAX, K_THRESHOLD,
                V_FORMAT, V_STORE, V_LARGEST, V_EMAX, V_THRESHOLD, KEEP_K,
            )  # fmt: skip
        else:
            total, own = attend_own(
                q, part, kept_keys, kept_values, cos, sin, total, own, scale,
                KEPT, HEADS, TOKENS, OWN, DIM, EPS, K_TURN, V_TURN,
            )  # fmt: skip
        if V_PAIRED:
            own_sum = own
        else:
            sum0 = own
    if V_PAIRED:  # noqa: SIM108 (a compile-time branch)
        result = own_sum + tl.reshape(tl.join(sum0, sum1), (BLOCK_M, DIM))
    else:
        result = sum0
    if V_TURN:  # of weighted means, which are in the range of any dtype that the values are in
        most = tl.maximum(total, 1e-30)[:, None]
        result = turned((result / most).to(DTYPE), DIM) * most
    columns = tl.arange(0, DIM)
    out += (batch * TOKENS * HEADS + head) * DIM
    if SPLITS == 1:
        values = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + queries[:, None] * (HEADS * DIM) + columns[None, :], values, mask=asked[:, None])
    else:
        stride = programs * TOKENS
        totals = parts + SPLITS * stride * DIM
        place = split * stride + row * TOKENS + queries
        tl.store(
            parts + place[:, None] * DIM + columns[None, :], result.to(tl.int32, bitcast=True), mask=asked[:, None]
        )
        tl.store(totals + place, total.to(tl.int32, bitcast=True), mask=asked)
        ROWS: tl.constexpr = BLOCK_M // SHARES
        if COUNTED:
            tl.debug_barrier()  # all threads' sums are written before one thread says so
            mine = shares_to_combine(counter, epoch, before, split, SPLITS, SHARES, POLLS)
        else:
            mine = tl.where(split < SHARES, 1 << split, 0)
            if (begun & 0xFFFF) == SPLITS - 1:
                mine |= begun >> 16
                tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
        for share in range(SHARES):
            if (mine >> share) & 1:
                first = tl.program_id(2) * BLOCK_M + share * ROWS
                if COUNTED:
                    combined = first + tl.arange(0, ROWS)
                    rows = row * TOKENS + combined
                    combine_arrived(
                        parts, totals, out, rows, stride, combined, combined < TOKENS, HEADS, DIM, SPLITS, ROWS
                    )
                else:
                    combine_share(
                        parts, totals, out, first, row * TOKENS, stride, counter, share,
                        HEADS, TOKENS, DIM, SPLITS, ROWS, EMPTY, POLLS,
                    )  # fmt: skip
    # Not before the sums, which others wait for. Every block of queries is here; one stores.
    if (K_STORE or V_STORE or KEEP_K) and not COUNTED and latest & (tl.program_id(2) == 0):
        store_own(
            part, kept_keys, kept_values, cos, sin, current, k_data, k_factors, v_data, v_factors,
            own_k + row * (TOKENS * DIM), KEPT, HEADS, TOKENS, OWN, DIM, EPS, K_TURN, V_TURN,
            K_FORMAT, K_STORE, K_LARGEST, K_EMAX, K_THRESHOLD,
            V_FORMAT, V_STORE, V_LARGEST, V_EMAX, V_THRESHOLD, KEEP_K,
        )  # fmt: skip
