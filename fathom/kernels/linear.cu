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

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct Part {
    const u8* w;      // e4m3 or BF16 [rows, K]
    const u8* scale;  // E8M0 [rows / 128, K / 128]
    void* out;        // [T, rows], float32 if `wide`, else BF16
    int rows, kind, wide, first;  // first: the part's first block
};
struct Parts { Part of[PARTS]; };

enum { QUANTISED, EIGHT, SIXTEEN };  // e4m3 times quantised x; e4m3 times BF16; BF16 times BF16

constexpr int THREADS = WARPS * 32, OWN = K / WARPS, GROUPS = OWN / 128;

__device__ __forceinline__ uint4 fetch(const u8* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ float exponent(u8 byte) { return __uint_as_float((u32)byte << 23); }
__device__ __forceinline__ float bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u16 to_bf16(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

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

// A warp's part of 16 rows of e4m3 times the columns of x: 128 of them are 2 pieces of 64, which are 4 products each.
template <bool QUANTISED_X>
__device__ __forceinline__ void eight(
    float (&sum)[NT][4], const uint4 (&top)[ROOM], const uint4 (&low)[ROOM], const float* ws, int begin, int piece0,
    const u8* xq, const float* xs, const u16* x, int stride, int rows
) {
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < ROOM / 2; group++) {
        if (piece0 / 2 + group >= GROUPS) break;
        const int column = begin + (piece0 / 2 + group) * 128;
        float part[NT][4] = {};
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const uint4 a = top[2 * group + p], b = low[2 * group + p];
            const int at = column + p * 64 + j * 16;
            uint4 v[NT], w[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                v[n] = w[n] = make_uint4(0, 0, 0, 0);
                if (n * 8 + g < rows) {
                    if (QUANTISED_X) v[n] = *(const uint4*)(xq + (n * 8 + g) * K + at);
                    else {
                        const uint4* from = (const uint4*)(x + (long long)(n * 8 + g) * stride + at);
                        v[n] = from[0], w[n] = from[1];
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const u32 wa = word(a, m), wb = word(b, m);
                u32 a0, a1, a2, a3;
                if (QUANTISED_X) a0 = half2_of(wa), a1 = half2_of(wb), a2 = half2_of(wa >> 16), a3 = half2_of(wb >> 16);
                else a0 = bf2_of(wa), a1 = bf2_of(wb), a2 = bf2_of(wa >> 16), a3 = bf2_of(wb >> 16);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    if (QUANTISED_X) mma<true>(part[n], a0, a1, a2, a3, half2_of(word(v[n], m)), half2_of(word(v[n], m) >> 16));
                    else {
                        const uint4 pairs = m < 2 ? v[n] : w[n];
                        mma<false>(part[n], a0, a1, a2, a3, word(pairs, m % 2 * 2), word(pairs, m % 2 * 2 + 1));
                    }
                }
            }
        }
        const float scale = ws[piece0 / 2 + group];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = n * 8 + j * 2 + i % 2;
                float factor = scale;
                if (QUANTISED_X) factor *= t < rows ? xs[t * (K / 128) + column / 128] : 0.0f;
                sum[n][i] += part[n][i] * factor;
            }
    }
}

// The same for BF16 weights: 16 bytes are 8 columns, a piece is 32.
__device__ __forceinline__ void sixteen(
    float (&sum)[NT][4], const uint4 (&top)[ROOM], const uint4 (&low)[ROOM], int begin, int piece0, int pieces,
    const u16* x, int stride, int rows
) {
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int p = 0; p < ROOM; p++) {
        if (piece0 + p >= pieces) break;
        const int at = begin + (piece0 + p) * 32 + j * 8;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (n * 8 + g < rows) v = *(const uint4*)(x + (long long)(n * 8 + g) * stride + at);
            mma<false>(sum[n], top[p].x, low[p].x, top[p].y, low[p].y, v.x, v.y);
            mma<false>(sum[n], top[p].z, low[p].z, top[p].w, low[p].w, v.z, v.w);
        }
    }
}

__device__ __forceinline__ void load(uint4 (&top)[ROOM], uint4 (&low)[ROOM], const u8* w, long long step, int piece, int pieces) {
#pragma unroll
    for (int p = 0; p < ROOM; p++)
        if (piece + p < pieces) top[p] = fetch(w + (piece + p) * 64), low[p] = fetch(w + 8 * step + (piece + p) * 64);
}

extern "C" __global__ void __launch_bounds__(THREADS, FIT) few(
    const __grid_constant__ Parts parts, const u16* x, const u8* quantised, const float* scales, int total, int stride, int per_group
) {
    __shared__ float sums[WARPS][16][NT * 8 + 1];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    int of = 0;
#pragma unroll
    for (int i = 1; i < PARTS; i++) of += blockIdx.x >= parts.of[i].first;
    const Part& part = parts.of[of];
    const int row = (blockIdx.x - part.first) * 16, warp = threadIdx.x / 32;
    const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4, begin = warp * OWN;
    const int size = part.kind == SIXTEEN ? 2 : 1, pieces = OWN * size / 64;
    const long long step = (long long)K * size;
    const u8* w = part.w + (row + g) * step + begin * size + j * 16;
    uint4 top[ROOM], low[ROOM];
    load(top, low, w, step, 0, pieces);
    float ws[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        ws[i] = part.kind == SIXTEEN ? 1.0f : exponent(part.scale[row / 128 * (K / 128) + begin / 128 + i]);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int t0 = blockIdx.y * NT * 8, rows = min(total - t0, NT * 8);
    const u16* from = x + (long long)t0 * stride + (long long)(row / per_group) * K;
    const u8* xq = quantised + (long long)t0 * K;
    const float* xs = scales + t0 * (K / 128);
    float sum[NT][4] = {};
    for (int piece = 0; piece < pieces; piece += ROOM) {
        if (piece) load(top, low, w, step, piece, pieces);
        if (part.kind == QUANTISED) eight<true>(sum, top, low, ws, begin, piece, xq, xs, from, stride, rows);
        else if (part.kind == EIGHT) eight<false>(sum, top, low, ws, begin, piece, xq, xs, from, stride, rows);
        else sixteen(sum, top, low, begin, piece, pieces, from, stride, rows);
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[warp][g + i / 2 * 8][n * 8 + j * 2 + i % 2] = sum[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * rows; i += THREADS) {
        const int t = i / 16, r = i % 16;
        float all = 0;
        for (int k = 0; k < WARPS; k++) all += sums[k][r][t];
        const long long place = (long long)(t0 + t) * part.rows + row + r;
        if (part.wide) ((float*)part.out)[place] = all;
        else ((u16*)part.out)[place] = to_bf16(all);
    }
}
