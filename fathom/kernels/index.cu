// The k best of a token's scores, in order. Reference 2.8; the launcher and the contract are in index_cuda.py.
//
// A block holds the scores of a chunk in registers, as patterns in the order of the scores, and looks for the k-th largest
// pattern two bits at a time, until exactly k are not below it; of equal ones the first are taken. Above one chunk, `last`
// chooses among the chunks' best.
//
// EACH   scores a thread; 1024 * EACH in a chunk
// CHUNK  scores that a block of `choose` looks at

typedef unsigned int u32;

constexpr int THREADS = 1024;

// 0 for what is not there. Both zeros are one score.
__device__ __forceinline__ u32 ordered(float score, bool real) {
    const u32 bits = score == 0.0f ? 0 : __float_as_uint(score);
    return !real ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u32 warp_sum(u32 v) { return __reduce_add_sync(~0u, v); }

// Sums of two words over the block; every other call with the other `room`.
__device__ __forceinline__ uint2 block_sum(u32 a, u32 b, uint2 (&room)[32]) {
    const uint2 own = make_uint2(warp_sum(a), warp_sum(b));
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = own;
    __syncthreads();
    const uint2 part = room[threadIdx.x % 32];
    return make_uint2(warp_sum(part.x), warp_sum(part.y));
}

// Marks which k are taken (at least so many are real) in the bits of the result; `place`: of the first of the thread's.
__device__ u32 take(const u32 (&order)[EACH], int k, int& place) {
    __shared__ uint2 room[3][32];
    u32 bar = 0;
    int have = -1, turn = 0;
    for (int shift = 30; shift >= 0 && have != k; shift -= 2, turn ^= 1) {
        const u32 one = bar | 1u << shift, two = bar | 2u << shift, three = bar | 3u << shift;
        u32 few = 0, fewer = 0;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            few += (order[e] >= one) + ((u32)(order[e] >= two) << 16);
            fewer += order[e] >= three;
        }
        const uint2 all = block_sum(few, fewer, room[turn]);
        const int c1 = all.x & 0xffff, c2 = all.x >> 16, c3 = all.y;
        if (c3 >= k) bar = three, have = c3;
        else if (c2 >= k) bar = two, have = c2;
        else if (c1 >= k) bar = one, have = c1;
    }
    // Exactly k: all of them. Else equal ones share the bar, and there is room for some.
    u32 above = 0, level = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        above |= (u32)(order[e] > bar || (have == k && order[e] == bar)) << e;
        level |= (u32)(have != k && order[e] == bar) << e;
    }
    u32 upto = __popc(above) | __popc(level) << 16;
    const u32 own = upto;
    for (int d = 1; d < 32; d *= 2) {
        const u32 before = __shfl_up_sync(~0u, upto, d);
        if (threadIdx.x % 32 >= d) upto += before;
    }
    if (threadIdx.x % 32 == 31) room[2][threadIdx.x / 32].x = upto;
    __syncthreads();
    const u32 part = room[2][threadIdx.x % 32].x, all = warp_sum(part);
    const u32 first = upto - own + warp_sum(threadIdx.x % 32 < threadIdx.x / 32 ? part : 0);
    const int free = k - (int)(all & 0xffff), equal = first >> 16;
    u32 taken = above;
    int left = free - equal;
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (level >> e & 1) taken |= (u32)(left-- > 0) << e;
    place = (first & 0xffff) + min(equal, free);
    return taken;
}

struct Pages {
    const int* table;
    int pages, per;
    __device__ int row(int slot, int entry) const { return table[slot * pages + entry / per] * per + entry % per; }
};

__device__ __forceinline__ void load(float (&s)[EACH], const float* from, int count) {
    if (EACH % 4 == 0 && count >= EACH && (unsigned long long)from % 16 == 0) {
#pragma unroll
        for (int e = 0; e < EACH / 4; e++) {
            const float4 v = ((const float4*)from)[e];
            s[4 * e] = v.x, s[4 * e + 1] = v.y, s[4 * e + 2] = v.z, s[4 * e + 3] = v.w;
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) s[e] = e < count ? from[e] : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float* scores, int* best, int* out, const int* slots, const int* positions, const int* table, int pages,
    int number, int chunks, int k, int per
) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int chunk = blockIdx.x, at = chunk * CHUNK + threadIdx.x * EACH, slot = slots[blockIdx.y];
    const long long t = blockIdx.y;
    const int seen = slot >= 0 ? (positions[t] + 1) / 4 : 0;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float s[EACH];
    load(s, scores + t * number + at, min(number, seen) - at);
    const Pages where = {table, pages, per};
    if (seen <= k) {
        for (int i = threadIdx.x; chunk == 0 && i < k; i += THREADS) out[t * k + i] = i < seen ? where.row(slot, i) : -1;
        return;
    }
    if (chunk * CHUNK >= seen) return;
    u32 order[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) order[e] = ordered(s[e], at + e < seen);
    const int own = min(k, seen - chunk * CHUNK);
    int place;
    const u32 taken = take(order, own, place);
    int* const to = seen <= CHUNK ? out + t * k : best + (t * chunks + chunk) * k;
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (taken >> e & 1) to[place++] = seen <= CHUNK ? where.row(slot, at + e) : at + e;
    for (int i = own + threadIdx.x; i < k; i += THREADS) to[i] = -1;
}

extern "C" __global__ void __launch_bounds__(THREADS) last(
    const float* scores, const int* best, int* out, const int* slots, const int* positions, const int* table, int pages,
    int number, int chunks, int k, int per
) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int first = threadIdx.x * EACH, slot = slots[blockIdx.y];
    const long long t = blockIdx.y;
    const int seen = slot >= 0 ? (positions[t] + 1) / 4 : 0;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (seen <= max(k, CHUNK)) return;
    const int there = (seen + CHUNK - 1) / CHUNK * k;
    int at[EACH];
    u32 order[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) at[e] = first + e < there ? best[t * chunks * k + first + e] : -1;
#pragma unroll
    for (int e = 0; e < EACH; e++) order[e] = ordered(at[e] >= 0 ? scores[t * number + at[e]] : 0.0f, at[e] >= 0);
    int place;
    const u32 taken = take(order, k, place);
    const Pages where = {table, pages, per};
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (taken >> e & 1) out[t * k + place++] = where.row(slot, at[e]);
}
