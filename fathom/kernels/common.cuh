// What the CUDA kernels share: types, dependent launch (rules: common_triton.py), pairs of BF16, a cluster's shared memory,
// and what ranks leave each other (mailbox.py).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

__device__ __forceinline__ void begin_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u32 pair_of(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Of what another block of the cluster has where this one has `mine`.
__device__ __forceinline__ u32 address_in(int block, const void* mine) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address(mine)), "r"(block));
    return r;
}

// Ranks that sum: what one leaves for the others is a word of two BF16 and the number of the sum, which arrive together.
// places: each rank's words [2, ranks, BLOCKS, WORDS]; numbers: each block's last sum; stop: set when nobody is to wait.
constexpr int WORDS = 128, BLOCKS = 2048, MOST_RANKS = 8;

struct Mailbox {
    u64* places[MOST_RANKS];
    u32* numbers;
    const volatile int* stop;
    int rank, ranks;
};

// Where a word of a block's sum stands among those that a rank has for one sender. Two sums' worth are enough: a rank that
// leaves its part of a sum has the others' of the sum before, which they left when they were done with the one before that.
// (After 2^32 sums of a block numbers begin anew: by then a step has written every word that it looks at.)
__device__ __forceinline__ int place_of(const Mailbox& box, int block, u32 number, int word) {
    return ((number & 1) * box.ranks * BLOCKS + block) * WORDS + word;
}

// To all the others.
__device__ __forceinline__ void leave(const Mailbox& box, int place, u32 number, u32 pair) {
    for (int r = 0; r < box.ranks; r++)
        if (r != box.rank)
            asm volatile("st.relaxed.sys.global.u64 [%0], %1;"
                         :: "l"(box.places[r] + box.rank * BLOCKS * WORDS + place), "l"((u64)number << 32 | pair) : "memory");
}

__device__ __forceinline__ u64 look(const u64* word) {
    u64 found;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
    return found;
}

// The sums of all ranks' parts, in the order of the ranks, rounded as each is added; own: this rank's, and the sums.
template <int COUNT>
__device__ __forceinline__ void sum_up(
    u32 (&own)[COUNT], const Mailbox& box, const int (&places)[COUNT], const u32 (&numbers)[COUNT], int count
) {
    u32 sum[COUNT];
    for (int r = 0; r < box.ranks; r++) {
        const u64* words = box.places[box.rank] + r * BLOCKS * WORDS;
        u64 found[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (i < count) found[i] = r == box.rank ? (u64)numbers[i] << 32 | own[i] : look(words + places[i]);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i >= count) break;
            for (u32 looks = 1; (u32)(found[i] >> 32) != numbers[i] && (looks % 4096 || !*box.stop); looks++)
                found[i] = look(words + places[i]);
            const u32 part = (u32)found[i];
            sum[i] = r ? pair_of(low(sum[i]) + low(part), high(sum[i]) + high(part)) : part;
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) own[i] = sum[i];
}
