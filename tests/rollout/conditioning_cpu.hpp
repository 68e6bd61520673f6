// Runs the kernels of conditioning.cu, on which it must follow, block by block on a CPU (see mx_device_cpu.hpp).
//
// What the kernel in front leaves is there when all threads of a block wait for it, and nothing may be written before.

struct Bytes {
    u8* at;
    std::vector<u8> value;
};
typedef std::vector<std::pair<const void*, size_t>> Places;

// The order of threads is one of many, `seed`; with any but the first some fall behind others.
static void begin_run(int seed) {
    dice.seed(seed);
    uneven = seed > 0;
}

static std::vector<Bytes> given_, before_;
static int over_;

static std::vector<Bytes> bytes_of(const Places& places) {
    std::vector<Bytes> all;
    for (const auto& [at, size] : places) {
        u8* from = static_cast<u8*>(const_cast<void*>(at));
        all.push_back({from, std::vector<u8>(from, from + size)});
    }
    return all;
}

static void leave_inputs() {
    for (const Bytes& b : before_)
        CHECK(std::memcmp(b.at, b.value.data(), b.value.size()) == 0, "written before the kernel in front is over");
    for (const Bytes& b : given_) std::memcpy(b.at, b.value.data(), b.value.size());
    ++over_;
}

static void run_block(int block, int shared, const Places& inputs, const Places& outputs) {
    before_ = bytes_of(outputs), given_ = bytes_of(inputs), over_ = 0;
    for (const Bytes& b : given_) std::memset(b.at, 0xff, b.value.size());
    previous = leave_inputs;
    run_cluster({block, 0}, 1, THREADS, shared);
    CHECK(over_ == 1, "a block that does not wait for the kernel in front");
}

static const float *mouse_, *buttons_;
static const u16 *in_, *embedded_, *weight_, *bias_;
static u16* out_;
static FirstWeights first_;
static SecondWeights second_;
static Rotation rotation_;
static Counter counter_;
static int outputs_;

extern "C" void begin_frame_on_cpu(int first, int blocks, int shared, int seed, const float* mouse, const float* buttons,
                                   const FirstWeights* weights, u16* hidden, const Rotation* rotation) {
    begin_run(seed);
    mouse_ = mouse, buttons_ = buttons, first_ = *weights, out_ = hidden, rotation_ = *rotation;
    body = [] { begin_frame(mouse_, buttons_, first_, out_, rotation_); };
    const Places inputs = {{mouse, 8}, {buttons, 4 * BUTTONS}, {rotation->before, 8}};
    const Places outputs = {{hidden, 4 * HIDDEN}, {rotation->cos, 4 * TOKENS * PAIRS}, {rotation->sin, 4 * TOKENS * PAIRS}};
    for (int block = first; block < blocks; ++block) run_block(block, shared, inputs, outputs);
}

extern "C" void add_controls_on_cpu(int first, int blocks, int shared, int seed, const u16* hidden, const SecondWeights* weights,
                                    const u16* embedded, u16* conditioning, const Counter* counter) {
    begin_run(seed);
    in_ = hidden, second_ = *weights, embedded_ = embedded, out_ = conditioning, counter_ = *counter;
    body = [] { add_controls(in_, second_, embedded_, out_, counter_); };
    Places outputs = {{conditioning, 2 * STEPS * WIDTH}};
    for (int i = 0; i < counter->rings; ++i) outputs.push_back({counter->slots[i], 8});
    for (int block = first; block < blocks; ++block) {
        Places inputs = {{hidden, 4 * HIDDEN}};
        if (block == 0) inputs.push_back({counter->frame, 8});  // the others do not ask for it
        run_block(block, shared, inputs, outputs);
    }
}

extern "C" void plain_product_on_cpu(int first, int blocks, int shared, int seed, const u16* x, const u16* weight, const u16* bias,
                                     u16* out, int outputs) {
    begin_run(seed);
    in_ = x, weight_ = weight, bias_ = bias, out_ = out, outputs_ = outputs;
    body = [] { plain_product(in_, weight_, bias_, out_, outputs_); };
    for (int block = first; block < blocks; ++block)
        run_block(block, shared, {{x, 2 * STEPS * WIDTH}}, {{out, 2ul * STEPS * outputs}});
}
