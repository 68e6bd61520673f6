// The last layer's residual stream to the velocity of a step, and the latents behind it: modulated norm, SiLU, projection.
//
// A block computes 16 channels of 8 tokens; its warps share the features out. Its weights are fetched while the kernel in
// front still runs. Compile-time parameters: D features, a multiple of 32; C channels; WARPS a block, at least 4; PDL
// launched as kernels/launch.py describes. Behind mx_device.cuh and conv_device.cuh.

constexpr int THREADS = WARPS * 32;
constexpr int GROUPS = (D / 32 + WARPS - 1) / WARPS;  // of 32 features, a warp
constexpr int PARTS = WARPS * 512, END = PARTS + WARPS * 32;

// A step's latents [C][P] and how far it takes them: `x - drop * velocity`.
struct Latents {
    const float* x;
    const float* drop;
    float* next;
    float* velocity;
};

__device__ __forceinline__ float normed(float h, float inverse, float scale, float shift) {
    return silu(fmaf(h * inverse, 1.0f + scale, shift));
}

__device__ __forceinline__ u32 normed_pair(u32 h, float inverse, u32 scale, u32 shift) {
    return to_bf16(normed(low_of(h), inverse, low_of(scale), low_of(shift)),
                   normed(high_of(h), inverse, high_of(scale), high_of(shift)));
}

__device__ __forceinline__ float squares_of(u32 pair) {
    return fmaf(low_of(pair), low_of(pair), high_of(pair) * high_of(pair));
}

// 1 / rms of token `lane / 4`, of which this lane has seen squares that sum up to `sum`.
__device__ __forceinline__ float inverse_rms(u32 memory, int warp, int lane, float sum, float eps) {
    sum += of_lanes(sum, lane, 1);
    sum += of_lanes(sum, lane, 2);
    if (lane % 4 == 0) store4(memory + PARTS + (warp * 8 + lane / 4) * 4, sum);
    __syncthreads();
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) squares += __uint_as_float(load4(memory + PARTS + (i * 8 + lane / 4) * 4));
    return inverse_root(fmaf(squares, 1.0f / D, eps));
}

// Thread `i` of 128 has the sum of one channel of one token: word `i` of every warp's products.
__device__ __forceinline__ void step(u32 memory, const u16* bias, const Latents& latents, int first, int tokens) {
    const int lane = threadIdx.x / 4, word = threadIdx.x % 4;
    const int channel = blockIdx.x * 16 + lane / 4 + word / 2 * 8;
    const int place = channel * tokens + first + lane % 4 * 2 + word % 2;
    const float x = __uint_as_float(read_fresh(latents.x + place));
    float sum = low_of(bias[channel]);
    for (int i = 0; i < WARPS; ++i) sum += __uint_as_float(load4(memory + i * 512 + threadIdx.x * 4));
    const float velocity = low_of(to_bf16(sum, 0.0f));
    latents.velocity[place] = velocity;
    latents.next[place] = fmaf(-*latents.drop, velocity, x);
}

// Grid (C / 16, P / 8). `total` [P][D]; `scale`, `shift` [D] of the norm; `weight` as ends.py packs it, `bias` [C].
KERNEL(THREADS, 1, 1)
velocity(const u16* total, const u16* scale, const u16* shift, const u8* weight, const u16* bias, const Latents latents,
         int tokens, float eps) {
    const u32 memory = shared_memory();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * 8;
    const u64 policy = cache_policy(false);
    if (PDL) next_may_begin();
    uint4 w[GROUPS][2];
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; ++i) {
        const int step = (warp + i / 2 * WARPS) * 2 + i % 2;
        w[i / 2][i % 2] = step < D / 16 ? read16_early(weight + ((step * (C / 16) + blockIdx.x) * 32 + lane) * 16, policy) : uint4{0, 0, 0, 0};
    }
    if (PDL) previous_is_over();

    // Of a lane: token `lane / 4`, and 8 neighbouring features of each group.
    uint4 h[GROUPS], scales[GROUPS], shifts[GROUPS];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        const int feature = (warp + i * WARPS) * 32 + lane % 4 * 8;
        h[i] = scales[i] = shifts[i] = uint4{0, 0, 0, 0};
        if (feature >= D) continue;
        h[i] = read_fresh16(total + (first + lane / 4) * D + feature);
        scales[i] = read_fresh16(scale + feature), shifts[i] = read_fresh16(shift + feature);
    }
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        sum += squares_of(h[i].x) + squares_of(h[i].y) + squares_of(h[i].z) + squares_of(h[i].w);
    const float inverse = inverse_rms(memory, warp, lane, sum, eps);
    float acc[4] = {};
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        const uint4 s = scales[i], t = shifts[i];
        const u32 a[2][4] = {{w[i][0].x, w[i][0].y, w[i][0].z, w[i][0].w}, {w[i][1].x, w[i][1].y, w[i][1].z, w[i][1].w}};
        mma(acc, a[0], normed_pair(h[i].x, inverse, s.x, t.x), normed_pair(h[i].y, inverse, s.y, t.y));
        mma(acc, a[1], normed_pair(h[i].z, inverse, s.z, t.z), normed_pair(h[i].w, inverse, s.w, t.w));
    }
    store16(memory + warp * 512 + lane * 16, acc);
    __syncthreads();
    if (threadIdx.x < 128) step(memory, bias, latents, first, tokens);
}
