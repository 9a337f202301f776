// From the logits of a step's tokens to their experts. Reference 2.10; the launcher and the contract: router_cuda.py.
//
// A warp has a token, a lane every 32nd of its experts: the best of all is one reduction, its id another.
//
// E        experts, at most 1024; TOP those of a token
// BY_HASH  1: the experts stand in a table
// WIDE     1: token ids have 64 bits

typedef unsigned int u32;

constexpr int EACH = (E + 31) / 32;

// Patterns in the order of the scores; 0 is below all.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(32) route(
    const float* logits, const float* bias, const long long* table, const void* tokens, int* chosen, float* shares,
    float factor
) {
    __shared__ float scores[EACH * 32];
    const int t = blockIdx.x, lane = threadIdx.x;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    float move[EACH], x[EACH];
    u32 left[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) move[i] = !BY_HASH && i * 32 + lane < E ? bias[i * 32 + lane] : 0.0f;
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = i * 32 + lane < E ? logits[(long long)t * E + i * 32 + lane] : 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const float score = __fsqrt_rn(log1pf(expf(-fabsf(x[i]))) + fmaxf(x[i], 0.0f));
        scores[i * 32 + lane] = score;
        left[i] = i * 32 + lane < E ? ordered(score + move[i]) : 0;
    }
    __syncwarp();
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
