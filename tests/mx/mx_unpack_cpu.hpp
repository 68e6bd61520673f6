// Runs mx_unpack.cu, on which it must follow, block by block on a CPU (see mx_device_cpu.hpp).

static const u8* weight_;
static u16* out_;
static int N_, K_, groups_;

extern "C" void run(const u8* weight, u16* out, int N, int K, int groups, int blocks) {
    weight_ = weight, out_ = out, N_ = N, K_ = K, groups_ = groups;
    body = [] { mx_unpack(weight_, out_, N_, K_, groups_); };
    grid = {blocks, 1};
    for (int x = 0; x < blocks; ++x) run_cluster({x, 0}, 1, WARPS * 32, 16);
}
