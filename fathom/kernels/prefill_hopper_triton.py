"""Attention of a prompt's queries with Hopper's matrix instructions: `prefill_triton`'s sums, placed by hand (Gluon).

What Triton cannot be told: the logits' product is shared by two groups of four warps instead of being made by both, and
rows are copied to shared memory while others are multiplied. With up to 32 columns two programs share a multiprocessor
and have one block of rows each; else one program has two blocks. The list of rows is that of `prefill_triton`. Instead
of rows that nobody sees some other rows are copied: all must be finite.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name up to Triton 3.6, and since
ONCE, TWICE = {"num_warps": 8}, {"num_warps": 8, "maxnreg": 128}
"""Launch options where a multiprocessor has one program at a time, or two."""
PAIRS = 32
"""Rotated pairs of a row: they fill a swizzled panel of shared memory, which is read alone."""


@gluon.jit
def _entry(chosen, own, at, WINDOW: gl.constexpr, K: gl.constexpr, CHOSEN: gl.constexpr):
    """Entries by their place in the list; -1 where there is none."""
    place = at - WINDOW
    if CHOSEN:
        return gl.load(chosen + own * K + place, mask=(place >= 0) & (place < K), other=-1)
    else:
        return place


@gluon.jit
def _copy(to, rows, entries, at, e, first, last, ENTRIES, C: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr,
          layout: gl.constexpr):  # fmt: skip
    """Begin to copy the list's rows `at`, whose entries are `e`."""
    source = rows + gl.minimum(gl.maximum(at, first), last - 1) * C
    if RATIO > 0:
        entry = gl.minimum(gl.maximum(e, 0), ENTRIES - 1).to(gl.int64)
        source = gl.where((at >= WINDOW) & (ENTRIES > 0), entries + entry * C, source)
    rc = gl.arange(0, C, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(to, source[:, None] + rc[None, :])


@gluon.jit
def _pairs(x, N: gl.constexpr, ROPE: gl.constexpr):
    return gl.split(gl.reshape(x, (N, ROPE // 2, 2)))


@gluon.jit(do_not_specialize=["START", "T", "BEFORE", "ENTRIES"])
def attend(
    q, near, entries, chosen, sink, turn, out, START, T, BEFORE, ENTRIES, H, SCALE, K: gl.constexpr, HB: gl.constexpr,
    C: gl.constexpr, ROPE: gl.constexpr, SPAN: gl.constexpr, RATIO: gl.constexpr, Q: gl.constexpr, B: gl.constexpr,
    CHOSEN: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    N: gl.constexpr = Q * HB
    WINDOW: gl.constexpr = SPAN + Q - 1
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    short: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    long: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 16])
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([B, C], gl.bfloat16)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([B, N], gl.bfloat16)
    x = gl.allocate_shared_memory(gl.bfloat16, [N, C], tile)
    ks = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, B, C], tile)
    ps = gl.allocate_shared_memory(gl.bfloat16, [B, N], square)
    # One factor a column, on its way from the logits' layout to that of the results.
    factors = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    first = (START // Q + gl.program_id(0)) * Q
    own = first.to(gl.int64) - START
    number = 0
    if RATIO > 0:
        number = gl.minimum((first + Q) // RATIO, ENTRIES)
    if CHOSEN:
        number = gl.minimum(number, K)
    # The list begins with the window of the first query; of the window's rows, those of SKIP .. LAST - 1 are in `near`.
    skip = gl.maximum(START - BEFORE - first + SPAN - 1, 0)
    last = gl.minimum(START + T - first + SPAN - 1, WINDOW)
    rows = near + (first - SPAN + 1 - START + BEFORE).to(gl.int64) * C
    begin = gl.maximum(SPAN - 1 - first, 0) // B * B
    end = WINDOW + number

    r = gl.arange(0, B, gl.SliceLayout(1, wide))
    rs = gl.arange(0, B, gl.SliceLayout(1, short))
    e = _entry(chosen, own, begin + r, WINDOW, K, CHOSEN)
    es = _entry(chosen, own, begin + rs, WINDOW, K, CHOSEN)
    _copy(ks.index(0), rows, entries, begin + r, e, skip, last, ENTRIES, C, WINDOW, RATIO, wide)
    async_copy.commit_group()
    e = _entry(chosen, own, begin + B + r, WINDOW, K, CHOSEN)
    column = gl.arange(0, N, gl.SliceLayout(1, wide))
    t = own + column // HB
    real = (t >= 0) & (t < T) & (column % HB < H)
    rc = gl.arange(0, C, gl.SliceLayout(0, wide))
    rr = gl.arange(0, ROPE, gl.SliceLayout(0, wide))
    place = (t * H + column % HB)[:, None] * C
    queries = gl.load(q + place + rc[None, :], mask=real[:, None], other=0.0)
    cos, sin = _pairs(gl.load(turn + t[:, None] * ROPE + rr[None, :], mask=real[:, None], other=0.0), N, ROPE)
    x.store(queries)
    behind = gl.arange(0, N, gl.SliceLayout(0, short)) // HB
    closed = (first + behind + 1) // RATIO if RATIO > 0 else behind
    top = gl.full([N], -1e38, gl.float32, gl.SliceLayout(0, short))
    sums = gl.full([B, N], 0.0, gl.float32, short)
    none = gl.full([B, N], 0.0, gl.float32, short)
    acc = gl.full([C, N], 0.0, gl.float32, long)
    slot = 0
    for v in range(begin, end, B):
        async_copy.wait_group(0)
        fence_async_shared()
        _barrier()
        k = ks.index(slot)
        if BUFFERS == 2:
            slot = 1 - slot
            if v + B < end:
                _copy(ks.index(slot), rows, entries, v + B + r, e, skip, last, ENTRIES, C, WINDOW, RATIO, wide)
            async_copy.commit_group()
            e = _entry(chosen, own, v + 2 * B + r, WINDOW, K, CHOSEN)
        logits = warpgroup_mma(k, x.permute((1, 0)), none, use_acc=False)
        at = v + rs
        seen = (at >= skip) & (at < last)
        if RATIO > 0:
            there = (at >= WINDOW) & (es >= 0) & (es < ENTRIES)
            if Q == 1:
                seen = (seen | (there & (at < end)))[:, None]
            else:
                ahead = at[:, None] - behind[None, :]
                seen = seen[:, None] & ((ahead >= 0) & (ahead < SPAN))
                seen = seen | (there[:, None] & (es[:, None] < closed[None, :]))
        else:
            seen = seen[:, None]
        es = _entry(chosen, own, v + B + rs, WINDOW, K, CHOSEN)
        logits = gl.where(seen, logits * SCALE, float("-inf"))
        new = gl.maximum(top, gl.max(logits, 0))
        shrink = gl.exp2(top - new)
        p = gl.exp2(logits - new[None, :])
        sums = sums * shrink[None, :] + p
        top = new
        factors.store(shrink)
        ps.store(p.to(gl.bfloat16))
        acc = acc * factors.load(gl.SliceLayout(0, long))[None, :]
        fence_async_shared()
        acc = warpgroup_mma(k.permute((1, 0)), ps, acc)
        if BUFFERS == 1:
            _barrier()
            if v + B < end:
                _copy(k, rows, entries, v + B + r, e, skip, last, ENTRIES, C, WINDOW, RATIO, wide)
            async_copy.commit_group()
            e = _entry(chosen, own, v + 2 * B + r, WINDOW, K, CHOSEN)
    column = gl.arange(0, N, gl.SliceLayout(0, short)) % HB
    bar = gl.load(sink + column, mask=column < H, other=0.0) * 1.4426950408889634
    new = gl.maximum(top, bar)
    shrink = gl.exp2(top - new)
    share = shrink / (gl.sum(sums, 0) * shrink + gl.exp2(bar - new))
    factors.store(share)
    y = acc * factors.load(gl.SliceLayout(0, long))[None, :]
    x.permute((1, 0)).store(y.to(gl.bfloat16))
    gl.store(out + place + rc[None, :], x.load(wide), mask=real[:, None] & (rc < C - ROPE)[None, :])
    even, odd = _pairs(x.slice(C - ROPE, ROPE, dim=1).load(wide).to(gl.float32), N, ROPE)
    y = gl.reshape(gl.join(even * cos + odd * sin, odd * cos - even * sin), (N, ROPE)).to(gl.bfloat16)
    gl.store(out + place + (C - ROPE) + rr[None, :], gl.convert_layout(y, wide), mask=real[:, None])
