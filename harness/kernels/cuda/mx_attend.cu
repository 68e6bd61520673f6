// A frame's attention from the residual stream on: projection of queries, keys and values, their norms and rotation, attention
// to the window and to the frame's own, and these into the window's ring. Of one clip, 64 tokens a frame, heads of 64; written
// for sm_90.
//
// A cluster of CL blocks has one head. Each of its blocks has 13 warps: three warpgroups, of queries, keys and values first,
// and a warp more, which does for the norm in front what it does in mx_linear.cu.
//
//  1. Projection. The blocks split K. A warpgroup multiplies the head's 64 rows of its W with the block's part of x, as
//     mx_linear.cu does. Partial sums go, through distributed shared memory, to the block that owns the tokens: every CL-th
//     tile of 8.
//  2. Of its tokens a block adds up the sums in the order of ranks, normalises and rotates queries and keys, sends queries to
//     all blocks of the cluster and keeps keys and values.
//  3. Attention. Each warpgroup of the cluster takes an equal part of the window, in order of age, and the third one of a
//     block its own keys and values. Queries are A fragments in registers; keys and values lie in shared memory, and are
//     decoded there if they are stored in an MX format. Scores need no running maximum: see window.py.
//  4. Sums of weighted values, and of weights, are added up in a block, go to the block that owns these outputs, and are added
//     there, always in the same order.
//
// Nothing depends on which block or warp comes first. What lies in the ring's slot of this frame has left the window and is
// read by nobody, so the frame's own may be stored there.
//
// Compile-time parameters beside those of mx_decode.cuh and mx_product.cuh (MT 8, NORM, RT 1, GS 1): CL; GX groups of 64 inputs a
// block holds; FETCHED groups of W that arrive together, WAITING such fetches a warp has on their way; K_BITS, V_BITS of what
// the ring stores (16, 8 or 4), K_MANTISSA, V_MANTISSA of its elements (3 of E4M3, 2 of E5M2, 1 of E2M1); STAGES times 64 rows
// of the window that a warpgroup has on their way; K_STORE, V_STORE whether the frame's own go into the ring; K_THRESHOLD,
// V_THRESHOLD see `biased_exponent`; PDL programmatic dependent launch.

constexpr int WARPS = 12;                      // that multiply
constexpr int THREADS = (WARPS + 1) * 32;
constexpr int XTILE = XT * 8 * 128;
constexpr int OWN_M = (MT + CL - 1) / CL;      // tiles of 8 tokens a block owns
constexpr int OWN_KEYS = (OWN_M * 8 + 15) / 16 * 16;  // with padding
constexpr int WORKERS = 3 * CL;                // warpgroups of a head

constexpr int ROW = 128;                       // bytes of 64 BF16
constexpr int FRAME = 64 * ROW;                // and of a frame's keys or values
constexpr int W_AT = GX * XTILE;
constexpr int W_STAGE = FETCHED * TILE;
constexpr int OPERANDS = W_AT + WARPS * WAITING * W_STAGE;
// Where operands were, once all blocks have multiplied: queries, own keys and values, the window.
constexpr int Q_AT = 0;
constexpr int OWN_K_AT = FRAME;
constexpr int OWN_V_AT = OWN_K_AT + OWN_KEYS * ROW;
constexpr int STAGES_AT = OWN_V_AT + OWN_KEYS * ROW;
constexpr int K_BYTES = FRAME * K_BITS / 16, V_BYTES = FRAME * V_BITS / 16;
constexpr int K_SCALES = K_BITS < 16 ? 128 : 0, V_SCALES = V_BITS < 16 ? 128 : 0;  // bytes of a frame
constexpr int STAGE = (K_BYTES + V_BYTES + K_SCALES + V_SCALES + 1023) / 1024 * 1024;
constexpr int DECODED_AT = STAGES_AT + 3 * STAGES * STAGE;
constexpr int DECODED = (K_BITS < 16 ? FRAME : 0) + (V_BITS < 16 ? FRAME : 0);  // of a warpgroup
constexpr int WINDOW_END = DECODED_AT + 3 * DECODED;
// Partial sums: of the projection, and later, where these were, of weighted values and weights.
constexpr int OWNED = (32 + CL - 1) / CL;      // units of 16 queries by 8 columns a block adds up
constexpr int PARTIAL_AT = OPERANDS > WINDOW_END ? OPERANDS : WINDOW_END;
constexpr int PROJECTED = CL * OWN_M * WARPS * 512;
constexpr int TOTALS_AT = PARTIAL_AT + CL * OWNED * 512;
constexpr int ATTENDED = CL * (OWNED * 512 + 256);
constexpr int BARRIERS_AT = PARTIAL_AT + (PROJECTED > ATTENDED ? PROJECTED : ATTENDED);
constexpr int BARRIERS = GX + WARPS * WAITING + 4 + 3 * STAGES;
constexpr int ROWS_AT = BARRIERS_AT + BARRIERS * 8;  // 1 / rms of each row, floats
constexpr int END = ROWS_AT + 256;
static_assert(STAGES * STAGE >= FRAME * 2 + 256, "a warpgroup's sums find room where its share of the window was");
static_assert(CL > 1 && CL <= 8 && MT == 8 && NORM && RT == 1 && GS == 1, "a head's blocks meet in a cluster");

// Keys or values as a ring stores them, [heads][frames][64][64], and their scales, [heads][frames][64][2].
struct Ring {
    u8* data;
    u8* scales;
};

struct Window {
    Ring k, v;
    const long long* slot;  // of this frame
    const float* cos;       // [64][32], as sin
    const float* sin;
    int heads, frames;
    float scale;  // of scores, for powers of two
    float eps;    // of the norms of queries and keys
};

// The part of the window that a warpgroup attends to, in pieces of 16 rows, up to four of which are a stage.
struct Share {
    int slot, frames, begin, end;

    __device__ __forceinline__ Share(const Window& window, int worker)
        : slot(static_cast<int>(*window.slot)),
          frames(window.frames),
          begin((window.frames - 1) * 4 * worker / WORKERS),
          end((window.frames - 1) * 4 * (worker + 1) / WORKERS) {}

    __device__ __forceinline__ int stages() const {
        return (end - begin + 3) / 4;
    }

    __device__ __forceinline__ int pieces(int stage) const {
        return min(4, end - begin - stage * 4);
    }

    // The row in the ring at which a piece begins.
    __device__ __forceinline__ int row(int head, int stage, int piece) const {
        const int place = begin + stage * 4 + piece, frame = slot + 1 + place / 4;
        return (head * frames + (frame >= frames ? frame - frames : frame)) * 64 + place % 4 * 16;
    }
};

// Bytes `at` of row `row` of 64 BF16, as TMA swizzles rows.
__device__ __forceinline__ u32 place_in_rows(u32 rows, int row, int at) {
    return rows + row * ROW + ((at / 16 ^ row % 8) * 16) + at % 16;
}

__device__ __forceinline__ void add_to(float (&sum)[4], const uint4& part) {
    sum[0] += __uint_as_float(part.x);
    sum[1] += __uint_as_float(part.y);
    sum[2] += __uint_as_float(part.z);
    sum[3] += __uint_as_float(part.w);
}

// Two elements of BITS_ bits with `mantissa` bits of fraction, in the low bits of both halves of `pair`, where BF16 has sign
// and magnitude: their values times 2^(BIAS - 127).
template <int BITS_, int MANTISSA>
__device__ __forceinline__ u32 placed(u32 pair) {
    constexpr u32 MAGNITUDE = ((1u << (BITS_ - 1)) - 1) * 0x10001u, SIGN = (1u << (BITS_ - 1)) * 0x10001u;
    return (pair & MAGNITUDE) << (7 - MANTISSA) | (pair & SIGN) << (16 - BITS_);
}

// An E8M0 byte as two BF16.
__device__ __forceinline__ u32 scale_pair(u32 byte) {
    return (byte == 255 ? 0x7fc0u : byte == 0 ? 0x40u : byte << 7) * 0x10001u;
}

// Rows of 64 elements in shared memory to BF16 where TMA would have put them; by a warpgroup, of whose threads two have a row.
template <int BITS_, int MANTISSA>
__device__ __forceinline__ void decode_rows(u32 from, u32 scales, u32 to, int rows, int thread) {
    if (thread >= 2 * rows) return;
    const int row = thread / 2, half = thread % 2;  // 32 elements, a block
    const u32 scale = scale_pair(load4(scales + row / 2 * 4) >> ((row % 2 * 2 + half) * 8) & 255);
    constexpr int PIECES = 32 * BITS_ / 128;  // of 16 bytes
    constexpr u32 BIAS = (1u << (BITS_ - 2 - MANTISSA)) - 1, UNBIASED = ((254 - BIAS) << 7) * 0x10001u;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const uint4 raw = load16(from + (thread * PIECES + piece) * 16);
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 16 / BITS_; ++i) {  // 8 elements: 16 bytes of BF16
            u32 out[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 pair;
                if constexpr (BITS_ == 8) {
                    pair = __byte_perm(words[i * 2 + j / 2], 0, j % 2 ? 0x4342 : 0x4140);
                } else {
                    const u32 byte = words[i] >> (8 * j) & 255;
                    pair = (byte & 15) | (byte & 240) << 12;
                }
                out[j] = multiply(multiply(placed<BITS_, MANTISSA>(pair), UNBIASED), scale);
            }
            put16(place_in_rows(to, row, half * 64 + (piece * (16 / BITS_) + i) * 16), uint4{out[0], out[1], out[2], out[3]});
        }
    }
}

// E8M0 byte of a block from the bits of its largest magnitude (NaN if it holds one), as harness/formats/mx.py has it: one
// step larger where the fraction is above `threshold`.
__device__ __forceinline__ int biased_exponent(int amax, int emax, int threshold) {
    if (amax >= 0x7f800000) return 255;
    return max((amax >> 23) - emax + ((amax & 0x7fffff) > threshold ? 1 : 0), 0);
}

__device__ __forceinline__ float round_even(float v) {  // of 0 <= v < 2^22, to an integer
    return (v + 12582912.0f) - 12582912.0f;
}

// The code of a value in its format's range, rounded to nearest even; NaN is the largest magnitude, of E2M1 0.
template <int BITS_, int MANTISSA>
__device__ __forceinline__ u32 code_of(float v) {
    const u32 bits = bits_of(v), magnitude = bits & 0x7fffffffu;
    const float a = __uint_as_float(magnitude);
    if constexpr (BITS_ == 4) {
        const float finite = magnitude > 0x7f800000u ? 0.0f : a;
        const float steps = fminf(round_even(finite * 2.0f),
                                  fminf(round_even(finite) + 2.0f, round_even(finite * 0.5f) + 4.0f));
        return static_cast<u32>(steps) | (bits >> 28 & 8);
    } else {
        constexpr int BIAS = (1 << (6 - MANTISSA)) - 1, SHIFT = 23 - MANTISSA;
        const u32 normal =
            ((magnitude + ((1u << (SHIFT - 1)) - 1) + (magnitude >> SHIFT & 1)) >> SHIFT) - ((127u - BIAS) << MANTISSA);
        const bool small = magnitude < (128u - BIAS) << 23;
        const u32 subnormal = static_cast<u32>(round_even((small ? a : 0.0f) * (1 << (BIAS + MANTISSA - 1))));
        return (magnitude > 0x7f800000u ? 0x7fu : small ? subnormal : normal) | (bits >> 24 & 0x80);
    }
}

// 8 rows of own keys or values, at `rows` in shared memory, to `row` and the next ones of their ring; by a warp, of which
// a lane has 16 numbers, half a block.
template <int BITS_, int MANTISSA, int THRESHOLD>
__device__ __forceinline__ void store_rows(const Ring& ring, u32 rows, int row, int lane) {
    const int mine = lane / 4, part = lane % 4;
    const uint4 raw[2] = {load16(place_in_rows(rows, mine, part * 32)), load16(place_in_rows(rows, mine, part * 32 + 16))};
    u8* const to = ring.data + static_cast<long long>(row + mine) * (8 * BITS_) + part * (2 * BITS_);
    const u32 words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w, raw[1].x, raw[1].y, raw[1].z, raw[1].w};
    if constexpr (BITS_ == 16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 piece[4] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
            write16(reinterpret_cast<u16*>(to) + 8 * i, piece);
        }
    } else {
        constexpr int EMAX = BITS_ == 4 ? 2 : MANTISSA == 3 ? 8 : 15;
        constexpr float LARGEST = BITS_ == 4 ? 6.0f : MANTISSA == 3 ? 448.0f : 57344.0f;
        int amax = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            amax = max(amax, max(static_cast<int>(bits_of(low_of(words[i])) & 0x7fffffff),
                                 static_cast<int>(bits_of(high_of(words[i])) & 0x7fffffff)));
        amax = max(amax, static_cast<int>(from_lane(amax, lane ^ 1)));
        const int exponent = biased_exponent(amax, EMAX, THRESHOLD);
        const float reciprocal_scale = __uint_as_float(exponent == 255 ? 0u : (254u - exponent) << 23);
        u32 codes[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float v = (i % 2 ? high_of(words[i / 2]) : low_of(words[i / 2])) * reciprocal_scale;
            if (v == v) v = fminf(fmaxf(v, -LARGEST), LARGEST);
            codes[i * BITS_ / 32] |= code_of<BITS_, MANTISSA>(v) << (i * BITS_ % 32);
        }
        if constexpr (BITS_ == 8) {
            write16(reinterpret_cast<u16*>(to), codes);
        } else {
            write8(reinterpret_cast<u16*>(to), codes[0], codes[1]);
        }
        if (part % 2 == 0) ring.scales[static_cast<long long>(row + mine) * 2 + part / 2] = static_cast<u8>(exponent);
    }
}

// 16 rows of a ring, and their scales, to shared memory.
template <int BITS_>
__device__ __forceinline__ void fetch_rows(u32 to, u32 scales, const Ring& ring, const TensorMap* map, int row, u32 bar,
                                           u64 policy) {
    if constexpr (BITS_ == 16) {
        copy_x(to, map, 0, row, bar);
    } else {
        copy_bytes(to, ring.data + static_cast<long long>(row) * (8 * BITS_), 128 * BITS_, bar, policy);
        copy_bytes(scales, ring.scales + static_cast<long long>(row) * 2, 32, bar, policy);
    }
}

// Cosines and sines of a lane's columns of a token, of which two make a pair.
struct Angles {
    float cos[8], sin[8];

    __device__ __forceinline__ void load(const Window& window, int token, int lane) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int at = token * 32 + i * 4 + lane / 8;
            cos[i] = window.cos[at];
            sin[i] = window.sin[at];
        }
    }
};

// A head's queries, keys or values of a tile of 8 tokens from their partial sums. Two warps share them: a lane has columns
// lane / 4 + 8 i of token 2 (lane % 4) + ODD.
template <int ODD>
struct Projected {
    float of[8];

    // Adds up what lies `from` there, 512 bytes for each of four tiles of 16 columns, once for each block; rounds as a
    // projection by itself would.
    __device__ __forceinline__ void load(u32 from, const Bias (&biases)[4], float output_scale, int lane) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int slot = 0; slot < CL; ++slot) add_to(sum, load16(from + (slot * OWN_M * WARPS + r) * 512 + lane * 16));
            const float bias[2] = {low_of(biases[r].above), low_of(biases[r].below)};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 pair = to_bf16(fmaf(sum[2 * i], output_scale, bias[i]), fmaf(sum[2 * i + 1], output_scale, bias[i]));
                of[2 * r + i] = ODD ? high_of(pair) : low_of(pair);
            }
        }
    }

    // RMS norm, rounded, and pairs (2 i, 2 i + 1) rotated to columns i and 32 + i, rounded when they are stored.
    __device__ __forceinline__ void rotate(const Angles& angles, float eps, int lane) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) squares = fmaf(of[i], of[i], squares);
        squares += of_lanes(squares, lane, 4);
        squares += of_lanes(squares, lane, 8);
        squares += of_lanes(squares, lane, 16);
        const float norm = inverse_root(fmaf(squares, 0.015625f, eps));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float mine = low_of(to_bf16(of[i] * norm, 0.0f)), other = of_lanes(mine, lane, 4);
            const float turned = lane / 4 % 2 ? other : -other;
            of[i] = fmaf(turned, angles.sin[i], mine * angles.cos[i]);
        }
    }

    // To 8 rows in shared memory; `rotated`: column 8 i + j is at 4 i + j / 2, and 32 further on if it is odd.
    __device__ __forceinline__ void store(u32 rows, bool rotated, int lane) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int column = lane / 4 + 8 * i;
            const int at = rotated ? column / 2 + column % 2 * 32 : column;
            store2(place_in_rows(rows, lane % 4 * 2 + ODD, at * 2), to_bf16(of[i], 0.0f));
        }
    }
};

// Queries, keys or values of every other one of 8 tokens from `token` on, once their partial sums are there.
template <int ODD>
__device__ __forceinline__ void own_rows(const Window& window, const Bias (&biases)[4], u32 from, u32 rows, bool rotated,
                                         int token, float output_scale, u32 sums_bar, int lane) {
    Angles angles;
    Projected<ODD> projected;
    if (rotated) angles.load(window, token + lane % 4 * 2 + ODD, lane);
    barrier_wait(sums_bar, 0);
    projected.load(from, biases, output_scale, lane);
    if (rotated) projected.rotate(angles, window.eps, lane);
    projected.store(rows, rotated, lane);
}

// Weighted values and weights of a warp's 16 queries.
struct Attended {
    float sums[8][4];
    float totals[2];

    // Adds the first `known` of KEYS keys and values, rows in shared memory.
    template <int KEYS>
    __device__ __forceinline__ void add(const u32 (&queries)[4][4], u32 keys, u32 values, int known, float scale, int lane) {
        float scores[KEYS / 8][4];
        products_begin();
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_rows<0>(scores, queries[i], rows_after(rows_at(keys), i * 32), i > 0);
        products_commit();
        products_wait<0>();
        u32 weights[KEYS / 16][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                keep(scores[n][i]);
                scores[n][i] = n * 8 + lane % 4 * 2 + i % 2 < known ? power_of_two(scores[n][i] * scale) : 0.0f;
                totals[i / 2] += scores[n][i];
            }
            weights[n / 2][n % 2 * 2] = to_bf16(scores[n][0], scores[n][1]);
            weights[n / 2][n % 2 * 2 + 1] = to_bf16(scores[n][2], scores[n][3]);
        }
        products_begin();
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i)
            multiply_columns(sums, weights[i], rows_after(columns_at(values), i * 16 * ROW), true);
        products_commit();
        products_wait<0>();
#pragma unroll
        for (int i = 0; i < KEYS / 16 * 4; ++i) keep(weights[i / 4][i % 4]);
#pragma unroll
        for (int i = 0; i < 32; ++i) keep(sums[i / 4][i % 4]);
    }

    // Adds `pieces` times 16 rows of the window, fewer than 64.
    __device__ __forceinline__ void add_some(const u32 (&queries)[4][4], u32 keys, u32 values, int pieces, float scale,
                                             int lane) {
        if (pieces >= 2) add<32>(queries, keys, values, 32, scale, lane);
        const u32 rest = pieces / 2 * 32 * ROW;
        if (pieces % 2) add<16>(queries, keys + rest, values + rest, 16, scale, lane);
    }
};

// The warp more: the norm in front.
__device__ __forceinline__ void help(const Squares& squares, u32 rows, u32 norms_bar, int lane) {
    cluster_arrive();
    __syncthreads();
    if (PDL) previous_is_over();
    norms(squares, rows, 64, lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(norms_bar);
    cluster_wait();
}

// Which part of a head's attention a thread has, and where its block's shared memory has what.
struct Place {
    u32 base;
    int lane, warp, wg, rank, head;

    __device__ __forceinline__ int owned() const {  // tiles of 8 tokens of this block
        return (MT - rank + CL - 1) / CL;
    }

    __device__ __forceinline__ u32 x_bar(int group) const {
        return base + BARRIERS_AT + group * 8;
    }

    __device__ __forceinline__ u32 w_bar(int fetch) const {
        return x_bar(GX + warp * WAITING) + fetch % WAITING * 8;
    }

    __device__ __forceinline__ u32 sums_bar() const {
        return x_bar(GX + WARPS * WAITING);
    }

    __device__ __forceinline__ u32 norms_bar() const {
        return sums_bar() + 8;
    }

    __device__ __forceinline__ u32 queries_bar() const {
        return sums_bar() + 16;
    }

    __device__ __forceinline__ u32 out_bar() const {
        return sums_bar() + 24;
    }

    __device__ __forceinline__ u32 window_bar(int stage) const {
        return sums_bar() + 32 + (wg * STAGES + stage % STAGES) * 8;
    }

    __device__ __forceinline__ u32 stage(int stage) const {
        return base + STAGES_AT + (wg * STAGES + stage % STAGES) * STAGE;
    }

    __device__ __forceinline__ u32 partial() const {
        return base + PARTIAL_AT;
    }
};

__device__ __forceinline__ void make_barriers(const Place& at) {
    for (int i = 0; i < WAITING; ++i) barrier_init(at.w_bar(i));
    for (int i = at.warp; i < GX; i += WARPS) barrier_init(at.x_bar(i));
    if (at.warp % 4 == 0)
        for (int i = 0; i < STAGES; ++i) barrier_init(at.window_bar(i));
    if (at.warp == 0) {
        barrier_init(at.sums_bar());
        barrier_expect(at.sums_bar(), at.owned() * WARPS * (CL - 1) * 512);
        barrier_init(at.norms_bar());
        barrier_init(at.queries_bar());
        barrier_expect(at.queries_bar(), (MT - at.owned()) * 1024);
        barrier_init(at.out_bar());
        barrier_expect(at.out_bar(), CL * ((32 - at.rank + CL - 1) / CL * 512 + 256));
    }
    barriers_ready();
}

// A warp's 16 rows of the head's W, of this block's groups of inputs, on their way to shared memory.
struct Weight {
    const u8* global;
    u32 shared;
    int groups;
    u64 policy;

    __device__ __forceinline__ void fetch(const Place& at, int i) const {
        const int first = i * FETCHED, count = min(FETCHED, groups - first);
        if (at.lane != 0 || count <= 0) return;
        barrier_expect(at.w_bar(i), count * TILE);
        copy_bytes(shared + i % WAITING * W_STAGE, global + first * TILE, count * TILE, at.w_bar(i), policy);
    }
};

// acc = W x^T over this block's inputs.
__device__ __forceinline__ void multiply_block(const Place& at, const Weight& weight, float (&acc)[1][XT][4]) {
    Half halves[2];
    for (int i = 0; i * FETCHED < weight.groups; ++i) {
        barrier_wait(at.w_bar(i), i / WAITING % 2);
        const u32 w = weight.shared + i % WAITING * W_STAGE;
        for (int group = i * FETCHED; group < min((i + 1) * FETCHED, weight.groups); ++group) {
            barrier_wait(at.x_bar(group), 0);
            multiply_group(acc, halves, w + (group - i * FETCHED) * TILE, at.base + group * XTILE, at.lane, group > 0);
        }
        __syncwarp();  // every lane has read the stage
        weight.fetch(at, i + WAITING);
        __syncwarp();
    }
    products_wait<0>();
#pragma unroll
    for (int m = 0; m < XT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            keep(acc[0][m][i]);
            if (weight.groups == 0) acc[0][m][i] = 0.0f;
        }
}

// 1. The head's projection: partial sums to the blocks that own the tokens.
__device__ __forceinline__ void project(const Place& at, const TensorMap* x_map, const u8* weight, int heads, int groups) {
    const int lo = groups * at.rank / CL, count = groups * (at.rank + 1) / CL - lo;
    const long long tile = (at.wg * heads + at.head) * 4 + at.warp % 4;
    const Weight w{weight + (tile * groups + lo) * TILE, at.base + W_AT + at.warp * WAITING * W_STAGE, count, cache_policy(true)};
    for (int i = 0; i < WAITING; ++i) w.fetch(at, i);
    cluster_arrive();  // a block may only write to blocks whose barriers are ready
    if (at.lane == 0) {
        if (PDL) previous_is_over();
        for (int i = at.warp; i < count; i += WARPS) {
            barrier_expect(at.x_bar(i), XTILE);
            copy_x(at.base + i * XTILE, x_map, (lo + i) * 64, 0, at.x_bar(i));
        }
    }
    __syncthreads();  // the barriers of x are ready
    float acc[1][XT][4];
    multiply_block(at, w, acc);
    barrier_wait(at.norms_bar(), 0);
    normalise(acc, at.base + ROWS_AT, at.lane);
    cluster_wait();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        const u32 to = at.partial() + ((at.rank * OWN_M + m / CL) * WARPS + at.warp) * 512 + at.lane * 16;
        if (m % CL == at.rank) {
            store16(to, acc[0][m]);
        } else {
            store16_in(address_in(to, m % CL), acc[0][m], address_in(at.sums_bar(), m % CL));
        }
    }
    group_sync(1, WARPS * 32);  // nobody here reads operands any more, and this block's sums are there
}

// 2. Tokens this block owns: two warps for a tile's queries, keys or values. Queries go to all blocks.
__device__ __forceinline__ void finish_tokens(const Place& at, const Window& window, const u16* bias, float output_scale) {
    const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int item = at.warp / 2; item < 3 * OWN_M; item += WARPS / 2) {
        const int mine = item / 3, part = item % 3, m = mine * CL + at.rank;
        const u32 from = at.partial() + (mine * WARPS + part * 4) * 512;
        const u32 rows = at.base + (part == 0 ? Q_AT + m * 1024 : (part == 1 ? OWN_K_AT : OWN_V_AT) + mine * 1024);
        if (m < MT) {
            Bias biases[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) biases[r].load(bias, (part * window.heads + at.head) * 4 + r, 1 << 30, at.lane);
            if (at.warp % 2) {
                own_rows<1>(window, biases, from, rows, part < 2, m * 8, output_scale, at.sums_bar(), at.lane);
            } else {
                own_rows<0>(window, biases, from, rows, part < 2, m * 8, output_scale, at.sums_bar(), at.lane);
            }
        } else if (part > 0) {  // keys that are none
            for (int i = at.lane; i < 64; i += 32) store16(rows + i * 16, zeros);
        }
        copies_see_stores();
    }
    if (OWN_M % 2 && at.warp == WARPS - 1) {  // nor are these
        for (int i = at.lane; i < 128; i += 32)
            store16(at.base + (i < 64 ? OWN_K_AT : OWN_V_AT) + OWN_M * 1024 + i % 64 * 16, zeros);
        copies_see_stores();
    }
    group_sync(1, WARPS * 32);  // all partial sums are read, all rows are written
}

__device__ __forceinline__ void send_queries(const Place& at) {
    const int m = at.warp * CL + at.rank;
    if (at.warp >= OWN_M || at.lane >= CL || at.lane == at.rank || m >= MT) return;
    const u32 rows = at.base + Q_AT + m * 1024;
    send_bytes(address_in(rows, at.lane), rows, 1024, address_in(at.queries_bar(), at.lane));
}

// A warpgroup's share of the window, on its way to shared memory a stage at a time.
struct Stages {
    const Window& window;
    const TensorMap* k_map;
    const TensorMap* v_map;
    Share share;

    __device__ __forceinline__ void fetch(const Place& at, int i) const {
        if (at.warp % 4 != 0 || at.lane != 0 || i >= share.stages()) return;
        const u32 stage = at.stage(i), bar = at.window_bar(i);
        const u64 policy = cache_policy(false);
        barrier_expect(bar, (K_BYTES + V_BYTES + K_SCALES + V_SCALES) / 4 * share.pieces(i));
#pragma unroll 1
        for (int piece = 0; piece < share.pieces(i); ++piece) {
            const int row = share.row(at.head, i, piece);
            const u32 scales = stage + K_BYTES + V_BYTES + piece * 32;
            fetch_rows<K_BITS>(stage + piece * (K_BYTES / 4), scales, window.k, k_map, row, bar, policy);
            fetch_rows<V_BITS>(stage + K_BYTES + piece * (V_BYTES / 4), scales + K_SCALES, window.v, v_map, row, bar, policy);
        }
    }
};

// 3. What a warpgroup has of the window, and the third one of its block's own keys and values.
__device__ __forceinline__ void attend_to(const Place& at, const Stages& stages, Attended& attended) {
    const Window& window = stages.window;
    u32 queries[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i)
        queries[i / 4][i % 4] = load4(place_in_rows(at.base + Q_AT, at.warp % 4 * 16 + at.lane / 4 + i % 2 * 8,
                                                    i / 4 * 32 + i % 4 / 2 * 16 + at.lane % 4 * 4));
    attended.totals[0] = attended.totals[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) attended.sums[i / 4][i % 4] = 0.0f;
    if (at.wg == 2)
        attended.add<OWN_KEYS>(queries, at.base + OWN_K_AT, at.base + OWN_V_AT, at.owned() * 8, window.scale, at.lane);
    for (int i = 0; i < stages.share.stages(); ++i) {
        const u32 stage = at.stage(i), decoded = at.base + DECODED_AT + at.wg * DECODED;
        const u32 scales = stage + K_BYTES + V_BYTES;
        const int pieces = stages.share.pieces(i), thread = threadIdx.x % 128;
        u32 keys = stage, values = stage + K_BYTES;
        barrier_wait(at.window_bar(i), i / STAGES % 2);
        if constexpr (K_BITS < 16) {
            keys = decoded;
            decode_rows<K_BITS, K_MANTISSA>(stage, scales, keys, pieces * 16, thread);
        }
        if constexpr (V_BITS < 16) {
            values = decoded + (K_BITS < 16 ? FRAME : 0);
            decode_rows<V_BITS, V_MANTISSA>(stage + K_BYTES, scales + K_SCALES, values, pieces * 16, thread);
        }
        if constexpr (DECODED > 0) {
            copies_see_stores();
            group_sync(2 + at.wg, 128);
        }
        if (pieces == 4) {
            attended.add<64>(queries, keys, values, 64, window.scale, at.lane);
        } else {
            attended.add_some(queries, keys, values, pieces, window.scale, at.lane);
        }
        group_sync(2 + at.wg, 128);  // all have read the stage
        stages.fetch(at, i + STAGES);
    }
}

// 4. A block's sums, added up where its share of the window was, to the blocks that own the outputs.
__device__ __forceinline__ void send_sums(const Place& at, const Attended& attended) {
    const u32 sums = at.base + STAGES_AT, here = sums + at.wg * STAGES * STAGE;
#pragma unroll
    for (int n = 0; n < 8; ++n) store16(here + (at.warp % 4 * 8 + n) * 512 + at.lane * 16, attended.sums[n]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float total = attended.totals[i];
        total += of_lanes(total, at.lane, 1);
        total += of_lanes(total, at.lane, 2);
        if (at.lane % 4 == 0) store4(here + 2 * FRAME + (at.warp % 4 * 16 + i * 8 + at.lane / 4) * 4, total);
    }
    group_sync(1, WARPS * 32);
    for (int unit = at.warp; unit < 32; unit += WARPS) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 3; ++i) add_to(sum, load16(sums + i * STAGES * STAGE + unit * 512 + at.lane * 16));
        const int owner = unit % CL;
        const u32 to = at.partial() + (at.rank * OWNED + unit / CL) * 512 + at.lane * 16;
        store16_in(address_in(to, owner), sum, address_in(at.out_bar(), owner));
    }
    if (at.warp >= WARPS - 2) {
        const int query = (at.warp - (WARPS - 2)) * 32 + at.lane;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 3; ++i) total += __uint_as_float(load4(sums + i * STAGES * STAGE + 2 * FRAME + query * 4));
        const u32 to = at.base + TOTALS_AT + at.rank * 256 + query * 4;
        for (int owner = 0; owner < CL; ++owner)
            store4_in(address_in(to, owner), total, address_in(at.out_bar(), owner));
    }
}

// This block's own keys and values to this frame's slot of their rings.
__device__ __forceinline__ void store_own(const Place& at, const Window& window, int slot) {
    const int first = (at.head * window.frames + slot) * 64;
    if (K_STORE && at.warp < OWN_M && at.warp * CL + at.rank < MT)
        store_rows<K_BITS, K_MANTISSA, K_THRESHOLD>(window.k, at.base + OWN_K_AT + at.warp * 1024,
                                                    first + (at.warp * CL + at.rank) * 8, at.lane);
    const int mine = at.warp - 4;
    if (V_STORE && mine >= 0 && mine < OWN_M && mine * CL + at.rank < MT)
        store_rows<V_BITS, V_MANTISSA, V_THRESHOLD>(window.v, at.base + OWN_V_AT + mine * 1024,
                                                    first + (mine * CL + at.rank) * 8, at.lane);
}

// The outputs this block owns.
__device__ __forceinline__ void finish(const Place& at, u16* out, int heads) {
    for (int owned = at.warp; owned < OWNED; owned += WARPS) {
        const int unit = owned * CL + at.rank;
        if (unit >= 32) break;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, total[2] = {0.0f, 0.0f};
        const int query = unit / 8 * 16 + at.lane / 4;
#pragma unroll
        for (int slot = 0; slot < CL; ++slot) {
            add_to(sum, load16(at.partial() + (slot * OWNED + owned) * 512 + at.lane * 16));
            total[0] += __uint_as_float(load4(at.base + TOTALS_AT + slot * 256 + query * 4));
            total[1] += __uint_as_float(load4(at.base + TOTALS_AT + slot * 256 + (query + 8) * 4));
        }
        u16* const to = out + static_cast<long long>(query) * heads * 64 + at.head * 64 + unit % 8 * 8 + at.lane % 4 * 2;
        *reinterpret_cast<u32*>(to) = to_bf16(sum[0] / total[0], sum[1] / total[0]);
        *reinterpret_cast<u32*>(to + static_cast<long long>(heads) * 512) = to_bf16(sum[2] / total[1], sum[3] / total[1]);
    }
}

KERNEL(THREADS, CL, 1)
mx_attend(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap k_map,
          const __grid_constant__ TensorMap v_map, const u8* __restrict__ weight, const u16* __restrict__ bias,
          u16* __restrict__ out, int groups, float output_scale, const Squares squares, const Window window) {
    const int warp = same_in_warp(threadIdx.x / 32);
    const Place at{shared_memory(), static_cast<int>(threadIdx.x % 32), warp, warp / 4, static_cast<int>(blockIdx.x % CL),
                   static_cast<int>(blockIdx.x / CL)};
    if (PDL) next_may_begin();
    if (warp == WARPS) {
        help(squares, at.base + ROWS_AT, at.norms_bar(), at.lane);
        return;
    }
    if (at.lane == 0) {
        if (warp == 0) prefetch_map(&x_map);
        make_barriers(at);
    }
    __syncwarp();
    project(at, &x_map, weight, window.heads, groups);

    const Stages stages{window, &k_map, &v_map, Share(window, at.wg * CL + at.rank)};
    stages.fetch(at, 0);  // others in the way of partial sums would be late themselves
    finish_tokens(at, window, bias, output_scale);
    for (int i = 1; i < STAGES; ++i) stages.fetch(at, i);
    send_queries(at);
    barrier_wait(at.queries_bar(), 0);

    Attended attended;
    attend_to(at, stages, attended);
    send_sums(at, attended);
    store_own(at, window, stages.share.slot);
    barrier_wait(at.out_bar(), 0);
    finish(at, out, window.heads);
}
