// FP4 experts for the few tokens of a step, on Hopper's FP8 tensor cores. Reference 2.10 and 4; the launcher and the
// contract are in experts_cuda.py.
//
// A block has 64 rows of one expert and all the pairs (token, expert) that chose it, eight at a time: weights are the
// rows of the products, pairs their columns. FP4 becomes e4m3 by table (exactly; 7 operations for 8 weights), activations
// are e4m3 already. A product sums 32 columns, which is one scale of a row; scales are applied to its result, so what the
// tensor cores round is far below float32's use. A pair's result does not know what else is in the batch.
//
// K       columns; a multiple of 128
// GROUPS  groups of four warps: 2 have half of the columns each; 1 sums the halves in the same order
// STAGES  chunks of 128 columns that are on their way to a warp at once; an even number
// UP      1: gate and up rows, joined by SwiGLU (BF16 [P, N]); 0: down (float32 [P, N])
// TOP     experts a token

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = GROUPS * 128, CHUNKS = K / 128, HALF = (CHUNKS + 1) / 2, PAIRS = 8, MOST = 512;
constexpr bool EVEN = HALF % STAGES == 0 && CHUNKS % STAGES == 0;

template <int BYTES>
__device__ __forceinline__ void copy(void* to, const void* from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ float exponent(u32 byte) { return __uint_as_float(byte << 23); }

// Weights 0..3 and 4..7 of a word as e4m3: magnitudes by table, signs stand where they belong (`words`).
__device__ __forceinline__ void unpack(u32 word, u32& low, u32& high, uint2 table) {
    const u32 m = word & 0x77777777u;
    low = __byte_perm(table.x, table.y, m) | (word & 0x80808080u);
    high = __byte_perm(table.x, table.y, m >> 16) | ((word << 4) & 0x80808080u);
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 columns) {
    const u64 b = (u64)(128 >> 4) << 32 | columns;
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 0, 1, 1;"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The low word of what describes columns in shared memory: 16 bytes of 8 of them lie one after the other, the next 16 of
// K 128 bytes further (the high word has the same distance).
__device__ __forceinline__ u32 described(const u8* x) {
    return ((u32)__cvta_generic_to_shared(x) >> 4 & 0x3fff) | (128 >> 4) << 16;
}

// The pairs that chose the expert of pair `own`, in order; none if an earlier one did, whose block does the work.
__device__ int company(const int* chosen, int total, int own, int* list) {
    if (total <= TOP) {
        if (threadIdx.x == 0) list[0] = own;
        __syncthreads();
        return 1;
    }
    __shared__ int counts[MOST / 32];
    const int expert = chosen[own];
    for (int i = threadIdx.x; i < MOST; i += THREADS) {
        const bool same = i < total && chosen[i] == expert;
        const u32 mask = __ballot_sync(~0u, same);
        if (threadIdx.x % 32 == 0) counts[i / 32] = mask;
    }
    __syncthreads();
    int before = 0, all = 0;
    for (int i = 0; i < MOST / 32; i++) {
        if (i * 32 <= own) before += __popc(counts[i] & (own - i * 32 >= 32 ? ~0u : (1u << (own - i * 32)) - 1));
        const int bit = threadIdx.x;
        if (bit < 32 && (counts[i] >> bit & 1)) list[all + __popc(counts[i] & ((1u << bit) - 1))] = i * 32 + bit;
        all += __popc(counts[i]);
    }
    __syncthreads();
    return before ? 0 : all;
}

// e4m3 rows of x into shared memory: of 32 columns the first four of each eight, then the others. What columns hold that
// are nobody's does not matter: nobody reads their results.
__device__ void place(u8* to, float* factors, const u8* x, const float* scales, const int* list, int count) {
    for (int i = threadIdx.x; i < count * (K / 32); i += THREADS) {
        const int n = i / (K / 32), group = i % (K / 32);
        const uint4* from = (const uint4*)(x + (long long)(list[n] / (UP ? TOP : 1)) * K + group * 32);
        const uint4 a = from[0], b = from[1];
        *(uint4*)(to + group * 256 + n * 16) = make_uint4(a.x, a.z, b.x, b.z);
        *(uint4*)(to + group * 256 + 128 + n * 16) = make_uint4(a.y, a.w, b.y, b.w);
    }
    for (int i = threadIdx.x; i < count * CHUNKS; i += THREADS) {
        const int n = i / CHUNKS, chunk = i % CHUNKS;
        factors[chunk * PAIRS + n] = scales[(list[n] / (UP ? TOP : 1)) * CHUNKS + chunk];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

// The two rows that a lane multiplies of a warp's 16, 64 bytes each: for each of four scales one word a row.
__device__ __forceinline__ void unpacked(u32 (&a)[4][4], const u8* const (&at)[4], int slot, uint2 table) {
#pragma unroll
    for (int m = 0; m < 4; m++) {
        unpack(*(const u32*)(at[m] + slot * 1024), a[m][0], a[m][2], table);
        unpack(*(const u32*)(at[m] + slot * 1024 + 512), a[m][1], a[m][3], table);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) experts(
    const u8* weights, const u8* exponents, const u8* x, const float* scales, const int* chosen, const float* shares,
    void* out, int total, int rows, float limit
) {
    extern __shared__ __align__(128) u8 memory[];
    u8* const xs = memory;                                               // [K / 16, PAIRS, 16]
    u8* const powers = xs + PAIRS * K;                                   // [64, K / 32]
    u8* const ring = powers + 64 * (K / 32);                             // [GROUPS * 4 warps, STAGES, 16, 64]
    __shared__ float factors[PAIRS * CHUNKS], parts[128][4];
    __shared__ int list[MOST];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int own = blockIdx.y, warp = threadIdx.x / 32 % 4, group = GROUPS == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    const int g = lane / 4, j = lane % 4;
    const int count = company(chosen, total, own, list);
    if (!count) return;
    // A warp has 16 rows: gate rows stand beside their up rows, half of the matrix further.
    const long long top = (long long)chosen[own] * (UP ? 2 * rows : rows);
    const long long row = top + (UP ? blockIdx.x * 32 + warp * 8 : blockIdx.x * 64 + warp * 16), far = UP ? rows : 8;
    const int from = group * HALF, end = GROUPS == 2 && !group ? HALF : CHUNKS;
    u8* const mine = ring + (threadIdx.x / 32) * STAGES * 1024;
    u8* const to = mine + g * 64 + (j ^ (g >> 1 & 3)) * 16;
    const u8* const at[4] = {
        mine + g * 64 + (0 ^ (g >> 1 & 3)) * 16 + j * 4, mine + g * 64 + (1 ^ (g >> 1 & 3)) * 16 + j * 4,
        mine + g * 64 + (2 ^ (g >> 1 & 3)) * 16 + j * 4, mine + g * 64 + (3 ^ (g >> 1 & 3)) * 16 + j * 4};
    const u8* const power = powers + (warp * 16 + g) * (K / 32);
    const u32 columns = described(xs);
    uint2 table = make_uint2(0x3c383000u, 0x4c484440u);
    asm volatile("" : "+r"(table.x), "+r"(table.y));  // in registers, not made anew for every word
    for (int i = threadIdx.x; i < 64 * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, at = i % CHUNKS * 4, w = r / 16;
        const long long place = top + (UP ? blockIdx.x * 32 + w * 8 : blockIdx.x * 64 + w * 16) + r / 8 % 2 * far + r % 8;
        copy<4>(powers + r * (K / 32) + at, exponents + place * (K / 32) + at);
    }
    for (int first = 0; first < count; first += PAIRS) {
        const int now = min(PAIRS, count - first);
        float sum[4] = {}, before[4] = {};
        const u8* near = weights + (row + g) * (K / 2) + from * 64 + j * 16;
        const u8* away = near + far * (K / 2);
        const auto load = [&](int chunk, int slot) {
            if (chunk < end) copy<16>(to + slot * 1024, near), copy<16>(to + slot * 1024 + 512, away);
            near += 64, away += 64;
            commit();
        };
#pragma unroll
        for (int c = 0; c < STAGES - 1; c++) load(from + c, c);
        place(xs, factors, x, scales, list + first, now);
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();
        u32 a[2][4][4];
        unpacked(a[0], at, 0, table);
        for (int begin = from; begin < end; begin += STAGES) {
#pragma unroll
            for (int c = 0; c < STAGES; c++) {
                const int chunk = begin + c;
                if (!EVEN && chunk >= end) break;
                if (GROUPS == 1 && (c == 0 || !EVEN) && chunk == HALF)
#pragma unroll
                    for (int i = 0; i < 4; i++) before[i] = sum[i], sum[i] = 0;
                float d[4][4];
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int m = 0; m < 4; m++) multiply(d[m], a[c % 2][m], columns + (chunk * 4 + m) * 16);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                load(chunk + STAGES - 1, (c + STAGES - 1) % STAGES);
                asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
                __syncwarp();
                unpacked(a[(c + 1) % 2], at, (c + 1) % STAGES, table);
                const u32 of[2] = {*(const u32*)(power + chunk * 4), *(const u32*)(power + 8 * (K / 32) + chunk * 4)};
                const float2 f = *(const float2*)(factors + chunk * PAIRS + 2 * j);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
                for (int m = 0; m < 4; m++)  // nothing may read the results above the wait
#pragma unroll
                    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[m][i])::"memory");
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float part = 0;
#pragma unroll
                    for (int m = 0; m < 4; m++) part += d[m][i] * exponent(of[i / 2] >> 8 * m & 0xff);
                    sum[i] += part * (i % 2 ? f.y : f.x);
                }
            }
        }
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        if (group) {
#pragma unroll
            for (int i = 0; i < 4; i++) parts[threadIdx.x % 128][i] = sum[i];
        }
        __syncthreads();
        if (!group) {
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] = GROUPS == 2 ? sum[i] + parts[threadIdx.x][i] : before[i] + sum[i];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int n = 2 * j + i;
                if (n >= now) continue;
                const long long pair = list[first + n];
                if (UP) {
                    const float a = fminf(sum[i], limit), b = fminf(fmaxf(sum[2 + i], -limit), limit);
                    const float y = __fdiv_rn(a, 1.0f + __expf(-a)) * b * shares[pair];
                    u16 bits;
                    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(y));
                    ((u16*)out)[pair * rows + blockIdx.x * 32 + warp * 8 + g] = bits;
                } else {
                    float* to = (float*)out + pair * rows + blockIdx.x * 64 + warp * 16 + g;
                    to[0] = sum[i], to[8] = sum[2 + i];
                }
            }
        }
        __syncthreads();
    }
}
