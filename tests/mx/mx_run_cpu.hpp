// Runs mx_linear.cu, on which it must follow, block by block on a CPU (see mx_device_cpu.hpp).

static TensorMap map_;
static const u8* weight_;
static const u16* bias_;
static u16* out_;
static int M_, N_, groups_;
static float output_scale_;
static Stream stream_;

extern "C" int shared_bytes() {
    return ROWS_AT + (NORM ? MT * 32 : RESIDUAL ? OWNED * 32 : 0);
}

extern "C" void run(const u16* x, const u8* weight, const u16* bias, u16* out, int M, int N, int K, int groups,
                    float output_scale, const Stream* stream, int seed) {
    dice.seed(seed);
    map_ = TensorMap{x, K, NORM ? MT * 8 + 1 : M, XT * 8};
    stream_ = *stream;
    weight_ = weight, bias_ = bias, out_ = out, M_ = M, N_ = N, groups_ = groups, output_scale_ = output_scale;
    body = [] { mx_linear(map_, weight_, bias_, out_, M_, N_, groups_, output_scale_, stream_); };
    const int clusters = ((N + 15) / 16 + TILES - 1) / TILES;  // of CL blocks
    grid = {(clusters + CN - 1) / CN * CN * CL, (M + MT * 8 - 1) / (MT * 8)};
    for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; x += CL * CN) run_cluster({x, y}, CL * CN, THREADS, shared_bytes());
}
