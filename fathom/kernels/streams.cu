// Hyper-connections for the tokens of a step: four BF16 streams. Reference 2.3; launcher and contract: streams_cuda.py.
//
// `turn` mixes a sublayer's output into the streams and projects them for the next mixing weights, slice by slice;
// `finish` sums the slices up, folds the streams into the next sublayer's input, normalises and rounds it, while a second
// block does the Sinkhorn rounds, which only the next `turn` needs. Every sum has one order.
//
// D       hidden size, a multiple of 128
// ROWS    mixing weights of a token: 24 before a sublayer, 4 before the head
// ROUNDS  of Sinkhorn; 0 before the head
// TOKENS  of a block of `turn`
// RANKS   whose parts of y `turn` sums up

#include "common.cuh"

constexpr int N = 4, SLICE = 64, SLICES = D / SLICE, COLUMNS = 32, WARPS = 4;
constexpr int THREADS = (D / 8 + 31) / 32 * 32;

__device__ __forceinline__ float across(float v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

// a b + c d in one order, wherever the compiler meets it: a token has the same bits whatever TOKENS is.
__device__ __forceinline__ float both(float a, float b, float c, float d) { return __fmaf_rn(a, b, __fmul_rn(c, d)); }

// How a token is mixed: the share of y that each stream takes, and of each stream (rows) that each takes.
struct Shares {
    float4 post, comb[N];

    __device__ __forceinline__ void load(const float* from_post, const float* from_comb, long long t) {
        post = *(const float4*)(from_post + t * N);
#pragma unroll
        for (int i = 0; i < N; i++) comb[i] = *(const float4*)(from_comb + (t * N + i) * N);
    }
};

__device__ __forceinline__ float of(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two columns of the streams, each with its part of y.
__device__ __forceinline__ void mix(u32 (&streams)[N], u32 add, const Shares& shares) {
    u32 mixed[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        const float post = of(shares.post, j), first = of(shares.comb[0], j);
        float a = both(post, low(add), first, low(streams[0])), b = both(post, high(add), first, high(streams[0]));
#pragma unroll
        for (int i = 1; i < N; i++) {
            const float part = of(shares.comb[i], j);
            a = __fmaf_rn(part, low(streams[i]), a), b = __fmaf_rn(part, high(streams[i]), b);
        }
        mixed[j] = pair_of(a, b);
    }
#pragma unroll
    for (int j = 0; j < N; j++) streams[j] = mixed[j];
}

// A warp's sums of a token over a slice: its rows of fn times the streams; the last warp's also their squares.
template <int EACH>
__device__ __forceinline__ void project(float* to, const float2 (&f)[EACH][N], const u32 (&streams)[N], int warp, int lane) {
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) sum += both(f[r][i].x, low(streams[i]), f[r][i].y, high(streams[i]));
        sum = across(sum);
        if (lane == 0) to[warp * EACH + r] = sum;
    }
    if (warp != WARPS - 1) return;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < N; i++) squares += both(low(streams[i]), low(streams[i]), high(streams[i]), high(streams[i]));
    squares = across(squares);
    if (lane == 0) to[ROWS] = squares;
}

// y over all ranks: a warp leaves this rank's for the others, each takes theirs.
__device__ __forceinline__ void meet(u32 (&add)[TOKENS], const Mailbox& box, int block, int count, int warp, int lane) {
    const u32 number = box.numbers[block] + 1;
    int places[TOKENS];
    u32 numbers[TOKENS];
#pragma unroll
    for (int k = 0; k < TOKENS; k++) {
        places[k] = place_of(box, block, number, k * 32 + lane), numbers[k] = number;
        if (k < count && warp == 0) leave(box, places[k], number, add[k]);
    }
    __syncthreads();
    if (threadIdx.x == 0) box.numbers[block] = number;
    sum_up(add, box, places, numbers, count);
}

// x [T, N, D] of which each stream takes its part of y [T, D], or stays if there is no y; sums float32 [T, SLICES, 32].
extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) turn(
    const u16* y, const u16* x, const float* post, const float* comb, u16* out, const float* fn, float* sums,
    const __grid_constant__ Mailbox box, int total
) {
    constexpr int EACH = ROWS / WARPS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = blockIdx.x, column = slice * SLICE + 2 * lane;
    const long long t0 = blockIdx.y * TOKENS;
    const int count = total - (int)t0;
    begin_next();
    float2 f[EACH][N];
#pragma unroll
    for (int r = 0; r < EACH; r++)
#pragma unroll
        for (int i = 0; i < N; i++) f[r][i] = *(const float2*)(fn + (long long)(warp * EACH + r) * N * D + i * D + column);
    wait();
    u32 streams[TOKENS][N], add[TOKENS];
    Shares shares[TOKENS];
#pragma unroll
    for (int k = 0; k < TOKENS; k++) {
        if (k >= count) break;
#pragma unroll
        for (int i = 0; i < N; i++) streams[k][i] = *(const u32*)(x + ((t0 + k) * N + i) * D + column);
        if (y) add[k] = *(const u32*)(y + (t0 + k) * D + column);
    }
    if (y) shares[0].load(post, comb, t0);
    if (RANKS > 1) meet(add, box, blockIdx.y * SLICES + slice, count, warp, lane);
#pragma unroll
    for (int k = 0; k < TOKENS; k++) {
        if (k >= count) break;
        const long long t = t0 + k;
        if (y && k + 1 < TOKENS && k + 1 < count) shares[k + 1].load(post, comb, t + 1);  // on its way meanwhile
        if (y) mix(streams[k], add[k], shares[k]);
#pragma unroll
        for (int j = 0; j < N; j++)
            if (y && warp == j) *(u32*)(out + (t * N + j) * D + column) = streams[k][j];
        project(sums + (t * SLICES + slice) * COLUMNS, f, streams[k], warp, lane);
    }
}

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }

__device__ __forceinline__ float inverse(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// The rounds over logits [N, N], in place. One thread, whose time is that of the chain from one sum to the next: the
// matrix stays, its rows and columns get factors, the reciprocals of the hardware are good to a last bit, which the next
// round mends.
__device__ void sinkhorn(float (&c)[N][N], float eps) {
    float rows[N], columns[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float most = fmaxf(fmaxf(c[i][0], c[i][1]), fmaxf(c[i][2], c[i][3]));
        float sum = 0;
#pragma unroll
        for (int j = 0; j < N; j++) c[i][j] = __expf(c[i][j] - most), sum += c[i][j];
        const float share = inverse(sum);
#pragma unroll
        for (int j = 0; j < N; j++) c[i][j] = c[i][j] * share + eps;
        rows[i] = columns[i] = 1.0f;
    }
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
        if (round)
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float sum = (c[i][0] * columns[0] + c[i][1] * columns[1]) + (c[i][2] * columns[2] + c[i][3] * columns[3]);
                rows[i] *= inverse(rows[i] * sum + eps);
            }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float sum = (c[0][j] * rows[0] + c[1][j] * rows[1]) + (c[2][j] * rows[2] + c[3][j] * rows[3]);
            columns[j] *= inverse(columns[j] * sum + eps);
        }
    }
#pragma unroll
    for (int i = 0; i < N * N; i++) c[i / N][i % N] *= rows[i / N] * columns[i % N];
}

// out BF16 [T, D], and the same rounded to e4m3 with a scale per 128; post [T, N], comb [T, N, N].
extern "C" __global__ void __launch_bounds__(THREADS) finish(
    const u16* x, const float* sums, const float* scale, const float* base, const u16* weight, u16* out, u8* rounded,
    float* scales, float* post, float* comb, float eps, float hc_eps
) {
    __shared__ __align__(16) float slices[THREADS / 32][COLUMNS], squares[32], logits[COLUMNS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = threadIdx.x * 8;
    const long long t = blockIdx.y;
    const bool folds = blockIdx.x == 0, inside = column < D;
    begin_next();
    uint4 streams[N], norm = make_uint4(0, 0, 0, 0);
    if (folds && inside) norm = *(const uint4*)(weight + column);
    // A lane has a mixing weight: pre, post, comb; the sum of squares stands behind the last.
    const float own_scale = lane < ROWS ? scale[lane < N ? 0 : lane < 2 * N ? 1 : 2] : 0.0f;
    const float own_base = lane < ROWS ? base[lane] : 0.0f;
    wait();
#pragma unroll
    for (int i = 0; i < N; i++) {
        streams[i] = make_uint4(0, 0, 0, 0);
        if (folds && inside) streams[i] = *(const uint4*)(x + (t * N + i) * D + column);
    }
    float m = 0;
#pragma unroll 4
    for (int s = warp; s < SLICES; s += THREADS / 32) m += lane <= ROWS ? sums[(t * SLICES + s) * COLUMNS + lane] : 0.0f;
    slices[warp][lane] = m;
    __syncthreads();
    m = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) m += slices[w][lane];
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__shfl_sync(~0u, m, ROWS) / (N * D) + eps));
    const float logit = m * factor * own_scale + own_base;
    if (!folds) {
        if (warp) return;
        if (lane >= N && lane < 2 * N) post[t * N + lane - N] = 2.0f * sigmoid(logit);
        logits[lane] = logit;
        __syncwarp();
        if (lane) return;
        float c[N][N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float4 row = *(const float4*)(logits + 2 * N + i * N);
            c[i][0] = row.x, c[i][1] = row.y, c[i][2] = row.z, c[i][3] = row.w;
        }
        sinkhorn(c, hc_eps);
#pragma unroll
        for (int i = 0; i < N; i++) *(float4*)(comb + (t * N + i) * N) = make_float4(c[i][0], c[i][1], c[i][2], c[i][3]);
        return;
    }
    float total[8] = {};
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float pre = sigmoid(__shfl_sync(~0u, logit, i)) + hc_eps;
        const u32 pairs[4] = {streams[i].x, streams[i].y, streams[i].z, streams[i].w};
#pragma unroll
        for (int e = 0; e < 8; e++) total[e] += pre * (e % 2 ? high(pairs[e / 2]) : low(pairs[e / 2]));
    }
    float own = 0;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        const u32 pair = pair_of(total[e], total[e + 1]);
        total[e] = low(pair), total[e + 1] = high(pair);
        own += total[e] * total[e] + total[e + 1] * total[e + 1];
    }
    own = across(own);
    if (lane == 0) squares[warp] = own;
    __syncthreads();
    float all = 0;
    for (int w = 0; w < THREADS / 32; w++) all += squares[w];
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(all / D + eps));
    const u32 weights[4] = {norm.x, norm.y, norm.z, norm.w};
    u32 result[4];
    float most = 0;
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        result[e / 2] = pair_of(total[e] * inverse * low(weights[e / 2]), total[e + 1] * inverse * high(weights[e / 2]));
        total[e] = low(result[e / 2]), total[e + 1] = high(result[e / 2]);
        most = fmaxf(most, fmaxf(fabsf(total[e]), fabsf(total[e + 1])));
    }
    for (int d = 8; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    const u32 bits = (__float_as_uint(__fdiv_rn(fmaxf(most, 1e-4f), 448.0f)) + 0x7fffff) & 0x7f800000;
    const float shrink = __uint_as_float(0x7f000000 - bits);
    u16 codes[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
            : "=h"(codes[e]) : "f"(total[2 * e + 1] * shrink), "f"(total[2 * e] * shrink));
    if (!inside) return;
    *(uint4*)(out + t * D + column) = make_uint4(result[0], result[1], result[2], result[3]);
    *(uint2*)(rounded + t * D + column) = make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
    if (threadIdx.x % 16 == 0) scales[t * (D / 128) + column / 128] = __uint_as_float(bits);
}
