// What of a frame comes before its layers' modulation, of one clip: the controls through their MLPs, the conditioning that
// every modulation Linear reads, and where the frame lies in the cache and in time. In two launches, and one for a plain
// Linear that reads the conditioning.
//
//  * Rows are few, so weights are all there is to read: a warp has some outputs, and their weights in registers before it
//    waits for the kernel in front (griddepcontrol). Inputs are staged in shared memory; sums are float32.
//  * Controls are the same in all of a frame's steps: one row. `add_controls` adds the steps' times, embedded once.
//  * Every result is rounded to BF16 where the model's modules round theirs.
//
// Compile-time parameters: WIDTH D of the model, a multiple of 16; STEPS a frame; BUTTONS; TOKENS a frame; PAIRS that a
// head rotates; PLAIN_BLOCKS of `plain_product` a multiprocessor; PDL programmatic dependent launch.

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int HIDDEN = 2048;       // of both MLPs
constexpr int HALF = 256;          // features of the mouse's direction, and as many of its magnitude
constexpr int FEATURES = 2 * HALF;
constexpr int HIDDEN_OUTPUTS = 2;  // a warp
constexpr int PLAIN_OUTPUTS = 2;
constexpr int LANES_INPUTS = 256;  // inputs that a warp reads at once, 8 a lane
constexpr int BUTTON_LOADS = (BUTTONS + 31) / 32;
constexpr int MOST_RINGS = 4;

__device__ __forceinline__ float of_half(u16 half) {
    return __uint_as_float(static_cast<u32>(half) << 16);
}

__device__ __forceinline__ float rounded(float v) {
    return low_of(to_bf16(v, 0.0f));
}

__device__ __forceinline__ u16 half_of(float v) {
    return static_cast<u16>(to_bf16(v, 0.0f));
}

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float v, int lane) {
#pragma unroll
    for (int far = 16; far > 0; far /= 2) v += of_lanes(v, lane, far);
    return v;
}

// A lane's part of OUTPUTS rows of a BF16 weight [N, K], K a multiple of 8.
template <int OUTPUTS, int K>
struct Weights {
    static constexpr int LOADS = (K + LANES_INPUTS - 1) / LANES_INPUTS;
    uint4 held[OUTPUTS][LOADS];

    __device__ __forceinline__ static int input(int load, int lane) {
        return load * LANES_INPUTS + lane * 8;
    }

    __device__ __forceinline__ void fetch(const u16* weight, int first, int lane, u64 policy) {
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const u16* from = weight + static_cast<long long>(first + o) * K + input(i, lane);
                held[o][i] = uint4{0, 0, 0, 0};
                if (K % LANES_INPUTS == 0 || input(i, lane) < K)
                    held[o][i] = read16_early(reinterpret_cast<const u8*>(from), policy);
            }
        }
    }

    // sums[o][r] = row o of the weight * row r of BF16 x [ROWS, K] in shared memory.
    template <int ROWS>
    __device__ __forceinline__ void multiply(float (&sums)[OUTPUTS][ROWS], u32 x, int lane) const {
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[o][r] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (K % LANES_INPUTS != 0 && input(i, lane) >= K) break;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const uint4 row = load16(x + (r * K + input(i, lane)) * 2);
#pragma unroll
                for (int o = 0; o < OUTPUTS; ++o) sums[o][r] = added(sums[o][r], held[o][i], row);
            }
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[o][r] = warp_sum(sums[o][r], lane);
        }
    }

    __device__ __forceinline__ static float added(float sum, const uint4& w, const uint4& x) {
        const u32 factors[4] = {w.x, w.y, w.z, w.w}, others[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sum = fmaf(low_of(factors[j]), low_of(others[j]), sum);
            sum = fmaf(high_of(factors[j]), high_of(others[j]), sum);
        }
        return sum;
    }
};

// BF16 x of COUNT numbers, a multiple of 8, that a kernel in front has written, to shared memory; the block meets.
template <int COUNT>
__device__ __forceinline__ void stage(u32 to, const u16* x) {
    constexpr int LOADS = (COUNT + THREADS * 8 - 1) / (THREADS * 8);
    uint4 held[LOADS];  // all are under way before the first has arrived
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int at = (i * THREADS + threadIdx.x) * 8;
        if (at < COUNT) held[i] = read_fresh16(x + at);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int at = (i * THREADS + threadIdx.x) * 8;
        if (at < COUNT) put16(to + at * 2, held[i]);
    }
    __syncthreads();
}

// Float32 of the mouse's two axes after a symmetric log, as `MouseEmbedding` has them.
struct Mouse {
    float x, y;

    __device__ __forceinline__ static float symmetric_log(float v) {
        const float sign = static_cast<float>((v > 0.0f) - (v < 0.0f));
        return sign * log1pf(fabsf(v));
    }

    __device__ __forceinline__ void read(const float* mouse) {
        x = symmetric_log(__uint_as_float(read_fresh(mouse)));
        y = symmetric_log(__uint_as_float(read_fresh(mouse + 1)));
    }

    // Feature `i` of 256 of the direction; `factors` are a row of `angle_proj`, BF16.
    __device__ __forceinline__ float direction(u32 factors) const {
        const float angle = atan2f(y, x);
        return fmaf(high_of(factors), rounded(sinf(angle)), low_of(factors) * rounded(cosf(angle)));
    }

    // Feature `i` of 256 of the magnitude: sines, then cosines. Arguments reach thousands of radians.
    __device__ __forceinline__ float magnitude(int i, float frequency) const {
        const float norm = sqrtf(fmaf(x, x, y * y));
        const float angle = rounded_product(rounded_product(1000.0f, norm), frequency);
        return i < HALF / 2 ? sinf(angle) : cosf(angle);
    }
};

// Where the cache is: the index of its last frame, and that frame's slot in rings of each size.
struct Counter {
    long long* frame;
    long long* slots[MOST_RINGS];
    int frames[MOST_RINGS];  // of the rings
    int rings;
};

// By one warp; nothing else on the device asks for the counter meanwhile.
__device__ __forceinline__ void advance(const Counter& counter) {
    const long long frame = *const_cast<const volatile long long*>(counter.frame) + 1;
    __syncwarp();  // all have read it
    if (threadIdx.x == 0) *counter.frame = frame;
#pragma unroll
    for (int i = 0; i < MOST_RINGS; ++i)
        if (threadIdx.x == i && i < counter.rings) *counter.slots[i] = frame % counter.frames[i];
}

// A frame's rotation. A token's angles are (base + time * uses_time) * freqs. The time of frame f is times[f] up to `last`,
// and goes on from there by `step` a frame.
struct Rotation {
    const long long* before;  // index of the frame before this one
    const float* times;
    const float* base;        // [TOKENS, PAIRS]
    const float* uses_time;   // [PAIRS], 0 or 1
    const float* freqs;       // [PAIRS]
    float* cos;               // [TOKENS, PAIRS]
    float* sin;
    int last;
    float step;
};

// Angle `at` of the next frame.
__device__ __forceinline__ void rotate(const Rotation& rotation, int at) {
    const bool mine = at < TOKENS * PAIRS;
    const float base = mine ? rotation.base[at] : 0.0f;
    const float uses = rotation.uses_time[at % PAIRS], frequency = rotation.freqs[at % PAIRS];
    if (PDL) previous_is_over();
    const long long frame = *const_cast<const volatile long long*>(rotation.before) + 1;
    const float beyond = rounded_product(rotation.step, static_cast<float>(frame - rotation.last));
    const float time = frame > rotation.last ? rotation.times[rotation.last] + beyond : rotation.times[frame];
    const float angle = rounded_product(base + time * uses, frequency);
    if (!mine) return;
    rotation.cos[at] = cosf(angle);
    rotation.sin[at] = sinf(angle);
}

// What the first half of the controls' MLPs reads: BF16, but the frequencies, float32 [128].
struct FirstWeights {
    const u16* angle;        // [256, 2]
    const float* freqs;
    const u16* mouse;        // [HIDDEN, FEATURES]
    const u16* mouse_bias;   // [HIDDEN]
    const u16* button;       // [HIDDEN, BUTTONS]
    const u16* button_bias;  // [HIDDEN]
};

// A lane's part of HIDDEN_OUTPUTS rows of the buttons' first weight, whose rows begin anywhere.
struct ButtonWeights {
    float held[HIDDEN_OUTPUTS][BUTTON_LOADS];

    __device__ __forceinline__ void fetch(const u16* weight, int first, int lane) {
#pragma unroll
        for (int o = 0; o < HIDDEN_OUTPUTS; ++o) {
#pragma unroll
            for (int i = 0; i < BUTTON_LOADS; ++i) {
                const int button = i * 32 + lane;
                held[o][i] = button < BUTTONS ? of_half(weight[(first + o) * BUTTONS + button]) : 0.0f;
            }
        }
    }

    __device__ __forceinline__ void multiply(float (&sums)[HIDDEN_OUTPUTS], const float (&pressed)[BUTTON_LOADS],
                                             int lane) const {
#pragma unroll
        for (int o = 0; o < HIDDEN_OUTPUTS; ++o) {
            sums[o] = 0.0f;
#pragma unroll
            for (int i = 0; i < BUTTON_LOADS; ++i) sums[o] = fmaf(held[o][i], pressed[i], sums[o]);
            sums[o] = warp_sum(sums[o], lane);
        }
    }
};

// A lane's buttons as the MLP reads them: -1 or 1 of 0 or 1.
__device__ __forceinline__ void read_buttons(float (&pressed)[BUTTON_LOADS], const float* buttons, int lane) {
#pragma unroll
    for (int i = 0; i < BUTTON_LOADS; ++i) {
        const int button = i * 32 + lane;
        pressed[i] = button < BUTTONS ? rounded(2.0f * __uint_as_float(read_fresh(buttons + button)) - 1.0f) : 0.0f;
    }
}

// Activations of a Linear's two outputs, of their sums.
__device__ __forceinline__ u32 activated(float first, float second, u32 biases) {
    return to_bf16(silu(rounded(first + low_of(biases))), silu(rounded(second + high_of(biases))));
}

// Hidden activations of both MLPs, BF16 [2][HIDDEN], of one row of controls, the mouse's first; and the rotation. A block
// has 16 outputs of each MLP, and for them all of the mouse's features; those behind have 256 angles each.
KERNEL(THREADS, 1, 2)
begin_frame(const float* mouse, const float* buttons, FirstWeights weights, u16* hidden, Rotation rotation) {
    if (PDL) next_may_begin();
    const int thread = threadIdx.x, lane = thread % 32;
    const int first = (blockIdx.x * WARPS + thread / 32) * HIDDEN_OUTPUTS;
    if (first >= HIDDEN) {
        rotate(rotation, blockIdx.x * THREADS + thread - HIDDEN / (WARPS * HIDDEN_OUTPUTS) * THREADS);
        return;
    }
    const u32 features = shared_memory();
    const u64 policy = cache_policy(true);
    Weights<HIDDEN_OUTPUTS, FEATURES> of_mouse;
    of_mouse.fetch(weights.mouse, first, lane, policy);
    ButtonWeights of_buttons;
    of_buttons.fetch(weights.button, first, lane);
    const u32 factors = reinterpret_cast<const u32*>(weights.angle)[thread];
    const float frequency = weights.freqs[thread % (HALF / 2)];
    const u32 mouse_bias = *reinterpret_cast<const u32*>(weights.mouse_bias + first);
    const u32 button_bias = *reinterpret_cast<const u32*>(weights.button_bias + first);
    if (PDL) previous_is_over();

    Mouse moved;
    moved.read(mouse);
    float pressed[BUTTON_LOADS];
    read_buttons(pressed, buttons, lane);
    store2(features + thread * 2, half_of(moved.direction(factors)));
    store2(features + (HALF + thread) * 2, half_of(moved.magnitude(thread, frequency)));
    float button_sums[HIDDEN_OUTPUTS];
    of_buttons.multiply(button_sums, pressed, lane);
    __syncthreads();
    float mouse_sums[HIDDEN_OUTPUTS][1];
    of_mouse.multiply(mouse_sums, features, lane);
    u32* to = reinterpret_cast<u32*>(hidden + first);
    if (lane == 0) to[0] = activated(mouse_sums[0][0], mouse_sums[1][0], mouse_bias);
    if (lane == 1) to[HIDDEN / 2] = activated(button_sums[0], button_sums[1], button_bias);
}

// What the second half of the MLPs reads, BF16.
struct SecondWeights {
    const u16* mouse;        // [WIDTH, HIDDEN]
    const u16* mouse_bias;   // [WIDTH]
    const u16* button;       // [WIDTH, HIDDEN]
    const u16* button_bias;  // [WIDTH]
};

// SiLU of each step's conditioning, BF16 [STEPS, WIDTH]: its time's embedding, of the same shape, and the controls'. A block
// has 8 outputs. The first one counts the frame, which `begin_frame` has asked for its number.
KERNEL(THREADS, 1, 2)
add_controls(const u16* hidden, SecondWeights weights, const u16* embedded, u16* conditioning, Counter counter) {
    if (PDL) next_may_begin();
    const int thread = threadIdx.x, lane = thread % 32, output = blockIdx.x * WARPS + thread / 32;
    const u32 activations = shared_memory();
    const u64 policy = cache_policy(true);
    Weights<1, HIDDEN> of_mouse, of_buttons;
    of_mouse.fetch(weights.mouse, output, lane, policy);
    of_buttons.fetch(weights.button, output, lane, policy);
    const float mouse_bias = of_half(weights.mouse_bias[output]), button_bias = of_half(weights.button_bias[output]);
    const float time = lane < STEPS ? of_half(embedded[lane * WIDTH + output]) : 0.0f;
    if (PDL) previous_is_over();

    if (blockIdx.x == 0 && thread < 32) advance(counter);
    stage<2 * HIDDEN>(activations, hidden);
    float mouse_sum[1][1], button_sum[1][1];
    of_mouse.multiply(mouse_sum, activations, lane);
    of_buttons.multiply(button_sum, activations + HIDDEN * 2, lane);
    const float controls = rounded(rounded(mouse_sum[0][0] + mouse_bias) + rounded(button_sum[0][0] + button_bias));
    if (lane < STEPS) conditioning[lane * WIDTH + output] = half_of(silu(rounded(time + controls)));
}

// BF16 x [STEPS, WIDTH] times a plain weight [N, WIDTH], N a multiple of 16, and a bias, or none. A block has 16 outputs.
KERNEL(THREADS, 1, PLAIN_BLOCKS)
plain_product(const u16* x, const u16* weight, const u16* bias, u16* out, int N) {
    if (PDL) next_may_begin();
    const int thread = threadIdx.x, lane = thread % 32, first = (blockIdx.x * WARPS + thread / 32) * PLAIN_OUTPUTS;
    const u32 rows = shared_memory();
    Weights<PLAIN_OUTPUTS, WIDTH> weights;
    weights.fetch(weight, first, lane, cache_policy(true));
    const u32 biases = bias == nullptr ? 0 : *reinterpret_cast<const u32*>(bias + first);
    if (PDL) previous_is_over();

    stage<STEPS * WIDTH>(rows, x);
    float sums[PLAIN_OUTPUTS][STEPS];
    weights.multiply(sums, rows, lane);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32* to = reinterpret_cast<u32*>(out + static_cast<long long>(step) * N + first);
        if (lane == step) *to = to_bf16(sums[0][step] + low_of(biases), sums[1][step] + high_of(biases));
    }
}
