// The sum of all ranks' parts, BF16. The launcher and the contract: mailbox.py.
//
// EACH     blocks of a mailbox that a block of the grid has

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(WORDS, 4) add_up(
    const u32* part, u32* out, const __grid_constant__ Mailbox box, int pairs
) {
    u32 own[EACH], numbers[EACH];
    int places[EACH], count = 0;
    begin_next();
    wait();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int block = blockIdx.x + e * gridDim.x, i = block * WORDS + threadIdx.x;
        if (i >= pairs) break;
        numbers[e] = box.numbers[block] + 1, places[e] = place_of(box, block, numbers[e], threadIdx.x);
        own[e] = part[i], count = e + 1;
        leave(box, places[e], numbers[e], own[e]);
    }
    __syncthreads();
    sum_up(own, box, places, numbers, count);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int block = blockIdx.x + e * gridDim.x;
        if (e >= count) break;
        out[block * WORDS + threadIdx.x] = own[e];
        if (threadIdx.x == 0) box.numbers[block] = numbers[e];
    }
}
