// The decoder's last convolution: 3 by 3, from C channels to at most 8, without bias; and the frame's bicubic resize.
//
// Products of a warp have at least 8 outputs, so three colours take as long as eight would: little, beside reading.
//
// Compile-time parameters beside those of conv_tile.cuh: C, a multiple of 32; PACKED whether at most 4 colours of a pixel
// lie together, for `resize`, and not each colour by itself.

constexpr int XS = C * 2 + 16, WEIGHTS = 9 * (C / 32) * 512, ROWS = TH / WARPS;
constexpr int WEIGHTS_AT = HALO * XS, SHARED = WEIGHTS_AT + WEIGHTS;

// `out` [colours, height, width], or [height, width, 4], of `input` [height, width, C].
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
            if (PACKED && colour < 4) out[(blockIdx.y * pixels + pixel) * 4 + colour] = value;
            if (!PACKED && colour < colours) out[(blockIdx.y * static_cast<long long>(colours) + colour) * pixels + pixel] = value;
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

// `out` [colours, h, w] of `input` [height, width, 4], as torch resizes without aligned corners and antialiasing. A thread
// computes a pixel.
KERNEL(THREADS, 1, 2)
resize(const u16* __restrict__ input, u16* __restrict__ out, int height, int width, int h, int w, int colours) {
    const int pixel = blockIdx.x * THREADS + threadIdx.x, y = pixel / w, x = pixel % w;
    next_may_begin();
    previous_is_over();
    if (y >= h) return;
    const float at_y = static_cast<float>(height) / h * (y + 0.5f) - 0.5f;
    const float at_x = static_cast<float>(width) / w * (x + 0.5f) - 0.5f;
    const float top = floorf(at_y), left = floorf(at_x);
    float down[4], across[4], sums[4] = {};
    cubic(down, at_y - top);
    cubic(across, at_x - left);
    const u16* from = input + blockIdx.y * static_cast<long long>(height) * width * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u16* row = from + static_cast<long long>(clamped(static_cast<int>(top) + i - 1, height)) * width * 4;
        float line[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint2 v = fetch8(row + clamped(static_cast<int>(left) + j - 1, width) * 4);
            const float values[4] = {low(v.x), high(v.x), low(v.y), high(v.y)};
#pragma unroll
            for (int c = 0; c < 4; ++c) line[c] += across[j] * values[c];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] += down[i] * line[c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (c < colours) out[((blockIdx.y * static_cast<long long>(colours) + c) * h + y) * w + x] = to_bf16(sums[c], 0.0f);
}
