// A stage of the decoder in one launch: bicubic doubling, a residual block, the pixel-shuffle shortcut.
//
//   x = double(low)
//   out = x + conv3(leaky(conv2(leaky(conv1(x))))) + shortcut, conv1 and conv3 1 by 1, conv2 3 by 3 in groups of 16
//
// A block computes a tile of TH by 16 pixels and all C channels. What lies between the convolutions never leaves shared
// memory: 32 of the 2 * C hidden channels at a time, their halo (conv2's border) first, then their convolution, then
// their share of conv3's sums, which stay in registers. Hidden channels outside the picture are zero, as padding is.
// While one 32 are convolved the next ones' weights arrive.
//
// Compile-time parameters beside those of conv_tile.cuh: C channels; CI channels of the shortcut's picture; SPLIT and WN
// shares of conv1's and conv3's outputs among the warps; BLOCKS on a multiprocessor; DOUBLE whether x is to be doubled, or is given;
// SHORTCUT whether there is one; SILU of the result.

constexpr int HC = 32, GROUPS = HC / 16, CHUNKS = 2 * C / HC;
constexpr int XS = C * 2 + 16, HS = HC * 2 + 16;  // bytes of a pixel: an odd multiple of 16, so that rows meet no bank twice
constexpr int W1 = HC * C * 2, W2 = GROUPS * 9 * 512, W3 = C * HC * 2, BIAS = 2 * HC * 4, CHUNK = W1 + W2 + W3 + BIAS;
constexpr int HID_AT = HALO * XS, MID_AT = HID_AT + HALO * HS, WEIGHTS_AT = MID_AT + TH * TW * HS;
constexpr int SHARED = WEIGHTS_AT + 2 * CHUNK;
static_assert(!DOUBLE || (TH / 2 + 4) * (TW / 2 + 4) * C * 2 <= WEIGHTS_AT + CHUNK - HID_AT, "what is doubled finds room");

constexpr int TILES = (HALO + 15) / 16, MINE = GROUPS / SPLIT;  // of 16 pixels of the halo; 16 channels of a warp
constexpr int EACH = (TILES * SPLIT + WARPS - 1) / WARPS;       // tiles of a warp
constexpr int UNIT = TH * GROUPS / WARPS;                                    // rows of a warp in conv2
constexpr int WM = WARPS / WN, ROWS = TH / WM, COLUMNS = C / 16 / WN;        // rows and 16 channels of a warp in conv3

__device__ __forceinline__ float bias_at(u32 biases, int i) { return __uint_as_float(load4(biases + i * 4)); }

__device__ __forceinline__ void load_weights(u32 to, const u8* from) {
    for (int i = threadIdx.x; i < CHUNK / 16; i += THREADS) copy16(to + i * 16, from + i * 16, true);
}

// Biases of channels `c` and `c` + 1 as sums begin with them.
__device__ __forceinline__ void begin_with(float (&sums)[4], u32 biases, int c) {
    sums[0] = sums[2] = bias_at(biases, c);
    sums[1] = sums[3] = bias_at(biases, c + 1);
}

// Hidden channels of the halo: a warp has some of the tiles, and of SPLIT = 2 shares of the channels one.
__device__ __forceinline__ void widen(u32 x, u32 hidden, u32 weights, u32 inside) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = warp % SPLIT, first = warp / SPLIT;
    float sums[EACH][2 * MINE][4];
#pragma unroll
    for (int n = 0; n < 2 * MINE; ++n) begin_with(sums[0][n], weights + W1 + W2 + W3, share * MINE * 16 + n * 8 + lane % 4 * 2);
#pragma unroll
    for (int i = 1; i < EACH; ++i)
#pragma unroll
        for (int n = 0; n < 8 * MINE; ++n) sums[i][n / 4][n % 4] = sums[0][n / 4][n % 4];
#pragma unroll 6
    for (int k = 0; k < C / 16; ++k) {
        uint4 b[MINE];
#pragma unroll
        for (int n = 0; n < MINE; ++n) b[n] = load16(weights + (k * GROUPS + share * MINE + n) * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int tile = first + i * (WARPS / SPLIT);
            if (tile >= TILES) break;
            u32 a[4];
            load_matrices(a, x + min(tile * 16 + lane % 16, HALO - 1) * XS + k * 32 + lane / 16 * 16);
#pragma unroll
            for (int n = 0; n < MINE; ++n) {
                mma(sums[i][2 * n], a, b[n].x, b[n].y);
                mma(sums[i][2 * n + 1], a, b[n].z, b[n].w);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int p = (first + i * (WARPS / SPLIT)) * 16 + lane / 4 + half * 8;
            if (p >= HALO) continue;
            const bool in = inside >> (2 * i + half) & 1;
#pragma unroll
            for (int n = 0; n < 2 * MINE; ++n) {
                const u32 pair = leaky(sums[i][n][half * 2], sums[i][n][half * 2 + 1]);
                put4(hidden + p * HS + (share * MINE * 16 + n * 8 + lane % 4 * 2) * 2, in ? pair : 0);
            }
        }
}

// Their convolution, inside the tile.
__device__ __forceinline__ void convolve_hidden(u32 hidden, u32 mid, u32 weights) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % GROUPS, row = warp / GROUPS * UNIT;
    float sums[UNIT][2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        begin_with(sums[0][n], weights + W1 + W2 + W3 + HC * 4, group * 16 + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 4; i < 4 * UNIT; ++i) sums[i / 4][n][i % 4] = sums[0][n][i % 4];
    }
    convolve<UNIT>(sums, hidden + row * WIDE * HS + group * 32, HS, weights + W1 + group * 9 * 512);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int r = 0; r < UNIT; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                put4(mid + ((row + r) * TW + lane / 4 + half * 8) * HS + (group * 16 + n * 8 + lane % 4 * 2) * 2,
                     leaky(sums[r][n][half * 2], sums[r][n][half * 2 + 1]));
}

// Their share of conv3's sums.
__device__ __forceinline__ void narrow(float (&sums)[ROWS][2 * COLUMNS][4], u32 mid, u32 weights) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp / WN * ROWS, column = warp % WN * COLUMNS;
#pragma unroll
    for (int k = 0; k < HC / 16; ++k) {
        u32 a[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            load_matrices(a[r], mid + ((row + r) * TW + lane % 16) * HS + k * 32 + lane / 16 * 16);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            const uint4 b = load16(weights + W1 + W2 + (k * (C / 16) + column + n) * 512 + lane * 16);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                mma(sums[r][2 * n], a[r], b.x, b.y);
                mma(sums[r][2 * n + 1], a[r], b.z, b.w);
            }
        }
    }
}

__device__ __forceinline__ u32 at_pixel(u32 x, int row, int column) { return x + ((row + 1) * WIDE + column + 1) * XS; }

// Sums, where x was: a thread rewrites what it alone reads.
__device__ __forceinline__ void add_to_x(u32 x, const float (&sums)[ROWS][2 * COLUMNS][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp / WN * ROWS, column = warp % WN * COLUMNS;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int n = 0; n < 2 * COLUMNS; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 address = at_pixel(x, row + r, lane / 4 + half * 8) + (column * 16 + n * 8 + lane % 4 * 2) * 2;
                const u32 old = load4(address);
                put4(address, to_bf16(low(old) + sums[r][n][half * 2], high(old) + sums[r][n][half * 2 + 1]));
            }
}

// The pixel shuffle of `from` [height / 2, width / 2, CI], its CI / 4 channels as often as they fit: fetched, then added.
constexpr int PARTS = CI / 8, PIECES = SHORTCUT ? (TH / 2 * (TW / 2) * PARTS + THREADS - 1) / THREADS : 1;
constexpr int LAST = SHORTCUT ? TH / 2 * (TW / 2) * PARTS : 0;

__device__ __forceinline__ void fetch_shortcut(uint4 (&pieces)[PIECES], const u16* from, const Tile& tile) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int i = threadIdx.x + piece * THREADS, y = i / PARTS / (TW / 2), column = i / PARTS % (TW / 2);
        if (i >= LAST) break;
        const long long pixel = static_cast<long long>(tile.y0 / 2 + y) * (tile.width / 2) + tile.x0 / 2 + column;
        pieces[piece] = fetch16(from + pixel * CI + i % PARTS * 8);
    }
}

__device__ __forceinline__ void add_shortcut(u32 x, const uint4 (&pieces)[PIECES]) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int i = threadIdx.x + piece * THREADS, part = i % PARTS;
        const int y = i / PARTS / (TW / 2), column = i / PARTS % (TW / 2);
        if (i >= LAST) break;
        const uint4 v = pieces[piece];
        // Channels 4 * c to 4 * c + 3 are the four pixels of channel c; here are those of two channels.
        const u32 pairs[4] = {v.x & 0xffff | v.z << 16, v.x >> 16 | v.z & 0xffff0000u,
                              v.y & 0xffff | v.w << 16, v.y >> 16 | v.w & 0xffff0000u};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
#pragma unroll
            for (int again = 0; again < C; again += CI / 4) {
                const u32 address = at_pixel(x, 2 * y + corner / 2, 2 * column + corner % 2) + (again + part * 2) * 2;
                put4(address, add_pairs(load4(address), pairs[corner]));
            }
    }
}

// x as the double of `from` [height / 2, width / 2, C]. What it is made of is first copied to `small`.
constexpr int SMALL_ROWS = TH / 2 + 4, SMALL_COLUMNS = TW / 2 + 4;

__device__ __forceinline__ void load_small(u32 small, const u16* from, const Tile& tile) {
    for (int i = threadIdx.x; i < SMALL_ROWS * SMALL_COLUMNS * (C / 8); i += THREADS) {
        const int part = i % (C / 8), pixel = i / (C / 8);
        const int y = clamped(first_tap(tile.y0 - 1) + pixel / SMALL_COLUMNS, tile.height / 2);
        const int column = clamped(first_tap(tile.x0 - 1) + pixel % SMALL_COLUMNS, tile.width / 2);
        copy16(small + i * 16, from + (static_cast<long long>(y) * (tile.width / 2) + column) * C + part * 8, true);
    }
}

__device__ __forceinline__ void double_small(u32 x, u32 small, const Tile& tile) {
    for (int i = threadIdx.x; i < WIDE * (C / 8); i += THREADS) {
        const int part = i % (C / 8), column = i / (C / 8), left = column - 1 + tile.x0;
        const u32 taps = small + (first_tap(left) - first_tap(tile.x0 - 1)) * (C * 2) + part * 16;
        const auto fetch = [&](int row, int tap) { return load16(taps + (row * SMALL_COLUMNS + tap) * (C * 2)); };
        upsampled_column(left, tile.y0 - 1, TH + 2, fetch, [&](int y, uint4 v) {
            put16(x + ((y - tile.y0 + 1) * WIDE + column) * XS + part * 16, v);
        });
    }
}

__device__ __forceinline__ u32 silu_pair(u32 pair) { return to_bf16(silu(low(pair)), silu(high(pair))); }

__device__ __forceinline__ void write_tile(u16* out, u32 x, const Tile& tile) {
    constexpr int ALL = C / 8;
    for (int i = threadIdx.x; i < TH * TW * ALL; i += THREADS) {
        const int part = i % ALL, row = i / ALL / TW, column = i / ALL % TW;
        uint4 v = load16(at_pixel(x, row, column) + part * 16);
        if (SILU) v = uint4{silu_pair(v.x), silu_pair(v.y), silu_pair(v.z), silu_pair(v.w)};
        write16(out + (static_cast<long long>(tile.y0 + row) * tile.width + tile.x0 + column) * C + part * 8, v);
    }
}

KERNEL(THREADS, 1, BLOCKS)
resblock(const u16* __restrict__ input, const u8* __restrict__ weights, const u16* __restrict__ shortcut,
         u16* __restrict__ out, int height, int width) {
    const u32 x = shared_memory(), hidden = x + HID_AT, mid = x + MID_AT;
    const Tile tile = tile_of(blockIdx.x, height, width);
    const long long pixels = static_cast<long long>(height) * width;
    load_weights(x + WEIGHTS_AT + CHUNK, weights);
    if (DOUBLE) {
        load_small(hidden, input + blockIdx.y * (pixels / 4) * C, tile);
        copies_wait();
        __syncthreads();
        double_small(x, hidden, tile);
    } else {
        load_halo<C>(x, XS, input + blockIdx.y * pixels * C, C, tile);
    }
    u32 inside = 0;  // which pixels of `widen` are
#pragma unroll
    for (int i = 0; i < 2 * EACH; ++i) {
        const int p = (threadIdx.x / 32 / SPLIT + i / 2 * (WARPS / SPLIT)) * 16 + threadIdx.x % 32 / 4 + i % 2 * 8;
        inside |= static_cast<u32>(tile.holds(p)) << i;
    }
    float sums[ROWS][2 * COLUMNS][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const u32 now = x + WEIGHTS_AT + (chunk + 1) % 2 * CHUNK, other = x + WEIGHTS_AT + chunk % 2 * CHUNK;
        copies_wait();
        __syncthreads();  // weights are there; the 32 channels before are convolved
        if (chunk > 0) narrow(sums, mid, other);
        widen(x, hidden, now, inside);
        __syncthreads();  // hidden channels are there; nobody reads `other` and `mid` any more
        if (chunk + 1 < CHUNKS) load_weights(other, weights + (chunk + 1) * CHUNK);
        convolve_hidden(hidden, mid, now);
    }
    uint4 pieces[PIECES];
    if (SHORTCUT) fetch_shortcut(pieces, shortcut + blockIdx.y * (pixels / 4) * CI, tile);
    __syncthreads();
    narrow(sums, mid, x + WEIGHTS_AT + CHUNKS % 2 * CHUNK);
    add_to_x(x, sums);
    __syncthreads();
    if (SHORTCUT) {
        add_shortcut(x, pieces);
        __syncthreads();
    }
    write_tile(out + blockIdx.y * pixels * C, x, tile);
}
