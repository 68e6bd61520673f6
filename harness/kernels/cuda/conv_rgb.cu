// The decoder's last convolution: 3 by 3, from C channels to at most 8, without bias; or what resblock.cu left of it to
// do, and the frame's bicubic resize.
//
// Products of a warp have at least 8 outputs, so three colours take as long as eight would: little, beside reading.
//
// Compile-time parameter beside those of conv_tile.cuh: C, a multiple of 32.

constexpr int XS = C * 2 + 16, WEIGHTS = 9 * (C / 32) * 512, ROWS = TH / WARPS;
constexpr int WEIGHTS_AT = HALO * XS, SHARED = WEIGHTS_AT + WEIGHTS;

// `out` [colours, height, width] of `input` [height, width, C].
KERNEL(THREADS, 1, 2)
conv_rgb(const u16* __restrict__ input, const u8* __restrict__ weights, u16* __restrict__ out, int height, int width,
         int colours) {
    const u32 x = shared_memory(), filters = x + WEIGHTS_AT;
    const Tile tile = tile_of(blockIdx.x, height, width);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * ROWS;
    const long long pixels = static_cast<long long>(height) * width;
    next_may_begin();
    for (int i = threadIdx.x; i < WEIGHTS / 16; i += THREADS) copy16(filters + i * 16, weights + i * 16, true);
    previous_is_over();
    load_halo<C>(x, XS, 16, input + blockIdx.y * pixels * C, tile);
    copies_wait();
    __syncthreads();
    float sums[ROWS][4] = {};
#pragma unroll 1
    for (int k = 0; k < C / 32; ++k)
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
            uint4 b[3];
#pragma unroll
            for (int ky = 0; ky < 3; ++ky) b[ky] = load16(filters + ((ky * 3 + kx) * (C / 32) + k) * 512 + lane * 16);
#pragma unroll
            for (int in = 0; in < ROWS + 2; ++in)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    u32 a[4];
                    load_matrices(a, x + ((row + in) * WIDE + kx + lane % 16) * XS + k * 64 + half * 32 + lane / 16 * 16);
#pragma unroll
                    for (int ky = 0; ky < 3; ++ky) {
                        const int out = in - ky;
                        if (out < 0 || out >= ROWS) continue;
                        mma(sums[out], a, half ? b[ky].z : b[ky].x, half ? b[ky].w : b[ky].y);
                    }
                }
        }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int colour = lane % 4 * 2 + i % 2, column = lane / 4 + i / 2 * 8;
            const long long pixel = static_cast<long long>(tile.y0 + row + r) * width + tile.x0 + column;
            const u16 value = to_bf16(sums[r][i], 0.0f);
            if (colour < colours) out[(blockIdx.y * static_cast<long long>(colours) + colour) * pixels + pixel] = value;
        }
}

// Weights of bicubic interpolation (A = -0.75) at `t` behind the second of four pixels.
__device__ __forceinline__ void cubic(float (&weights)[4], float t) {
    const float far = 1.0f + t, near = 1.0f - t, last = 2.0f - t;
    weights[0] = ((-0.75f * far + 3.75f) * far - 6.0f) * far + 3.0f;
    weights[1] = (1.25f * t - 2.25f) * t * t + 1.0f;
    weights[2] = (1.25f * near - 2.25f) * near * near + 1.0f;
    weights[3] = ((-0.75f * last + 3.75f) * last - 6.0f) * last + 3.0f;
}

// Colours of a pixel: the sum of what its neighbours give, `products` [9, height, width, 4].
__device__ __forceinline__ uint4 collected(const u16* products, int y, int x, int height, int width) {
    uint2 v[9];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
        const int row = y + tap / 3 - 1, column = x + tap % 3 - 1;
        v[tap] = uint2{0, 0};
        if (row >= 0 && row < height && column >= 0 && column < width)
            v[tap] = fetch8(products + ((static_cast<long long>(tap) * height + row) * width + column) * 4);
    }
    float sums[4] = {};
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
        sums[0] += low_of(v[tap].x), sums[1] += high_of(v[tap].x);
        sums[2] += low_of(v[tap].y), sums[3] += high_of(v[tap].y);
    }
    return uint4{bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])};
}

// Where the middle of pixel `i` of a picture resized to `to` lies in one of `from` pixels.
__device__ __forceinline__ float source_of(int i, int from, int to) {
    return static_cast<float>(from) / to * (i + 0.5f) - 0.5f;
}

constexpr int OUT_ROWS = 16, OUT_COLUMNS = 32;

// `out` [colours, h, w] of `products` [9, height, width, 4], as torch resizes without aligned corners and antialiasing. A
// block makes 16 by 32 pixels of up to `rows` by `columns`, which it has in shared memory as four floats each.
KERNEL(THREADS, 1, 4)
resize(const u16* __restrict__ products, u16* __restrict__ out, int height, int width, int h, int w, int colours, int rows,
       int columns) {
    const u32 colour = shared_memory();
    const int across = (w + OUT_COLUMNS - 1) / OUT_COLUMNS;
    const int y0 = blockIdx.x / across * OUT_ROWS, x0 = blockIdx.x % across * OUT_COLUMNS;
    const int first_row = static_cast<int>(floorf(source_of(y0, height, h))) - 1;
    const int first_column = static_cast<int>(floorf(source_of(x0, width, w))) - 1;
    const u16* from = products + blockIdx.y * static_cast<long long>(height) * width * 36;
    next_may_begin();
    previous_is_over();
    for (int i = threadIdx.x; i < rows * columns; i += THREADS)
        put16(colour + i * 16, collected(from, clamped(first_row + i / columns, height),
                                         clamped(first_column + i % columns, width), height, width));
    __syncthreads();
    for (int i = threadIdx.x; i < OUT_ROWS * OUT_COLUMNS; i += THREADS) {
        const int y = y0 + i / OUT_COLUMNS, x = x0 + i % OUT_COLUMNS;
        if (y >= h || x >= w) continue;
        const float at_y = source_of(y, height, h), at_x = source_of(x, width, w);
        const float top = floorf(at_y), left = floorf(at_x);
        float down[4], across[4], sums[4] = {};
        cubic(down, at_y - top);
        cubic(across, at_x - left);
        const int row = static_cast<int>(top) - 1 - first_row, column = static_cast<int>(left) - 1 - first_column;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float line[4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint4 v = load16(colour + ((row + r) * columns + column + j) * 16);
                line[0] += across[j] * __uint_as_float(v.x), line[1] += across[j] * __uint_as_float(v.y);
                line[2] += across[j] * __uint_as_float(v.z), line[3] += across[j] * __uint_as_float(v.w);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[c] += down[r] * line[c];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (c < colours) out[((blockIdx.y * static_cast<long long>(colours) + c) * h + y) * w + x] = to_bf16(sums[c], 0.0f);
    }
}
