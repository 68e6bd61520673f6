// What the decoder's kernels need beside mx_device.cuh: small products of a warp, and copies that threads ask for.
//
// Put behind mx_device.cuh when a kernel is compiled; tests/rollout/conv_device_cpu.hpp has the same on a CPU.

// Four 8 by 8 matrices of 16 bit; a lane gives the address of one row of 16 bytes and gets a fragment of each.
__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

// Fragments of four matrices into shared memory, as `load_matrices` and `load_transposed` read them.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// How wgmma finds rows of 16 inputs in two planes `bytes` apart, of 8 inputs each: 16 bytes a row, one after the other.
__device__ __forceinline__ u64 planes_at(u32 address, u32 bytes) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(bytes >> 4) << 16 | 8ull << 32;
}

__device__ __forceinline__ u64 planes_after(u64 planes, u32 bytes) { return planes + bytes / 16; }

// c += A * B: A 16 by 16, B 16 by 8, BF16, fragments of m16n8k16.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes of memory into shared memory, some time before `copies_wait`; zeros where not `inside`.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// All that this thread asked for is there.
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// 16 bytes of memory that nobody writes, to be kept for the threads that ask for it next.
__device__ __forceinline__ uint4 fetch16(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ u32 fetch4(const void* from) {
    u32 v;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

__device__ __forceinline__ void put4(u32 address, u32 v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void write16(void* to, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void write4(void* to, u32 v) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// The larger of each of two BF16.
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 d;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// To 2^-11 (PTX ISA).
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    float d;
    asm("tanh.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

__device__ __forceinline__ uint2 fetch8(const void* from) {
    uint2 v;
    asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
