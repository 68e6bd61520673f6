// Runs one of the decoder's kernels, on which it must follow, block by block on a CPU.

static const u16 *input_, *shortcut_;
static const u8* weights_;
static u16 *out_, *base_;
static int batch_, height_, width_, channels_, wide_;

extern "C" int shared_bytes() { return SHARED; }
static const u8* after_;
static u16* products_;
extern "C" void behind(const u8* after, u16* products) { after_ = after, products_ = products; }

static void all_blocks(int blocks, int rows, int bytes) {
    grid = {blocks, rows};
    for (int y = 0; y < rows; ++y)
        for (int x = 0; x < blocks; ++x) run_cluster({x, y}, 1, THREADS, bytes);
    CHECK(asked.empty(), "a block ended before its copies");
}

#define KEEP input_ = input, weights_ = weights, shortcut_ = shortcut, out_ = out, base_ = base, height_ = height, \
             width_ = width, channels_ = channels, wide_ = wide, dice.seed(0)
extern "C" void run(const u16* input, const u8* weights, const u16* shortcut, u16* out, u16* base, int batch, int height,
                    int width, int channels, int wide) {
    KEEP;
    const int tiles = height / TH * (width / TW);
#if defined(RESBLOCK)
    batch_ = batch;
    body = [] {
        const int tiles = batch_ * (height_ / TH) * (width_ / TW);
        resblock(input_, weights_, shortcut_, after_, out_, products_, height_, width_, tiles);
    };
    all_blocks(min(3, tiles * batch), 1, SHARED);
#elif defined(GROUPED)
    body = [] { grouped_conv(input_, weights_, out_, height_, width_, channels_); };
    all_blocks(tiles, batch * (channels / 16 / WARPS), SHARED);
#elif defined(UPSAMPLE)
    body = [] { upsample(input_, shortcut_, out_, base_, height_, width_, channels_, wide_); };
    all_blocks(((width / 2 + 1) * (channels / 8) + THREADS - 1) / THREADS, batch * (height / 2 + 1), 16);
#elif defined(RESIZE)
    static int rows, columns;
    rows = ((OUT_ROWS - 1) * height + channels - 1) / channels + 5;
    columns = ((OUT_COLUMNS - 1) * width + wide - 1) / wide + 5;
    body = [] { resize(input_, out_, height_, width_, channels_, wide_, 3, rows, columns); };
    const int tall = (channels + OUT_ROWS - 1) / OUT_ROWS, across = (wide + OUT_COLUMNS - 1) / OUT_COLUMNS;
    all_blocks(tall * across, batch, rows * columns * 16);
#else
    body = [] { conv_rgb(input_, weights_, out_, height_, width_, channels_); };
    all_blocks(tiles, batch, SHARED);
#endif
}
