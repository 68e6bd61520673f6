// What a stage of the decoder is made of where its channels are too many for resblock.cu: the 3 by 3 convolution in
// groups of 16 between two activations, and bicubic doubling beside the stage's shortcut.
//
// Compile-time parameters are those of conv_tile.cuh.

constexpr int PIXELS = (HALO + 7) / 8 * 8, PLANE = PIXELS * 16, GROUP = 2 * PLANE;  // of 8 channels; of a group
constexpr int FILTERS = 9 * 512, SHARED = WARPS * GROUP;

// leaky(conv(leaky(input)) + bias). A warp computes a group of a tile, in shared memory of its own: nobody waits for
// another, and while some warps read others multiply.
KERNEL(THREADS, 1, 5)
grouped_conv(const u16* __restrict__ input, const u8* __restrict__ weights, u16* __restrict__ out, int height, int width,
             int channels) {
    const int blocks = channels / 16 / WARPS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = blockIdx.y % blocks * WARPS + warp;
    const Tile tile = tile_of(blockIdx.x, height, width);
    const long long picture = static_cast<long long>(blockIdx.y / blocks) * height * width * channels + group * 16;
    const u32 halo = shared_memory() + warp * GROUP;
    const u8* filters = weights + group * (FILTERS + 64);
    next_may_begin();
    previous_is_over();
    constexpr int EACH = (HALO + 15) / 16;  // two lanes read a pixel
    uint4 v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int p = i * 16 + lane / 2, y = tile.y0 + p / WIDE - 1, x = tile.x0 + p % WIDE - 1;
        v[i] = uint4{0, 0, 0, 0};
        if (p < HALO && tile.inside(y, x))
            v[i] = fetch16(input + picture + (static_cast<long long>(y) * width + x) * channels + lane % 2 * 8);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int p = i * 16 + lane / 2;
        const uint4 active{leaky_pair(v[i].x), leaky_pair(v[i].y), leaky_pair(v[i].z), leaky_pair(v[i].w)};
        if (p < PIXELS) put16(halo + lane % 2 * PLANE + p * 16, active);
    }
    uint4 w[9];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) w[tap] = fetch16(filters + tap * 512 + lane * 16);
    float biases[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        biases[i] = __uint_as_float(fetch4(filters + FILTERS + (i / 2 * 8 + lane % 4 * 2 + i % 2) * 4));
    __syncwarp();
    convolve_group(halo, halo, PLANE, PLANE, w, biases);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TH; ++i) {
        const int y = tile.y0 + i, x = tile.x0 + lane / 2;
        write16(out + picture + (static_cast<long long>(y) * width + x) * channels + lane % 2 * 8,
                load16(halo + lane % 2 * PLANE + (i * TW + lane / 2) * 16));
    }
}

// doubled = `small` [height / 2, width / 2, channels] at twice its size; base = doubled + the pixel shuffle of
// `shortcut` [height / 2, width / 2, wide], its wide / 4 channels as often as they fit. A thread computes 8 channels of
// the 2 by 2 pixels that the same 4 by 4 of the smaller picture make: those at 2 * i - 1 and 2 * i.
KERNEL(THREADS, 1, 4)
upsample(const u16* __restrict__ small, const u16* __restrict__ shortcut, u16* __restrict__ doubled,
         u16* __restrict__ base, int height, int width, int channels, int wide) {
    const int parts = channels / 8, i = blockIdx.x * THREADS + threadIdx.x, part = i % parts, x0 = i / parts * 2 - 1;
    const int h = height / 2, w = width / 2, y0 = blockIdx.y % (h + 1) * 2 - 1, clip = blockIdx.y / (h + 1);
    next_may_begin();
    previous_is_over();
    if (x0 >= width) return;
    const long long from = static_cast<long long>(clip) * h * w;
    uint4 v[4][4];
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
            const int y = clamped(first_tap(y0) + row, h), x = clamped(first_tap(x0) + tap, w);
            v[row][tap] = fetch16(small + (from + static_cast<long long>(y) * w + x) * channels + part * 8);
        }
    float across[4][2][8] = {};  // of the left pixel and the right
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
            const u32 words[4] = {v[row][tap].x, v[row][tap].y, v[row][tap].z, v[row][tap].w};
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const float value = c % 2 ? high_of(words[c / 2]) : low_of(words[c / 2]);
                across[row][0][c] += quarter(tap) * value;
                across[row][1][c] += quarter(3 - tap) * value;
            }
        }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        const int y = y0 + corner / 2, x = x0 + corner % 2;
        if (y < 0 || y >= height || x < 0 || x >= width) continue;
        const u16* other = shortcut + (from + static_cast<long long>(y / 2) * w + x / 2) * wide + part * 8 % (wide / 4) * 4;
        u32 sum[4], made[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            float down[2] = {0.0f, 0.0f};
#pragma unroll
            for (int row = 0; row < 4; ++row)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    down[e] += quarter(corner / 2 ? 3 - row : row) * across[row][corner % 2][2 * pair + e];
            made[pair] = to_bf16(down[0], down[1]);
            const uint4 four = fetch16(other + pair * 8);  // the four pixels of one channel, then of the next
            // The upper left of these is the lower right of the four that share a pixel of the shortcut's.
            const u32 a = corner < 2 ? four.y : four.x, b = corner < 2 ? four.w : four.z;
            sum[pair] = add_pairs(made[pair], __byte_perm(a, b, corner % 2 ? 0x5410 : 0x7632));
        }
        const long long to = ((static_cast<long long>(clip) * height + y) * width + x) * channels + part * 8;
        write16(doubled + to, uint4{made[0], made[1], made[2], made[3]});
        write16(base + to, uint4{sum[0], sum[1], sum[2], sum[3]});
    }
}
