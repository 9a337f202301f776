// From the logits of a step's tokens to their experts. Reference 2.10; the launcher and the contract: router_cuda.py.
//
// A block has a token, a thread one of its scores; the first warp chooses: the best of all is one reduction, its id another.
//
// E        experts, at most 1024; TOP those of a token
// BY_HASH  1: the experts stand in a table
// WIDE     1: token ids have 64 bits

#include "common.cuh"

constexpr int EACH = (E + 31) / 32, THREADS = EACH * 32;

// Patterns in the order of the scores; 0 is below all.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(THREADS) route(
    const float* logits, const float* bias, const long long* table, const void* tokens, int* chosen, float* shares,
    float factor
) {
    __shared__ float scores[THREADS];
    __shared__ u32 orders[THREADS];
    const int t = blockIdx.x, own_id = threadIdx.x, lane = own_id % 32;
    begin_next();
    const float move = !BY_HASH && own_id < E ? bias[own_id] : 0.0f;
    wait();
    const float x = own_id < E ? logits[(long long)t * E + own_id] : 0.0f;
    const float score = __fsqrt_rn(log1pf(expf(-fabsf(x))) + fmaxf(x, 0.0f));
    scores[own_id] = score;
    orders[own_id] = own_id < E ? ordered(score + move) : 0;
    __syncthreads();
    if (own_id >= 32) return;
    u32 left[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) left[i] = orders[i * 32 + lane];
    int id = 0;
    if (BY_HASH) {
        const long long token = WIDE ? ((const long long*)tokens)[t] : ((const int*)tokens)[t];
        if (lane < TOP) id = (int)table[token * TOP + lane];
    } else {
#pragma unroll
        for (int k = 0; k < TOP; k++) {
            u32 most = 0, where = ~0u;
#pragma unroll
            for (int i = 0; i < EACH; i++) most = max(most, left[i]);
            most = __reduce_max_sync(~0u, most);
#pragma unroll
            for (int i = EACH - 1; i >= 0; i--)
                if (left[i] == most) where = i * 32 + lane;
            where = __reduce_min_sync(~0u, where);  // of equal ones the lower id
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (where == i * 32 + lane) left[i] = 0;
            if (lane == k) id = where;
        }
    }
    const float own = lane < TOP ? scores[id] : 0.0f;
    float sum = own;
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane >= TOP) return;
    chosen[t * TOP + lane] = id;
    shares[t * TOP + lane] = own / sum * factor;
}
