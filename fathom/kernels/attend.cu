// The parts of a step's attention, summed up. Reference 2.6, 2.9; the launcher and the contract are in attend_cuda.py.
//
// A block has 256 columns of one head of one token, a thread two of them, and few registers: what follows in a layer loads
// its weights meanwhile, and needs the multiprocessors' room for it. Parts are summed in their order.
//
// C       columns of a head, a multiple of 256; the last ROPE are turned back
// SPAN    tokens of the window, in blocks of ROWS; those before position 0 left no part
// RATIO   tokens of an entry, 0: none; MOST_SPLITS of entries that are all looked at, CHOSEN: as many as there are

typedef unsigned short u16;
typedef unsigned int u32;

constexpr int THREADS = 128, WINDOWS = (SPAN + ROWS - 1) / ROWS, TOGETHER = 12, SLOTS = 2;  // of 32 parts each

__device__ __forceinline__ float most_of(float v) {
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
    return v;
}

__device__ __forceinline__ float sum_of(float v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

__device__ __forceinline__ u32 pair_of(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}

// The first part that a token has, and the one behind its last.
__device__ __forceinline__ int2 parts_of(int position, int slot, int most) {
    if (slot < 0) return make_int2(WINDOWS, WINDOWS);
    const int missing = SPAN - 1 - position;  // rows of the window before position 0
    const int entries = RATIO ? min((position + 1) / (RATIO ? RATIO : 1), most) : 0;
    const int blocks = CHOSEN ? 1 : max((entries + ROWS * MOST_SPLITS - 1) / (ROWS * MOST_SPLITS), 1);
    return make_int2(missing > 0 ? missing / ROWS : 0, WINDOWS + (entries + blocks * ROWS - 1) / (blocks * ROWS));
}

// parts float32 [T, all, H, C] with their sums [T, all, H, 2]: the largest logit and the sum; sink [H]; turn [T, ROPE].
extern "C" __global__ void __launch_bounds__(THREADS) combine(
    const float* parts, const float* sums, const float* sink, const float* turn, const int* slots, const int* positions,
    u32* out, int heads, int all, int most
) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int h = blockIdx.x / (C / 256), lane = threadIdx.x % 32, column = blockIdx.x % (C / 256) * 256 + threadIdx.x * 2;
    const long long t = blockIdx.y;
    const float bar = sink[h];
    const int2 has = parts_of(positions[t], slots[t], most);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const float* from = parts + ((t * all + has.x) * heads + h) * C + column;
    float2 own[SLOTS];
    float top = bar, share[SLOTS], total = 0;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
        const int s = has.x + i * 32 + lane;
        own[i] = s < has.y ? *(const float2*)(sums + ((t * all + s) * heads + h) * 2) : make_float2(-1e38f, 0);
        top = fmaxf(top, own[i].x);
    }
    top = most_of(top);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) share[i] = __expf(own[i].x - top), total += own[i].y * share[i];
    total = sum_of(total) + __expf(bar - top);
    const int count = has.y - has.x;
    float2 sum = make_float2(0, 0);
    for (int first = 0; first < count; first += TOGETHER) {
        float2 part[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
            part[i] = first + i < count ? *(const float2*)(from + (long long)(first + i) * heads * C) : make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int s = first + i;
            const float weight = __shfl_sync(~0u, s < 32 ? share[0] : share[1], s % 32);
            sum.x += weight * part[i].x, sum.y += weight * part[i].y;
        }
    }
    u32 pair = pair_of(__fdividef(sum.x, total), __fdividef(sum.y, total));
    if (column >= C - ROPE) {
        const float2 way = *(const float2*)(turn + t * ROPE + column - (C - ROPE));
        const float a = __uint_as_float(pair << 16), b = __uint_as_float(pair & 0xffff0000u);
        pair = pair_of(a * way.x + b * way.y, b * way.x - a * way.y);
    }
    out[((t * heads + h) * C + column) / 2] = pair;
}
