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
    x_map_ = TensorMap{x, K, 64 + NORM, XT * 8};
    const int rows = window->heads * window->frames * 64;
    k_map_ = TensorMap{reinterpret_cast<const u16*>(window->k.data), 64, rows, 16};
    v_map_ = TensorMap{reinterpret_cast<const u16*>(window->v.data), 64, rows, 16};
    weight_ = weight, bias_ = bias, out_ = out, groups_ = groups, output_scale_ = output_scale;
    body = [] { mx_attend(x_map_, k_map_, v_map_, weight_, bias_, out_, groups_, output_scale_, squares_, window_); };
    grid = {window->heads * CL, 1};
    for (int head = 0; head < window->heads; ++head) run_cluster({head * CL, 0}, CL, THREADS, END);
}
