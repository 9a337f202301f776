"""Compiles kernels for Hopper where there is none: `python -m tests.kernels.compile_for_hopper`.

The interpreter accepts what the compiler does not (types that change in a loop, names that change their shape). Here
every launch of the ops below, at V4-Flash's sizes and the embedded model's, is compiled to machine code instead of run;
CUDA sources likewise where NVRTC is installed. Prints a line a kernel, and ends with 1 if one does not compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from fathom.config import WEIGHTS, ModelConfig, preset
from fathom.engine.device_cache import DeviceCache
from fathom.kernels import common_triton
from fathom.kernels.decode import Tokens
from fathom.kernels.store import Norms, Pooling, Projected

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e8m0fnu: "*u8",
    torch.bool: "*i1",
}  # fmt: skip
_LAUNCH = ("num_warps", "num_stages", "maxnreg")
_HOPPER = GPUTarget("cuda", 90, 32)
_seen: dict[str, str] = {}


def _compiling(kernel: Any, grid: Any) -> Callable[..., None]:
    """What stands in for a launch."""

    def launch(*args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in _LAUNCH if name in named}
        named.pop("launch_pdl", None)
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        types, constants, aligned = {}, {}, {}
        for parameter in kernel.params:
            value = given[parameter.name]
            kind = None if parameter.is_constexpr else _type(value, parameter.do_not_specialize)
            types[parameter.name] = kind or "constexpr"
            if kind is None:
                constants[(parameter.num,)] = value
            elif kind.startswith("*"):
                aligned[(parameter.num,)] = [["tt.divisibility", 16]]
        key = f"{kernel.__module__}.{kernel.__name__} {types} {constants} {options}"
        if key not in _seen:
            source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
            _seen[key] = _outcome(lambda: triton.compile(source(kernel, types, constants, aligned), _HOPPER, options))
            print(f"{_seen[key][:400]:10} {kernel.__module__}.{kernel.__name__} {options}", flush=True)

    return launch


def _type(value: Any, general: bool) -> str | None:
    """The type of an argument; None for what is compiled in: a 1, nothing."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if value is None or (value == 1 and not isinstance(value, float) and not general):
        return None
    return "i1" if isinstance(value, bool) else "fp32" if isinstance(value, float) else "i32"


def _outcome(compile_it: Callable[[], Any]) -> str:
    try:
        compile_it()
    except Exception as error:
        while error.__cause__:
            error = error.__cause__  # type: ignore[assignment]
        return f"FAILED {str(error)[-360:]}"
    return "compiled"


def _configs() -> Iterator[ModelConfig]:
    flash = preset("flash")
    yield replace(flash, num_attention_heads=32, o_groups=4, moe_intermediate_size=1024)
    yield flash
    yield ModelConfig.load(WEIGHTS / "small")


def _layers(c: ModelConfig) -> None:
    """Stores, choice and attention of steps and of prompts."""
    from fathom.kernels import (
        attend_triton,
        index_triton,
        prefill_index_triton,
        prefill_read_triton,
        prefill_triton,
        store_triton,
        stored_triton,
    )

    rand = torch.randn
    for ratio, packed in ((0, False), (4, False), (4, True), (128, False)):
        some = replace(c, compress_ratios=(ratio,) * len(c.compress_ratios), num_hidden_layers=len(c.compress_ratios),
                       num_nextn_predict_layers=0)  # fmt: skip
        cache = DeviceCache(replace(some, compress_ratios=some.compress_ratios[:1], num_hidden_layers=1,
                                    num_hash_layers=1), 2, 8, 1024, "cpu", packed)  # fmt: skip
        memory, width, dim = cache.layers[0], c.head_dim, c.index_head_dim
        wide, bf16 = (2 if ratio == 4 else 1) * width, torch.bfloat16
        made = Projected(
            rand(8, c.num_attention_heads, width).to(bf16), rand(8, width).to(bf16),
            rand(8, 2 * wide) if ratio else None,
            rand(8, c.index_n_heads, dim).to(bf16) if ratio == 4 else None, rand(8, 4 * dim) if ratio == 4 else None,
        )  # fmt: skip
        pooling = [Pooling(rand(ratio, wide), rand(width).to(bf16))] if ratio else []
        pooling += [Pooling(rand(4, 2 * dim), rand(dim).to(bf16))] if ratio == 4 else []
        norms = Norms(rand(width).to(bf16), 1e-6, *pooling)
        where = torch.arange(8, dtype=torch.int32)
        tokens = Tokens(where % 2, where + 300, rand(4, 8, c.qk_rope_head_dim // 2, 2))
        q, index_q = store_triton.prepare(made, tokens, memory, norms)
        store_triton.enter(made, tokens, memory, norms)
        store_triton.remember(made, tokens, memory, norms, 0, 8, 308)
        near, chosen, picked, entries = stored_triton.recent(memory.window, 1, 200, 100), None, None, None
        if index_q is not None:
            weights = rand(8, c.index_n_heads).to(bf16)
            chosen = index_triton.select(index_q, weights, tokens, memory, c.index_topk, 1024)
            keys = prefill_read_triton.read_keys(memory.table, memory.keys, 0, 200)
            picked = prefill_index_triton.select(index_q, weights.float(), *keys, 800, c.index_topk)
        if ratio:
            entries = prefill_read_triton.read_rows(memory.table, memory.entries, 0, 0, 1024 // ratio)
        attend_triton.attend(q, rand(c.num_attention_heads), tokens, memory, 1024, chosen)
        prefill_triton.attend(
            q, near, entries, picked, rand(c.num_attention_heads), tokens.turns[0].contiguous(), 300, ratio, 128
        )


def main() -> int:
    torch.manual_seed(0)
    capability = mock.patch("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    dependent = mock.patch.object(common_triton, "_dependent_launch", lambda device: True)
    with torch.inference_mode(), capability, dependent, mock.patch.object(JITFunction, "__getitem__", _compiling):
        for config in _configs():
            _layers(config)
    failed = [key for key, outcome in _seen.items() if outcome != "compiled"]
    print(f"{len(_seen)} kernels, {len(failed)} do not compile")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
