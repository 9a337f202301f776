// y = x W^T for a few rows x and several stored weights at once, on tensor cores. Reference 4; the launcher and the
// contract are in linear_cuda.py.
//
// A block has 16 rows of one weight; its warps share out the columns. Each warp loads all of its weights into registers,
// then waits for the kernel before it, then reads x. A row of x is a column of the products, which does not know its
// neighbours: its sum has one order (groups of 128 columns, then warps) whatever else is in the batch.
//
// Which column stands where inside a product does not matter as long as W and x agree on it. So a thread takes 16 bytes
// of W that are neighbours in memory, and the same columns of x, instead of the order of the instruction's tables.
//
// K       columns; a multiple of 128 * WARPS
// NT      rows of x at once, in eights
// ROOM    pieces of 64 bytes of two rows of W that a thread's registers hold at once, an even number
// FIT     blocks that are to fit into a multiprocessor
// FORM    what is rounded to e4m3, here or in `rounded`: see the constants
// EARLY   1: x was complete before the kernel before this one let it begin; both may run side by side
// KINDS   of the parts, a bit for each that occurs
// ONE     1: x has one row

#include "common.cuh"

struct Part {
    const u8* w;      // e4m3 or BF16 [rows, K]
    const u8* scale;  // E8M0 [rows / 128, K / 128]
    void* out;        // [T, rows], float32 if `wide`, else BF16
    int rows, kind, wide, first;  // first: the part's first block
};
struct Parts { Part of[PARTS]; };

// e4m3 times quantised x; e4m3 times BF16; BF16 times BF16; e4m3 times FP16 with a scale for 64 columns
enum { QUANTISED, EIGHT, SIXTEEN, HALVES };
enum { PLAIN, NORMALISED, GATED };   // x; its RMS norm; SwiGLU of x = [gate, up], which `few` rounds itself

__device__ constexpr bool has(int kind) { return KINDS >> kind & 1; }

constexpr int THREADS = WARPS * 32, OWN = K / WARPS, GROUPS = OWN / 128, TOKENS = NT * 8;
// Scales of x: one for so many pieces of 64 columns. Those of a warp are loaded at once where few rows make that cheap.
__device__ constexpr int span(int kind) { return kind == HALVES ? 1 : 2; }
__device__ constexpr bool scaled(int kind) { return kind == QUANTISED || kind == HALVES; }

template <int COUNT> struct alignas(COUNT % 4 ? COUNT % 2 ? 4 : 8 : 16) Scales { float of[COUNT]; };

__device__ __forceinline__ uint4 fetch(const u8* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ float exponent(u8 byte) { return __uint_as_float((u32)byte << 23); }

__device__ __forceinline__ u16 to_bf16(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float as_bf16(float v) { return __uint_as_float((u32)to_bf16(v) << 16); }

// Two e4m3 in the low half of a word as a pair of FP16, exactly.
__device__ __forceinline__ u32 half2_of(u32 pair) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)pair));
    return r;
}

// The same as a pair of BF16: magnitudes moved to where BF16 has them, times the difference of the biases.
__device__ __forceinline__ u32 bf2_of(u32 pair) {
    u32 spread = __byte_perm(pair, 0, 0x1404), r;
    u32 moved = (spread & 0x80008000u) | ((spread >> 4) & 0x07f007f0u);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(moved), "r"(0x7b807b80u), "r"(0x80008000u));
    return r;
}

template <bool HALF>
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Weights of a lane: of two rows, 16 bytes of every 64 that its warp has. What is used makes room for what follows.
struct Weights {
    uint4 top[ROOM], low[ROOM];
    const u8* from;
    long long far;

    __device__ __forceinline__ void load(int p) {
        top[p % ROOM] = fetch(from + p * 64), low[p % ROOM] = fetch(from + far + p * 64);
    }
    template <int PIECES>
    __device__ __forceinline__ void take(int p, uint4& a, uint4& b) {
        a = top[p % ROOM], b = low[p % ROOM];
        if (p + ROOM < PIECES) load(p + ROOM);
    }
};

// The row of x that a lane has as a column of the n-th products. A row that is alone stands in all of them.
__device__ __forceinline__ int row_of(int n) { return ONE ? 0 : n * 8 + threadIdx.x % 32 / 4; }

// A warp's columns of a row that is alone, in one round of loads: those of lanes that multiply take one after another.
__device__ __forceinline__ const u8* staged(uint4* to, const u8* from, int bytes) {
    for (int i = threadIdx.x % 32; i < bytes / 16; i += 32) to[i] = ((const uint4*)from)[i];
    __syncwarp();
    return (const u8*)to;
}

// A warp's part of 16 rows of e4m3 times the columns of x: 64 of them are a piece, which is 4 products. x has e4m3 values or
// 16 bits, `pitch` bytes a row, and `many` scales a row.
template <int KIND>
__device__ __forceinline__ void eight(
    float (&sum)[NT][4], Weights& w, const float (&ws)[GROUPS], const u8* x, int pitch, const float* xs, int many, int rows
) {
    constexpr bool BYTES = KIND == QUANTISED, HALF = KIND != EIGHT;
    constexpr int SPAN = span(KIND), COUNT = OWN / 64 / SPAN;
    constexpr bool AHEAD = scaled(KIND) && NT == 1 && FORM == PLAIN && COUNT <= 8;
    const int j = threadIdx.x % 4;
    Scales<COUNT> of[2] = {};
    if (AHEAD)
#pragma unroll
        for (int i = 0; i < 2 - ONE; i++)
            if (2 * j + i < rows) of[i] = *(const Scales<COUNT>*)(xs + (2 * j + i) * many);
#pragma unroll
    for (int group = 0; group < COUNT; group++) {
        float part[NT][4] = {};
        // Zero, as scales are positive; the compiler does not know, and loads them beside x instead of after it.
        if (AHEAD)
#pragma unroll
            for (int i = 0; i < 4; i += 1 + ONE) part[0][i] = fminf(of[i % 2].of[group], 0.0f);
#pragma unroll
        for (int p = SPAN * group; p < SPAN * group + SPAN; p++) {
            uint4 a, b, v[NT][2];
            w.take<OWN / 64>(p, a, b);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                v[n][0] = v[n][1] = make_uint4(0, 0, 0, 0);
                if (row_of(n) >= rows) continue;
                const uint4* from = (const uint4*)(x + (long long)row_of(n) * pitch + (p * 64 + j * 16) * (BYTES ? 1 : 2));
                v[n][0] = from[0];
                if (!BYTES) v[n][1] = from[1];
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const u32 wa = word(a, m), wb = word(b, m);
                u32 a0, a1, a2, a3;
                if (HALF) a0 = half2_of(wa), a1 = half2_of(wb), a2 = half2_of(wa >> 16), a3 = half2_of(wb >> 16);
                else a0 = bf2_of(wa), a1 = bf2_of(wb), a2 = bf2_of(wa >> 16), a3 = bf2_of(wb >> 16);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const u32 codes = word(v[n][0], m);
                    if (BYTES) mma<true>(part[n], a0, a1, a2, a3, half2_of(codes), half2_of(codes >> 16));
                    else mma<HALF>(
                        part[n], a0, a1, a2, a3, word(v[n][m / 2], m % 2 * 2), word(v[n][m / 2], m % 2 * 2 + 1));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 1 + ONE) {
                const int t = n * 8 + j * 2 + i % 2;
                float factor = ws[group * SPAN / 2];
                if (scaled(KIND)) factor *= AHEAD ? of[i % 2].of[group] : t < rows ? xs[t * many + group] : 0.0f;
                sum[n][i] += part[n][i] * factor;
            }
    }
}

// The same for BF16 weights: 16 bytes are 8 columns, a piece is 32.
__device__ __forceinline__ void sixteen(float (&sum)[NT][4], Weights& w, const u8* x, int pitch, int rows) {
    const int j = threadIdx.x % 4;
#pragma unroll
    for (int p = 0; p < OWN / 32; p++) {
        uint4 a, b;
        w.take<OWN / 32>(p, a, b);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (row_of(n) < rows) v = *(const uint4*)(x + (long long)row_of(n) * pitch + p * 64 + j * 16);
            mma<false>(sum[n], a.x, b.x, a.y, b.y, v.x, v.y);
            mma<false>(sum[n], a.z, b.z, a.w, b.w, v.z, v.w);
        }
    }
}

// 16 columns as float32.
__device__ __forceinline__ void load16(float (&v)[16], const u16* x) {
    const uint4 a = *(const uint4*)x, b = *(const uint4*)(x + 8);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 pair = i < 4 ? word(a, i) : word(b, i - 4);
        v[2 * i] = low(pair), v[2 * i + 1] = high(pair);
    }
}

// SwiGLU of 16 columns of x = [gate, up], BF16 values as float32.
__device__ __forceinline__ void gated(float (&v)[16], const u16* x, float limit) {
    float up[16];
    load16(v, x), load16(up, x + K);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float a = fminf(v[i], limit);
        v[i] = as_bf16(__fdividef(a, 1.0f + __expf(-a)) * fminf(fmaxf(up[i], -limit), limit));
    }
}

// 16 columns a lane as e4m3; eight lanes share a scale.
__device__ __forceinline__ float codes_of(uint4& codes, const float (&v)[16]) {
    float most = 1e-4f;
#pragma unroll
    for (int i = 0; i < 16; i++) most = fmaxf(most, fabsf(v[i]));
    for (int d = 4; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    const u32 bits = (__float_as_uint(__fdiv_rn(most, 448.0f)) + 0x7fffff) & 0x7f800000;
    const float shrink = __uint_as_float(0x7f000000 - bits);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u16 a, b;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(a) : "f"(v[4 * i + 1] * shrink), "f"(v[4 * i] * shrink));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(b) : "f"(v[4 * i + 3] * shrink), "f"(v[4 * i + 2] * shrink));
        words[i] = a | (u32)b << 16;
    }
    codes = make_uint4(words[0], words[1], words[2], words[3]);
    return __uint_as_float(bits);
}

// All columns of x for a block, GATED, rounded into its own memory: codes [T, pitch], scales [T, K / 128].
__device__ __forceinline__ void gate(u8* to, int pitch, float* scales, const u16* x, int stride, float limit, int rows) {
    for (int first = 0; first < rows * (K / 16); first += THREADS) {
        const int i = first + threadIdx.x, t = i / (K / 16), c = i % (K / 16) * 16;
        float v[16] = {};
        uint4 codes;
        if (t < rows) gated(v, x + (long long)t * stride + c, limit);
        const float scale = codes_of(codes, v);
        if (t >= rows) continue;
        *(uint4*)(to + t * pitch + c) = codes;
        if (c % 128 == 0) scales[t * (K / 128) + c / 128] = scale;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, FIT) few(
    const __grid_constant__ Parts parts, const u16* x, const u8* quantised, const float* scales, float number, int total,
    int stride, int per_group
) {
    extern __shared__ __align__(16) u8 own[];
    __shared__ float sums[WARPS][16][TOKENS + 1];
    begin_next();
    int of = 0;
#pragma unroll
    for (int i = 1; i < PARTS; i++) of += blockIdx.x >= parts.of[i].first;
    const Part& part = parts.of[of];
    const int row = (blockIdx.x - part.first) * 16, warp = threadIdx.x / 32, kind = part.kind;
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4, begin = warp * OWN;
    const int size = has(SIXTEEN) && kind == SIXTEEN ? 2 : 1;
    Weights w;
    w.far = 8LL * K * size, w.from = part.w + (long long)(row + g) * K * size + begin * size + j * 16;
#pragma unroll
    for (int p = 0; p < ROOM; p++)
        if (p < OWN * size / 64) w.load(p);
    float ws[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        ws[i] = kind == SIXTEEN ? 1.0f : exponent(part.scale[row / 128 * (K / 128) + begin / 128 + i]);
    if (!EARLY) wait();
    const int t0 = blockIdx.y * TOKENS, rows = ONE ? 1 : min(total - t0, TOKENS), column = row / per_group * K + begin;
    const u16* from = x + (long long)t0 * stride;
    // Of a warp's columns x as bytes, a row's bytes, its scales and a row's number of them.
    const bool bytes = has(QUANTISED) && kind == QUANTISED;
    const int many = kind == HALVES ? stride / 64 : K / 128;
    const u8* own_x = bytes ? quantised + (long long)t0 * K + begin : (const u8*)(from + column);
    const float* xs = scales + t0 * many + (kind == HALVES ? column / 64 : begin / 128);
    int pitch = bytes ? K : stride * 2;
    if (FORM == GATED) {
        pitch = K + 64, own_x = own + begin, xs = (const float*)(own + TOKENS * pitch) + begin / 128;
        gate(own, pitch, (float*)(own + TOKENS * pitch), from, stride, number, rows);
    } else if (ONE) {
        __shared__ uint4 columns[WARPS][OWN / 8];
        own_x = staged(columns[warp], own_x, OWN * (bytes ? 1 : 2));
    }
    float sum[NT][4] = {};
    if (has(QUANTISED) && kind == QUANTISED) eight<QUANTISED>(sum, w, ws, own_x, pitch, xs, many, rows);
    if (has(EIGHT) && kind == EIGHT) eight<EIGHT>(sum, w, ws, own_x, pitch, xs, many, rows);
    if (has(HALVES) && kind == HALVES) eight<HALVES>(sum, w, ws, own_x, pitch, xs, many, rows);
    if (has(SIXTEEN) && kind == SIXTEEN) sixteen(sum, w, own_x, pitch, rows);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[warp][g + i / 2 * 8][n * 8 + j * 2 + i % 2] = sum[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * rows; i += THREADS) {
        const int t = i / 16, r = i % 16;
        float all = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) all += sums[k][r][t];
        const long long place = (long long)(t0 + t) * part.rows + row + r;
        if (part.wide) ((float*)part.out)[place] = all;
        else ((u16*)part.out)[place] = to_bf16(all);
    }
    if (EARLY) wait();
}

// 1 / RMS of a row of x, by a warp.
__device__ __forceinline__ float inverse_rms(const u16* row, float eps) {
    float sum = 0;
#pragma unroll 4
    for (int p = 0; p < (K + 511) / 512; p++) {
        float v[16] = {};
        if (K % 512 == 0 || p * 512 + threadIdx.x * 16 < K) load16(v, row + p * 512 + threadIdx.x * 16);
#pragma unroll
        for (int i = 0; i < 16; i++) sum += v[i] * v[i];
    }
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    return __fdiv_rn(1.0f, __fsqrt_rn(sum / K + eps));
}

// x, or its RMS norm, as e4m3 [T, K] with scales [T, K / 128]. A warp has 512 columns of a row, and all for the norm.
extern "C" __global__ void __launch_bounds__(32) rounded(
    const u16* x, const u16* norm, u8* codes, float* scales, float eps
) {
    begin_next();
    const u16* row = x + (long long)blockIdx.y * K;
    const int c = blockIdx.x * 512 + threadIdx.x * 16;
    const bool inside = K % 512 == 0 || c < K;
    float v[16] = {}, w[16] = {};
    if (FORM == NORMALISED && inside) load16(w, norm + c);
    wait();
    if (inside) load16(v, row + c);
    if (FORM == NORMALISED) {
        const float inverse = inverse_rms(row, eps);
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = as_bf16(v[i] * inverse * w[i]);
    }
    uint4 own;
    const float scale = codes_of(own, v);
    if (!inside) return;
    *(uint4*)(codes + (long long)blockIdx.y * K + c) = own;
    if (c % 128 == 0) scales[blockIdx.y * (K / 128) + c / 128] = scale;
}
