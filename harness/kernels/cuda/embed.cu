// Latents to the residual stream of a frame's first layer: tokens, and what the norm in front of that layer is made of.
//
// A block computes 8 tokens' values of 16 features a warp. Its weights are fetched while the kernel in front still runs.
// Compile-time parameters: D features, C channels of a latent, WARPS a block, PDL launched as kernels/launch.py describes.
// Behind mx_device.cuh and conv_device.cuh.

constexpr int THREADS = WARPS * 32, STEPS = C / 16;
constexpr int ROW = C * 2 + 16;              // of a token in shared memory: rows lie in different banks
constexpr int SUMS = 8 * ROW, END = SUMS + WARPS * 32;

// The stream as mx_linear.cu leaves it: [P][D], [65][D] with `shift` last, and [P][blocks across].
struct Entered {
    u16* total;
    u16* modulated;
    float* squares;
};

// 8 tokens' channels as BF16, from latents [C][P].
__device__ __forceinline__ void read_latents(u32 memory, const float* x, int first, int tokens) {
    for (int i = threadIdx.x; i < C * 8; i += THREADS) {
        const float value = __uint_as_float(read_fresh(x + i / 8 * tokens + first + i % 8));
        store2(memory + i % 8 * ROW + i / 8 * 2, to_bf16(value, 0.0f));
    }
}

// Two neighbouring features of a token into the stream; returns the sum of their squares.
__device__ __forceinline__ float enter(const Entered& to, int place, u32 pair, u32 scale) {
    const float first = low_of(pair), second = high_of(pair);
    write4(to.total + place, pair);
    write4(to.modulated + place, to_bf16(fmaf(first, low_of(scale), first), fmaf(second, high_of(scale), second)));
    return fmaf(first, first, second * second);
}

// Grid (blocks across D, P / 8). `weight` as conv.py's `fragments` of [D, C] has rows; `scale` and `shift` [D].
KERNEL(THREADS, 1, 1)
embed(const float* x, const u8* weight, const u16* scale, const u16* shift, const Entered to, int tokens) {
    const u32 memory = shared_memory();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = blockIdx.x * WARPS + warp, first = blockIdx.y * 8;
    const bool mine = tile < D / 16;
    const u64 policy = cache_policy(false);
    if (PDL) next_may_begin();
    u32 w[STEPS][4];
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const uint4 v = mine ? read16_early(weight + ((k * (D / 16) + tile) * 32 + lane) * 16, policy) : uint4{0, 0, 0, 0};
        w[k][0] = v.x, w[k][1] = v.y, w[k][2] = v.z, w[k][3] = v.w;
    }
    if (PDL) previous_is_over();

    // Of a lane: token `lane / 4`, and of the features of its tile the pairs `lane % 4` and 4 + `lane % 4`.
    const int feature = tile * 16 + lane % 4 * 2;
    u32 scales[2] = {};
    if (mine) scales[0] = read_fresh(scale + feature), scales[1] = read_fresh(scale + feature + 8);
    if (blockIdx.y == 0 && mine && lane < 8)
        write4(to.modulated + 64 * D + tile * 16 + lane * 2, read_fresh(shift + tile * 16 + lane * 2));
    read_latents(memory, x, first, tokens);
    __syncthreads();
    float acc[4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
        const u32 row = memory + lane / 4 * ROW + (k * 16 + lane % 4 * 2) * 2;
        mma(acc, w[k], load4(row), load4(row + 16));
    }
    float sum = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 pair = transpose(to_bf16(acc[2 * half], acc[2 * half + 1]));
        if (mine) sum += enter(to, (first + lane / 4) * D + feature + 8 * half, pair, scales[half]);
    }
    sum += of_lanes(sum, lane, 1);
    sum += of_lanes(sum, lane, 2);
    if (lane % 4 == 0) store4(memory + SUMS + (warp * 8 + lane / 4) * 4, sum);
    __syncthreads();
    if (threadIdx.x >= 8) return;
    float squares = 0.0f;
    for (int i = 0; i < WARPS; ++i) squares += __uint_as_float(load4(memory + SUMS + (i * 8 + threadIdx.x) * 4));
    to.squares[(first + threadIdx.x) * gridDim.x + blockIdx.x] = squares;
}
