// The splits of a decode step's attention summed up. Reference 2.6; the launcher and the contract are in attend_triton.py.
//
// A block has a head of a token, a thread four of its columns: all splits are on their way before the first is used. They
// are summed in their order, and which there are depends on the token's position alone.
//
// C       head dim; ROPE: its last columns, which are turned back
// SPAN    rows of the window, in splits of B; RATIO tokens an entry (0: none)
// CHOSEN  1: entries in splits of B; 0: in at most SPLITS of a multiple of B
// MOST    splits that there can be, at most 64

typedef unsigned short u16;
typedef unsigned int u32;

constexpr int WINDOWS = (SPAN + B - 1) / B, TOGETHER = MOST <= 24 ? MOST : (MOST + 1) / 2 <= 24 ? (MOST + 1) / 2 : 16;

__device__ __forceinline__ float rounded(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return __uint_as_float((u32)r << 16);
}

__device__ __forceinline__ u32 pair_of(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}

// parts float32 [T, MOST, H, C], sums [T, MOST, H, 2]: the largest logit of a split and the sum under it; out BF16 [T, H, C].
extern "C" __global__ void __launch_bounds__(C / 4) combine(
    const float* parts, const float* sums, const float* sink, const float* turn, const int* slots, const int* positions,
    u16* out, int heads, int number
) {
    __shared__ float shares[64];
    const int h = blockIdx.x, t = blockIdx.y, lane = threadIdx.x % 32, column = threadIdx.x * 4;
    const float bar = sink[h];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int position = positions[t], slot = slots[t];
    const float2* const own = (const float2*)sums + (long long)t * MOST * heads + h;
    const float* const part = parts + ((long long)t * MOST * heads + h) * C + column;
    int begin = 0, end = 0;
    if (slot >= 0) {
        const int seen = RATIO ? min((position + 1) / (RATIO ? RATIO : 1), number) : 0;
        const int rows = CHOSEN ? B : max((seen + B * SPLITS - 1) / (B * SPLITS), 1) * B;
        begin = max(0, (SPAN - 1 - position) / B);
        end = WINDOWS + (seen + rows - 1) / rows;
    }
    float2 sum[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int s = lane + 32 * i;
        sum[i] = s >= begin && s < end ? own[(long long)s * heads] : make_float2(-1e38f, 0.0f);
    }
    float top = fmaxf(bar, fmaxf(sum[0].x, sum[1].x));
    for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float total = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float share = __expf(sum[i].x - top);
        if (threadIdx.x < 32) shares[lane + 32 * i] = share;
        total += sum[i].y * share;
    }
    for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
    const float factor = __fdividef(1.0f, total + __expf(bar - top));
    float y[4] = {};
    for (int s = begin; s < end; s += TOGETHER) {
        float4 v[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) v[i] = *(const float4*)(part + (long long)min(s + i, end - 1) * heads * C);
        __syncthreads();  // for the shares; and all loads stand before it, where the compiler would have two at a time
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const float share = s + i < end ? shares[s + i] : 0.0f;
            y[0] += v[i].x * share, y[1] += v[i].y * share, y[2] += v[i].z * share, y[3] += v[i].w * share;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] *= factor;
    if (column >= C - ROPE) {
        const float4 by = *(const float4*)(turn + (long long)t * ROPE + column - (C - ROPE));
        const float a = rounded(y[0]), b = rounded(y[1]), c = rounded(y[2]), d = rounded(y[3]);
        y[0] = a * by.x + b * by.y, y[1] = b * by.x - a * by.y;
        y[2] = c * by.z + d * by.w, y[3] = d * by.z - c * by.w;
    }
    *(uint2*)(out + ((long long)t * heads + h) * C + column) = make_uint2(pair_of(y[0], y[1]), pair_of(y[2], y[3]));
}
