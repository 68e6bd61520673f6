// How lanes of a warp decode a packed weight (cuda_packing.py) into BF16 fragments of mma.m16n8k16.
//
// Decoding is exact: an element's bits, moved to where BF16 has them, are its value times a power of two (subnormals
// included), and one multiplication by a power of two puts that right and applies the block's scale.
//
// Compile-time parameters: BITS 16 (BF16, nothing to decode), 8 or 4; MAG_AT lowest bit of an 8-bit element's magnitude
// where BF16 has it.

constexpr int SCALES = 128 * BITS;             // bytes of the elements of a tile of 16 rows by 64 inputs
constexpr int TILE = SCALES + (BITS < 16 ? 32 : 0);  // and of its scales, which come after them
constexpr int STEPS = 16 / BITS;               // of 16 inputs, in 16 bytes a lane
constexpr int WORDS = BITS < 16 ? 4 / STEPS : 1;  // 16 bytes each, of a tile, that are read before anything is waited for

// Byte `i` of `word` as the exponents of two BF16 powers of two.
__device__ __forceinline__ u32 power(u32 word, int i) {
    return __byte_perm(word, 0, 0x4040 + 0x0101 * i) << 7;
}

// Fragments of 16 rows by 16 inputs: a[0], a[2] of row `lane / 4`, a[1], a[3] of the row 8 below.
// A word of 8-bit elements holds a[0] where BF16 has sign and magnitude, and a[2] in the other bits: see _BYTE_PLACES of
// cuda_packing.py. The next word holds a[1] and a[3].
__device__ __forceinline__ u32 decode_first(u32 word) {
    return word & (0x8000u | 0x7fu << MAG_AT) * 0x10001u;
}

__device__ __forceinline__ u32 decode_second(u32 word) {
    constexpr int SIGN_UP = MAG_AT == 4 ? 4 : 1;  // at 4 it moves with the low bits
    constexpr u32 LOW = (1u << 2 * MAG_AT) - (1u << MAG_AT), HIGH = (0x7fu << MAG_AT) - LOW;
    return ((word << SIGN_UP) & 0x80008000u) | ((word << MAG_AT) & LOW * 0x10001u) |
           ((word >> (12 - 2 * MAG_AT)) & HIGH * 0x10001u);
}

__device__ __forceinline__ void decode8(u32 (&a)[4], u32 upper, u32 lower, u32 scale, u32 scale8) {
    a[0] = multiply(decode_first(upper), scale);
    a[1] = multiply(decode_first(lower), scale8);
    a[2] = multiply(decode_second(upper), scale);
    a[3] = multiply(decode_second(lower), scale8);
}

// A word holds all eight 4-bit elements of a lane. In each half, sign and magnitude of a[0] lie in bits 15 and 8-6, of
// a[1] in 12 and 5-3 (3 below), of a[2] in 14 and 11-9, of a[3] in 13 and 2-0.
__device__ __forceinline__ void decode4(u32 (&a)[4], u32 word, u32 scale, u32 scale8) {
    a[0] = multiply(word & 0x81c081c0u, scale);
    a[1] = multiply((word << 3) & 0x81c081c0u, scale8);
    a[2] = multiply(((word << 1) & 0x80008000u) | ((word >> 3) & 0x01c001c0u), scale);
    a[3] = multiply(((word << 2) & 0x80008000u) | ((word << 6) & 0x01c001c0u), scale8);
}

// The fragments of 16 inputs, `step` of a group, of a row tile; `raw` is what of it lies in the same 16 bytes.
__device__ __forceinline__ void decode(u32 (&a)[4], const uint4& raw, u32 scales, int step) {
    if constexpr (BITS == 16) {
        a[0] = raw.x, a[1] = raw.y, a[2] = raw.z, a[3] = raw.w;
        return;
    }
    const u32 scale = power(scales, step / 2 * 2), scale8 = power(scales, step / 2 * 2 + 1);
    if constexpr (BITS == 8) {
        decode8(a, step % 2 ? raw.z : raw.x, step % 2 ? raw.w : raw.y, scale, scale8);
    } else if constexpr (BITS == 4) {
        decode4(a, step == 0 ? raw.x : step == 1 ? raw.y : step == 2 ? raw.z : raw.w, scale, scale8);
    }
}
