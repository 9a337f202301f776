// Attention of a step over stored rows. Reference 2.6, 2.9; the launcher and the contract are in attend_cuda.py.
//
// A cluster of eight blocks has 32 heads of one token: its rows, 96 at a time, go round among the blocks, whose results are
// summed up through each other's shared memory. A token with more rows than LIMIT rounds has several clusters, and
// `combine` sums theirs up. How rows are shared out depends on the token's position alone, and every sum has one order.
//
// Rows are e4m3 with a scale for 64 columns, and BF16 in the last ROPE columns; they are multiplied as BF16, exactly what
// they were stored from. Warps share out the rows and halves of the columns of Q K^T, then columns of P V.
//
// SPAN    tokens of the window, at their place in a slot's ring of RING rows
// RATIO   tokens of an entry, 0: none; CHOSEN: entries stand in a list, else in the pages of PER, all that are closed
// MOST    clusters of a token

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

constexpr int C = 512, ROPE = 64, FRONT = C - ROPE, THREADS = 256, HEADS = 32, ROWS = 96, CLUSTER = 8, LIMIT = 2;
constexpr int BYTES = FRONT + 2 * ROPE, PIECES = BYTES / 16, SCALES = 8;  // of a stored row
constexpr int PITCH = C + 8, WIDE = ROWS + 2, NARROW = ROWS + 8;  // of rows in shared memory, apart in all banks
constexpr int WINDOWS = (SPAN + ROWS - 1) / ROWS, TILES = HEADS / 16, GROUPS = ROWS / 32;
constexpr float LOWEST = -1e38f;

struct Shared {
    u16 q[HEADS][PITCH];
    union {  // results take the place of rows
        u16 k[ROWS][PITCH];
        float out[HEADS][PITCH];
    };
    u8 raw[ROWS][BYTES], scales[ROWS][SCALES];
    float logits[2][HEADS][WIDE];
    u16 p[HEADS][NARROW];
    float shrink[HEADS], top[HEADS], total[HEADS];
    int rows[ROWS];
};

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 pair_of(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}

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

    // Rows of a block, in whole groups of 32.
    __device__ int count(int block) const {
        const int left = block < WINDOWS ? SPAN - block * ROWS : entries - (block - WINDOWS) * ROWS;
        return min(ROWS, (left + 31) / 32 * 32);
    }

    // The place of row i of a block among the window's or the entries' rows; -1 for none.
    __device__ int row(int block, int i, const int* chosen, const int* pages) const {
        if (block < WINDOWS) {
            const int at = position - SPAN + 1 + block * ROWS + i;
            return at >= 0 && at <= position ? slot * RING + at % RING : -1;
        }
        const int at = (block - WINDOWS) * ROWS + i;
        if (at >= entries) return -1;
        return CHOSEN ? chosen[at] : pages[at / PER] * PER + at % PER;
    }
};

template <int SIZE>
__device__ __forceinline__ void copy(void* to, const void* from, bool real) {
    if constexpr (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" :: "r"(address(to)), "l"(from), "r"(real ? 8 : 0) : "memory");
}

// Stored rows into shared memory as they are, zeros where there is none.
__device__ __forceinline__ void fetch(Shared& s, const u8* data, const u8* scales, int count) {
    for (int n = threadIdx.x; n < count * PIECES; n += THREADS) {
        const int i = n / PIECES, piece = n % PIECES, row = s.rows[i];
        copy<16>(&s.raw[i][piece * 16], data + (i64)max(row, 0) * BYTES + piece * 16, row >= 0);
    }
    if (threadIdx.x < count) {
        const int row = s.rows[threadIdx.x];
        copy<8>(s.scales[threadIdx.x], scales + (i64)max(row, 0) * SCALES, row >= 0);
    }
}

// The same as BF16.
__device__ __forceinline__ void widen(Shared& s, int count) {
    for (int n = threadIdx.x; n < count * PIECES; n += THREADS) {
        const int i = n / PIECES, piece = n % PIECES;
        const uint4 v = *(const uint4*)&s.raw[i][piece * 16];
        if (piece >= FRONT / 16) {
            *(uint4*)&s.k[i][FRONT + (piece - FRONT / 16) * 8] = v;
            continue;
        }
        const u32 power = s.scales[i][piece / 4], scale = power << 7 | power << 23, w[4] = {v.x, v.y, v.z, v.w};
        u32 r[8];
#pragma unroll
        for (int e = 0; e < 4; e++) r[2 * e] = bf2_of(w[e], scale), r[2 * e + 1] = bf2_of(w[e] >> 16, scale);
        *(uint4*)&s.k[i][piece * 16] = make_uint4(r[0], r[1], r[2], r[3]);
        *(uint4*)&s.k[i][piece * 16 + 8] = make_uint4(r[4], r[5], r[6], r[7]);
    }
}

// Logits of a block's heads and rows: a warp has 8 rows of each group and half of the columns.
__device__ __forceinline__ void multiply(Shared& s, int groups) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp % 4 * 8, half = warp / 4;
    float sum[GROUPS][TILES][4] = {};
#pragma unroll 2
    for (int c = half * (C / 2); c < (half + 1) * (C / 2); c += 32) {
        u32 a[TILES][2][4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) tiles(a[m][i], &s.q[m * 16 + lane % 16][c + i * 16 + lane / 16 * 8]);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            if (g >= groups) break;
            u32 b[4];
            tiles(b, &s.k[g * 32 + row + lane % 8][c + lane / 8 * 8]);
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) mma(sum[g][m], a[m][i], b[2 * i], b[2 * i + 1]);
        }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float* const to = &s.logits[half][m * 16 + lane / 4][g * 32 + row + lane % 4 * 2];
            *(float2*)to = make_float2(sum[g][m][0], sum[g][m][1]);
            *(float2*)(to + 8 * WIDE) = make_float2(sum[g][m][2], sum[g][m][3]);
        }
}

// The softmax so far: a warp has an eighth of the heads, a lane a row of each group; which of them are there: `seen`.
__device__ __forceinline__ void weigh(
    Shared& s, float (&top)[HEADS / 8], float (&total)[HEADS / 8], const bool (&seen)[GROUPS], float scale
) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < HEADS / 8; i++) {
        const int h = warp * (HEADS / 8) + i;
        float logit[GROUPS], now = top[i], sum = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            logit[g] = seen[g] ? (s.logits[0][h][g * 32 + lane] + s.logits[1][h][g * 32 + lane]) * scale : LOWEST;
            now = fmaxf(now, logit[g]);
        }
        now = most_of(now);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const float p = seen[g] ? __expf(logit[g] - now) : 0.0f;
            sum += p;
            s.p[h][g * 32 + lane] = (u16)pair_of(p, 0);
        }
        const float shrink = __expf(top[i] - now);
        total[i] = total[i] * shrink + sum_of(sum), top[i] = now;
        if (lane == 0) s.shrink[h] = shrink;
    }
}

// P V of a block's heads and rows: a warp has 64 columns.
__device__ __forceinline__ void gather(Shared& s, float (&acc)[TILES][8][4], int groups) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        const float upper = s.shrink[m * 16 + lane / 4], lower = s.shrink[m * 16 + lane / 4 + 8];
#pragma unroll
        for (int n = 0; n < 8; n++)
            acc[m][n][0] *= upper, acc[m][n][1] *= upper, acc[m][n][2] *= lower, acc[m][n][3] *= lower;
    }
#pragma unroll 2
    for (int r = 0; r < groups * 32; r += 16) {
        u32 a[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) tiles(a[m], &s.p[m * 16 + lane % 16][r + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            u32 b[4];
            turned_tiles(b, &s.k[r + lane % 16][warp * 64 + n * 8 + lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < TILES; m++) mma(acc[m][n], a[m], b[0], b[1]), mma(acc[m][n + 1], a[m], b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Something of shared memory as another block of the cluster has it.
template <class T>
__device__ __forceinline__ T of_block(const T* mine, int block) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(mine)), "r"(block));
    T v;
    if constexpr (sizeof(T) == 16)
        asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(((float*)&v)[0]), "=f"(((float*)&v)[1]), "=f"(((float*)&v)[2]), "=f"(((float*)&v)[3]) : "r"(there));
    else
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(((float*)&v)[0]) : "r"(there));
    return v;
}

// Four neighbouring columns of a token's head, as they leave: BF16, the last ROPE turned back.
__device__ __forceinline__ uint2 finished(const float4& v, int column, const float* turn) {
    uint2 r = make_uint2(pair_of(v.x, v.y), pair_of(v.z, v.w));
    if (column < FRONT) return r;
    u32* const pairs = (u32*)&r;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float2 way = *(const float2*)(turn + column - FRONT + 2 * i);
        const float a = __uint_as_float(pairs[i] << 16), b = __uint_as_float(pairs[i] & 0xffff0000u);
        pairs[i] = pair_of(a * way.x + b * way.y, b * way.x - a * way.y);
    }
    return r;
}

__device__ __forceinline__ float4 over(const float4& v, float total) {
    return make_float4(__fdividef(v.x, total), __fdividef(v.y, total), __fdividef(v.z, total), __fdividef(v.w, total));
}

// The sum over the cluster's blocks of one head's eight columns.
struct Sum {
    float4 v[2];
    float top, total;

    __device__ __forceinline__ Sum(const Shared& s, int h, int column, float bar) : v{}, top(bar), total(0) {
        float4 part[CLUSTER][2];
        float tops[CLUSTER], totals[CLUSTER];
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            tops[b] = of_block(&s.top[h], b), totals[b] = of_block(&s.total[h], b);
#pragma unroll
            for (int i = 0; i < 2; i++) part[b][i] = of_block((const float4*)&s.out[h][column + 4 * i], b);
        }
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) top = fmaxf(top, tops[b]);
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            const float share = __expf(tops[b] - top);
            total += totals[b] * share;
#pragma unroll
            for (int i = 0; i < 2; i++)
                v[i].x += part[b][i].x * share, v[i].y += part[b][i].y * share, v[i].z += part[b][i].z * share,
                    v[i].w += part[b][i].w * share;
        }
    }
};

// q and out BF16 [T, H, C]; parts float32 [T, MOST, H, C] with sums [T, MOST, H, 2] of clusters that are not alone.
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 2) attend(
    const u16* q, const u8* window, const u8* window_scales, const u8* held, const u8* held_scales, const int* chosen,
    const int* table, const int* slots, const int* positions, const float* sink, const float* turn, u16* out, float* parts,
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
    int block = cluster < seen.clusters ? seen.first + cluster * CLUSTER + rank : seen.last;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    // In this order: what follows would load its weights while the kernels before this one need the bandwidth.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (cluster >= seen.clusters) return;  // with all of the cluster
    const auto find = [&](int block) {
        if (threadIdx.x < ROWS && block < seen.last) s.rows[threadIdx.x] = seen.row(block, threadIdx.x, list, own_pages);
    };
    const auto load = [&](int block) {
        const bool near = block < WINDOWS;
        if (block < seen.last) fetch(s, near ? window : held, near ? window_scales : held_scales, seen.count(block));
    };
    find(block);
    __syncthreads();
    load(block);
    for (int i = threadIdx.x; i < HEADS * C / 8; i += THREADS) {
        const int h = h0 + i / (C / 8), column = i % (C / 8) * 8;
        copy<16>(&s.q[i / (C / 8)][column], q + (t * heads + min(h, heads - 1)) * C + column, h < heads);
    }
    float acc[TILES][8][4] = {}, top[HEADS / 8], total[HEADS / 8] = {};
#pragma unroll
    for (int i = 0; i < HEADS / 8; i++) top[i] = LOWEST;
    for (; block < seen.last; block += step) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        const int count = seen.count(block);
        widen(s, count);
        find(block + step);
        __syncthreads();
        load(block + step);
        multiply(s, count / 32);
        __syncthreads();
        bool there[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int i = block * ROWS + g * 32 + lane, at = i - WINDOWS * ROWS;  // row of the window, or entry
            there[g] = g * 32 < count && (block < WINDOWS ? i < SPAN && seen.position - SPAN + 1 + i >= 0 : at < seen.entries);
        }
        weigh(s, top, total, there, scale);
        __syncthreads();
        gather(s, acc, count / 32);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float* const to = &s.out[m * 16 + lane / 4][warp * 64 + n * 8 + lane % 4 * 2];
            *(float2*)to = make_float2(acc[m][n][0], acc[m][n][1]);
            *(float2*)(to + 8 * PITCH) = make_float2(acc[m][n][2], acc[m][n][3]);
        }
#pragma unroll
    for (int i = 0; i < HEADS / 8; i++)
        if (lane == i) s.top[warp * (HEADS / 8) + i] = top[i], s.total[warp * (HEADS / 8) + i] = total[i];
    meet();
    const int own = threadIdx.x / 8, h = h0 + own, column = rank * 64 + threadIdx.x % 8 * 8;
    const bool alone = seen.clusters == 1;
    const float bar = alone && h < heads ? sink[h] : LOWEST;
    const Sum sum(s, own, column, bar);
    meet();  // a block's memory is its own again only when all have read it
    if (h >= heads) return;
    if (alone) {
        const float total = sum.total + __expf(bar - sum.top);
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(uint2*)(out + (t * heads + h) * C + column + 4 * i) =
                finished(over(sum.v[i], total), column + 4 * i, turn + t * ROPE);
        return;
    }
    const i64 place = (t * MOST + cluster) * heads + h;
#pragma unroll
    for (int i = 0; i < 2; i++) *(float4*)(parts + place * C + column + 4 * i) = sum.v[i];
    if (rank == 0 && threadIdx.x % 8 == 0) *(float2*)(sums + place * 2) = make_float2(sum.top, sum.total);
}

// The sum over a token's clusters, if it has several: a block has one head, a thread four columns.
extern "C" __global__ void __launch_bounds__(C / 4) combine(
    const float* parts, const float* sums, const float* sink, const float* turn, const int* slots, const int* positions,
    u16* out, int heads, int most
) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int h = blockIdx.x, column = threadIdx.x * 4;
    const i64 t = blockIdx.y;
    const Seen seen(slots[t], positions[t], most);
    const float bar = sink[h];
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (seen.clusters == 1) return;
    float2 own[MOST];
    float4 part[MOST], sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const i64 place = (t * MOST + i) * heads + h;
        own[i] = make_float2(LOWEST, 0), part[i] = sum;
        if (i < seen.clusters) own[i] = *(const float2*)(sums + place * 2), part[i] = *(const float4*)(parts + place * C + column);
    }
    float top = bar;
#pragma unroll
    for (int i = 0; i < MOST; i++) top = fmaxf(top, own[i].x);
    float total = __expf(bar - top);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const float share = __expf(own[i].x - top);
        total += own[i].y * share;
        sum.x += part[i].x * share, sum.y += part[i].y * share, sum.z += part[i].z * share, sum.w += part[i].w * share;
    }
    *(uint2*)(out + (t * heads + h) * C + column) = finished(over(sum, total), column, turn + t * ROPE);
}
