// What the decoder's kernels share: tiles of a channels-last picture, 16 pixels wide, TH high, with a border of one.
//
// Compile-time parameters: TH rows of a tile, a multiple of 2; WARPS a block.

constexpr int THREADS = WARPS * 32, TW = 16, WIDE = TW + 2, HALO = (TH + 2) * WIDE;

// Leaky ReLU of two BF16, and of two values as two BF16. The slope, 0.01, is 0x3c24 in BF16.
__device__ __forceinline__ u32 leaky_pair(u32 pair) { return larger(pair, multiply(pair, 0x3c243c24u)); }
__device__ __forceinline__ u32 leaky(float a, float b) { return leaky_pair(to_bf16(a, b)); }
__device__ __forceinline__ u32 add_to_pair(u32 pair, float a, float b) { return to_bf16(low_of(pair) + a, high_of(pair) + b); }
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) { return add_to_pair(a, low_of(b), high_of(b)); }

// x / (1 + exp(-x)) by half of it: exact to 2^-12 of x.
__device__ __forceinline__ float silu_by_tanh(float x) {
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

// The grouped 3 by 3 convolution and its activation, a group of 16 channels of a tile by a warp.
//
// `halo`: that group's pixels in two planes of 8 channels, 16 bytes a pixel; `w`: its nine fragments; `to`: the same of the
// tile, which may be where the halo is, with planes as far apart: four rows of the tile lie where the other four read
// nothing. A row of pixels is read once a column of the kernel and serves all three of its rows.
__device__ __forceinline__ void convolve_group(u32 halo, u32 to, int halo_plane, int to_plane, const uint4 (&w)[9],
                                               const float (&biases)[4]) {
    constexpr int ROWS = 4;
    static_assert(TH % ROWS == 0, "units of four rows");
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int begin = 0; begin < TH; begin += ROWS) {
        float sums[ROWS][2][4];
#pragma unroll
        for (int i = 0; i < 8 * ROWS; ++i) sums[i / 8][i / 4 % 2][i % 4] = biases[i / 4 % 2 * 2 + i % 2];
#pragma unroll
        for (int in = 0; in < ROWS + 2; ++in)
#pragma unroll
            for (int kx = 0; kx < 3; ++kx) {
                u32 a[4];
                load_matrices(a, halo + lane / 16 * halo_plane + ((begin + in) * WIDE + kx + lane % 16) * 16);
#pragma unroll
                for (int ky = 0; ky < 3; ++ky) {
                    const int out = in - ky;
                    if (out < 0 || out >= ROWS) continue;
                    const uint4& b = w[ky * 3 + kx];
                    mma(sums[out][0], a, b.x, b.y);
                    mma(sums[out][1], a, b.z, b.w);
                }
            }
        __syncwarp();  // nobody reads these rows any more
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            store_matrices(to + lane / 16 * to_plane + ((begin + r) * TW + lane % 16) * 16,
                           leaky(sums[r][0][0], sums[r][0][1]), leaky(sums[r][0][2], sums[r][0][3]),
                           leaky(sums[r][1][0], sums[r][1][1]), leaky(sums[r][1][2], sums[r][1][3]));
    }
}
