// Product of BF16 activations with a packed weight, MX or BF16: out[m][n] = sum_k x[m][k] * W[n][k] + bias[n], or SiLU
// of it.
//
// For few rows M (a frame's 64), where reading the weight once decides the time; of many see mx_unpack.cu. Written for
// sm_90.
//
//  * Rows of W are the A operand of wgmma.m64n64k16, rows of x the B operand. Weights are decoded into A fragments in
//    registers (mx_decode.cuh), 16 rows a warp; they are packed so that a lane finds its fragments of a tile in 16
//    bytes. The tensor cores read x from shared memory, once for the 64 rows of a warpgroup, while the warps decode on.
//  * CL blocks share TILES row tiles of W and split K; CN such groups of blocks, side by side along N, are a cluster. A
//    block's warps split its row tiles WR ways (a multiple of 4: warpgroups) and its part of K WK ways; where TILES are
//    fewer than WR * RT, the last warps multiply what nobody reads. Every warp fetches its own part of W by bulk copies,
//    up to ST stages ahead: no block-wide synchronisation, and most of what a multiprocessor will need is under way at once.
//  * A block holds its part of x in shared memory (TMA, 128-byte swizzle). The CN blocks of a cluster that need the same
//    part fetch a share of it each and send it to all (multicast): x is read once a cluster.
//  * Partial sums go to the block that owns the output, through distributed shared memory, as copies that a barrier
//    there waits for, and are added there in the order of their ranks: the result is the same every time.
//
// Norms need no kernel of their own. What they normalise, the residual stream h, is written by the product in front of
// them (RESIDUAL), which has a part of each row only, so it cannot know the norm, but h o (1 + scale) it can, and the sum
// of its part's squares. The product behind (NORM) multiplies W with that, and with the shift as one more row of x:
// W (h o (1 + scale) / rms(h) + shift) = (W (h o (1 + scale))) / rms(h) + W shift. What either has to read and to add up
// beside is done by a warp more, so that no other waits for memory.
//
// Compile-time parameters (cuda_config.py), beside those of mx_decode.cuh: MT tiles of 8 rows of x (1, 2, 4, 8, 16 or
// 32); RT row tiles a warp; TILES, WR, WK, CL, CN as above; GS groups of 64 inputs in a stage; ST stages; GX groups of x a block
// holds; OVERLAY partial sums arrive where x and W were; PDL programmatic dependent launch; BLOCKS a multiprocessor; SILU
// the outputs, rounded to BF16, go through SiLU and are rounded again; NORM x is h o (1 + scale) and, MT * 8 rows on, the
// shift (one block along M); RESIDUAL the outputs, rounded to BF16, times gate are added to the residual stream (N a
// multiple of 16).

constexpr int WARPS = WR * WK;
constexpr int THREADS = (WARPS + NORM + RESIDUAL) * 32;
constexpr int XTILE = XT * 8 * 128;            // bytes of 64 inputs of every row of x
constexpr int STAGE = RT * GS * TILE;
constexpr int UNITS = TILES * MT;              // a unit is the 16 by 8 outputs of one accumulator fragment
constexpr int OWN_M = (MT + CL - 1) / CL;      // RESIDUAL: a block adds up every CL-th tile of rows, whole rows of its W
constexpr int OWNED = RESIDUAL ? TILES * OWN_M : (UNITS + CL - 1) / CL;  // units a block adds up, else every CL-th
constexpr int PEERS = CN == 1 ? 1 : CN == 2 ? 1 | 1 << CL : 1 | 1 << CL | 1 << 2 * CL | 1 << 3 * CL;  // with rank 0's x
constexpr int SLOTS = CL * WK;                 // partial sums of a unit
constexpr int W_AT = GX * XTILE;
constexpr int W_END = W_AT + WARPS * ST * STAGE;
constexpr int PARTIAL = SLOTS > 1 ? SLOTS * OWNED * 512 : 0;
constexpr int PARTIAL_AT = OVERLAY ? 0 : W_END;
constexpr int BARRIERS_AT = OVERLAY ? (W_END > PARTIAL ? W_END : PARTIAL) : W_END + PARTIAL;
constexpr int BARRIERS = GX + WARPS * ST + 1 + NORM;  // of x, of W, of partial sums, of norms
constexpr int ROWS_AT = BARRIERS_AT + BARRIERS * 8;   // floats: NORM 1 / rms of each row, RESIDUAL squares of units' rows
constexpr int EPILOGUES = SLOTS > 1 ? (OWNED + WARPS - 1) / WARPS : RT;  // units a warp adds up, or its row tiles
constexpr bool BIAS_EARLY = EPILOGUES <= 4;  // as many as registers hold
constexpr bool BRANCH_EARLY = SLOTS > 1 && EPILOGUES <= 2;
static_assert(!(NORM && RESIDUAL) && !(NORM && MT > 8), "a norm has 64 rows at most");
static_assert(TILES <= WR * RT && TILES > (WR - 4) * RT, "every warpgroup has rows");

// What NORM and RESIDUAL need beside x and out. Everything is BF16 but sums of squares.
struct Stream {
    const u16* before;   // RESIDUAL: h [M][N] to which is added
    const u16* gate;     // [N], as the next two
    const u16* scale;
    const u16* shift;
    u16* modulated;      // [MT * 8 + 1][N]: of the outputs h o (1 + scale), and shift
    float* squares;      // [M][clusters]: sums of squares of the rows of h
    Squares given;       // NORM: of what is x now
};

// Unit `owned` of block `rank`: a row tile of W and a tile of 8 rows of x; which block owns a unit, and as which.
struct Unit {
    int tile, m;
};

__device__ __forceinline__ Unit unit_of(int owned, int rank) {
    if (RESIDUAL) return {owned / OWN_M, owned % OWN_M * CL + rank};
    return {(owned * CL + rank) / MT, (owned * CL + rank) % MT};
}

__device__ __forceinline__ int owner_of(int tile, int m) {
    return RESIDUAL ? m % CL : (tile * MT + m) % CL;
}

__device__ __forceinline__ int place_of(int tile, int m) {
    return RESIDUAL ? tile * OWN_M + m / CL : (tile * MT + m) / CL;
}

__device__ __forceinline__ int units_of(int rank) {
    return RESIDUAL ? TILES * ((MT + CL - 1 - rank) / CL) : (UNITS + CL - 1 - rank) / CL;
}

// All warps that add up the same sums (and the rest of their cluster) have come this far.
__device__ __forceinline__ void cluster_sync() {
    if constexpr (CL > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
}

// Two outputs in BF16, turned so that a lane holds row `lane / 4` of x and outputs 2 * (lane % 4) and the next.
__device__ __forceinline__ u32 turned(float first, float second) {
    u32 pair = to_bf16(first, second);
    if constexpr (SILU) pair = to_bf16(silu(low_of(pair)), silu(high_of(pair)));
    return transpose(pair);
}

__device__ __forceinline__ void store_pair(u16* out, u32 pair, int m, int n, int M, int N) {
    if (m >= M || n >= N) return;
    u16* to = out + static_cast<long long>(m) * N + n;
    if (N % 2 == 0) {  // then n + 1 < N, and the address is a multiple of 4
        *reinterpret_cast<u32*>(to) = pair;
    } else {
        to[0] = static_cast<u16>(pair);
        if (n + 1 < N) to[1] = static_cast<u16>(pair >> 16);
    }
}

// What a lane needs of the residual stream for a unit: of a row of h, two outputs and those 8 further on.
struct Branch {
    u32 before[2], gate[2], scale[2];

    __device__ __forceinline__ void load(const Stream& stream, int m, int n, int M, int N) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool inside = m < M && n < N;
            before[i] = inside ? read_fresh(stream.before + static_cast<long long>(m) * N + n + 8 * i) : 0;
            gate[i] = inside ? read_fresh(stream.gate + n + 8 * i) : 0;
            scale[i] = inside ? read_fresh(stream.scale + n + 8 * i) : 0;
        }
    }
};

// One unit of outputs: rows n, n + 8 of W by rows m of x, in BF16, as `turned` gives them.
struct Outputs {
    u32 pairs[2];

    __device__ __forceinline__ Outputs(const float (&c)[4], const Bias& bias, float output_scale) {
        const float above = __uint_as_float(bias.above << 16), below = __uint_as_float(bias.below << 16);
        pairs[0] = turned(fmaf(c[0], output_scale, above), fmaf(c[1], output_scale, above));
        pairs[1] = turned(fmaf(c[2], output_scale, below), fmaf(c[3], output_scale, below));
    }

    __device__ __forceinline__ void store(u16* out, int m, int n, int M, int N) const {
        store_pair(out, pairs[0], m, n, M, N);
        store_pair(out, pairs[1], m, n + 8, M, N);
    }

    // The residual stream with these added to it, and the sums of its squares to `squares`, 8 floats in shared memory.
    __device__ __forceinline__ void add(u16* out, const Stream& stream, const Branch& branch, u32 squares, int m, int n,
                                        int M, int N, int lane) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 before = branch.before[i], gate = branch.gate[i], scale = branch.scale[i];
            const u32 h = to_bf16(fmaf(low_of(gate), low_of(pairs[i]), low_of(before)),
                                  fmaf(high_of(gate), high_of(pairs[i]), high_of(before)));
            const float first = low_of(h), second = high_of(h);
            sum = fmaf(first, first, fmaf(second, second, sum));
            store_pair(out, h, m, n + 8 * i, M, N);
            const u32 modulated = to_bf16(fmaf(first, low_of(scale), first), fmaf(second, high_of(scale), second));
            store_pair(stream.modulated, modulated, m, n + 8 * i, M, N);
        }
        sum += __uint_as_float(from_lane(bits_of(sum), lane ^ 1));
        sum += __uint_as_float(from_lane(bits_of(sum), lane ^ 2));
        if (lane % 4 == 0) store4(squares + lane / 4 * 4, n < N ? sum : 0.0f);
    }
};

// A warp's partial sums, each unit to the block that owns it, where the barrier at `bar` waits for them: for the bytes that
// come from other blocks, and for the warps of its own.
__device__ __forceinline__ void send(const float (&acc)[RT][XT][4], u32 partial, u32 bar, int first_tile, int slot,
                                     int rank, int place, int lane) {
#pragma unroll
    for (int r = 0; r < RT; ++r) {
        if (TILES < WR * RT && first_tile + r >= TILES) break;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const u32 to = partial + (slot * OWNED + place_of(first_tile + r, m)) * 512 + lane * 16;
            const int owner = owner_of(first_tile + r, m);
            if (CL == 1 || owner == rank) {
                store16(to, acc[r][m]);
            } else {
                const int block = place * CL + owner;
                store16_in(address_in(to, block), acc[r][m], address_in(bar, block));
            }
        }
    }
    if (CL > 1) {
        __syncwarp();
        if (lane == 0) barrier_arrive(bar);
    }
}

// The warp more: meets the others of its block and cluster wherever these do.
__device__ __forceinline__ void help(const Stream& stream, u32 rows, u32 norms_bar, int tile0, int m0, int rank, int M,
                                     int N, int lane) {
    if (CL * CN > 1) cluster_arrive();
    if (CN > 1) cluster_wait();
    __syncthreads();
    if (PDL) previous_is_over();
    if constexpr (NORM) {
        norms(stream.given, rows, M, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(norms_bar);
    } else if (rank == 0) {
        for (int n = tile0 * 16 + lane * 2; n < min(N, (tile0 + TILES) * 16); n += 64)
            store_pair(stream.modulated, read_fresh(stream.shift + n), MT * 8, n, MT * 8 + 1, N);
    }
    if constexpr (SLOTS > 1) {
        if (CL > 1 && CN == 1) cluster_wait();
        if (OVERLAY) cluster_sync();
        if (CL == 1) __syncthreads();
    }
    if constexpr (RESIDUAL) {
        __syncthreads();  // the squares are there
        for (int i = lane; i < OWN_M * 8; i += 32) {
            const int m = i / 8 * CL + rank, row = m0 + m * 8 + i % 8;
            if (m >= MT || row >= M) break;
            float sum = 0.0f;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                sum += __uint_as_float(load4(rows + (tile * OWN_M * 8 + i) * 4));
            stream.squares[static_cast<long long>(row) * (gridDim.x / CL) + blockIdx.x / CL] = sum;
        }
    }
}

KERNEL(THREADS, CL * CN, BLOCKS)
mx_linear(const __grid_constant__ TensorMap x_map, const u8* __restrict__ weight, const u16* __restrict__ bias,
          u16* __restrict__ out, int M, int N, int groups, float output_scale, const Stream stream) {
    const u32 base = shared_memory();
    const int lane = threadIdx.x % 32, warp = same_in_warp(threadIdx.x / 32);
    const int wr = warp % WR, wk = warp / WR;
    const int rank = blockIdx.x % CL, place = blockIdx.x / CL % CN;  // along K and N within the cluster
    const int tile0 = blockIdx.x / CL * TILES, m0 = blockIdx.y * MT * 8;

    // This block's groups of 64 inputs, and this warp's.
    const int block_lo = groups * rank / CL, block_groups = groups * (rank + 1) / CL - block_lo;
    const int lo = block_groups * wk / WK, hi = block_groups * (wk + 1) / WK;

    const u32 x_bars = base + BARRIERS_AT, w_bars = x_bars + (GX + warp * ST) * 8;
    const u32 sums_bar = x_bars + (GX + WARPS * ST) * 8, norms_bar = sums_bar + 8;
    const u32 w_shared = base + W_AT + warp * ST * STAGE;
    const int my_tile = tile0 + wr * RT;
    const int end = TILES < WR * RT ? min(tile0 + TILES, (N + 15) / 16) : (N + 15) / 16;
    const int tiles = min(RT, max(0, end - my_tile));  // fewer where the cluster's or N end; others' sums go nowhere
    const u8* w_global = weight + (static_cast<long long>(my_tile) * groups + block_lo) * TILE;
    const u64 policy = cache_policy(gridDim.y == 1);

    const auto fetch = [&](int stage) {
        const int first = lo + stage * GS, count = min(GS, hi - first);
        if (lane != 0 || count <= 0) return;
        const u32 bar = w_bars + stage % ST * 8, to = w_shared + stage % ST * STAGE;
        barrier_expect(bar, count * TILE * tiles);
#pragma unroll 1
        for (int r = 0; r < tiles; ++r)
            copy_bytes(to + r * GS * TILE, w_global + (static_cast<long long>(r) * groups + first) * TILE, count * TILE,
                       bar, policy);
    };

    const auto fetch_x = [&] {
        if (lane != 0) return;
        if (PDL) previous_is_over();  // it may be writing x
        for (int i = warp; i < block_groups; i += WARPS) {
            barrier_expect(x_bars + i * 8, XTILE);
            const u32 to = base + i * XTILE, bar = x_bars + i * 8;
            if constexpr (CN == 1) {
                copy_x(to, &x_map, (block_lo + i) * 64, m0, bar);
            } else if (i % CN == place) {
                copy_x_to(to, &x_map, (block_lo + i) * 64, m0, bar, PEERS << rank);
            }
        }
    };

    if (PDL) next_may_begin();
    if constexpr (NORM || RESIDUAL) {
        if (warp == WARPS) {
            help(stream, base + ROWS_AT, norms_bar, tile0, m0, rank, M, N, lane);
            return;
        }
    }
    if (lane == 0) {
        if (warp == 0) prefetch_map(&x_map);
        for (int i = 0; i < ST; ++i) barrier_init(w_bars + i * 8);
        for (int i = warp; i < GX; i += WARPS) barrier_init(x_bars + i * 8);
        if (CL > 1 && warp == 0) {
            barrier_init(sums_bar, WARPS + 1);
            barrier_expect(sums_bar, units_of(rank) * (SLOTS - WK) * 512);
        }
        if (NORM && warp == 0) barrier_init(norms_bar);
        barriers_ready();
    }
    __syncwarp();
    if (!PDL && CN == 1) fetch_x();  // from L2, and needed with the first of W: before W
#pragma unroll 1
    for (int i = 0; i < ST; ++i) fetch(i);
    if (CL * CN > 1) cluster_arrive();  // a block may only write to blocks whose barriers are ready
    if (CN > 1) cluster_wait();
    if (PDL || CN > 1) fetch_x();
    __syncthreads();  // the barriers of x are ready

    // On their way while the products are computed: from memory they would be waited for at the end.
    Bias biases[EPILOGUES];
    Branch branches[RESIDUAL ? EPILOGUES : 1];
#pragma unroll
    for (int i = 0; i < EPILOGUES; ++i) {
        if (!BIAS_EARLY) break;
        const Unit unit = unit_of(warp + i * WARPS, rank);
        biases[i].load(bias, SLOTS > 1 ? tile0 + unit.tile : my_tile + i, N, lane);
        keep(biases[i].above);
        keep(biases[i].below);
    }
    if constexpr (RESIDUAL) {
        if (PDL) previous_is_over();
        if constexpr (BRANCH_EARLY) {
#pragma unroll
            for (int i = 0; i < EPILOGUES; ++i) {
                const Unit unit = unit_of(warp + i * WARPS, rank);
                branches[i].load(stream, m0 + unit.m * 8 + lane / 4, (tile0 + unit.tile) * 16 + lane % 4 * 2, M, N);
            }
        }
    }

    float acc[RT][XT][4];
    Half halves[2];

    int group = lo;
    for (int stage = 0; group < hi; ++stage) {
        barrier_wait(w_bars + stage % ST * 8, stage / ST % 2);
        const int last = min(group + GS, hi);
        for (u32 w = w_shared + stage % ST * STAGE; group < last; ++group, w += TILE) {
            barrier_wait(x_bars + group * 8, 0);
            multiply_group(acc, halves, w, base + group * XTILE, lane, group > lo);
        }
        __syncwarp();  // every lane has read the stage
        fetch(stage + ST);
        __syncwarp();
    }
    products_wait<0>();
#pragma unroll
    for (int r = 0; r < RT; ++r)
#pragma unroll
        for (int m = 0; m < XT; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                keep(acc[r][m][i]);
                if (lo >= hi) acc[r][m][i] = 0.0f;
            }

    if constexpr (NORM) {
        barrier_wait(norms_bar, 0);
        normalise(acc, base + ROWS_AT, lane);
    }

    // A unit's outputs, the `i`th of this warp, to where they go.
    const auto finish = [&](const float (&sum)[4], int i, int tile, int m, int owned) {
        const Outputs outputs(sum, biases[i], output_scale);
        const int row = m0 + m * 8 + lane / 4, n = (tile0 + tile) * 16 + lane % 4 * 2;
        if constexpr (RESIDUAL) {
            if (!BRANCH_EARLY) branches[i].load(stream, row, n, M, N);
            outputs.add(out, stream, branches[i], base + ROWS_AT + owned * 32, row, n, M, N, lane);
        } else {
            outputs.store(out, row, n, M, N);
        }
    };

    if constexpr (SLOTS == 1) {
#pragma unroll
        for (int r = 0; r < RT; ++r) {
            if (TILES < WR * RT && wr * RT + r >= TILES) break;
            if (!BIAS_EARLY) biases[r].load(bias, my_tile + r, N, lane);
#pragma unroll
            for (int m = 0; m < MT; ++m) finish(acc[r][m], r, wr * RT + r, m, place_of(wr * RT + r, m));
        }
    } else {
        if (CL > 1 && CN == 1) cluster_wait();
        if (OVERLAY) cluster_sync();  // all have read what the partial sums will replace
        const u32 partial = base + PARTIAL_AT;
        send(acc, partial, sums_bar, wr * RT, rank * WK + wk, rank, place, lane);
        if constexpr (CL > 1) {
            barrier_wait(sums_bar, 0);
        } else {
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < EPILOGUES; ++i) {
            const int owned = warp + i * WARPS;
            const Unit unit = unit_of(owned, rank);
            if (owned >= OWNED || unit.tile >= TILES) break;
            if (RESIDUAL && unit.m >= MT) continue;
            if (!BIAS_EARLY) biases[i].load(bias, tile0 + unit.tile, N, lane);
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const uint4 part = load16(partial + (slot * OWNED + owned) * 512 + lane * 16);
                sum[0] += __uint_as_float(part.x);
                sum[1] += __uint_as_float(part.y);
                sum[2] += __uint_as_float(part.z);
                sum[3] += __uint_as_float(part.w);
            }
            finish(sum, i, unit.tile, unit.m, owned);
        }
    }

    if (RESIDUAL) __syncthreads();  // the squares are there
}
