// FP4 experts for the few tokens of a step, on Hopper's FP8 tensor cores. Reference 2.10 and 4; the launcher and the
// contract are in experts_cuda.py.
//
// A block has TILES of 64 rows of one expert and all the pairs (token, expert) that chose it, PAIRS at a time: weights
// are the rows of the products, pairs their columns. A product has eight columns; those that are nobody's are whatever
// stands behind the others, so that pairs take little memory and more blocks fit into a multiprocessor. FP4 becomes e5m2,
// 2^14 times too small (exactly; 5 operations for 8 weights, `words`), activations are e4m3 already (gate and up) or
// become it here (down). A product sums 32 columns, which is one scale of a row; scales are applied to its result, so
// what the tensor cores round is far below float32's use. A pair's result does not know what else is in the batch.
//
// K       columns; a multiple of 128
// TILES   of 64 rows that a block has, one after the other
// STAGES  pieces of 256 columns that a warp has room for: whole lines of the cache, one of them in use
// UP      1: gate and up rows, joined by SwiGLU (BF16 [P, N]); 0: down (float32 [P, N])
// TOP     experts a token
// PAIRS   multiplied at once: 2, 4 or 8
// READY   1: x was complete before the launch that chose the experts began
// ONE     1: there is one token, so every expert has one pair and PAIRS is 1

#include "common.cuh"

constexpr int THREADS = 128, CHUNKS = K / 128, MOST = 512;
constexpr int SLOT = 2048, SCALES = K / 32 + 16;  // bytes of a piece of 16 rows; of a row's scales, apart in all banks

template <int BYTES>
__device__ __forceinline__ void copy(void* to, const void* from) {
    const u32 at = address(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ float exponent(u32 byte) { return __uint_as_float(byte << 23); }

// Weights 0, 2, 4, 6 and 1, 3, 5, 7 of a word as e5m2: its exponent's two low bits and the mantissa's high one, which are
// e2m1's below a higher bias. Also zero and a half are right, as numbers below the normal ones.
__device__ __forceinline__ void unpack(u32 word, u32& even, u32& odd) {
    even = word << 1 & 0x8e8e8e8eu;
    odd = (word >> 2 & 0x0e0e0e0eu) | (word & 0x80808080u);
}

constexpr float TOO_SMALL = 1 << 14;

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 columns) {
    asm volatile(
        "{ .reg .b64 b; mov.b64 b, {%8, %9};\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e4m3 {%0,%1,%2,%3}, {%4,%5,%6,%7}, b, 0, 1, 1; }"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(columns), "n"(PAIRS));
}

// The low word of what describes columns in shared memory: 16 bytes of 8 of them lie one after the other, the next 16 of
// K as far away as PAIRS of them take (the high word has the same distance). All in units of 16 bytes.
__device__ __forceinline__ u32 described(const u8* x) {
    return (address(x) >> 4 & 0x3fff) | PAIRS << 16;
}

// The pairs that chose the expert of pair `own`, in order; none if an earlier one did, whose block does the work.
__device__ int company(const int* chosen, int total, int own, int* list) {
    if (ONE) {
        if (threadIdx.x == 0) list[0] = own;
        __syncthreads();
        return 1;
    }
    __shared__ int counts[MOST / 32];
    const int expert = chosen[own];
    bool before = false;
    for (int i = threadIdx.x; i < own; i += THREADS) before |= chosen[i] == expert;
    if (__syncthreads_or(before)) return 0;
    for (int i = threadIdx.x; i < MOST; i += THREADS) {
        const bool same = i < total && chosen[i] == expert;
        const u32 mask = __ballot_sync(~0u, same);
        if (threadIdx.x % 32 == 0) counts[i / 32] = mask;
    }
    __syncthreads();
    int all = 0;
    for (int i = own / 32; i * 32 < total; i++) {
        const int bit = threadIdx.x;
        if (bit < 32 && (counts[i] >> bit & 1)) list[all + __popc(counts[i] & ((1u << bit) - 1))] = i * 32 + bit;
        all += __popc(counts[i]);
    }
    __syncthreads();
    return all;
}

// The even and the odd ones of eight bytes.
__device__ __forceinline__ u32 even(u32 a, u32 b) { return __byte_perm(a, b, 0x6420); }
__device__ __forceinline__ u32 odd(u32 a, u32 b) { return __byte_perm(a, b, 0x7531); }

// 32 columns of a row that stand in registers into shared memory: the even ones of each eight, then the odd ones.
__device__ __forceinline__ void put(u8* to, const u32 (&w)[8]) {
    *(uint4*)to = make_uint4(w[0], w[2], w[4], w[6]);
    *(uint4*)(to + PAIRS * 16) = make_uint4(w[1], w[3], w[5], w[7]);
}

// e4m3 rows of x into shared memory.
__device__ __forceinline__ void given(u8* to, float* factors, const u8* x, const float* scales, const int* list, int count) {
    for (int i = threadIdx.x; i < count * (K / 32); i += THREADS) {
        const int n = i / (K / 32), group = i % (K / 32);
        const long long row = ONE ? 0 : list[n] / TOP;
        const uint4* from = (const uint4*)(x + row * K + group * 32);
        const uint4 a = from[0], b = from[1];
        const float scale = scales[row * CHUNKS + group / 4];
        const u32 w[8] = {even(a.x, a.y), odd(a.x, a.y), even(a.z, a.w), odd(a.z, a.w),
                          even(b.x, b.y), odd(b.x, b.y), even(b.z, b.w), odd(b.z, b.w)};
        put(to + group * PAIRS * 32 + n * 16, w);
        if (group % 4 == 0) factors[group / 4 * PAIRS + n] = scale;
    }
}

// 32 columns of a BF16 row.
__device__ __forceinline__ void read(u32 (&v)[16], const u16* x) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const uint4 part = ((const uint4*)x)[q];
        v[4 * q] = part.x, v[4 * q + 1] = part.y, v[4 * q + 2] = part.z, v[4 * q + 3] = part.w;
    }
}

__device__ __forceinline__ u32 e4m3(float a, float b, float shrink) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(b * shrink), "f"(a * shrink));
    return r;
}

// They in e4m3, in shared memory if they are somebody's: four lanes share a scale.
__device__ __forceinline__ void round_off(u8* to, float* factors, const u32 (&v)[16], int n, int group, bool inside) {
    float most = 1e-4f;
#pragma unroll
    for (int e = 0; e < 16; e++) most = fmaxf(most, fmaxf(fabsf(low(v[e])), fabsf(high(v[e]))));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const u32 bits = (__float_as_uint(__fdiv_rn(most, 448.0f)) + 0x7fffff) & 0x7f800000;
    const float shrink = __uint_as_float(0x7f000000 - bits);
    u32 w[8];
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const u32* const eight = v + 2 * e;
        w[e] = e4m3(low(eight[0]), low(eight[1]), shrink) | e4m3(low(eight[2]), low(eight[3]), shrink) << 16;
        w[e + 1] = e4m3(high(eight[0]), high(eight[1]), shrink) | e4m3(high(eight[2]), high(eight[3]), shrink) << 16;
    }
    if (!inside) return;
    put(to + group * PAIRS * 32 + n * 16, w);
    if (group % 4 == 0) factors[group / 4 * PAIRS + n] = __uint_as_float(bits);
}

// The same of BF16 rows, rounded here.
__device__ __forceinline__ void rounded(u8* to, float* factors, const u16* x, const int* list, int count) {
    for (int first = 0; first < count * (K / 32); first += THREADS) {
        const int i = first + threadIdx.x, n = i / (K / 32), group = i % (K / 32);
        u32 v[16] = {};
        if (n < count) read(v, x + (long long)list[n] * K + group * 32);
        round_off(to, factors, v, n, group, n < count);
    }
}

__device__ __forceinline__ void placed() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

__device__ void place(u8* to, float* factors, const u8* x, const float* scales, const int* list, int count) {
    if (UP) given(to, factors, x, scales, list, count);
    else rounded(to, factors, (const u16*)x, list, count);
    placed();
}

// The two rows that a lane multiplies of a warp's 16, half of a piece: for each of four scales one word a row.
__device__ __forceinline__ void unpacked(u32 (&a)[4][4], const u8* from, const int (&at)[4]) {
#pragma unroll
    for (int m = 0; m < 4; m++) {
        unpack(*(const u32*)(from + at[m]), a[m][0], a[m][2]);
        unpack(*(const u32*)(from + at[m] + SLOT / 2), a[m][1], a[m][3]);
    }
}

// The scales of 64 rows.
__device__ __forceinline__ void copy_scales(u8* to, const u8* exponents, long long first, int far) {
    constexpr int BYTES = K % 512 ? 4 : 16, COUNT = K / 32 / BYTES;
    for (int i = threadIdx.x; i < 64 * COUNT; i += THREADS) {
        const int r = i / COUNT, at = i % COUNT * BYTES;
        const long long row = first + (UP ? r / 16 * 8 : r / 16 * 16) + r / 8 % 2 * far + r % 8;
        copy<BYTES>(to + r * SCALES + at, exponents + row * (K / 32) + at);
    }
}

// What a lane has of the result: rows `at` (gate), and their up rows or 8 further, of two pairs.
__device__ __forceinline__ void write(
    const float (&sum)[4], const int* list, int now, const float (&share)[2], void* out, int rows, int at, float limit
) {
#pragma unroll
    for (int i = 0; i < 2 - ONE; i++) {
        const int n = 2 * (threadIdx.x % 4) + i;
        if (n >= now) continue;
        const long long pair = list[n];
        if (UP) {
            const float a = fminf(sum[i] * TOO_SMALL, limit);
            const float b = fminf(fmaxf(sum[2 + i] * TOO_SMALL, -limit), limit);
            const float y = __fdividef(a, 1.0f + __expf(-a)) * b * share[i];
            u16 bits;
            asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(y));
            ((u16*)out)[pair * rows + at] = bits;
        } else {
            float* to = (float*)out + pair * rows + at;
            to[0] = sum[i] * TOO_SMALL, to[8] = sum[2 + i] * TOO_SMALL;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) experts(
    const u8* weights, const u8* exponents, const u8* x, const float* scales, const int* chosen, const float* shares,
    void* out, int total, int rows, float limit
) {
    extern __shared__ __align__(128) u8 memory[];
    u8* const xs = memory;                                               // [K / 16, PAIRS, 16], read with what follows
    u8* const powers = xs + PAIRS * K;                                   // [TILES, 64, SCALES]
    u8* const ring = powers + TILES * 64 * SCALES;                       // [4 warps, STAGES, 16, 128]
    __shared__ __align__(8) float factors[PAIRS * CHUNKS + 8];
    __shared__ int list[MOST];
    if (UP && ONE && READY) place(xs, factors, x, scales, list, 1);
    // Down begins at the earliest when gate and up have begun, so what they waited for, `chosen` too, is complete.
    if (UP) wait();
    // In this order: what runs beside gate and up (EARLY in linear.cu) reads what was complete when they began.
    begin_next();
    const int own = blockIdx.y, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int g = lane / 4, j = lane % 4;
    // A warp has 16 rows: gate rows stand beside their up rows, half of the matrix further.
    constexpr int ROWS = UP ? 32 : 64;  // of the result, that a tile makes
    const int expert = chosen[own];
    const long long top = (long long)expert * (UP ? 2 * rows : rows) + blockIdx.x * TILES * ROWS;
    // By a shuffle the compiler sees that all lanes have the same, and keeps what follows from it once a warp.
    const int count = __shfl_sync(~0u, company(chosen, total, own, list), 0);
    if (!count) return wait();
    const int far = UP ? rows : 8;
    // Eight lanes copy 128 bytes of a row; 16 bytes stand at their number exclusive-or the row's.
    u8* const mine = ring + warp * STAGES * SLOT;
    const int to = lane / 8 * 128 + (lane % 8 ^ lane / 8) * 16;
    int at[2][4];
#pragma unroll
    for (int m = 0; m < 4; m++) at[0][m] = g * 128 + (m ^ g) * 16 + j * 4, at[1][m] = g * 128 + (m + 4 ^ g) * 16 + j * 4;
    const u32 columns = described(xs);
    for (int i = 0; i < TILES; i++) copy_scales(powers + i * 64 * SCALES, exponents, top + i * ROWS, far);
    for (int first = 0; first < count; first += PAIRS) {
        const int now = min(PAIRS, count - first);
        const u8* near = weights + (top + warp * (UP ? 8 : 16) + lane / 8) * (K / 2) + lane % 8 * 16;
        int ahead = 0, tile = 0;  // the chunk that is loaded next
        const auto load = [&](u8* slot) {
            if (tile < TILES && (CHUNKS % 2 == 0 || ahead + lane % 8 / 4 < CHUNKS)) {
                const u8* away = near + (long long)far * (K / 2);
                copy<16>(slot + to, near), copy<16>(slot + (to ^ 64) + 512, near + 2 * K);
                copy<16>(slot + to + 1024, away), copy<16>(slot + (to ^ 64) + 1536, away + 2 * K);
            }
            near += 128, ahead += 2;
            if (ahead >= CHUNKS) near += ROWS * (K / 2) - ahead * 64, ahead = 0, tile++;
            commit();
        };
        // Of one pair x goes first: behind the weights it would come late.
        constexpr bool FIRST = !UP && ONE && K / 32 <= THREADS;
        const bool inside = threadIdx.x < K / 32;
        u32 row[16] = {};
        if (FIRST) wait();
        if (FIRST && inside) read(row, (const u16*)x + (long long)own * K + threadIdx.x * 32);
#pragma unroll
        for (int c = 0; c < STAGES - 1; c++) load(mine + c * SLOT);
        if (!UP && !FIRST && first == 0) wait();
        if (FIRST) round_off(xs, factors, row, 0, threadIdx.x, inside), placed();
        else if (!(UP && ONE && READY)) place(xs, factors, x, scales, list + first, now);
        float share[2] = {};
#pragma unroll
        for (int i = 0; i < 2 - ONE; i++)
            if (UP && 2 * j + i < now) share[i] = shares[list[first + 2 * j + i]];
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();
        u32 a[2][4][4], b[2][4][4];
        unpacked(a[0], mine, at[0]), unpacked(a[1], mine, at[1]);
        u8 *slot = mine, *free = mine + (STAGES - 1) * SLOT;
        for (int n = 0; n < TILES; n++) {
            float sum[4] = {};
            const u8* const power = powers + (n * 64 + warp * 16 + g) * SCALES;
#pragma unroll 2
            for (int begin = 0; begin < CHUNKS; begin += 2) {
                float d[2][4][4];
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int c = 0; c < 2; c++) {
#pragma unroll
                    for (int m = 0; m < 4; m++)
                        if (CHUNKS % 2 == 0 || begin + c < CHUNKS)
                            multiply(d[c][m], a[c][m], columns + ((begin + c) * 4 + m) * PAIRS * 2);
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                }
                load(free);
                free = slot;
                slot = slot == mine + (STAGES - 1) * SLOT ? mine : slot + SLOT;
                asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
                __syncwarp();
                unpacked(b[0], slot, at[0]), unpacked(b[1], slot, at[1]);
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int chunk = begin + c;
                    if (c == 0) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                    if (CHUNKS % 2 && chunk >= CHUNKS) continue;
#pragma unroll
                    for (int m = 0; m < 4; m++)  // nothing may read the results above the wait
#pragma unroll
                        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[c][m][i])::"memory");
                    const u32 of[2] = {*(const u32*)(power + chunk * 4), *(const u32*)(power + 8 * SCALES + chunk * 4)};
                    const float* const factor = factors + chunk * PAIRS + (ONE ? 0 : 2 * j);
                    const float2 f = ONE ? make_float2(*factor, 0) : *(const float2*)factor;
#pragma unroll
                    for (int i = 0; i < 4; i += 1 + ONE) {
                        float part = 0;
#pragma unroll
                        for (int m = 0; m < 4; m++) part += d[c][m][i] * exponent(of[i / 2] >> 8 * m & 0xff);
                        sum[i] += part * (i % 2 ? f.y : f.x);
                    }
                }
#pragma unroll
                for (int c = 0; c < 2; c++)
#pragma unroll
                    for (int m = 0; m < 4; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) a[c][m][i] = b[c][m][i];
            }
            write(sum, list + first, now, share, out, rows, (blockIdx.x * TILES + n) * ROWS + warp * ROWS / 4 + g, limit);
        }
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
    }
}
