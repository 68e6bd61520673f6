// mx_device.cuh on a CPU: every thread of a cluster is a fiber, and they take turns wherever one waits.
//
// Copies happen a while after they were asked for, and shared memory starts as NaN, so that a missing wait shows. What
// the instructions demand (alignment, bounds, threads that meet, blocks that have started) is checked: a violation
// ends the process with a message. Layouts of fragments are those of the PTX ISA.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    const u16* x;
    int k, m, rows;
};
struct uint4 {
    u32 x, y, z, w;
};
struct Index {
    int x, y;
};

#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define KERNEL(threads, cluster, blocks) extern "C" void

#define CHECK(condition, what)                                           \
    if (!(condition)) {                                                  \
        std::fprintf(stderr, "%s (line %d: %s)\n", what, __LINE__, #condition); \
        std::exit(3);                                                    \
    }

struct Meeting {  // of a fixed number of threads
    int needed = 0, arrived = 0, generation = 0;
};

struct Warp {
    Meeting meeting;
    u32 given[32][16], result[32][8];
};

struct Copy {
    int due;
    u32 to, bytes, bar;
    const u8* from;             // or
    const TensorMap* map;       // or, without either, `value`
    int k, m;
    float value[4];
};

struct Block {
    Meeting groups[16];
    std::vector<u8> shared;
    std::vector<Warp> warps;
    std::vector<Copy> copies;
    Meeting all, previous;
    int started = 0;
};

struct Barrier {  // 8 bytes of shared memory
    u8 pending, arrivals;
    u16 phase;
    int bytes;
};

struct Fiber {
    ucontext_t context;
    Index thread, block_index;
    Block* block;
    std::vector<Block>* cluster;
    bool done = false;
    std::vector<u8> stack;
};

static Fiber* now;
static ucontext_t scheduler;
static Index grid;
static Meeting cluster_meeting;
static std::mt19937 dice;

#define threadIdx (now->thread)
#define blockIdx (now->block_index)
#define gridDim grid

static void pause() { swapcontext(&now->context, &scheduler); }

static int arrive(Meeting& meeting) {
    const int generation = meeting.generation;
    if (++meeting.arrived == meeting.needed) meeting.arrived = 0, ++meeting.generation;
    return generation;
}

static void meet(Meeting& meeting) {
    const int generation = arrive(meeting);
    while (meeting.generation == generation) pause();
}

static thread_local int cluster_generation[4096];

inline int fiber_number() {
    return static_cast<int>(now->block - now->cluster->data()) * static_cast<int>(now->block->warps.size()) * 32 +
           now->thread.x;
}
inline void cluster_arrive() { cluster_generation[fiber_number()] = arrive(cluster_meeting); }
inline void cluster_wait() {
    while (cluster_meeting.generation == cluster_generation[fiber_number()]) pause();
}
inline void __syncthreads() { meet(now->block->all); }
inline void group_sync(int group, int threads) {
    CHECK(group > 0 && group < 16 && threads % 32 == 0, "a group is of whole warps");
    Meeting& meeting = now->block->groups[group];
    CHECK(meeting.arrived == 0 || meeting.needed == threads, "all of a group agree on how many they are");
    meeting.needed = threads;
    meet(meeting);
}
inline Warp& my_warp() { return now->block->warps[now->thread.x / 32]; }
inline void __syncwarp() { meet(my_warp().meeting); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __uint_as_float(u32 bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline u32 bits_of(float f) {
    u32 bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 choice = selector >> (4 * i) & 15;
        CHECK(choice < 8, "a byte is chosen by 3 bits");
        out |= static_cast<u32>(bytes >> (8 * choice) & 255) << (8 * i);
    }
    return out;
}
inline float of_bf16(u32 half) { return __uint_as_float((half & 0xffff) << 16); }
inline u32 bf16_of(float f) {
    const u32 bits = bits_of(f);
    if (f != f) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u8* at(Block& block, u32 address, u32 bytes, u32 alignment) {
    CHECK(address % alignment == 0, "misaligned shared memory");
    CHECK(address + bytes <= block.shared.size(), "outside shared memory");
    return block.shared.data() + address;
}
inline u32 shared_memory() { return 0; }
inline u64 cache_policy(bool) { return 0; }
inline void next_may_begin() {}
static void (*previous)() = nullptr;  // what the kernel in front does, if anything, once all threads of a block wait for it
inline void previous_is_over() {
    if (!previous) return;
    Meeting& meeting = now->block->previous;
    if (meeting.arrived + 1 == meeting.needed) previous();
    meet(meeting);
}

inline Barrier& barrier_at(Block& block, u32 bar) { return *reinterpret_cast<Barrier*>(at(block, bar, 8, 8)); }
inline void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals;
}
inline void barrier_init(u32 bar, int arrivals = 1) {
    barrier_at(*now->block, bar) = Barrier{static_cast<u8>(arrivals), static_cast<u8>(arrivals), 0, 0};
}
inline Barrier& arrive_at(u32 bar) {
    Barrier& b = barrier_at(*now->block, bar);
    CHECK(b.phase <= 1 && b.pending > 0, "no more arrivals than a barrier waits for");
    --b.pending;
    return b;
}
inline void barrier_arrive(u32 bar) { settle(arrive_at(bar)); }
inline void barriers_ready() {}
inline void barrier_expect(u32 bar, u32 bytes) {
    Barrier& b = arrive_at(bar);
    b.bytes += bytes;
    settle(b);
}
inline void barrier_wait(u32 bar, u32 parity) {
    const Barrier& b = barrier_at(*now->block, bar);
    CHECK(b.phase <= 1, "a barrier that is not initialised");
    while (b.phase == parity) pause();
}
inline void copy_bytes(u32 to, const u8* from, u32 bytes, u32 bar, u64) {
    CHECK(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<u64>(from) % 16 == 0, "bulk copies are of 16 bytes");
    at(*now->block, to, bytes, 16);
    now->block->copies.push_back({static_cast<int>(dice() % 8), to, bytes, bar, from, nullptr, 0, 0});
}
inline void copies_see_stores() {}
inline void prefetch_map(const TensorMap*) {}
inline void copy_x(u32 to, const TensorMap* map, int k, int m, u32 bar) {
    const u32 bytes = map->rows * 128;
    at(*now->block, to, bytes, 1024);
    now->block->copies.push_back({static_cast<int>(dice() % 8), to, bytes, bar, nullptr, map, k, m});
}
inline void copy_x_to(u32 to, const TensorMap* map, int k, int m, u32 bar, int blocks) {
    for (size_t rank = 0; rank < now->cluster->size(); ++rank) {
        if (!(blocks >> rank & 1)) continue;
        Block& block = (*now->cluster)[rank];
        CHECK(block.started == block.all.needed, "a copy to a block that has not started");
        CHECK(barrier_at(block, bar).phase <= 1, "a copy to a block whose barrier is not initialised");
        const u32 bytes = map->rows * 128;
        at(block, to, bytes, 1024);
        block.copies.push_back({static_cast<int>(dice() % 8), to, bytes, bar, nullptr, map, k, m});
    }
}
inline void perform(Block& block, const Copy& copy) {
    u8* to = at(block, copy.to, copy.bytes, copy.bytes < 16 ? 4 : 16);
    if (!copy.map) std::memcpy(to, copy.from ? copy.from : reinterpret_cast<const u8*>(copy.value), copy.bytes);
    for (int r = 0; copy.map && r < copy.map->rows; ++r)
        for (int c = 0; c < 64; ++c) {
            const int k = copy.k + c, m = copy.m + r;
            const u16 value = k < copy.map->k && m < copy.map->m ? copy.map->x[static_cast<u64>(m) * copy.map->k + k] : 0;
            std::memcpy(to + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2, &value, 2);
        }
    Barrier& b = barrier_at(block, copy.bar);
    b.bytes -= copy.bytes;
    settle(b);
}

inline u32 load4(u32 address) {
    u32 v;
    std::memcpy(&v, at(*now->block, address, 4, 4), 4);
    return v;
}
inline uint4 load16(u32 address) {
    uint4 v;
    std::memcpy(&v, at(*now->block, address, 16, 16), 16);
    return v;
}
inline void store2(u32 address, u32 v) { std::memcpy(at(*now->block, address, 2, 2), &v, 2); }
inline void put16(u32 address, uint4 v) { std::memcpy(at(*now->block, address, 16, 16), &v, 16); }
inline void store4(u32 address, float v) { std::memcpy(at(*now->block, address, 4, 4), &v, 4); }
template <typename V>
V in_memory(const void* from) {
    CHECK(reinterpret_cast<u64>(from) % sizeof(V) == 0, "misaligned memory");
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
inline u32 read_fresh(const void* from) { return in_memory<u32>(from); }
inline uint4 read_fresh16(const void* from) { return in_memory<uint4>(from); }
inline u32 address_in(u32 address, int rank) { return address | (rank + 1) << 24; }
inline void store16(u32 address, const float (&v)[4]) { std::memcpy(at(*now->block, address, 16, 16), v, 16); }
inline Block& block_at(u32 address, u32 bar) {
    CHECK(address >> 24 == bar >> 24, "the barrier is the written block's");
    Block& block = (*now->cluster)[(address >> 24) - 1];
    CHECK(block.started == block.all.needed, "a write to a block that has not started");
    return block;
}
inline int some_time() { return static_cast<int>(dice() % 8); }
inline void store16_in(u32 address, const float (&v)[4], u32 bar) {
    block_at(address, bar).copies.push_back(
        {some_time(), address & 0xffffff, 16, bar & 0xffffff, nullptr, nullptr, 0, 0, {v[0], v[1], v[2], v[3]}});
}
inline void store4_in(u32 address, float v, u32 bar) {
    block_at(address, bar).copies.push_back(
        {some_time(), address & 0xffffff, 4, bar & 0xffffff, nullptr, nullptr, 0, 0, {v}});
}
inline void send_bytes(u32 to, u32 from, u32 bytes, u32 bar) {
    block_at(to, bar).copies.push_back(
        {some_time(), to & 0xffffff, bytes, bar & 0xffffff, at(*now->block, from, bytes, 16), nullptr, 0, 0});
}
inline u32 multiply(u32 a, u32 b) {
    return bf16_of(of_bf16(a) * of_bf16(b)) | bf16_of(of_bf16(a >> 16) * of_bf16(b >> 16)) << 16;
}
inline float rounded_product(float a, float b) {
    const volatile float product = a * b;  // some CPUs fuse it with a sum
    return product;
}
inline float flushed(float v) { return std::fabs(v) < 1.17549435e-38f ? std::copysign(0.0f, v) : v; }
inline float power_of_two(float v) { return flushed(std::exp2(v)); }
inline float inverse_root(float v) { return flushed(1.0f / std::sqrt(v)); }
inline float reciprocal(float v) { return flushed(1.0f / v); }
inline float silu(float v) {
    const float denominator = std::fma(power_of_two(v * -1.44269504f), 0.00390625f, 0.00390625f);
    return v * (reciprocal(denominator) * 0.00390625f);
}
inline u32 to_bf16(float first, float second) { return bf16_of(first) | bf16_of(second) << 16; }

// All lanes give `n` words; the last to come computes for all of them; each takes its results.
template <typename Compute>
void together(const u32* given, int n, u32* result, int results, Compute compute) {
    Warp& warp = my_warp();
    const int lane = now->thread.x % 32;
    std::memcpy(warp.given[lane], given, 4 * n);
    if (warp.meeting.arrived == 31) compute(warp);
    meet(warp.meeting);
    std::memcpy(result, warp.result[lane], 4 * results);
}
inline float low_of(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline u32 transpose(u32 pair) {
    u32 result;
    together(&pair, 1, &result, 1, [](Warp& warp) {
        const auto element = [&](int row, int column) {
            return warp.given[row * 4 + column / 2][0] >> (column % 2 * 16) & 0xffff;
        };
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            warp.result[lane][0] = element(column, row) | element(column + 1, row) << 16;
        }
    });
    return result;
}
inline u32 from_lane(u32 value, int lane) {
    const u32 given[2] = {value, static_cast<u32>(lane)};
    u32 result;
    together(given, 2, &result, 1, [](Warp& warp) {
        for (int i = 0; i < 32; ++i) warp.result[i][0] = warp.given[warp.given[i][1]][0];
    });
    return result;
}
inline float of_lanes(float value, int lane, int distance) {
    return __uint_as_float(from_lane(bits_of(value), lane ^ distance));
}
inline uint4 read16(const u8* from, u64) { return in_memory<uint4>(from); }
inline uint4 read16_early(const u8* from, u64) { return in_memory<uint4>(from); }
inline u32 read4(const u8* from, u64) { return in_memory<u32>(from); }
inline void write16(u16* to, const u32 (&v)[4]) {
    CHECK(reinterpret_cast<u64>(to) % 16 == 0, "misaligned memory");
    std::memcpy(to, v, 16);
}
inline void write8(u16* to, u32 first, u32 second) {
    CHECK(reinterpret_cast<u64>(to) % 8 == 0, "misaligned memory");
    std::memcpy(to, &first, 4);
    std::memcpy(to + 2, &second, 4);
}
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 given[10] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(given + 6, c, 16);
    u32 result[4];
    together(given, 10, result, 4, [](Warp& warp) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 6; ++i)
                for (int e = 0; e < 2; ++e) {
                    const float value = of_bf16(warp.given[lane][i] >> (16 * e));
                    const int column = lane % 4 * 2 + e;
                    if (i < 4) A[lane / 4 + i % 2 * 8][column + i / 2 * 8] = value;
                    else B[column + (i - 4) * 8][lane / 4] = value;
                }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                float sum = __uint_as_float(warp.given[lane][6 + i]);
                for (int k = 0; k < 16; ++k) sum += A[lane / 4 + i / 2 * 8][k] * B[k][lane % 4 * 2 + i % 2];
                warp.result[lane][i] = bits_of(sum);
            }
    });
    std::memcpy(c, result, 16);
}

// wgmma, a warp's 16 rows of it, done at once. Shared memory is read as swizzled, bits 4 to 6 of an address exclusive-or
// bits 7 to 9; or, where the topmost bit says so, as two planes, whose distance lies above the address.
inline void products_begin() {}
inline void products_commit() {}
template <int LATER>
inline void products_wait() {}
inline void keep(const u32&) {}
inline void keep(float&) {}
inline u64 rows_at(u32 address) { return address; }
inline u64 rows_after(u64 rows, u32 bytes) { return rows + bytes; }
inline int same_in_warp(int value) { return value; }
template <int FIRST, int COUNT>
inline void multiply_rows(float (&acc)[COUNT][4], const u32 (&a)[4], u64 rows, u32 add) {
    const int lane = now->thread.x % 32;
    for (int m = FIRST; m < min(COUNT, FIRST + (COUNT < 16 ? COUNT : 8)); ++m) {
        u32 b[2];
        for (int i = 0; i < 2; ++i) {
            const bool planes = rows >> 63;
            const u32 row = (m - FIRST) * 8 + lane / 4, apart = planes ? rows >> 32 & 0x7fffffff : 16;
            const u32 address = static_cast<u32>(rows) + row * (planes ? 16 : 128) + i * apart + lane % 4 * 4;
            std::memcpy(&b[i], at(*now->block, planes ? address : address ^ (address >> 7 & 7) << 4, 4, 4), 4);
        }
        for (float& sum : acc[m]) sum = add ? sum : 0.0f;
        mma(acc[m], a, b[0], b[1]);
    }
}

inline u64 columns_at(u32 address) { return address; }
inline void multiply_columns(float (&acc)[8][4], const u32 (&a)[4], u64 rows, u32 add) {
    const int lane = now->thread.x % 32;
    for (int n = 0; n < 8; ++n) {
        u32 b[2] = {0, 0};
        for (int i = 0; i < 4; ++i) {
            const u32 row = i / 2 * 8 + lane % 4 * 2 + i % 2, address = static_cast<u32>(rows) + row * 128 + n * 16 + lane / 4 * 2;
            u16 value;
            std::memcpy(&value, at(*now->block, address ^ (address >> 7 & 7) << 4, 2, 2), 2);
            b[i / 2] |= static_cast<u32>(value) << (i % 2 * 16);
        }
        for (float& sum : acc[n]) sum = add ? sum : 0.0f;
        mma(acc[n], a, b[0], b[1]);
    }
}

static std::vector<std::unique_ptr<Fiber>> fibers;
static void (*body)();
static bool uneven = false;  // whether, for a while, one warp or another does nothing

static void begin() {
    ++now->block->started;
    body();
    now->done = true;
    pause();
}

// Runs one cluster to its end: threads in an order that changes, copies when they are due.
static void run_cluster(Index first, int blocks, int threads, int bytes) {
    std::vector<Block> cluster(blocks);
    fibers.clear();
    cluster_meeting = Meeting{blocks * threads};
    for (int rank = 0; rank < blocks; ++rank) {
        Block& block = cluster[rank];
        block.shared.assign(bytes, 0xff);
        block.warps.resize(threads / 32);
        for (Warp& warp : block.warps) warp.meeting.needed = 32;
        block.all.needed = block.previous.needed = threads;
        for (int t = 0; t < threads; ++t) {
            auto fiber = std::make_unique<Fiber>();
            fiber->thread = {t, 0};
            fiber->block_index = {first.x + rank, first.y};
            fiber->block = &block;
            fiber->cluster = &cluster;
            fiber->stack.resize(32768);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            makecontext(&fiber->context, begin, 0);
            fibers.push_back(std::move(fiber));
        }
    }
    int left = blocks * threads, idle = 0, resting = -1;
    for (int round = 0; left > 0; ++round) {
        if (uneven && round % 64 == 0) resting = static_cast<int>(dice() % (threads / 32));
        const size_t start = dice() % fibers.size();
        const int before = left;
        for (size_t i = 0; i < fibers.size(); ++i) {
            now = fibers[(start + i) % fibers.size()].get();
            if (now->done || now->thread.x / 32 == resting) continue;
            swapcontext(&scheduler, &now->context);
            left -= now->done;
        }
        bool copied = false;
        for (Block& block : cluster)
            for (size_t i = block.copies.size(); i-- > 0;)
                if (block.copies[i].due-- <= 0) {
                    const Copy copy = block.copies[i];
                    block.copies.erase(block.copies.begin() + i);
                    perform(block, copy);
                    copied = true;
                }
        idle = copied || left < before ? 0 : idle + 1;
        CHECK(idle < 100000, "threads wait for each other");
    }
    for (Block& block : cluster) CHECK(block.copies.empty(), "a block ended before its copies");
}
