// conv_device.cuh on a CPU, behind tests/mx/mx_device_cpu.hpp, which has products of a warp already. Copies happen a
// while after they were asked for: at the latest when the thread that asked waits, and not before another may.

#include <unordered_map>

inline void load_matrices(u32 (&a)[4], u32 address) {
    u32 given[1] = {address}, result[4];
    together(given, 1, result, 4, [](Warp& warp) {
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m)
                std::memcpy(&warp.result[lane][m], at(*now->block, warp.given[m * 8 + lane / 4][0], 16, 16) + lane % 4 * 4, 4);
    });
    std::memcpy(a, result, 16);
}

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
inline uint4 fetch16(const void* from) {
    CHECK(reinterpret_cast<u64>(from) % 16 == 0, "misaligned memory");
    uint4 v;
    std::memcpy(&v, from, 16);
    return v;
}
inline void put16(u32 address, uint4 v) { std::memcpy(at(*now->block, address, 16, 16), &v, 16); }
inline void put4(u32 address, u32 v) { std::memcpy(at(*now->block, address, 4, 4), &v, 4); }
inline void write16(void* to, uint4 v) {
    CHECK(reinterpret_cast<u64>(to) % 16 == 0, "misaligned memory");
    std::memcpy(to, &v, 16);
}
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
struct uint2 {
    u32 x, y;
};
inline uint2 fetch8(const void* from) {
    CHECK(reinterpret_cast<u64>(from) % 8 == 0, "misaligned memory");
    uint2 v;
    std::memcpy(&v, from, 8);
    return v;
}
