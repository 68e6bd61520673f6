// A stage of the decoder in one launch: bicubic doubling, a residual block, the pixel-shuffle shortcut.
//
//   x = double(low)
//   out = x + conv3(leaky(conv2(leaky(conv1(x))))) + shortcut, conv1 and conv3 1 by 1, conv2 3 by 3 in groups of 16
//
// A block computes tiles of TH by 16 pixels and all C channels, one after the other. A warp has a group of 16 hidden
// channels, or PASSES of them one after the other: it computes conv1 for the halo (conv2's border) and then conv2, and
// nobody else reads what lies between. Doubling, conv1 and conv3 are products of a warpgroup (wgmma) whose rows are
// channels, weights in registers, and whose columns are pixels, which tensor cores fetch from shared memory themselves.
// Hidden channels outside the picture are zero, as padding is.
//
// Shared memory holds pixels in planes of 8 channels: 16 bytes a pixel, one after the other, so that any pixel may be
// the first of a product, and rows of 8 pixels meet no bank twice.
//
// Compile-time parameters beside those of conv_tile.cuh, of which TH is 8, or 4 where channels are many: C channels; CI
// channels of the shortcut's picture; DOUBLE whether x is to be doubled, or is given; SHORTCUT whether there is one; SILU of
// the result; NEXT how many channels of a 1 by 1 convolution of the result are written, too; RGB whether the result is not
// written, but what a 3 by 3 convolution to at most four colours adds up, for conv_rgb.cu.

static_assert(TH == 8 || TH == 4, "a product's columns are the halo of 8 rows, or of 4");
constexpr int GROUPS = 2 * C / 16, PASSES = GROUPS / WARPS, WARPGROUPS = WARPS / 4;
static_assert(PASSES * WARPS == GROUPS, "warps share groups evenly");
constexpr int PARTS = C / 8, PIXELS = (HALO + 7) / 8 * 8;  // planes of x; pixels of the halo, in eights
constexpr int COLUMNS = TH == 8 ? 96 : PIXELS;             // of a product over the halo, of which there are two, or one
constexpr int SMALL_ROWS = TH / 2 + 4, SMALL_COLUMNS = TW / 2 + 4;
constexpr int SMALL = (SMALL_ROWS * SMALL_COLUMNS + 15) / 16 * 16;  // pixels, in sixteens, that double to the halo

// Bytes of planes. Those written and read a pixel at a time are an odd multiple of 16, so that neighbours do not meet.
constexpr int X_PLANE = (PIXELS + 1) * 16, SMALL_PLANE = (SMALL + 1) * 16;
constexpr int HIDDEN_PLANE = PIXELS * 16, HIDDEN = 2 * HIDDEN_PLANE, MID_PLANE = TH * TW * 16, MID = 2 * MID_PLANE;

constexpr int W1 = GROUPS * PARTS * 256, W2 = GROUPS * 9 * 512, W3 = W1, BIAS = 2 * C * 4;  // bytes of the weights
constexpr bool KEEPS = PASSES == 1;  // weights stay: conv1's and conv2's in registers, conv3's in shared memory
// Where there is room, two tiles are under way: x lies in two places, and what is doubled has a place of its own and is
// asked for a tile ahead. Else it lies where hidden channels will.
constexpr bool PIPELINED = KEEPS && DOUBLE;
constexpr int X = PARTS * X_PLANE, MATRIX_PLANE = HALO * 16, MATRIX_AT = PIPELINED ? 2 * X : X;
constexpr int HIDDEN_AT = MATRIX_AT + (DOUBLE ? SMALL / 8 * MATRIX_PLANE : 0);
constexpr int MID_AT = HIDDEN_AT + WARPS * HIDDEN, W3_AT = MID_AT + (PASSES - 1) * WARPS * MID;
constexpr int SMALL_AT = PIPELINED ? W3_AT + W3 : HIDDEN_AT;
constexpr int SHARED = PIPELINED ? SMALL_AT + PARTS * SMALL_PLANE : KEEPS ? W3_AT + W3 : W3_AT;
static_assert(!DOUBLE || PIPELINED || PARTS * SMALL_PLANE <= W3_AT - HIDDEN_AT, "what is doubled finds room");

constexpr int ROWS64 = (C + 63) / 64;  // of products whose rows are the C channels

__device__ __forceinline__ u32 at_pixel(u32 plane, int row, int column) {
    return plane + ((row + 1) * WIDE + column + 1) * 16;
}

// Where a lane finds its row of four matrices of 8 pixels by 8 channels: two planes, then the next 8 pixels.
__device__ __forceinline__ u32 planes_row(int plane) {
    const int lane = threadIdx.x % 32;
    return lane / 8 % 2 * plane + (lane / 16 * 8 + lane % 8) * 16;
}

template <int COUNT>
__device__ __forceinline__ void settle_products(float (&sums)[COUNT][4]) {
    products_commit();
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < 4 * COUNT; ++i) keep(sums[i / 4][i % 4]);
}

// What of the smaller picture doubles to the tile's halo: edges again where it ends.
__device__ __forceinline__ void load_small(u32 small, const u16* from, const Tile& tile) {
    for (int i = threadIdx.x; i < SMALL * PARTS; i += THREADS) {
        const int part = i % PARTS, pixel = i / PARTS;
        const int y = clamped(first_tap(tile.y0 - 1) + pixel / SMALL_COLUMNS, tile.height / 2);
        const int column = clamped(first_tap(tile.x0 - 1) + pixel % SMALL_COLUMNS, tile.width / 2);
        copy16(small + part * SMALL_PLANE + pixel * 16,
               from + (static_cast<long long>(y) * (tile.width / 2) + column) * C + part * 8,
               pixel < SMALL_ROWS * SMALL_COLUMNS);
    }
}

// Weight of row (column) `from` of the smaller picture in row (column) `to` of the halo.
__device__ __forceinline__ float tap(int to, int from) {
    const int i = from - to / 2;
    return i < 0 || i > 3 ? 0.0f : quarter(to % 2 ? 3 - i : i);
}

// Doubling as a matrix [HALO, SMALL], the same for every tile. Columns of products beyond the halo are anything.
__device__ __forceinline__ void put_matrix(u32 matrix) {
    for (int i = threadIdx.x; i < SMALL / 8 * HALO; i += THREADS) {
        const int part = i / HALO, p = i % HALO;
        u32 pairs[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int first = part * 8 + 2 * e, row = first / SMALL_COLUMNS, column = first % SMALL_COLUMNS;
            const float down = tap(p / WIDE, row);
            pairs[e] = to_bf16(down * tap(p % WIDE, column), down * tap(p % WIDE, column + 1));
        }
        put16(matrix + part * MATRIX_PLANE + p * 16, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
}

// x of the halo. A warpgroup has some of the products of 64 channels and 64 pixels.
__device__ __forceinline__ void double_small(u32 x, u32 small, u32 matrix) {
    constexpr int THIRDS = (PIXELS + 63) / 64;
    const int warp = same_in_warp(threadIdx.x / 32), warpgroup = warp / 4;
#pragma unroll 1
    for (int unit = THIRDS * ROWS64 * warpgroup / WARPGROUPS; unit < THIRDS * ROWS64 * (warpgroup + 1) / WARPGROUPS; ++unit) {
        const int rows = unit / THIRDS * 4 + warp % 4, begin = min(unit % THIRDS * 64, PIXELS - 64) * 16;
        const bool real = rows < C / 16;
        u32 a[SMALL / 16][4];
#pragma unroll
        for (int k = 0; k < SMALL / 16; ++k)
            load_transposed(a[k], small + (real ? rows * 2 * SMALL_PLANE : 0) + k * 256 + planes_row(SMALL_PLANE));
        float sums[8][4];
        products_begin();
#pragma unroll
        for (int k = 0; k < SMALL / 16; ++k)
            multiply_rows<0>(sums, a[k], planes_at(matrix + begin + k * 2 * MATRIX_PLANE, MATRIX_PLANE), k > 0);
        settle_products(sums);
        if (!real) continue;
        const u32 to = x + rows * 2 * X_PLANE + begin + planes_row(X_PLANE);
#pragma unroll
        for (int n = 0; n < 8; n += 2)
            store_transposed(to + n * 128, to_bf16(sums[n][0], sums[n][1]), to_bf16(sums[n][2], sums[n][3]),
                             to_bf16(sums[n + 1][0], sums[n + 1][1]), to_bf16(sums[n + 1][2], sums[n + 1][3]));
    }
}

// conv1 and its activation: a warp's 16 hidden channels of the halo. All of the weights are at hand, or come in batches.
constexpr int STEPS = PARTS / 2, BATCH = 4;
constexpr bool BATCHES = TH < 8;
static_assert(!BATCHES || !KEEPS && STEPS % BATCH == 0, "weights that come in batches do not stay");

template <int COUNT>
__device__ __forceinline__ void load_fragments(uint4 (&w)[COUNT], const u8* from) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) w[k] = fetch16(from + k * 512 + threadIdx.x % 32 * 16);
}

struct Weights {  // of a warp's group
    uint4 w1[BATCHES ? 2 * BATCH : STEPS], w2[9];
    float bias1[2], bias2[4];
};

__device__ __forceinline__ void widen(u32 x, u32 hidden, Weights& w, const u8* weights) {
#pragma unroll
    for (int first = 0; first < PIXELS; first += COLUMNS) {
        const int begin = min(first, PIXELS - COLUMNS) * 16;
        float sums[COLUMNS / 8][4];
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) sums[i / 4][i % 4] = w.bias1[i % 4 / 2];
        constexpr int EACH = BATCHES ? BATCH : STEPS;
#pragma unroll
        for (int k = 0; k < STEPS; k += EACH) {
            if (BATCHES && k + EACH < STEPS)
#pragma unroll
                for (int i = 0; i < EACH; ++i)
                    w.w1[(k + EACH) % (2 * EACH) + i] = fetch16(weights + (k + EACH + i) * 512 + threadIdx.x % 32 * 16);
            products_begin();
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const uint4& v = w.w1[BATCHES ? k % (2 * EACH) + i : i];
                const u32 a[4] = {v.x, v.y, v.z, v.w};
                multiply_rows<0>(sums, a, planes_at(x + begin + (k + i) * 2 * X_PLANE, X_PLANE), 1);
            }
            settle_products(sums);
        }
        const u32 to = hidden + begin + planes_row(HIDDEN_PLANE);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2)
            store_transposed(to + n * 128, leaky(sums[n][0], sums[n][1]), leaky(sums[n][2], sums[n][3]),
                             leaky(sums[n + 1][0], sums[n + 1][1]), leaky(sums[n + 1][2], sums[n + 1][3]));
    }
}

__device__ __forceinline__ void clear_outside(u32 hidden, const Tile& tile) {
    if (tile.y0 > 0 && tile.x0 > 0 && tile.y0 + TH < tile.height && tile.x0 + TW < tile.width) return;
    __syncwarp();
    for (int p = threadIdx.x % 32; p < HALO; p += 32)
        if (!tile.holds(p))
            for (int half = 0; half < 2; ++half) put16(hidden + half * HIDDEN_PLANE + p * 16, uint4{0, 0, 0, 0});
}

// x += conv3, where x is. A warpgroup has some of the products of 64 channels and NARROW pixels.
constexpr int NARROW = KEEPS ? TH * TW / 2 : TH * TW, UNITS = ROWS64 * (TH * TW / NARROW);

__device__ __forceinline__ void fetch_narrowing(uint4 (&w)[BATCH], u32 shared, const u8* memory, int at) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
        w[i] = KEEPS ? load16(shared + at + i * 512) : fetch16(memory + at + i * 512);
}

__device__ __forceinline__ void narrow(u32 x, u32 hidden, u32 mid, u32 shared, const u8* memory) {
    const int warp = same_in_warp(threadIdx.x / 32), warpgroup = warp / 4;
#pragma unroll 1
    for (int unit = UNITS * warpgroup / WARPGROUPS; unit < UNITS * (warpgroup + 1) / WARPGROUPS; ++unit) {
        const int rows = unit / (TH * TW / NARROW) * 4 + warp % 4, begin = unit % (TH * TW / NARROW) * NARROW;
        const bool real = rows < C / 16;
        const int at = (real ? rows : 0) * GROUPS * 512 + threadIdx.x % 32 * 16;
        float sums[NARROW / 8][4];
        uint4 w[2][BATCH];
        fetch_narrowing(w[0], shared, memory, at);
#pragma unroll
        for (int group = 0; group < GROUPS; group += BATCH) {
            if (group + BATCH < GROUPS)
                fetch_narrowing(w[(group / BATCH + 1) % 2], shared, memory, at + (group + BATCH) * 512);
            products_begin();
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int g = group + i, last = g - (PASSES - 1) * WARPS;
                const u64 pixels = last < 0 ? planes_at(mid + g * MID + begin * 16, MID_PLANE)
                                            : planes_at(hidden + last * HIDDEN + begin * 16, HIDDEN_PLANE);
                const uint4& v = w[group / BATCH % 2][i];
                const u32 a[4] = {v.x, v.y, v.z, v.w};
                multiply_rows<0>(sums, a, pixels, g > 0);
                if constexpr (NARROW > 64) multiply_rows<8>(sums, a, planes_after(pixels, 64 * 16), g > 0);
            }
            settle_products(sums);
        }
        if (!real) continue;
#pragma unroll
        for (int n = 0; n < NARROW / 8; n += 2) {
            const u32 at = at_pixel(x + rows * 2 * X_PLANE, begin / TW + n / 2, 0) + planes_row(X_PLANE);
            u32 old[4];
            load_transposed(old, at);
            store_transposed(at, add_to_pair(old[0], sums[n][0], sums[n][1]), add_to_pair(old[1], sums[n][2], sums[n][3]),
                             add_to_pair(old[2], sums[n + 1][0], sums[n + 1][1]),
                             add_to_pair(old[3], sums[n + 1][2], sums[n + 1][3]));
        }
    }
}

// A piece of the result: 8 channels of 2 by 2 pixels, which a pixel of the shortcut's picture has four channels for.
constexpr int PIECES = TH / 2 * (TW / 2) * PARTS, MINE = (PIECES + THREADS - 1) / THREADS;

struct Piece {
    int part, row, column;
    bool real;
    __device__ __forceinline__ Piece(int number) {
        const int i = threadIdx.x + number * THREADS;
        part = i % PARTS, row = i / PARTS / (TW / 2) * 2, column = i / PARTS % (TW / 2) * 2, real = i < PIECES;
    }
};

// The pixel shuffle of `from` [height / 2, width / 2, CI], its CI / 4 channels as often as they fit.
__device__ __forceinline__ void fetch_shortcut(uint4 (&v)[MINE][4], const u16* from, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const Piece piece(i);
        if (!piece.real) break;
        const long long pixel = static_cast<long long>((tile.y0 + piece.row) / 2) * (tile.width / 2) + (tile.x0 + piece.column) / 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = fetch16(from + pixel * CI + piece.part * 8 % (CI / 4) * 4 + j * 8);
    }
}

__device__ __forceinline__ u32 finished(u32 pair, u32 other) {
    const float a = SHORTCUT ? low_of(pair) + low_of(other) : low_of(pair), b = SHORTCUT ? high_of(pair) + high_of(other) : high_of(pair);
    return SILU ? to_bf16(silu_by_tanh(a), silu_by_tanh(b)) : to_bf16(a, b);
}

// The result, to memory and, where there is a product of it, to where x is.
__device__ __forceinline__ void write_tile(u16* out, u32 x, const uint4 (&shortcut)[MINE][4], const Tile& tile) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const Piece piece(i);
        if (!piece.real) break;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            const int row = piece.row + corner / 2, column = piece.column + corner % 2;
            u32 other[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; SHORTCUT && j < 4; ++j) {  // four pixels of one channel, then of the next
                const uint4& v = shortcut[i][j];
                other[j] = __byte_perm(corner < 2 ? v.x : v.y, corner < 2 ? v.z : v.w, corner % 2 ? 0x7632 : 0x5410);
            }
            const u32 at = at_pixel(x + piece.part * X_PLANE, row, column);
            const uint4 v = load16(at);
            const uint4 result{finished(v.x, other[0]), finished(v.y, other[1]), finished(v.z, other[2]),
                               finished(v.w, other[3])};
            const long long pixel = static_cast<long long>(tile.y0 + row) * tile.width + tile.x0 + column;
            if (RGB || NEXT > 0) put16(at, result);
            if (!RGB) write16(out + pixel * C + piece.part * 8, result);
        }
    }
}

// Products of the result: `out` [height, width, NEXT]; or, if RGB, [TAPS, height, width, 4], what each tap of the convolution
// to colours makes of a pixel. A warp computes 16 of them for some of the rows.
constexpr int TAPS = 9, PRODUCTS = RGB ? TAPS * 4 : NEXT, BLOCKS = PRODUCTS > 0 ? (PRODUCTS + 15) / 16 : 1;

__device__ __forceinline__ void write_products(u16* out, u32 x, const u8* weights, const Tile& tile) {
    constexpr int SHARES = WARPS > BLOCKS ? WARPS / BLOCKS : 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int block = warp < BLOCKS * SHARES ? warp % BLOCKS : BLOCKS; block < BLOCKS; block += WARPS) {
        uint4 w[PARTS / 2];
#pragma unroll
        for (int k = 0; k < PARTS / 2; ++k) w[k] = fetch16(weights + (k * BLOCKS + block) * 512 + lane * 16);
#pragma unroll 1
        for (int row = SHARES > 1 ? warp / BLOCKS : 0; row < TH; row += SHARES) {
            float sums[2][4] = {};
#pragma unroll
            for (int k = 0; k < PARTS / 2; ++k) {
                u32 a[4];
                load_matrices(a, at_pixel(x + (2 * k + lane / 16) * X_PLANE, row, lane % 16));
                mma(sums[0], a, w[k].x, w[k].y);
                mma(sums[1], a, w[k].z, w[k].w);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int product = block * 16 + i / 2 * 8 + lane % 4 * 2, column = lane / 4 + i % 2 * 8;
                const long long pixel = static_cast<long long>(tile.y0 + row) * tile.width + tile.x0 + column;
                const long long plane = static_cast<long long>(tile.height) * tile.width * (product / 4);
                const long long at = RGB ? (plane + pixel) * 4 + product % 4 : pixel * NEXT + product;
                const float* pair = sums[i / 2] + i % 2 * 2;
                if (product < PRODUCTS) write4(out + at, to_bf16(pair[0], pair[1]));
            }
        }
    }
}

__device__ __forceinline__ void fetch_widening(Weights& w, const u8* weights, int group) {
    const int lane = threadIdx.x % 32;
    if (BATCHES) {  // the first ones
#pragma unroll
        for (int k = 0; k < BATCH; ++k) w.w1[k] = fetch16(weights + group * (W1 / GROUPS) + k * 512 + lane * 16);
    } else {
        load_fragments(w.w1, weights + group * (W1 / GROUPS));
    }
    const u8* biases = weights + W1 + W2 + W3 + group * 64;
#pragma unroll
    for (int i = 0; i < 2; ++i) w.bias1[i] = __uint_as_float(fetch4(biases + (lane / 4 + i * 8) * 4));
}

__device__ __forceinline__ void fetch_convolution(Weights& w, const u8* weights, int group) {
    load_fragments(w.w2, weights + W1 + group * (W2 / GROUPS));
    const u8* biases = weights + W1 + W2 + W3 + BIAS + group * 64;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        w.bias2[i] = __uint_as_float(fetch4(biases + (i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2) * 4));
}

// What a launch is about, at hand for the steps of a tile.
struct Stage {
    const u16 *input, *shortcut;
    const u8 *weights, *after;
    u16 *out, *products;
    int height, width, tiles;
    u32 shared;

    __device__ __forceinline__ Tile tile(int number) const {
        return tile_of(number % (height / TH * (width / TW)), height, width);
    }
    // What lies in front of tile `number`'s picture, whose pixels number a `part` of this one's.
    __device__ __forceinline__ long long before(int number, int part) const {
        return number / (height / TH * (width / TW)) * (static_cast<long long>(height) * width / part);
    }
    __device__ __forceinline__ void ask_small(int number) const {
        if (number < tiles) load_small(shared + SMALL_AT, input + before(number, 4) * C, tile(number));
    }
    __device__ __forceinline__ void ask_shortcut(uint4 (&pieces)[MINE][4], int number) const {
        if (SHORTCUT) fetch_shortcut(pieces, shortcut + before(number, 4) * CI, tile(number));
    }
    __device__ __forceinline__ void double_to(u32 x) const {
        double_small(x, shared + SMALL_AT, shared + MATRIX_AT);
    }
    // conv1 and conv2: a warp's groups.
    __device__ __forceinline__ void widen_and_convolve(Weights& w, u32 x, int number) const {
        const int warp = same_in_warp(threadIdx.x / 32);
        const u32 hidden = shared + HIDDEN_AT + warp * HIDDEN;
#pragma unroll 1
        for (int group = warp; group < GROUPS; group += WARPS) {
            const bool last = group + WARPS >= GROUPS;
            if (!KEEPS) fetch_convolution(w, weights, group);
            widen(x, hidden, w, weights + group * (W1 / GROUPS));
            if (!KEEPS && !last) fetch_widening(w, weights, group + WARPS);
            clear_outside(hidden, tile(number));
            __syncwarp();
            const u32 to = last ? hidden : shared + MID_AT + group * MID;
            convolve_group(hidden, to, HIDDEN_PLANE, last ? HIDDEN_PLANE : MID_PLANE, w.w2, w.bias2);
        }
    }
    __device__ __forceinline__ void narrow_onto(u32 x) const {
        narrow(x, shared + HIDDEN_AT, shared + MID_AT, shared + W3_AT, weights + W1 + W2);
    }
    __device__ __forceinline__ void write(u32 x, const uint4 (&pieces)[MINE][4], int number) const {
        write_tile(out + before(number, 1) * C, x, pieces, tile(number));
    }
    __device__ __forceinline__ void write_after(u32 x, int number) const {
        if (PRODUCTS > 0) write_products(products + before(number, 1) * PRODUCTS, x, after, tile(number));
    }
};

// Tiles one after the other. A fence waits for all that a thread has asked memory for: nothing is asked for in front of one.
__device__ __forceinline__ void one_by_one(const Stage& stage, Weights& w) {
    const u32 x = stage.shared;
    const int warp = same_in_warp(threadIdx.x / 32);
#pragma unroll 1
    for (int number = blockIdx.x; number < stage.tiles; number += gridDim.x) {
        if (!DOUBLE) {
            __syncthreads();  // the tile before is written
            load_halo<C>(x, 16, X_PLANE, stage.input + stage.before(number, 1) * C, stage.tile(number));
        }
        copies_wait();
        if (!DOUBLE) copies_see_stores();
        __syncthreads();
        if (!KEEPS) fetch_widening(w, stage.weights, warp);
        if (DOUBLE) {
            stage.double_to(x);
            copies_see_stores();
            __syncthreads();  // x is there; hidden channels may lie where what was doubled did
        }
        stage.widen_and_convolve(w, x, number);
        copies_see_stores();
        __syncthreads();  // hidden channels are convolved; nobody reads x any more
        uint4 pieces[MINE][4];
        stage.ask_shortcut(pieces, number);
        stage.narrow_onto(x);
        __syncthreads();  // nobody reads hidden channels any more
        if (DOUBLE) stage.ask_small(number + gridDim.x);
        stage.write(x, pieces, number);
        if (PRODUCTS > 0) __syncthreads();
        stage.write_after(x, number);
    }
}

// A tile's result is written while the next one is doubled, and multiplied while that one is convolved.
__device__ __forceinline__ void pipelined(const Stage& stage, Weights& w) {
    copies_wait();
    __syncthreads();
    stage.double_to(stage.shared);
    int turn = 0;
#pragma unroll 1
    for (int number = blockIdx.x; number < stage.tiles; number += gridDim.x, turn ^= 1) {
        const u32 x = stage.shared + turn * X, other = stage.shared + (turn ^ 1) * X;
        const int next = number + gridDim.x;
        copies_see_stores();
        __syncthreads();  // x is there, and the result before in `other`
        stage.ask_small(next);
        if (number >= gridDim.x) stage.write_after(other, number - gridDim.x);
        stage.widen_and_convolve(w, x, number);
        copies_wait();
        copies_see_stores();
        __syncthreads();  // hidden channels are convolved; nobody reads x and `other` any more
        uint4 pieces[MINE][4];
        stage.ask_shortcut(pieces, number);
        stage.narrow_onto(x);
        __syncthreads();  // nobody reads hidden channels any more
        stage.write(x, pieces, number);
        if (next < stage.tiles) stage.double_to(other);
        else if (PRODUCTS > 0) {
            __syncthreads();
            stage.write_after(x, number);
        }
    }
}

// `after`: weights of the products of the result, `products` where they go to; `tiles`: of all pictures.
KERNEL(THREADS, 1, 1)
resblock(const u16* __restrict__ input, const u8* __restrict__ weights, const u16* __restrict__ shortcut,
         const u8* __restrict__ after, u16* __restrict__ out, u16* __restrict__ products, int height, int width, int tiles) {
    const Stage stage{input, shortcut, weights, after, out, products, height, width, tiles, shared_memory()};
    const int warp = same_in_warp(threadIdx.x / 32);
    next_may_begin();
    if (DOUBLE) put_matrix(stage.shared + MATRIX_AT);
    Weights w;
    if (KEEPS) {
        for (int i = threadIdx.x; i < W3 / 16; i += THREADS)
            copy16(stage.shared + W3_AT + i * 16, weights + W1 + W2 + i * 16, true);
        fetch_widening(w, weights, warp);
        fetch_convolution(w, weights, warp);
    }
    if (DOUBLE) copies_see_stores();
    previous_is_over();
    if (DOUBLE) stage.ask_small(blockIdx.x);
    if (PIPELINED) pipelined(stage, w);
    else one_by_one(stage, w);
}
