// The instructions that the kernels are written in terms of: types, asynchronous copies, barriers, tensor cores.
//
// Put before a kernel when it is compiled. tests/mx/mx_device_cpu.hpp has the same on a CPU, so that tests run the
// kernels' own source without a GPU. Addresses of shared memory are 32 bit.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    u64 opaque[16];
};

#define KERNEL(threads, cluster, blocks) \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks)

// Where this block's shared memory begins: at a multiple of 1024, which the swizzle of TMA needs.
__device__ __forceinline__ u32 shared_memory() {
    extern __shared__ __align__(1024) u8 memory[];
    return static_cast<u32>(__cvta_generic_to_shared(memory));
}

// How long L2 should keep what is fetched: not at all, or as usual.
__device__ __forceinline__ u64 cache_policy(bool read_once) {
    u64 policy;
    if (read_once) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    } else {
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    }
    return policy;
}

__device__ __forceinline__ void barrier_init(u32 bar, int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// One of the arrivals a barrier waits for: what this thread wrote to shared memory is seen by those that waited.
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// What this thread has written to shared memory is seen by copies and tensor cores that begin after a meeting.
__device__ __forceinline__ void copies_see_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread did to barriers is seen by copies and by the cluster.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    copies_see_stores();
}

// The same, and the bytes of copies it waits for beside it.
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(bar), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_bytes(u32 to, const u8* from, u32 bytes, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}

// Has the description of a matrix at hand when the first copy needs it.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_x(u32 to, const TensorMap* map, int k, int m, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(k), "r"(m), "r"(bar) : "memory");
}

// The same into every block of the cluster whose bit is set in `blocks`, each at `to` and with its own barrier at `bar`.
__device__ __forceinline__ void copy_x_to(u32 to, const TensorMap* map, int k, int m, u32 bar, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(to), "l"(map), "r"(k), "r"(m), "r"(bar), "h"(static_cast<u16>(blocks)) : "memory");
}

__device__ __forceinline__ uint4 load16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ u32 load4(u32 address) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// The lower half of `v`.
__device__ __forceinline__ void store2(u32 address, u32 v) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<u16>(v)) : "memory");
}

__device__ __forceinline__ void put16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store4(u32 address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

// 4 bytes of memory that a kernel in front has written, from L2: what L1 holds may be from before that.
template <typename T>
__device__ __forceinline__ u32 read_fresh(const T* from) {
    u32 v;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// The same of 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 read_fresh16(const T* from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

// Of memory that nobody writes.
__device__ __forceinline__ uint4 read16(const u8* from, u64 policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from), "l"(policy));
    return v;
}

// The same before `previous_is_over`, if that comes behind: `read16` may be put off by the assembler until its value is
// needed.
__device__ __forceinline__ uint4 read16_early(const u8* from, u64 policy) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from), "l"(policy) : "memory");
    return v;
}

__device__ __forceinline__ u32 read4(const u8* from, u64 policy) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(v) : "l"(from), "l"(policy));
    return v;
}

__device__ __forceinline__ void write16(u16* to, const u32 (&v)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

__device__ __forceinline__ void write8(u16* to, u32 first, u32 second) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(first), "r"(second) : "memory");
}

// `value` of another lane.
__device__ __forceinline__ u32 from_lane(u32 value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ u32 bits_of(float v) {
    return __float_as_uint(v);
}

// `value` of the lane whose number differs from `lane`, this one's, in the bits of `distance`.
__device__ __forceinline__ float of_lanes(float value, int lane, int distance) {
    return __uint_as_float(from_lane(bits_of(value), lane ^ distance));
}

// Two BF16, the first one low, as floats.
__device__ __forceinline__ float low_of(u32 pair) {
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_of(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// Products of a warpgroup (wgmma): asynchronous, in order. Registers they read or add to are theirs from
// `products_begin` until `products_wait` says that at most `LATER` commits after theirs are still under way.
__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LATER>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}

// Not to be given to anything else before this point.
__device__ __forceinline__ void keep(const u32& value) {
    asm volatile("" ::"r"(value) : "memory");
}

__device__ __forceinline__ void keep(float& value) {
    asm volatile("" : "+f"(value)::"memory");
}

// How wgmma finds rows of 64 inputs, 128 bytes each, as TMA swizzles them: 8 rows are 1024 bytes, aligned to that.
// Further inputs begin 2 bytes each after `address`.
__device__ __forceinline__ u64 rows_at(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// `rows` of what lies `bytes` further on.
__device__ __forceinline__ u64 rows_after(u64 rows, u32 bytes) {
    return rows + bytes / 16;
}

// `value`, which is the same in every lane, where the compiler knows that it is.
__device__ __forceinline__ int same_in_warp(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

#define SUMS(m) "+f"(acc[m][0]), "+f"(acc[m][1]), "+f"(acc[m][2]), "+f"(acc[m][3])
#define SUMS8(m) SUMS(m), SUMS(m + 1), SUMS(m + 2), SUMS(m + 3), SUMS(m + 4), SUMS(m + 5), SUMS(m + 6), SUMS(m + 7)
#define FACTORS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(add)
#define WGMMA_OF(n, sums, factors, more, columns) \
    "{\n.reg .pred add;\nsetp.ne.u32 add, " more ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, " factors ", add, 1, 1, " columns ";\n}\n"
#define WGMMA(n, sums, factors, more) WGMMA_OF(n, sums, factors, more, "0")
#define SUM8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SUM16 SUM8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SUM32 SUM16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SUM48 SUM32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"

// acc[FIRST], ... (+)= A * B^T for 16 inputs: A 64 rows, 16 a warp, fragments of m16n8k16; B up to 112 rows in shared
// memory, 8 for each acc[m]. Without `add` what acc held does not matter.
template <int FIRST, int COUNT>
__device__ __forceinline__ void multiply_rows(float (&acc)[COUNT][4], const u32 (&a)[4], u64 rows, u32 add) {
    if constexpr (COUNT == 1) {
        asm volatile(WGMMA(8, "%0,%1,%2,%3", "{%4,%5,%6,%7}, %8", "%9") : SUMS(0) : FACTORS);
    } else if constexpr (COUNT == 2) {
        asm volatile(WGMMA(16, SUM8, "{%8,%9,%10,%11}, %12", "%13") : SUMS(0), SUMS(1) : FACTORS);
    } else if constexpr (COUNT == 4) {
        asm volatile(WGMMA(32, SUM16, "{%16,%17,%18,%19}, %20", "%21")
                     : SUMS(0), SUMS(1), SUMS(2), SUMS(3)
                     : FACTORS);
    } else if constexpr (COUNT == 9) {
        asm volatile(WGMMA(72, SUM32 ",%32,%33,%34,%35", "{%36,%37,%38,%39}, %40", "%41")
                     : SUMS8(0), SUMS(8)
                     : FACTORS);
    } else if constexpr (COUNT == 12) {
        asm volatile(WGMMA(96, SUM48, "{%48,%49,%50,%51}, %52", "%53")
                     : SUMS8(0), SUMS(8), SUMS(9), SUMS(10), SUMS(11)
                     : FACTORS);
    } else if constexpr (COUNT == 14) {
        asm volatile(WGMMA(112, SUM48 ",%48,%49,%50,%51,%52,%53,%54,%55", "{%56,%57,%58,%59}, %60", "%61")
                     : SUMS8(0), SUMS(8), SUMS(9), SUMS(10), SUMS(11), SUMS(12), SUMS(13)
                     : FACTORS);
    } else {
        static_assert(COUNT % 8 == 0, "a width that nobody has needed");
        asm volatile(WGMMA(64, SUM32, "{%32,%33,%34,%35}, %36", "%37") : SUMS8(FIRST) : FACTORS);
    }
}

// How wgmma finds 64 columns of rows that lie as in `rows_at`, where rows are what is summed over: 16 are 2048 bytes.
__device__ __forceinline__ u64 columns_at(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | 64ull << 16 | 64ull << 32 | 1ull << 62;
}

// acc (+)= A * B for 16 rows of B, of 64 columns, 8 for each acc[n]; A as in `multiply_rows`.
__device__ __forceinline__ void multiply_columns(float (&acc)[8][4], const u32 (&a)[4], u64 rows, u32 add) {
    asm volatile(WGMMA_OF(64, SUM32, "{%32,%33,%34,%35}, %36", "%37", "1") : SUMS8(0) : FACTORS);
}

// `threads` of a block meet, of those that name `group`, 1 to 15.
__device__ __forceinline__ void group_sync(int group, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(group), "r"(threads) : "memory");
}

// The blocks of a cluster meet; what they wrote need not be seen (making sure of that takes as long as memory does).
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of `address` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ u32 address_in(u32 address, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ void store16(u32 address, const float (&v)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
}

// The same at an address that `address_in` gave, as a copy that the barrier at `bar`, of the same block, waits for.
__device__ __forceinline__ void store16_in(u32 address, const float (&v)[4], u32 bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar) : "memory");
}

__device__ __forceinline__ void store4_in(u32 address, float v, u32 bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address), "f"(v),
                 "r"(bar) : "memory");
}

// Shared memory of this block to another's, at an address that `address_in` gave, likewise.
__device__ __forceinline__ void send_bytes(u32 to, u32 from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "r"(from), "r"(bytes), "r"(bar) : "memory");
}

// 2^v, 1 / sqrt(v) and 1 / v by the special function units; subnormal results are 0.
__device__ __forceinline__ float power_of_two(float v) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}

__device__ __forceinline__ float inverse_root(float v) {
    float d;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}

__device__ __forceinline__ float reciprocal(float v) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}

// `a * b`, rounded before anything is added to it.
__device__ __forceinline__ float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}

// As torch's own SiLU of BF16 has it, v / (1 + exp(-v)) in float32, rounded to BF16: of no BF16 value but -2^-8, 2^-7 and
// 5.9375, which another exp decides, does it lie so close to where BF16 rounds the other way that the instructions'
// 2^-22 matter. Divided by 256 the denominator's reciprocal is a normal number wherever it is not 0.
__device__ __forceinline__ float silu(float v) {
    const float denominator = fmaf(power_of_two(v * -1.44269504f), 0.00390625f, 0.00390625f);
    return v * (reciprocal(denominator) * 0.00390625f);
}

// Two BF16 of two floats, the first one low.
__device__ __forceinline__ u32 to_bf16(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// Transposes an 8 by 8 matrix of 16 bit; a lane holds row `lane / 4`, columns `2 * (lane % 4)` and the next.
__device__ __forceinline__ u32 transpose(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Programmatic dependent launch: lets the next kernel begin; waits until the previous one is over.
__device__ __forceinline__ void next_may_begin() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void previous_is_over() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
