// Attention of a step over stored rows. Reference 2.6, 2.9; the launcher and the contract are in attend_cuda.py.
//
// A cluster of eight blocks has 16 heads of one token: its rows, 32 at a time, go round among the blocks, which send each
// other their results to sum up: each has 64 columns. (A barrier of the cluster that orders memory waits for all of it,
// also for the weights that the next kernel is loading; what is sent beside a barrier of its own does not.) A token with
// more rows than LIMIT rounds has several clusters, and `combine` sums theirs up. How rows are shared out depends on the
// token's position alone, and every sum has one order.
//
// Rows are e4m3 with a scale for 64 columns, and BF16 in the last ROPE columns; they are multiplied as BF16, exactly what
// they were stored from. Warps share out the rows and quarters of the columns of Q K^T, then columns of P V.
//
// SPAN    tokens of the window, at their place in a slot's ring of RING rows
// RATIO   tokens of an entry, 0: none; CHOSEN: entries stand in a list, else in the pages of PER, all that are closed
// MOST    clusters of a token
// FIT     blocks that are to fit into a multiprocessor: two have less registers than they want

#include "common.cuh"

constexpr int C = 512, ROPE = 64, FRONT = C - ROPE, THREADS = 512, HEADS = 16, ROWS = 32, CLUSTER = 8, LIMIT = 3;
constexpr int BYTES = FRONT + 2 * ROPE, PIECES = BYTES / 16, EACH = (ROWS * PIECES + THREADS - 1) / THREADS;
constexpr int PITCH = C + 8, WIDE = ROWS + 2, NARROW = ROWS + 8;  // of rows in shared memory, apart in all banks
constexpr int QUARTERS = 4, OWN = C / (THREADS / 32);  // of the columns: of logits; a warp's of the result
constexpr int WINDOWS = (SPAN + ROWS - 1) / ROWS;
constexpr int SHARE = C / CLUSTER, BROAD = SHARE + 8;    // columns of a block, apart in all banks
constexpr int CHUNK = HEADS * BROAD * 4, SENT = CLUSTER * (CHUNK + HEADS * 8);  // bytes for a block, and of all to one
constexpr float LOWEST = -1e38f;

struct Shared {
    union {
        struct { u16 q[HEADS][PITCH], k[ROWS][PITCH]; };
        float results[CLUSTER][HEADS][BROAD];  // for each block, in the end
    };
    float parts[CLUSTER][HEADS][BROAD];  // from each block
    float2 sums[CLUSTER][HEADS];         // largest logit, sum
    float logits[QUARTERS][HEADS][WIDE];
    u16 p[HEADS][NARROW];
    float shrink[HEADS];
    unsigned long long full;  // the barrier that counts their bytes
};

__device__ __forceinline__ u32 scaled(u32 pair, u32 power) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(power), "r"(0x80008000u));
    return r;
}

// Two e4m3 in the low half of a word as a pair of BF16: magnitudes moved to where BF16 has them, times the difference of
// the biases, then their scale.
__device__ __forceinline__ u32 bf2_of(u32 pair, u32 power) {
    const u32 spread = __byte_perm(pair, 0, 0x1404);
    return scaled(scaled((spread & 0x80008000u) | ((spread >> 4) & 0x07f007f0u), 0x7b807b80u), power);
}

__device__ __forceinline__ void tiles(u32 (&r)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(from)));
}

__device__ __forceinline__ void turned_tiles(u32 (&r)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(from)));
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float most_of(float v) {
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
    return v;
}

__device__ __forceinline__ float sum_of(float v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

// Which rows a token sees: blocks first .. last - 1, of which the first WINDOWS are the window's.
struct Seen {
    int slot, position, entries, first, last, clusters;

    __device__ Seen(int slot, int position, int most) : slot(slot), position(position) {
        entries = RATIO && slot >= 0 ? min((position + 1) / (RATIO ? RATIO : 1), most) : 0;
        const int missing = SPAN - 1 - position;  // rows of the window before position 0
        first = slot < 0 ? WINDOWS : missing > 0 ? missing / ROWS : 0;
        last = WINDOWS + (entries + ROWS - 1) / ROWS;
        clusters = min(MOST, max(1, (last - first + CLUSTER * LIMIT - 1) / (CLUSTER * LIMIT)));
    }

    // The place of row i of a block among the window's or the entries' rows; -1 for none.
    __device__ int row(int block, int i, const int* chosen, const int* pages) const {
        if (block < WINDOWS) {
            const int at = position - SPAN + 1 + block * ROWS + i;
            return at >= 0 && at <= position ? slot * RING + at % RING : -1;
        }
        const int at = (block - WINDOWS) * ROWS + i;
        if (block >= last || at >= entries) return -1;
        return CHOSEN ? chosen[at] : pages[at / PER] * PER + at % PER;
    }
};

// 16 heads, or the last that there are.
__device__ __forceinline__ void load_queries(Shared& s, const u16* q, int heads) {
    constexpr int MANY = HEADS * C / 8 / THREADS;
    uint4 v[MANY];
#pragma unroll
    for (int i = 0; i < MANY; i++) {
        const int piece = threadIdx.x + i * THREADS;
        v[i] = piece / (C / 8) < heads ? ((const uint4*)q)[piece] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < MANY; i++) {
        const int piece = threadIdx.x + i * THREADS;
        *(uint4*)&s.q[piece / (C / 8)][piece % (C / 8) * 8] = v[i];
    }
}

// Of one block of rows what a thread loads: 16 bytes of EACH rows with their scales.
struct Pieces {
    uint4 v[EACH];
    u8 power[EACH];

    __device__ __forceinline__ void load(const u8* data, const u8* scales, const int (&rows)[EACH]) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int piece = (threadIdx.x + e * THREADS) % PIECES;
            v[e] = make_uint4(0, 0, 0, 0), power[e] = 127;
            if (rows[e] < 0) continue;
            v[e] = *(const uint4*)(data + (i64)rows[e] * BYTES + piece * 16);
            if (piece < FRONT / 16) power[e] = scales[(i64)rows[e] * 8 + piece / 4];
        }
    }

    __device__ __forceinline__ void store(u16 (&k)[ROWS][PITCH]) const {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int number = threadIdx.x + e * THREADS, row = number / PIECES, piece = number % PIECES;
            if (row >= ROWS) continue;
            if (piece >= FRONT / 16) {
                *(uint4*)&k[row][FRONT + (piece - FRONT / 16) * 8] = v[e];
                continue;
            }
            const u32 scale = (u32)power[e] << 7 | (u32)power[e] << 23, w[4] = {v[e].x, v[e].y, v[e].z, v[e].w};
            u32 r[8];
#pragma unroll
            for (int i = 0; i < 4; i++) r[2 * i] = bf2_of(w[i], scale), r[2 * i + 1] = bf2_of(w[i] >> 16, scale);
            *(uint4*)&k[row][piece * 16] = make_uint4(r[0], r[1], r[2], r[3]);
            *(uint4*)&k[row][piece * 16 + 8] = make_uint4(r[4], r[5], r[6], r[7]);
        }
    }
};

// Logits of 16 heads and 32 rows: a warp has 8 rows and a quarter of the columns.
__device__ __forceinline__ void multiply(Shared& s) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp % 4 * 8, quarter = warp / 4;
    float sum[2][4] = {};
#pragma unroll
    for (int i = 0; i < C / QUARTERS; i += 32) {
        const int c = quarter * (C / QUARTERS) + i;
        u32 a[2][4], b[4];
        tiles(b, &s.k[row + lane % 8][c + lane / 8 * 8]);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            tiles(a[e], &s.q[lane % 16][c + e * 16 + lane / 16 * 8]);
            mma(sum[e], a[e], b[2 * e], b[2 * e + 1]);
        }
    }
    float* const to = &s.logits[quarter][lane / 4][row + lane % 4 * 2];
    *(float2*)to = make_float2(sum[0][0] + sum[1][0], sum[0][1] + sum[1][1]);
    *(float2*)(to + 8 * WIDE) = make_float2(sum[0][2] + sum[1][2], sum[0][3] + sum[1][3]);
}

// The softmax so far: a warp has a head, a lane a row.
__device__ __forceinline__ void weigh(Shared& s, float& top, float& total, bool seen, float scale) {
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float sum = (s.logits[0][h][lane] + s.logits[1][h][lane]) + (s.logits[2][h][lane] + s.logits[3][h][lane]);
    const float logit = seen ? sum * scale : LOWEST, now = fmaxf(top, most_of(logit));
    const float p = seen ? __expf(logit - now) : 0.0f, shrink = __expf(top - now);
    s.p[h][lane] = (u16)pair_of(p, 0);
    if (lane == 0) s.shrink[h] = shrink;
    total = total * shrink + sum_of(p), top = now;
}

// P V of 16 heads and 32 rows: a warp has OWN columns.
__device__ __forceinline__ void gather(Shared& s, float (&acc)[OWN / 8][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float upper = s.shrink[lane / 4], lower = s.shrink[lane / 4 + 8];
#pragma unroll
    for (int n = 0; n < OWN / 8; n++) acc[n][0] *= upper, acc[n][1] *= upper, acc[n][2] *= lower, acc[n][3] *= lower;
#pragma unroll
    for (int r = 0; r < ROWS; r += 16) {
        u32 a[4];
        tiles(a, &s.p[lane % 16][r + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < OWN / 8; n += 2) {
            u32 b[4];
            turned_tiles(b, &s.k[r + lane % 16][warp * OWN + n * 8 + lane / 16 * 8]);
            mma(acc[n], a, b[0], b[1]), mma(acc[n + 1], a, b[2], b[3]);
        }
    }
}

// The barrier is there for all before anything is sent.
__device__ __forceinline__ void open(Shared& s) {
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(address(&s.full)) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address(&s.full)), "n"(SENT) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// A warp's columns belong to one block of the cluster, which gets those of all warps in one copy; a head's sums go to all.
__device__ __forceinline__ void send_all(Shared& s, const float (&acc)[OWN / 8][4], float top, float total, int rank) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // a block without rows may still be storing queries, which the results displace
#pragma unroll
    for (int n = 0; n < OWN / 8; n++) {
        float* const at = &s.results[warp * OWN / SHARE][lane / 4][warp * OWN % SHARE + n * 8 + lane % 4 * 2];
        *(float2*)at = make_float2(acc[n][0], acc[n][1]), *(float2*)(at + 8 * BROAD) = make_float2(acc[n][2], acc[n][3]);
    }
    if (lane < CLUSTER)
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                     :: "r"(address_in(lane, &s.sums[rank][warp])), "f"(top), "f"(total), "r"(address_in(lane, &s.full)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x < CLUSTER)
        asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     :: "r"(address_in(threadIdx.x, &s.parts[rank])), "r"(address(&s.results[threadIdx.x])), "n"(CHUNK),
                     "r"(address_in(threadIdx.x, &s.full)) : "memory");
}

__device__ __forceinline__ void receive(Shared& s) {
    u32 here = 0;
    while (!here)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
            : "=r"(here) : "r"(address(&s.full)) : "memory");
    __syncwarp();
}

// Two neighbouring columns of a token's head, as they leave: BF16, the last ROPE turned back.
__device__ __forceinline__ u32 finished(const float2& v, float total, int column, const float2& way) {
    const u32 pair = pair_of(__fdividef(v.x, total), __fdividef(v.y, total));
    if (column < FRONT) return pair;
    const float a = low(pair), b = high(pair);
    return pair_of(a * way.x + b * way.y, b * way.x - a * way.y);
}

// Where a head's columns go: BF16, and what products with e4m3 read, FP16 under a power of two that a warp's 64 columns share
// (exact down to 2^-28 of the largest).
struct Leave {
    u16 *out, *halves;
    float* scales;

    __device__ __forceinline__ void write(i64 head, int column, u32 pair) const {
        const float a = low(pair), b = high(pair);
        const u32 power = max(16u, __float_as_uint(most_of(fmaxf(fabsf(a), fabsf(b)))) >> 23);
        const float grow = __uint_as_float((268 - power) << 23);
        u32 half;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(half) : "f"(b * grow), "f"(a * grow));
        *(u32*)(out + head * C + column) = pair, *(u32*)(halves + head * C + column) = half;
        if (threadIdx.x % 32 == 0) scales[head * (C / 64) + column / 64] = __uint_as_float((power - 14) << 23);
    }
};

// The sum over the cluster's blocks of one head's two columns.
struct Sum {
    float2 v;
    float top, total;

    __device__ __forceinline__ Sum(const Shared& s, int h, int column, float bar) : v(make_float2(0, 0)), top(bar), total(0) {
        float2 part[CLUSTER], of[CLUSTER];
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) of[b] = s.sums[b][h], part[b] = *(const float2*)&s.parts[b][h][column];
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) top = fmaxf(top, of[b].x);
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            const float share = __expf(of[b].x - top);
            total += of[b].y * share, v.x += part[b].x * share, v.y += part[b].y * share;
        }
    }
};

// q and what leaves BF16 [T, H, C]; parts float32 [T, MOST, H, C] with sums [T, MOST, H, 2] of clusters that are not alone.
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, FIT) attend(
    const u16* q, const u8* window, const u8* window_scales, const u8* held, const u8* held_scales, const int* chosen,
    const int* table, const int* slots, const int* positions, const float* sink, const float* turn, Leave leave, float* parts,
    float* sums, int heads, int most, int pages, float scale
) {
    extern __shared__ __align__(16) u8 memory[];
    Shared& s = *(Shared*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % CLUSTER;
    const int cluster = blockIdx.x / CLUSTER % MOST, h0 = blockIdx.x / (CLUSTER * MOST) * HEADS;
    const i64 t = blockIdx.y;
    const Seen seen(slots[t], positions[t], most);
    const int* const list = CHOSEN ? chosen + t * most : nullptr;
    const int* const own_pages = CHOSEN ? nullptr : table + (i64)max(seen.slot, 0) * pages;
    const int step = CLUSTER * seen.clusters;
    int block = seen.first + cluster * CLUSTER + rank;
    // Read now what only the end needs: by then the weights of what follows would come ahead of it.
    const int own = h0 + warp, column = rank * SHARE + lane * 2;
    const bool alone = seen.clusters == 1;
    const float bar = alone && own < heads ? sink[own] : LOWEST;
    const float2 way = column < FRONT ? make_float2(1, 0) : *(const float2*)(turn + t * ROPE + column - FRONT);
    int rows[EACH];
    const auto find = [&](int block, int end) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = (threadIdx.x + e * THREADS) / PIECES;
            rows[e] = i < ROWS && block < end ? seen.row(block, i, list, own_pages) : -1;
        }
    };
    Pieces pieces;
    const auto load = [&](int block) {
        pieces.load(block < WINDOWS ? window : held, block < WINDOWS ? window_scales : held_scales, rows);
    };
    float acc[OWN / 8][4] = {}, top = LOWEST, total = 0;
    // The blocks up to `end`; the rows of the first are on their way. last: none come after these.
    const auto rounds = [&](int end, bool last) __attribute__((always_inline)) {
        for (; block < end; block += step) {
            pieces.store(s.k);
            load(block + step);
            if (last && block + 2 * step >= end) begin_next();
            find(block + 2 * step, end);
            __syncthreads();
            multiply(s);
            __syncthreads();
            const int at = (block - WINDOWS) * ROWS + lane;  // an entry, or before them a row of the window
            const bool there = block < WINDOWS ? at + WINDOWS * ROWS < SPAN && seen.position - SPAN + 1 + at + WINDOWS * ROWS >= 0
                                               : at < seen.entries;
            weigh(s, top, total, there, scale);
            __syncthreads();
            gather(s, acc);
            __syncthreads();
        }
    };
    if (cluster < seen.clusters) open(s);
    if (!CHOSEN) find(block, seen.last);
    else if (cluster < seen.clusters) {
        // While entries are chosen. Queries and window are complete: the launch that scores waited for them, and for its
        // own end whoever chooses.
        find(block, WINDOWS), load(block), find(block + step, WINDOWS);
        load_queries(s, q + (t * heads + h0) * C, heads - h0);
        rounds(WINDOWS, false);
        block = WINDOWS + cluster * CLUSTER + rank;
    }
    wait();
    if (cluster >= seen.clusters) return;  // with all of the cluster
    if (CHOSEN) find(block, seen.last);
    load(block);
    if (!CHOSEN) load_queries(s, q + (t * heads + h0) * C, heads - h0);
    if (block + step >= seen.last) begin_next();  // not before: its weights would come ahead of these rows
    find(block + step, seen.last);
    rounds(seen.last, true);
    send_all(s, acc, top, total, rank);
    receive(s);
    // What all have received nobody's memory is needed for any more; the barrier's end is waited for behind the rest.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    const Sum sum(s, warp, lane * 2, bar);
    if (own < heads && alone)
        leave.write(t * heads + own, column, finished(sum.v, sum.total + __expf(bar - sum.top), column, way));
    if (own < heads && !alone) {
        const i64 place = (t * MOST + cluster) * heads + own;
        *(float2*)(parts + place * C + column) = sum.v;
        if (rank == 0 && lane == 0) *(float2*)(sums + place * 2) = make_float2(sum.top, sum.total);
    }
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// The sum over a token's clusters, if it has several: a block has one head, a thread two columns.
extern "C" __global__ void __launch_bounds__(C / 2) combine(
    const float* parts, const float* sums, const float* sink, const float* turn, const int* slots, const int* positions,
    Leave leave, int heads, int most
) {
    begin_next();
    const int h = blockIdx.x, column = threadIdx.x * 2;
    const i64 t = blockIdx.y;
    const Seen seen(slots[t], positions[t], most);
    const float bar = sink[h];
    const float2 way = column < FRONT ? make_float2(1, 0) : *(const float2*)(turn + t * ROPE + column - FRONT);
    wait();
    if (seen.clusters == 1) return;
    float2 own[MOST], part[MOST], sum = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const i64 place = (t * MOST + i) * heads + h;
        own[i] = make_float2(LOWEST, 0), part[i] = sum;
        if (i < seen.clusters) own[i] = *(const float2*)(sums + place * 2), part[i] = *(const float2*)(parts + place * C + column);
    }
    float top = bar;
#pragma unroll
    for (int i = 0; i < MOST; i++) top = fmaxf(top, own[i].x);
    float total = __expf(bar - top);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const float share = __expf(own[i].x - top);
        total += own[i].y * share, sum.x += part[i].x * share, sum.y += part[i].y * share;
    }
    leave.write(t * heads + h, column, finished(sum, total, column, way));
}
