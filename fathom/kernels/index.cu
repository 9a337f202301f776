// The k best of a token's scores, in order. Reference 2.8; the launcher and the contract are in index_cuda.py.
//
// A cluster of blocks, or one block, has a token. Scores go round among all warps in pieces, so that no warp has a region
// of the sequence to itself. The warps' best give a bound below which none of the k can be: few scores pass it, and
// only those are looked at again. Of these the k-th largest pattern is found DIGIT bits at a time, by counts that blocks
// send each other; it is exact whatever passes. Of equal ones the first are taken.
//
// EACH     scores of a thread, at most: up to 4 in each of its pieces
// CLUSTER  blocks of a token

#include "common.cuh"

constexpr int WARPS = 32, THREADS = 32 * WARPS, SIDE = EACH < 4 ? EACH : 4, TILES = EACH / SIDE, PIECES = TILES * WARPS;
constexpr int PIECE = 32 * SIDE;               // scores of a warp side by side, SIDE of a thread
constexpr int TILE = WARPS * CLUSTER * PIECE;  // scores from a warp's piece to its next
constexpr int DIGIT = 7, BINS = 1 << DIGIT, ROUNDS = (32 + DIGIT - 1) / DIGIT;
constexpr int LINES = PIECES * 2 / 16;  // of 16 bytes: the counts of a block's pieces
constexpr u32 LOWEST = 0x007fffff;      // the pattern of -inf

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER)
#else
#define TOGETHER
#endif

// Exchanges: of the ends, of a round each, of the pieces' counts.
constexpr int EXCHANGES = ROUNDS + 2;

struct Shared {
    uint4 inbox[CLUSTER > 1 ? EXCHANGES : 1][CLUSTER][32];  // lines from each block
    uint4 bins[ROUNDS][BINS / 4];
    alignas(16) u16 counts[PIECES];  // of each piece: taken for sure, and on the bar in the upper half
    uint4 found;
    uint2 ends[WARPS];     // of each warp: what j of its threads reach, the largest
    uint2 before[PIECES];  // what comes before a piece in its tile
    uint2 tiles[TILES];
    u64 full[EXCHANGES];  // barriers
};

// By one thread: an exchange that brings so many bytes.
__device__ __forceinline__ void expect(u64& full, int bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full)) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&full)), "r"(bytes) : "memory");
}

// All blocks are there, and their barriers. What is sent needs no more than that: its arrival is what a barrier tells.
__device__ __forceinline__ void meet() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void send(int block, uint4& to, const uint4& v, u64& full) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                     address_in(block, &to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(address_in(block, &full)) : "memory");
}

__device__ __forceinline__ void arrived(const u64& full) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(address(&full)) : "memory");
    } while (!done);
}

// To all blocks: a line of each lane of a warp, of so many lanes; a warp for each block.
__device__ __forceinline__ void tell(Shared& s, int exchange, const uint4* lines, int count) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < CLUSTER && lane < count) send(warp, s.inbox[exchange][blockIdx.x][lane], lines[lane], s.full[exchange]);
}

// Patterns in the order of the scores, none below LOWEST. Both zeros are one score.
__device__ __forceinline__ u32 ordered(float score) {
    const u32 bits = score == 0.0f ? 0 : __float_as_uint(score);
    return score != score ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(u32 pattern) {
    return __uint_as_float(pattern >> 31 ? pattern & 0x7fffffffu : ~pattern);
}

__device__ __forceinline__ u32 summed_up_to(u32 v) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const u32 before = __shfl_up_sync(~0u, v, d);
        if (threadIdx.x % 32 >= d) v += before;
    }
    return v;
}

// The warp's values, the largest in the first lane.
__device__ __forceinline__ u32 sorted(u32 v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int size = 2; size <= 32; size *= 2)
#pragma unroll
        for (int d = size / 2; d; d /= 2) {
            const u32 other = __shfl_xor_sync(~0u, v, d);
            v = !(lane & size) == !(lane & d) ? max(v, other) : min(v, other);
        }
    return v;
}

// Adds a warp's to the counts; bin < 0 for none. Most are often in one bin: together, not one after another.
__device__ __forceinline__ void count(u32* bins, int bin) {
    const u32 some = __ballot_sync(~0u, bin >= 0);
    if (!some) return;
    const int first = __ffs(some) - 1, common = __shfl_sync(~0u, bin, first);
    const u32 same = __ballot_sync(~0u, bin == common);
    if (threadIdx.x % 32 == first) atomicAdd(&bins[common], __popc(same));
    else if (bin >= 0 && bin != common) atomicAdd(&bins[bin], 1);
}

// The first warp: which bin has the need-th largest of all blocks; what is above it, what is in it.
__device__ __forceinline__ void find(Shared& s, const uint4 (*box)[32], u32 need) {
    const int at = 31 - threadIdx.x % 32;
    uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) {
        const uint4 part = box[b][at];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const u32 own[4] = {sum.w, sum.z, sum.y, sum.x}, all = sum.x + sum.y + sum.z + sum.w;
    u32 above = summed_up_to(all) - all;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (above < need && above + own[i] >= need) s.found = make_uint4(at * 4 + 3 - i, above, own[i], 0);
        above += own[i];
    }
}

// How many of each nibble's bits are set, in bytes: of even nibbles, of odd ones.
__device__ __forceinline__ uint2 nibbles(u32 v) {
    v -= v >> 1 & 0x55555555u;
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    return make_uint2(v & 0x0f0f0f0fu, v >> 4 & 0x0f0f0f0fu);
}

__device__ __forceinline__ u32 byte_of(const uint2& v, int i) { return (i % 2 ? v.y : v.x) >> i / 2 * 8 & 255; }

__device__ __forceinline__ uint2 lanes_up_to(const uint2& v) {
    return make_uint2(summed_up_to(v.x), TILES > 1 ? summed_up_to(v.y) : 0);
}

__device__ __forceinline__ float top_of(const float4& v, float top) {  // of a NaN and a number the number
    return fmaxf(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)), top);
}

__device__ __forceinline__ u32 passing(const float4& v, float bar) {  // NaN too
    return (u32) !(v.x < bar) | (u32) !(v.y < bar) << 1 | (u32) !(v.z < bar) << 2 | (u32) !(v.w < bar) << 3;
}

// The lowest bound and the largest pattern of all warps of all blocks.
__device__ __forceinline__ uint2 ends_of(Shared& s) {
    const int lane = threadIdx.x % 32;
    uint2 ends = s.ends[lane];
    ends = make_uint2(__reduce_min_sync(~0u, ends.x), __reduce_max_sync(~0u, ends.y));
    if (CLUSTER == 1) return ends;
    const uint4 line = make_uint4(ends.x, ends.y, 0, 0);
    if (threadIdx.x / 32 < CLUSTER && lane == 0) send(threadIdx.x / 32, s.inbox[0][blockIdx.x][0], line, s.full[0]);
    arrived(s.full[0]);
    const uint4 part = s.inbox[0][lane % CLUSTER][0];
    return make_uint2(__reduce_min_sync(~0u, part.x), __reduce_max_sync(~0u, part.y));
}

// A thread for each of a block's pieces: how many are taken before it in its tile.
__device__ __forceinline__ void place(Shared& s, int rank) {
    if (CLUSTER > 1) arrived(s.full[ROUNDS + 1]);
    u32 all = 0, lower = 0;  // at most 1024 in each half
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) {
        const u32 part = (CLUSTER > 1 ? (const u16*)s.inbox[ROUNDS + 1][b] : s.counts)[threadIdx.x];
        if (b == rank) lower = all;
        all += (part & 255) | part >> 8 << 16;
    }
    const u32 sure = summed_up_to(all & 0xffff), more = summed_up_to(all >> 16);
    s.before[threadIdx.x] = make_uint2(sure - (all & 0xffff) + (lower & 0xffff), more - (all >> 16) + (lower >> 16));
    if (threadIdx.x % 32 == 31) s.tiles[threadIdx.x / 32] = make_uint2(sure, more);
}

// scores float32 [T, number], a multiple of 4; out int32 [T, k]; table int32 [slots, pages] of pages of `per` rows.
extern "C" __global__ void TOGETHER __launch_bounds__(THREADS, EACH > 8 ? 1 : 2) choose(
    const float* scores, int* out, const int* slots, const int* positions, const int* table, int pages, int number, int k,
    int per
) {
    __shared__ Shared s;
    begin_next();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x;
    const i64 t = blockIdx.y;
    const int slot = slots[t], seen = slot >= 0 ? min(number, (positions[t] + 1) / 4) : 0;
    const int* const own_pages = table + (i64)max(slot, 0) * pages;
    const auto row = [&](int entry) { return own_pages[entry / per] * per + entry % per; };
    if (threadIdx.x < ROUNDS * BINS / 4) s.bins[0][threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (CLUSTER > 1) {
        for (int n = 0; threadIdx.x == 0 && n < EXCHANGES; n++)
            expect(s.full[n], CLUSTER * 16 * (n == 0 ? 1 : n <= ROUNDS ? BINS / 4 : LINES));
        meet();
    }
    wait();
    if (seen <= k) {  // with all of the cluster
        for (int i = rank * THREADS + threadIdx.x; i < k; i += CLUSTER * THREADS) out[t * k + i] = i < seen ? row(i) : -1;
        return;
    }
    // Scores at first + tile * TILE, SIDE at a time. All tiles before the last are whole; of the last a thread has `rest`.
    const int group = warp * CLUSTER + rank, first = group * PIECE + lane * SIDE, last = (seen - 1) / TILE;
    const int rest = max(0, min(SIDE, seen - first - last * TILE));
    const float* const from = scores + t * number + first;
    const float none = score_of(LOWEST);
    float4 v[TILES], end = make_float4(none, none, none, none);
#pragma unroll
    for (int i = 0; i < TILES - 1; i++)
        if (i < last) v[i] = *(const float4*)(from + i * TILE);
    if (SIDE < 4) end.x = rest > 0 ? from[0] : none, end.y = rest > 1 ? from[1] : none;
    else if (rest > 0) end = *(const float4*)(from + last * TILE);
    end = make_float4(end.x, rest > 1 ? end.y : none, rest > 2 ? end.z : none, rest > 3 ? end.w : none);
    float top = top_of(end, none);
#pragma unroll
    for (int i = 0; i < TILES - 1; i++)
        if (i < last) top = top_of(v[i], top);
    // If j threads of each of `whole` warps reach a bound, and j * whole are k or more, then so do the k best.
    const int whole = min(CLUSTER * WARPS, seen / PIECE);
    const u32 best = ordered(top), largest = __reduce_max_sync(~0u, best);
    u32 bound = LOWEST;
    if (whole * 32 >= k) bound = __shfl_sync(~0u, sorted(best), (k + whole - 1) / whole - 1);
    if (lane == 0) s.ends[warp] = make_uint2(group < whole || whole * 32 < k ? bound : ~0u, largest);
    __syncthreads();
    const uint2 ends = ends_of(s);
    // Patterns low .. low + reach are counted, those of more than that are taken: so many are `over`.
    const u32 high = ends.y;
    u32 low = ends.x, reach = high - low, above = 0;
    const float bar = score_of(low);
    u32 live = (passing(end, bar) & ((1u << rest) - 1)) << last * 4;
#pragma unroll
    for (int i = 0; i < TILES - 1; i++)
        if (i < last) live |= passing(v[i], bar) << i * 4;
    int over = 0;
    bool exact = false;
    for (int round = 0;; round++) {
        const int shift = max(0, 32 - DIGIT - __clz(reach));
        for (u32 todo = live; __any_sync(~0u, todo); todo &= todo - 1) {
            const int e = __ffs(todo) - 1;
            const u32 order = todo ? min(high, ordered(from[e / 4 * TILE + e % 4])) : 0;  // NaN: as the largest
            const bool inside = todo && order >= low && order - low <= reach;
            if (todo && !inside) live ^= 1u << e, above |= (u32)(order >= low) << e;
            if (reach) count((u32*)s.bins[round], inside ? (int)(order - low >> shift) : -1);
        }
        if (!reach) break;
        __syncthreads();
        if (CLUSTER > 1) tell(s, 1 + round, s.bins[round], BINS / 4);
        if (warp == 0) {
            if (CLUSTER > 1) arrived(s.full[1 + round]);
            find(s, CLUSTER > 1 ? s.inbox[1 + round] : &s.bins[round], k - over);
        }
        __syncthreads();
        low += s.found.x << shift, over += s.found.y;
        exact = over + s.found.z == k, reach = exact ? 0 : (1u << shift) - 1;
    }
    if (exact) above |= live, live = 0;
    const u32 level = live, free = k - over;  // room for those on the bar
    // How many come before a thread's: of its pieces, of its tiles, of tiles.
    uint2 sure = nibbles(above), more = nibbles(level);
    const uint2 sure_here = lanes_up_to(sure), more_here = exact ? make_uint2(0, 0) : lanes_up_to(more);
    if (lane == 31)
#pragma unroll
        for (int i = 0; i < TILES; i++) s.counts[i * WARPS + warp] = byte_of(sure_here, i) | byte_of(more_here, i) << 8;
    sure = make_uint2(sure_here.x - sure.x, sure_here.y - sure.y);
    more = make_uint2(more_here.x - more.x, more_here.y - more.y);
    __syncthreads();
    if (CLUSTER > 1) tell(s, ROUNDS + 1, (const uint4*)s.counts, LINES);
    if (threadIdx.x < PIECES) place(s, rank);
    __syncthreads();
    for (u32 todo = above | level; todo;) {
        const int e = __ffs(todo) - 1, i = e / 4;
        const u32 same = (1u << e) - (1u << i * 4);  // those of its four that come before
        uint2 at = s.before[i * WARPS + warp];
        for (int n = 0; n < i; n++) at.x += s.tiles[n].x, at.y += s.tiles[n].y;
        at.x += byte_of(sure, i) + __popc(above & same), at.y += byte_of(more, i) + __popc(level & same);
        todo &= todo - 1;
        if (level >> e & 1 && at.y >= free) todo &= above;  // nor is there room for the later ones
        else out[t * k + at.x + min(at.y, free)] = row(first + i * TILE + e % 4);
    }
}
