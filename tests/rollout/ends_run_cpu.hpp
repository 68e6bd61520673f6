// Runs embed.cu or velocity.cu, on which it must follow, block by block on a CPU.

static void all_blocks(int across, int down) {
    grid = {across, down};
    for (int y = 0; y < down; ++y)
        for (int x = 0; x < across; ++x) run_cluster({x, y}, 1, THREADS, END);
}

static const u16 *total_, *scale_, *shift_, *bias_;
static const u8* weight_;
static int tokens_;

extern "C" int shared_bytes() { return END; }

#if defined(EMBED)
static const float* x_;
static Entered entered_;

extern "C" void run(int across, int down, const float* x, const u8* weight, const u16* scale, const u16* shift,
                    const Entered* entered, int tokens) {
    x_ = x, weight_ = weight, scale_ = scale, shift_ = shift, entered_ = *entered, tokens_ = tokens;
    body = [] { embed(x_, weight_, scale_, shift_, entered_, tokens_); };
    all_blocks(across, down);
}
#else
static Latents latents_;
static float eps_;

extern "C" void run(int across, int down, const u16* total, const u16* scale, const u16* shift, const u8* weight,
                    const u16* bias, const Latents* latents, int tokens, float eps) {
    total_ = total, scale_ = scale, shift_ = shift, weight_ = weight, bias_ = bias;
    latents_ = *latents, tokens_ = tokens, eps_ = eps;
    body = [] { velocity(total_, scale_, shift_, weight_, bias_, latents_, tokens_, eps_); };
    all_blocks(across, down);
}
#endif
