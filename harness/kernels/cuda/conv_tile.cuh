// What the decoder's kernels share: tiles of a channels-last picture, 16 pixels wide, TH high, with a border of one.
//
// Compile-time parameters: TH rows of a tile, a multiple of 2; WARPS a block.

constexpr int THREADS = WARPS * 32, TW = 16, WIDE = TW + 2, HALO = (TH + 2) * WIDE;

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
// Leaky ReLU of two BF16, and of two values as two BF16. The slope, 0.01, is 0x3c24 in BF16.
__device__ __forceinline__ u32 leaky_pair(u32 pair) { return larger(pair, multiply(pair, 0x3c243c24u)); }
__device__ __forceinline__ u32 leaky(float a, float b) { return leaky_pair(to_bf16(a, b)); }
__device__ __forceinline__ u32 add_to_pair(u32 pair, float a, float b) { return to_bf16(low(pair) + a, high(pair) + b); }
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) { return add_to_pair(a, low(b), high(b)); }

// x / (1 + exp(-x)) by half of it: exact to 2^-12 of x.
__device__ __forceinline__ float silu(float x) {
    const float half = 0.5f * x;
    return half * hyperbolic_tangent(half) + half;
}

// The tile that a block computes, and what of its halo lies in the picture.
struct Tile {
    int x0, y0, width, height;
    __device__ __forceinline__ bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
    // Of halo pixel `p`, counted row by row.
    __device__ __forceinline__ bool holds(int p) const { return inside(y0 + p / WIDE - 1, x0 + p % WIDE - 1); }
};

__device__ __forceinline__ Tile tile_of(int number, int height, int width) {
    const int across = width / TW;
    return {number % across * TW, number / across * TH, width, height};
}

// The halo of a picture of CHANNELS, pixels `bytes` and 8 channels `part_bytes` apart; zeros outside the picture.
template <int CHANNELS>
__device__ __forceinline__ void load_halo(u32 to, int bytes, int part_bytes, const u16* from, const Tile& tile) {
    constexpr int PARTS = CHANNELS / 8;
    for (int i = threadIdx.x; i < HALO * PARTS; i += THREADS) {
        const int p = i / PARTS, part = i % PARTS, y = tile.y0 + p / WIDE - 1, x = tile.x0 + p % WIDE - 1;
        const bool inside = tile.inside(y, x);
        const long long pixel = inside ? static_cast<long long>(y) * tile.width + x : 0;
        copy16(to + p * bytes + part * part_bytes, from + pixel * CHANNELS + part * 8, inside);
    }
}

// Weights of bicubic interpolation at a quarter of a pixel (A = -0.75), of the four pixels around.
__device__ __forceinline__ float quarter(int tap) {
    return tap == 0 ? -0.10546875f : tap == 1 ? 0.87890625f : tap == 2 ? 0.26171875f : -0.03515625f;
}

__device__ __forceinline__ int clamped(int i, int size) { return max(0, min(i, size - 1)); }

// The leftmost and topmost of the four pixels that make pixel `i` of a picture twice as large.
__device__ __forceinline__ int first_tap(int i) { return i & 1 ? (i - 1) / 2 - 1 : i / 2 - 2; }

// Column `x` of a picture doubled bicubically: calls emit(y, 8 channels) for each row from `first` (odd) on, `rows` of
// them (even), with what fetch(row, tap) gives of the smaller picture, `row` counted from `first_tap(first)`.
template <typename Fetch, typename Emit>
__device__ __forceinline__ void upsampled_column(int x, int first, int rows, Fetch fetch, Emit emit) {
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = quarter(x & 1 ? i : 3 - i);
    float ring[4][8];  // rows of the smaller one, interpolated along x, at their number modulo 4
    for (int r = 0; r < rows / 2 + 3; r += 4) {
#pragma unroll
        for (int turn = 0; turn < 4; ++turn) {
            if (r + turn >= rows / 2 + 3) break;
#pragma unroll
            for (int c = 0; c < 8; ++c) ring[turn][c] = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 v = fetch(r + turn, i);
                const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    ring[turn][2 * c] += weights[i] * low(words[c]);
                    ring[turn][2 * c + 1] += weights[i] * high(words[c]);
                }
            }
            if (r + turn < 3) continue;
#pragma unroll
            for (int even = 0; even < 2; ++even) {
                u32 words[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float sum[2] = {0.0f, 0.0f};
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            sum[e] += quarter(even ? 3 - i : i) * ring[(turn + 1 + i) % 4][2 * c + e];
                    words[c] = to_bf16(sum[0], sum[1]);
                }
                emit(first + 2 * (r + turn - 3) + even, uint4{words[0], words[1], words[2], words[3]});
            }
        }
    }
}

// A unit of the grouped 3 by 3 convolution: ROWS rows of 16 pixels of one group of 16 channels, added to `sums`.
//
// `halo`: that group's first 8 channels of the halo's pixel at the unit's upper left, the other 8 `half` bytes behind,
// pixels `bytes` apart; `w`: the group's nine fragments. A row of pixels is read once a column of the kernel and serves
// all three of its rows.
template <int ROWS>
__device__ __forceinline__ void convolve(float (&sums)[ROWS][2][4], u32 halo, int bytes, int half, const uint4 (&w)[9]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int in = 0; in < ROWS + 2; ++in)
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
            u32 a[4];
            load_matrices(a, halo + (in * WIDE + kx + lane % 16) * bytes + lane / 16 * half);
#pragma unroll
            for (int ky = 0; ky < 3; ++ky) {
                const int out = in - ky;
                if (out < 0 || out >= ROWS) continue;
                const uint4& b = w[ky * 3 + kx];
                mma(sums[out][0], a, b.x, b.y);
                mma(sums[out][1], a, b.z, b.w);
            }
        }
}
