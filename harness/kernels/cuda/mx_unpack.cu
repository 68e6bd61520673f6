// A packed MX weight as a BF16 matrix [N, K], for a library's product of many rows: there arithmetic decides the time,
// and decoding once costs less than in every block of rows of x.
//
// A warp decodes a tile of 16 rows by 64 inputs into fragments (mx_decode.cuh). The four lanes of a row then exchange
// words, so that each stores 8 inputs in a row. The matrix is the only one for all Linears in turn: it is written when
// what came before is over, but the weight, which nothing changes, is read before that.
//
// Compile-time parameters beside those of mx_decode.cuh: WARPS a block; PDL programmatic dependent launch.

// `words[j]` of lane t of four becomes the t-th word of lane j of them.
__device__ __forceinline__ void exchange(u32 (&words)[4], int lane) {
#pragma unroll
    for (int far = 2; far > 0; far /= 2) {
        const bool high = lane & far;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int low = far == 2 ? i : 2 * i;  // the pair (low, low + far) of words
            const u32 got = from_lane(high ? words[low] : words[low + far], lane ^ far);
            words[low] = high ? got : words[low];
            words[low + far] = high ? words[low + far] : got;
        }
    }
}

KERNEL(WARPS * 32, 1, 1)
mx_unpack(const u8* __restrict__ weight, u16* __restrict__ out, int N, int K, int groups) {
    const int lane = threadIdx.x % 32, tile = blockIdx.x * WARPS + same_in_warp(threadIdx.x / 32);
    const int row = tile / groups * 16, column = tile % groups * 64;
    const bool inside = row < N;
    const u8* from = weight + static_cast<long long>(tile) * TILE;
    uint4 raw[WORDS];
    u32 scales = 0;
    const u64 policy = cache_policy(true);  // the matrix is to stay in L2 for the product
    if (PDL) next_may_begin();
    if (inside) {
        scales = read4(from + SCALES + lane / 4 * 4, policy);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) raw[i] = read16(from + i * 512 + lane * 16, policy);
    }
    if (PDL) previous_is_over();  // it may be reading what is written here
    if (!inside) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (column + half * 32 >= K) break;
        u32 above[4], below[4], a[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int step = half * 2 + i;
            decode(a, raw[step / STEPS], scales, step);
            above[i * 2] = a[0], above[i * 2 + 1] = a[2];
            below[i * 2] = a[1], below[i * 2 + 1] = a[3];
        }
        exchange(above, lane);
        exchange(below, lane);
        const int n = row + lane / 4;
        u16* to = out + static_cast<long long>(n) * K + column + half * 32 + lane % 4 * 8;
        if (n < N) write16(to, above);
        if (n + 8 < N) write16(to + 8ll * K, below);
    }
}
