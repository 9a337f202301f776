// What stands between a step's projections and its attention. Reference 2.5 to 2.8, 4; launcher, contract: store_cuda.py.
//
// A warp does one thing for one token: its window row, a part of what it leaves in a tail, a head's query, or the index
// queries of a few heads. Entries and index keys have blocks of their own, which have nothing to do but where a token
// closes its block of RATIO: their warps share out columns and items, and one warp finishes the row. Items of neighbours
// in the batch are taken from the projections; nothing is read that other blocks of the launch write. Every sum has one
// order, which positions alone decide.
//
// C        columns of a row, a multiple of 64 up to 512, of which the last ROPE are turned
// D        of an index key, 64 or 128 (ratio 4)
// RATIO    0, 4 or 128; PER entries of a page
// RING     rows of a slot's window; TAIL rows of its tails
// PACKED   1: index keys as FP4, two values a byte
// CLUSTER  blocks that share the columns of an entry

#include "common.cuh"

constexpr int WARPS = 8, THREADS = WARPS * 32, ROPE = 64, FRONT = C - ROPE;
constexpr int CHUNKS = (C + 255) / 256;                 // of a row: a lane has 8 neighbouring columns of each
constexpr int LANES = D / 8, INDEX_HEADS = 32 / LANES;  // lanes of a head, heads of a warp
constexpr int BLOCK = RATIO ? RATIO : 8, HALVES = RATIO == 4 ? 2 : 1, ITEMS = HALVES * BLOCK;
constexpr int POOLS = RATIO == 0 ? 0 : RATIO == 4 ? CLUSTER + 1 : CLUSTER;  // blocks of an entry, and of a key
constexpr int PART = 256, NEAR = 32;  // floats of a tail that a warp keeps; tokens among which neighbours are looked for
constexpr int PARTS = RATIO ? (2 * HALVES * C + PART - 1) / PART : 0, KEY_PARTS = RATIO == 4 ? 4 * D / PART : 0;
constexpr float LOWEST = -1e38f;

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER)
#else
#define TOGETHER
#endif

// A compressor: projections float32 [T, stride], values then gates; the tails float32 [slots, TAIL, ...]; the gates' bias
// [RATIO, ...]; the norm's weights; where entries go.
struct Compressor {
    const float* projected;
    float* tail;
    const float* bias;
    const u16* norm;
    u8* data;
    void* scales;
    int stride;
};

struct Token {
    int b, slot, position;
};

struct Shared {
    float2 parts[WARPS][3][32];  // of a warp: largest gate, sum of shares, sum of values
    i64 place;                   // of the row that is made
    float pooled[C > D ? C : D];
    __align__(16) float turn[ROPE];
    __align__(16) u16 norm[C > D ? C : D];
};

__device__ __forceinline__ void arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
__device__ __forceinline__ void meet() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

__device__ __forceinline__ u32 e4m3_pair(float a, float b) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(b), "f"(a));
    return r;
}

// Brought nearer, not read: what others still write is not missed.
__device__ __forceinline__ void into_cache(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Into shared memory of the cluster's first block.
__device__ __forceinline__ void put_first(float2* mine, float2 v) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1,%2};" ::"r"(address_in(0, mine)), "f"(v.x), "f"(v.y) : "memory");
}

// Over groups of `lanes` neighbouring lanes.
__device__ __forceinline__ float sum_of(float v, int lanes) {
    for (int d = 1; d < lanes; d <<= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

__device__ __forceinline__ float most_of(float v, int lanes) {
    for (int d = 1; d < lanes; d <<= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
    return v;
}

// The smallest power of two not below most / 448 or most / 6, without a division; and a power's exact inverse.
__device__ __forceinline__ float fp8_scale(float most) {  // 448 = 1.75 * 2^8
    return __uint_as_float(((__float_as_uint(most) + 0x1fffff) & 0x7f800000) - (8 << 23));
}
__device__ __forceinline__ float fp4_scale(float most) {  // 6 = 1.5 * 2^2
    return __uint_as_float(((__float_as_uint(most) + 0x3fffff) & 0x7f800000) - (2 << 23));
}
__device__ __forceinline__ float inverse(float power) { return __uint_as_float(0x7f000000 - __float_as_uint(power)); }
__device__ __forceinline__ u8 exponent(float power) { return __float_as_uint(power) >> 23; }

// --- eight neighbouring columns ---

__device__ __forceinline__ void unpack(float (&v)[8], const uint4& from) {
    v[0] = low(from.x), v[1] = high(from.x), v[2] = low(from.y), v[3] = high(from.y);
    v[4] = low(from.z), v[5] = high(from.z), v[6] = low(from.w), v[7] = high(from.w);
}

__device__ __forceinline__ uint4 packed(const float (&v)[8]) {
    return make_uint4(pair_of(v[0], v[1]), pair_of(v[2], v[3]), pair_of(v[4], v[5]), pair_of(v[6], v[7]));
}

__device__ __forceinline__ void to_bf16(float (&v)[8]) { unpack(v, packed(v)); }

__device__ __forceinline__ uint2 e4m3(const float (&v)[8], float factor) {
    return make_uint2(
        e4m3_pair(v[0] * factor, v[1] * factor) | e4m3_pair(v[2] * factor, v[3] * factor) << 16,
        e4m3_pair(v[4] * factor, v[5] * factor) | e4m3_pair(v[6] * factor, v[7] * factor) << 16
    );
}

__device__ __forceinline__ float largest(const float (&v)[8]) {
    float most = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) most = fmaxf(most, fabsf(v[e]));
    return most;
}

__device__ __forceinline__ float squares(const float (&v)[8]) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) sum = __fmaf_rn(v[e], v[e], sum);
    return sum;
}

__device__ __forceinline__ float rms_factor(float squares, int n, float eps) {
    return rsqrtf(__fmaf_rn(squares, 1.0f / n, eps));
}

// Of four pairs: cosine, sine, cosine, sine.
struct Turn {
    float4 a, b;

    // Of the columns from `column` on, counted from the first that is turned; those before it stay.
    __device__ __forceinline__ Turn(const float* turn, int column) : a(make_float4(1, 0, 1, 0)), b(a) {
        if (column < 0 || column >= ROPE) return;
        a = *(const float4*)(turn + column), b = *(const float4*)(turn + column + 4);
    }
};

__device__ __forceinline__ void turn_pair(float& even, float& odd, float cos, float sin) {
    const float x = even, y = odd;
    even = __fmaf_rn(x, cos, -__fmul_rn(y, sin)), odd = __fmaf_rn(x, sin, __fmul_rn(y, cos));
}

// Turned and rounded.
__device__ __forceinline__ void turned(float (&v)[8], const Turn& turn) {
    turn_pair(v[0], v[1], turn.a.x, turn.a.y), turn_pair(v[2], v[3], turn.a.z, turn.a.w);
    turn_pair(v[4], v[5], turn.b.x, turn.b.y), turn_pair(v[6], v[7], turn.b.z, turn.b.w);
    to_bf16(v);
}

// --- a row of C columns in a warp ---

__device__ __forceinline__ int column_of(int chunk) { return chunk * 256 + threadIdx.x % 32 * 8; }
__device__ __forceinline__ bool inside(int column) { return C % 256 == 0 || column < C; }
// All that is turned lies in the last chunk.
__device__ __forceinline__ Turn row_turn(const float* turn) { return Turn(turn, column_of(CHUNKS - 1) - FRONT); }

// Columns as BF16, zeros behind the last.
struct Loaded {
    uint4 v[CHUNKS];

    Loaded() = default;
    __device__ __forceinline__ explicit Loaded(const u16* from) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            v[i] = make_uint4(0, 0, 0, 0);
            if (inside(column_of(i))) v[i] = *(const uint4*)(from + column_of(i));
        }
    }
};

struct Row {
    float v[CHUNKS][8];

    __device__ __forceinline__ explicit Row(const u16* from) {
        const Loaded loaded(from);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) unpack(v[i], loaded.v[i]);
    }

    // From shared memory.
    __device__ __forceinline__ explicit Row(const float* from) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
#pragma unroll
            for (int e = 0; e < 8; e++) v[i][e] = inside(column_of(i)) ? from[column_of(i) + e] : 0.0f;
    }

    // Normalised, times weights if WEIGHTED, rounded, turned, rounded.
    template <bool WEIGHTED>
    __device__ __forceinline__ void finish(float eps, const Loaded& weights, const Turn& turn) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) sum += squares(v[i]);
        const float factor = rms_factor(sum_of(sum, 32), C, eps);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            float weight[8];
            if (WEIGHTED) unpack(weight, weights.v[i]);
#pragma unroll
            for (int e = 0; e < 8; e++) v[i][e] = WEIGHTED ? v[i][e] * factor * weight[e] : v[i][e] * factor;
            to_bf16(v[i]);
        }
        turned(v[CHUNKS - 1], turn);
    }

    // As row `at` of a plane of data and one of scales: e4m3 with an exponent byte for 64, the turned columns as BF16.
    __device__ __forceinline__ void store(u8* data, u8* scales, i64 at) const {
        u8* const row = data + at * (FRONT + 2 * ROPE);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int column = column_of(i);
            const float scale = fp8_scale(fmaxf(most_of(largest(v[i]), 8), 1e-4f));
            if (column < FRONT) {
                *(uint2*)(row + column) = e4m3(v[i], inverse(scale));
                if (column % 64 == 0) scales[at * ((FRONT + 511) / 512 * 8) + column / 64] = exponent(scale);
            } else if (inside(column)) *(uint4*)(row + FRONT + 2 * (column - FRONT)) = packed(v[i]);
        }
    }
};

// --- index keys and queries: a head's columns in LANES lanes ---

// The Walsh-Hadamard transform, by sums and differences of what stands 1, 2, 4 .. apart; rounded.
__device__ __forceinline__ void mix(float (&v)[8]) {
    constexpr float SHARE = D == 128 ? 181.0f / 2048 : 0.125f;  // D^-0.5 as BF16
#pragma unroll
    for (int d = 1; d < 8; d <<= 1)
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (!(e & d)) {
                const float a = v[e], b = v[e + d];
                v[e] = a + b, v[e + d] = a - b;
            }
#pragma unroll
    for (int d = 1; d < LANES; d <<= 1) {
        const float sign = threadIdx.x & d ? -1.0f : 1.0f;
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = __fmaf_rn(v[e], sign, __shfl_xor_sync(~0u, v[e], d));
    }
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] *= SHARE;
    to_bf16(v);
}

// On the e2m1 grid over the scale of 32 columns, which is returned; zeros keep their sign.
__device__ __forceinline__ float to_fp4(float (&v)[8]) {
    const float scale = fp4_scale(fmaxf(most_of(largest(v), 4), 7.052966104933725e-38f)), shrink = inverse(scale);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float y = v[e] * shrink, size = fabsf(y);
        const float step = size < 2.0f ? 0.5f : size < 4.0f ? 1.0f : 2.0f;
        const float whole = __fadd_rn(__fmul_rn(size, inverse(step)), 12582912.0f);  // to even, as the codes have it
        v[e] = copysignf(__fadd_rn(whole, -12582912.0f) * step, y);
    }
    return scale;
}

// `v` of the warp's first LANES lanes as key `at`.
__device__ __forceinline__ void store_key(float (&v)[8], const Compressor& c, i64 at) {
    const int lane = threadIdx.x % 32, column = lane % LANES * 8;
    const float scale = to_fp4(v);
    if (PACKED) {
        u32 word = 0;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float size = fabsf(v[e]);
            const u32 code = (u32)(size < 2.0f ? size * 2.0f : size < 4.0f ? size + 2.0f : size * 0.5f + 4.0f);
            word |= (code | __float_as_uint(v[e]) >> 31 << 3) << (4 * e);
        }
        if (lane >= LANES) return;
        *(u32*)(c.data + at * (D / 2) + column / 2) = word;
        if (lane % 4 == 0) ((u8*)c.scales)[at * (D / 32) + lane / 4] = exponent(scale);
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] *= scale;
    const float one = fp8_scale(fmaxf(most_of(largest(v), LANES), 7.888609052210118e-31f));
    if (lane >= LANES) return;
    *(uint2*)(c.data + at * D + column) = e4m3(v, inverse(one));
    if (lane == 0) ((float*)c.scales)[at] = one;
}

// --- pooling ---

// Bit d: the token d before in the batch is the sequence's token d before.
__device__ __forceinline__ u32 neighbours(const Token& t, const int* slots, const int* positions) {
    const int lane = threadIdx.x % NEAR, source = t.b - lane;
    const bool near = source >= 0 && slots[source] == t.slot && positions[source] == t.position - lane;
    return __ballot_sync(~0u, near);
}

// A block's items, by number: where their values stand that begin at column `first`, with the gates behind all values, and
// the bias of gates that have none yet, which are those of neighbours.
template <int WIDTH>
struct Items {
    static constexpr int W = HALVES * WIDTH;
    static_assert(!RATIO || TAIL >= ITEMS, "a tail has a block's items");
    const float *kept, *own, *biases;  // the slot's tail; item 0 if it were in the batch; the bias of a block's first
    int start, stride, ring;           // position of item 0, from item to item in the batch, row of item 0 in the tail
    u32 near;

    __device__ __forceinline__ Items(const Compressor& c, const Token& t, u32 near, int first)
        : kept(c.tail + (i64)t.slot * TAIL * (2 * W) + first), own(c.projected + (t.b - ITEMS + 1) * (i64)c.stride + first),
          biases(c.bias + first), start(t.position - ITEMS + 1), stride(c.stride), ring((start + TAIL) % TAIL),
          near(near) {}

    __device__ __forceinline__ bool missing(int i) const { return RATIO == 4 && start + i < 0; }
    __device__ __forceinline__ bool is_near(int i) const { return ITEMS - 1 - i < NEAR && near >> (ITEMS - 1 - i) & 1; }
    // Of the block before it is the low half that counts, of the own one the high half.
    __device__ __forceinline__ int half(int i) const { return RATIO == 4 && i >= 4 ? WIDTH : 0; }
    __device__ __forceinline__ const float* value(int i) const {
        const int row = ring + i < TAIL ? ring + i : ring + i - TAIL;
        return (is_near(i) ? own + i * stride : kept + row * (2 * W)) + half(i);
    }
    __device__ __forceinline__ const float* bias(int i) const { return biases + i % BLOCK * W + half(i); }

    // Into the cache what stands there already: neighbours come with this step, but their bias is a weight.
    template <int SHARE>
    __device__ __forceinline__ void fetch() const {
        constexpr int STEP = 16, STEPS = SHARE / STEP;  // columns: 64 bytes, of which memory gives no less
#pragma unroll 1
        for (int k = threadIdx.x; k < ITEMS * STEPS; k += THREADS) {
            const int i = k / STEPS, from = k % STEPS * STEP;
            if (missing(i)) continue;
            if (!is_near(i)) into_cache(value(i) + from);
            into_cache((is_near(i) ? bias(i) : value(i) + W) + from);
        }
    }
};

// Two columns' softmax over items, as it stands: largest gate, sums of shares and of values.
struct Softmax {
    float2 top, total, sum;

    template <int N>
    __device__ __forceinline__ void add(const float2 (&values)[N], const float2 (&gates)[N]) {
        float2 most = top;
#pragma unroll
        for (int i = 0; i < N; i++) most = make_float2(fmaxf(most.x, gates[i].x), fmaxf(most.y, gates[i].y));
        const float2 shrink = make_float2(__expf(top.x - most.x), __expf(top.y - most.y));
        top = most, total.x *= shrink.x, total.y *= shrink.y, sum.x *= shrink.x, sum.y *= shrink.y;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float2 share = make_float2(__expf(gates[i].x - top.x), __expf(gates[i].y - top.y));
            total.x += share.x, total.y += share.y;
            sum.x = __fmaf_rn(share.x, values[i].x, sum.x), sum.y = __fmaf_rn(share.y, values[i].y, sum.y);
        }
    }
};

// What the warp needs that finishes a row: weights, rotations, its place. In the registers of all they would be too many.
template <int WIDTH>
__device__ __forceinline__ void fetch_ends(
    Shared& shared, const u16* norm, const float* turns, const Token& t, const int* table, int pages
) {
    const int i = threadIdx.x, entry = t.position / BLOCK;
    if (i < WIDTH / 2) ((u32*)shared.norm)[i] = ((const u32*)norm)[i];
    if (i < ROPE) shared.turn[i] = turns[t.b * ROPE + i];
    if (i == 0) shared.place = (i64)table[(i64)t.slot * pages + entry / PER] * PER + entry % PER;
}

// Columns first .. first + SHARE - 1 of an entry of WIDTH into `pooled` of the cluster's first block, rounded to BF16. A
// warp has 64 columns of some of the items. Every thread of the block is here; in the end all see what was pooled.
template <int WIDTH, int SHARE, bool SPREAD>
__device__ __forceinline__ void pool(Shared& shared, const Items<WIDTH>& block) {
    constexpr int STRIPS = SHARE / 64, MOST = WARPS / STRIPS, GROUPS = MOST >= 8 ? 8 : MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1;
    constexpr int EACH = ITEMS / GROUPS, N = EACH < 8 ? EACH : 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, strip = warp % STRIPS, group = warp / STRIPS;
    const int own = strip * 64 + lane * 2;
    const float NONE = __uint_as_float(0xff800000);  // minus infinity: no item
    Softmax s = {make_float2(LOWEST, LOWEST), make_float2(0, 0), make_float2(0, 0)};
#pragma unroll 1
    for (int first = group * EACH; group < GROUPS && first < (group + 1) * EACH; first += N) {
        float2 values[N], gates[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int i = first + n;
            values[n] = make_float2(0, 0), gates[n] = make_float2(NONE, NONE);
            if (block.missing(i)) continue;
            const float* const from = block.value(i) + own;
            values[n] = *(const float2*)from, gates[n] = *(const float2*)(from + block.W);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (!block.is_near(first + n)) continue;
            const float2 bias = *(const float2*)(block.bias(first + n) + own);
            gates[n].x += bias.x, gates[n].y += bias.y;
        }
        s.add(values, gates);
    }
    if (GROUPS > 1) {
        shared.parts[warp][0][lane] = s.top, shared.parts[warp][1][lane] = s.total, shared.parts[warp][2][lane] = s.sum;
        __syncthreads();
        float2 top = s.top, total = make_float2(0, 0), sum = total;
#pragma unroll
        for (int g = 1; g < GROUPS; g++) {
            const float2 other = shared.parts[g * STRIPS + strip][0][lane];
            top = make_float2(fmaxf(top.x, other.x), fmaxf(top.y, other.y));
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const float2 (&part)[3][32] = shared.parts[g * STRIPS + strip];
            const float2 shrink = make_float2(__expf(part[0][lane].x - top.x), __expf(part[0][lane].y - top.y));
            const float2 more = part[1][lane], value = part[2][lane];
            total.x = __fmaf_rn(more.x, shrink.x, total.x), total.y = __fmaf_rn(more.y, shrink.y, total.y);
            sum.x = __fmaf_rn(value.x, shrink.x, sum.x), sum.y = __fmaf_rn(value.y, shrink.y, sum.y);
        }
        s.total = total, s.sum = sum;
    }
    const u32 pair = pair_of(__fdividef(s.sum.x, s.total.x), __fdividef(s.sum.y, s.total.y));
    if (SPREAD) meet();  // the first block has begun
    if (group == 0) {
        float2* const to = (float2*)(shared.pooled + (SPREAD ? blockIdx.x * SHARE : 0) + own);
        if (SPREAD) put_first(to, make_float2(low(pair), high(pair)));
        else *to = make_float2(low(pair), high(pair));
    }
    if (SPREAD) arrive(), meet();
    else __syncthreads();
}

// The entry of a block that `t` closes.
__device__ __forceinline__ void make_entry(
    Shared& shared, const Compressor& c, const Token& t, u32 near, const float* turns, const int* table, int pages,
    float eps
) {
    constexpr int SHARE = C / CLUSTER;
    const Items<C> block(c, t, near, blockIdx.x * SHARE);
    block.fetch<SHARE>();
    fetch_ends<C>(shared, c.norm, turns, t, table, pages);
    if (CLUSTER > 1) arrive();
    wait();
    pool<C, SHARE, (CLUSTER > 1)>(shared, block);
    if (blockIdx.x || threadIdx.x >= 32) return;
    Row row(shared.pooled);
    row.finish<true>(eps, Loaded(shared.norm), row_turn(shared.turn));
    row.store(c.data, (u8*)c.scales, shared.place);
}

// Its index key.
__device__ __forceinline__ void make_key(
    Shared& shared, const Compressor& c, const Token& t, u32 near, const float* turns, const int* table, int pages,
    float eps
) {
    const Items<D> block(c, t, near, 0);
    block.fetch<D>();
    fetch_ends<D>(shared, c.norm, turns, t, table, pages);
    wait();
    pool<D, D, false>(shared, block);
    if (threadIdx.x >= 32) return;
    const int column = threadIdx.x % LANES * 8;
    float v[8], weight[8];
    unpack(weight, *(const uint4*)(shared.norm + column));
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = shared.pooled[column + e];
    const float factor = rms_factor(sum_of(squares(v), LANES), D, eps);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = v[e] * factor * weight[e];
    to_bf16(v);
    turned(v, Turn(shared.turn, column - (D - ROPE)));
    mix(v);
    store_key(v, c, shared.place);
}

// --- what a warp does ---

// Part `part` of what a token leaves in a tail of entries of WIDTH.
template <int WIDTH>
__device__ __forceinline__ void keep(const Compressor& c, const Token& t, int part) {
    constexpr int W = HALVES * WIDTH;
    constexpr bool WHOLE = 2 * W % PART == 0;
    const int column = part * PART + threadIdx.x % 32 * 4;
    float4 bias[2], v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int gate = column + i * 128 - W;
        bias[i] = make_float4(0, 0, 0, 0);
        if (gate >= 0 && gate < W) bias[i] = *(const float4*)(c.bias + t.position % BLOCK * W + gate);
    }
    wait();
    if (t.slot < 0) return;
    const float* const from = c.projected + t.b * (i64)c.stride;
    float* const to = c.tail + ((i64)t.slot * TAIL + t.position % TAIL) * (2 * W);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (WHOLE || column + i * 128 < 2 * W) v[i] = *(const float4*)(from + column + i * 128);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!WHOLE && column + i * 128 >= 2 * W) continue;
        const float4 biased = make_float4(v[i].x + bias[i].x, v[i].y + bias[i].y, v[i].z + bias[i].z, v[i].w + bias[i].w);
        *(float4*)(to + column + i * 128) = biased;
    }
}

__device__ __forceinline__ void keep_row(
    const u16* kv, const u16* norm, u8* data, u8* scales, const Token& t, const float* turns, float eps
) {
    const Loaded weights(norm);
    const Turn turn = row_turn(turns + t.b * ROPE);
    wait();
    if (t.slot < 0) return;
    Row row(kv);
    row.finish<true>(eps, weights, turn);
    row.store(data, scales, (i64)t.slot * RING + t.position % RING);
}

__device__ __forceinline__ void query(const u16* q, u16* out, const Token& t, const float* turns, float eps) {
    const Turn turn = row_turn(turns + t.b * ROPE);
    wait();
    Row row(q);
    row.finish<false>(eps, {}, turn);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        if (inside(column_of(i))) *(uint4*)(out + column_of(i)) = packed(row.v[i]);
}

// Of the heads from the INDEX_HEADS * `group` th on.
__device__ __forceinline__ void index_queries(
    const u16* q, u16* out, const Token& t, const float* turns, int group, int heads
) {
    const int lane = threadIdx.x % 32, head = group * INDEX_HEADS + lane / LANES, column = lane % LANES * 8;
    const Turn turn(turns + t.b * ROPE, column - (D - ROPE));
    const i64 place = ((i64)t.b * heads + head) * D + column;
    float v[8] = {};
    wait();
    if (head < heads) unpack(v, *(const uint4*)(q + place));
    turned(v, turn);
    mix(v);
    const float scale = to_fp4(v);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] *= scale;
    if (head < heads) *(uint4*)(out + place) = packed(v);
}

// q and out BF16 [T, heads, C], index_q and index_out [T, index_heads, D], kv [T, kv_stride]; the window's rows; turns
// float32 [T, ROPE] of tokens and of their blocks; table int32 [slots, pages]. A block's warps have what stands gridDim.x
// apart, so that the blocks have something of each kind.
extern "C" __global__ void TOGETHER __launch_bounds__(THREADS, 4) prepare(
    const u16* q, u16* out, const u16* index_q, u16* index_out, const u16* kv, const u16* kv_norm, u8* window,
    u8* window_scales, const float* turns, const float* block_turns, const int* slots, const int* positions,
    const int* table, Compressor entries, Compressor keys, i64 kv_stride, int heads, int index_heads, int pages, float eps
) {
    __shared__ Shared shared;
    begin_next();
    const Token t = {(int)blockIdx.y, slots[blockIdx.y], positions[blockIdx.y]};
    const int block = blockIdx.x;
    if (RATIO && block < POOLS) {
        if (t.slot < 0 || (t.position + 1) % BLOCK) return wait();
        const u32 near = neighbours(t, slots, positions);
        if (block < CLUSTER) make_entry(shared, entries, t, near, block_turns, table, pages, eps);
        else if (RATIO == 4) make_key(shared, keys, t, near, block_turns, table, pages, eps);
        return;
    }
    int task = threadIdx.x / 32 * ((int)gridDim.x - POOLS) + block - POOLS;
    if (task < heads) {
        const i64 place = ((i64)t.b * heads + task) * C;
        query(q + place, out + place, t, turns, eps);
    } else if ((task -= heads) == 0) keep_row(kv + t.b * kv_stride, kv_norm, window, window_scales, t, turns, eps);
    else if ((task -= 1) < PARTS) keep<C>(entries, t, task);
    else if ((task -= PARTS) < KEY_PARTS) keep<D>(keys, t, task);
    else if (RATIO == 4 && (task -= KEY_PARTS) * INDEX_HEADS < index_heads)
        index_queries(index_q, index_out, t, turns, task, index_heads);
    else wait();
}
