// What products of a packed weight and rows of x are made of, where a norm is part of them: fragments decoded while tensor
// cores read those before, biases, and norms made up for afterwards.
//
// Compile-time parameters, beside those of mx_decode.cuh: MT tiles of 8 rows of x; RT row tiles of W a warp, their groups
// of 64 inputs GS tiles apart; NORM x has one row more, and a tile for it.

constexpr int XT = MT + NORM;  // tiles of 8 rows of x

// Sums of squares of parts of rows, [M][parts]; `width` is 1 / the numbers in a row, `eps` is added to their mean square.
struct Squares {
    const float* of;
    int parts;
    float width;
    float eps;
};

// Fragments of 32 inputs of a warp's row tiles. There are two: while tensor cores read one, the other is decoded.
struct Half {
    u32 a[2][RT][4];

    __device__ __forceinline__ void hold() const {
#pragma unroll
        for (int i = 0; i < 8 * RT; ++i) keep(a[i / (4 * RT)][i / 4 % RT][i % 4]);
    }
};

// acc += W * x^T for 64 inputs, or without `add` acc = it; `w` is the warp's first tile in shared memory, tiles of further
// rows lie GS tiles apart. The products of the last 32 inputs are under way when this returns.
__device__ __forceinline__ void multiply_group(float (&acc)[RT][XT][4], Half (&halves)[2], u32 w, u32 x, int lane,
                                               bool add) {
    const u64 rows = rows_at(x);
    u32 scales[RT];
    uint4 raw[WORDS][RT];
#pragma unroll
    for (int r = 0; r < RT; ++r) {
        if (BITS == 16) break;
        scales[r] = load4(w + r * GS * TILE + SCALES + lane / 4 * 4);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) raw[i][r] = load16(w + r * GS * TILE + i * 512 + lane * 16);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2 * RT; ++i) {
            const int r = i / 2, step = half * 2 + i % 2;
            if (BITS == 16) raw[0][r] = load16(w + r * GS * TILE + step * 512 + lane * 16);
            decode(halves[half].a[i % 2][r], raw[step / STEPS % WORDS][r], BITS < 16 ? scales[r] : 0, step);
        }
        products_begin();
#pragma unroll
        for (int i = 0; i < 2 * RT; ++i) {
            const u64 inputs = rows_after(rows, (half * 2 + i / RT) * 32);
            const u32 more = half + i / RT > 0 || add;
            multiply_rows<0>(acc[i % RT], halves[half].a[i / RT][i % RT], inputs, more);
            if constexpr (MT >= 16)
                multiply_rows<8>(acc[i % RT], halves[half].a[i / RT][i % RT], rows_after(inputs, 8192), more);
            if constexpr (MT >= 32) {
                multiply_rows<16>(acc[i % RT], halves[half].a[i / RT][i % RT], rows_after(inputs, 16384), more);
                multiply_rows<24>(acc[i % RT], halves[half].a[i / RT][i % RT], rows_after(inputs, 24576), more);
            }
        }
        products_commit();
        products_wait<1>();
        halves[1 - half].hold();
    }
}

// Biases in BF16 of a lane's outputs of a row tile: of row `lane / 4` and of that 8 below.
struct Bias {
    u32 above, below;

    __device__ __forceinline__ void load(const u16* bias, int tile, int N, int lane) {
        const int n = tile * 16 + lane / 4;
        above = bias != nullptr && n < N ? bias[n] : 0;
        below = bias != nullptr && n + 8 < N ? bias[n + 8] : 0;
    }
};

// 1 / rms of all rows of x from the sums of squares of their parts, four lanes a row, to shared memory at `to`.
__device__ __forceinline__ void norms(const Squares& squares, u32 to, int M, int lane) {
    float sums[MT], parts[MT][2];
#pragma unroll
    for (int i = 0; i < MT; ++i) sums[i] = 0.0f;
#pragma unroll 1
    for (int first = lane % 4; first < squares.parts; first += 8) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            const float* row = squares.of + static_cast<long long>(min(i * 8 + lane / 4, M - 1)) * squares.parts;
            parts[i][0] = __uint_as_float(read_fresh(row + first));
            parts[i][1] = first + 4 < squares.parts ? __uint_as_float(read_fresh(row + first + 4)) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) sums[i] += parts[i][0] + parts[i][1];
    }
#pragma unroll
    for (int i = 0; i < MT; ++i) {
        sums[i] += __uint_as_float(from_lane(bits_of(sums[i]), lane ^ 1));
        sums[i] += __uint_as_float(from_lane(bits_of(sums[i]), lane ^ 2));
        if (lane % 4 == 0)
            store4(to + (i * 8 + lane / 4) * 4, inverse_root(fmaf(sums[i], squares.width, squares.eps)));
    }
}

// acc / rms + W shift, where `rows` holds 1 / rms and acc[][MT] column 0 the products with the shift.
__device__ __forceinline__ void normalise(float (&acc)[RT][XT][4], u32 rows, int lane) {
#pragma unroll
    for (int r = 0; r < RT; ++r) {
        // In registers of their own: else ptxas makes BF16's products wait for each other (its note C7511).
        float shift[2] = {acc[r][MT * NORM][0], acc[r][MT * NORM][2]};
        keep(shift[0]);
        keep(shift[1]);
        const float above = __uint_as_float(from_lane(bits_of(shift[0]), lane & ~3));
        const float below = __uint_as_float(from_lane(bits_of(shift[1]), lane & ~3));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const float first = __uint_as_float(load4(rows + (m * 8 + lane % 4 * 2) * 4));
            const float second = __uint_as_float(load4(rows + (m * 8 + lane % 4 * 2 + 1) * 4));
            acc[r][m][0] = fmaf(acc[r][m][0], first, above);
            acc[r][m][1] = fmaf(acc[r][m][1], second, above);
            acc[r][m][2] = fmaf(acc[r][m][2], first, below);
            acc[r][m][3] = fmaf(acc[r][m][3], second, below);
        }
    }
}
