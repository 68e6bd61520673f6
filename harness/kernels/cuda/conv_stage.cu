// What a stage of the decoder is made of where its channels are too many for resblock.cu: the 3 by 3 convolution in
// groups of 16 between two activations, and bicubic doubling beside the stage's shortcut.
//
// Compile-time parameters are those of conv_tile.cuh.

constexpr int HC = 32, GROUPS = HC / 16, UNIT = TH * GROUPS / WARPS;
constexpr int HS = HC * 2 + 16, WEIGHTS = GROUPS * 9 * 512 + HC * 4;
constexpr int WEIGHTS_AT = HALO * HS, SHARED = WEIGHTS_AT + WEIGHTS;

// leaky(conv(leaky(input)) + bias): a block computes 32 channels of a tile.
KERNEL(THREADS, 1, 2)
grouped_conv(const u16* __restrict__ input, const u8* __restrict__ weights, u16* __restrict__ out, int height, int width,
             int channels) {
    const u32 hidden = shared_memory(), filters = hidden + WEIGHTS_AT;
    const int chunks = channels / HC, chunk = blockIdx.y % chunks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Tile tile = tile_of(blockIdx.x, height, width);
    const long long picture = static_cast<long long>(blockIdx.y / chunks) * height * width * channels + chunk * HC;
    for (int i = threadIdx.x; i < WEIGHTS / 16; i += THREADS)
        copy16(filters + i * 16, weights + static_cast<long long>(chunk) * WEIGHTS + i * 16, true);
    constexpr int PARTS = HC / 8, EACH = (HALO * PARTS + THREADS - 1) / THREADS;
    uint4 v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int p = (threadIdx.x + i * THREADS) / PARTS, part = (threadIdx.x + i * THREADS) % PARTS;
        const int y = tile.y0 + p / WIDE - 1, x = tile.x0 + p % WIDE - 1;
        v[i] = uint4{0, 0, 0, 0};
        if (p < HALO && tile.inside(y, x))
            v[i] = fetch16(input + picture + (static_cast<long long>(y) * width + x) * channels + part * 8);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int p = (threadIdx.x + i * THREADS) / PARTS, part = (threadIdx.x + i * THREADS) % PARTS;
        const uint4 active{leaky_pair(v[i].x), leaky_pair(v[i].y), leaky_pair(v[i].z), leaky_pair(v[i].w)};
        if (p < HALO) put16(hidden + p * HS + part * 16, active);
    }
    copies_wait();
    __syncthreads();
    const int group = warp % GROUPS, row = warp / GROUPS * UNIT;
    float sums[UNIT][2][4] = {};
    uint4 w[9];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) w[tap] = load16(filters + (group * 9 + tap) * 512 + lane * 16);
    convolve<UNIT>(sums, hidden + row * WIDE * HS + group * 32, HS, 16, w);
    __syncthreads();  // nobody reads the halo any more
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int c = group * 16 + n * 8 + lane % 4 * 2;
        const float b0 = __uint_as_float(load4(filters + GROUPS * 9 * 512 + c * 4));
        const float b1 = __uint_as_float(load4(filters + GROUPS * 9 * 512 + c * 4 + 4));
#pragma unroll
        for (int r = 0; r < UNIT; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                put4(hidden + ((row + r) * TW + lane / 4 + half * 8) * HS + c * 2,
                     leaky(sums[r][n][half * 2] + b0, sums[r][n][half * 2 + 1] + b1));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TH * TW * PARTS; i += THREADS) {
        const int part = i % PARTS, y = tile.y0 + i / PARTS / TW, x = tile.x0 + i / PARTS % TW;
        write16(out + picture + (static_cast<long long>(y) * width + x) * channels + part * 8,
                load16(hidden + i / PARTS * HS + part * 16));
    }
}

// doubled = `small` [height / 2, width / 2, channels] at twice its size; base = doubled + the pixel shuffle of
// `shortcut` [height / 2, width / 2, wide], its wide / 4 channels as often as they fit. A thread computes a column of
// TH rows of 8 channels.
KERNEL(THREADS, 1, 2)
upsample(const u16* __restrict__ small, const u16* __restrict__ shortcut, u16* __restrict__ doubled,
         u16* __restrict__ base, int height, int width, int channels, int wide) {
    const int parts = channels / 8, i = blockIdx.x * THREADS + threadIdx.x, part = i % parts, x = i / parts;
    const int segments = height / TH + 1, first = blockIdx.y % segments * TH - 1, clip = blockIdx.y / segments;
    if (x >= width) return;
    const long long from = static_cast<long long>(clip) * (height / 2) * (width / 2);
    const int channel = part * 8 % (wide / 4) * 4;
    const u16* taps[4];
    for (int i = 0; i < 4; ++i)
        taps[i] = small + (from + clamped(first_tap(x) + i, width / 2)) * channels + part * 8;
    const auto fetch = [&](int row, int tap) {
        const int y = clamped(first_tap(first) + row, height / 2);
        return fetch16(taps[tap] + static_cast<long long>(y) * (width / 2) * channels);
    };
    upsampled_column(x, first, TH, fetch, [&](int y, uint4 v) {
        if (y < 0 || y >= height) return;
        const long long to = ((static_cast<long long>(clip) * height + y) * width + x) * channels + part * 8;
        write16(doubled + to, v);
        const u16* other = shortcut + (from + static_cast<long long>(y / 2) * (width / 2) + x / 2) * wide + channel;
        const int corner = y % 2 * 2 + x % 2;
        u32 sum[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const uint4 four = fetch16(other + pair * 8);  // the four pixels of one channel, then of the next
            const u32 a = corner < 2 ? four.x : four.y, b = corner < 2 ? four.z : four.w;
            const int shift = corner % 2 * 16;
            sum[pair] = add_pairs(sum[pair], a >> shift & 0xffff | (b >> shift & 0xffff) << 16);
        }
        write16(base + to, uint4{sum[0], sum[1], sum[2], sum[3]});
    });
}
