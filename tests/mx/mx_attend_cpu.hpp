// Runs mx_attend.cu, on which it must follow, head by head on a CPU (see mx_device_cpu.hpp).

static TensorMap x_map_, k_map_, v_map_;
static const u8* weight_;
static const u16* bias_;
static u16* out_;
static int groups_;
static float output_scale_;
static Squares squares_;
static Window window_;

extern "C" int shared_bytes() { return END; }

extern "C" void run(const u16* x, int K, const u8* weight, const u16* bias, u16* out, int groups, float output_scale,
                    const Squares* squares, const Window* window, int seed) {
    dice.seed(seed);
    squares_ = *squares, window_ = *window;
    x_map_ = TensorMap{x, K, 65, XT * 8};
    const int rows = window->heads * window->frames * 64;
    k_map_ = TensorMap{reinterpret_cast<const u16*>(window->k.data), 64, rows, 16};
    v_map_ = TensorMap{reinterpret_cast<const u16*>(window->v.data), 64, rows, 16};
    weight_ = weight, bias_ = bias, out_ = out, groups_ = groups, output_scale_ = output_scale;
    body = [] { mx_attend(x_map_, k_map_, v_map_, weight_, bias_, out_, groups_, output_scale_, squares_, window_); };
    grid = {window->heads * CL, 1};
    for (int head = 0; head < window->heads; ++head) run_cluster({head * CL, 0}, CL, THREADS, END);
}

static const u8* elements_;
static const u8* scales_;

// 64 rows of values as a ring stores them, decoded by a warpgroup, row by row.
extern "C" void decode_values(const u8* elements, const u8* scales, u16* out) {
    constexpr int SCALES_AT = FRAME, TO = 2 * FRAME;
    elements_ = elements, scales_ = scales, out_ = out;
    body = [] {
        const int thread = threadIdx.x;
        if (thread == 0) {
            std::memcpy(at(*now->block, 0, V_BYTES, 16), elements_, V_BYTES);
            std::memcpy(at(*now->block, SCALES_AT, 128, 16), scales_, 128);
        }
        __syncthreads();
        if constexpr (V_BITS < 16) decode_rows<V_BITS, V_MANTISSA>(0, SCALES_AT, TO, 64, thread);
        __syncthreads();
        for (int i = thread; i < 64 * 8; i += 128)
            std::memcpy(out_ + i * 8, at(*now->block, place_in_rows(TO, i / 8, i % 8 * 16), 16, 16), 16);
    };
    run_cluster({0, 0}, 1, 128, 3 * FRAME);
}
