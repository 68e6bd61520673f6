// conv_device.cuh on a CPU, behind tests/mx/mx_device_cpu.hpp, which has products of a warp already. Copies happen a
// while after they were asked for: at the latest when the thread that asked waits, and not before another may.

#include <unordered_map>

// Four matrices in shared memory and a lane's fragments of them: a lane gives the address of a row.
template <bool STORE, bool TRANSPOSED>
void matrices(u32 address, u32 (&a)[4]) {
    u32 given[5] = {address, a[0], a[1], a[2], a[3]};
    together(given, 5, a, 4, [](Warp& warp) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 8; ++i) {
                const int m = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
                const u32 begin = warp.given[m * 8 + (TRANSPOSED ? column : row)][0];
                u8* element = at(*now->block, begin, 16, 16) + (TRANSPOSED ? row : column) * 2;
                u8* mine = reinterpret_cast<u8*>(STORE ? &warp.given[lane][1 + m] : &warp.result[lane][m]) + i % 2 * 2;
                std::memcpy(STORE ? element : mine, STORE ? mine : element, 2);
            }
    });
}
inline void load_matrices(u32 (&a)[4], u32 address) { matrices<false, false>(address, a); }
inline void load_transposed(u32 (&a)[4], u32 address) { matrices<false, true>(address, a); }
inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    u32 v[4] = {a, b, c, d};
    matrices<true, false>(address, v);
}
inline void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    u32 v[4] = {a, b, c, d};
    matrices<true, true>(address, v);
}
inline u64 planes_at(u32 address, u32 bytes) { return 1ull << 63 | static_cast<u64>(bytes) << 32 | address; }
inline u64 planes_after(u64 planes, u32 bytes) { return planes + bytes; }

struct Asked {
    u32 to;
    u8 bytes[16];
};
static std::unordered_map<Fiber*, std::vector<Asked>> asked;

inline void copy16(u32 to, const void* from, bool inside) {
    CHECK(reinterpret_cast<u64>(from) % 16 == 0, "misaligned memory");
    Asked one{to, {}};
    if (inside) std::memcpy(one.bytes, from, 16);
    std::memset(at(*now->block, to, 16, 16), 0xff, 16);  // not there yet
    asked[now].push_back(one);
}
inline void copies_wait() {
    for (const Asked& one : asked[now]) std::memcpy(at(*now->block, one.to, 16, 16), one.bytes, 16);
    asked.erase(now);
}
inline uint4 fetch16(const void* from) { return in_memory<uint4>(from); }
inline void put4(u32 address, u32 v) { std::memcpy(at(*now->block, address, 4, 4), &v, 4); }
inline void write16(void* to, uint4 v) {
    CHECK(reinterpret_cast<u64>(to) % 16 == 0, "misaligned memory");
    std::memcpy(to, &v, 16);
}
inline void write4(void* to, u32 v) {
    CHECK(reinterpret_cast<u64>(to) % 4 == 0, "misaligned memory");
    std::memcpy(to, &v, 4);
}
inline u32 fetch4(const void* from) { return in_memory<u32>(from); }
inline u32 larger(u32 a, u32 b) {
    const u32 low = of_bf16(a) > of_bf16(b) ? a : b, high = of_bf16(a >> 16) > of_bf16(b >> 16) ? a : b;
    return low & 0xffff | high & 0xffff0000u;
}
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
struct uint2 {
    u32 x, y;
};
inline uint2 fetch8(const void* from) { return in_memory<uint2>(from); }
