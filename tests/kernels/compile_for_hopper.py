"""Compiles kernels for Hopper where there is none: `python -m tests.kernels.compile_for_hopper`.

The interpreter accepts what the compiler does not (types that change in a loop, names that change their shape). Here a
model without memory (torch's meta device) goes through steps of tokens and pieces of prompts, at the sizes of V4-Flash,
of one rank of two and of the embedded model, and samples. Every launch is compiled to machine code instead of run, once
for Hopper with all that it has, once for Hopper without NVRTC, where Triton's kernels stand for CUDA's, once for the
oldest device that has kernels. CUDA sources are compiled where NVRTC is found, and what they do while tensor cores work
is looked at (`machine_code`). Prints a line a kernel, and ends with 1 if one does not compile, or needs more shared
memory than Hopper has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from fathom.checkpoint.names import kind_of
from fathom.config import WEIGHTS, ModelConfig, preset
from fathom.engine.device_cache import DeviceCache
from fathom.engine.graphs import NEAR
from fathom.kernels import common_triton, cuda, dispatch, experts_many_triton, mailbox, prefill_triton, sample_triton
from fathom.kernels.mailbox import Mailbox, Unsummed, whole
from fathom.model.batch import Batch, Span
from fathom.model.layers import Linear, Numerics
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from fathom.parallel.plan import rank_model, summed
from tests.kernels.machine_code import listing, overwritten

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e8m0fnu: "*u8",
    torch.bool: "*i1", torch.float64: "*fp64",
}  # fmt: skip
_LAUNCH = ("num_warps", "num_stages", "maxnreg")
_DEVICES = (((9, 0), True), ((9, 0), False), ((8, 9), False))
"""Compute capabilities, and whether there is NVRTC."""
_SHARED = 227 << 10
"""Bytes of shared memory that a program of Hopper can have."""
_STEPS = (1, 2, 16, 32)
_PROMPTS = ((1,), (300,), (1024,), (2048,), (3000, 1000, 96))
"""Tokens of the pieces of one call: from 128 rows to 4096, each width of the experts' tiles."""
_LONG = 1 << 20
_seen: dict[str, str] = {}


def _compiling(target: GPUTarget) -> Callable[[Any, Any], Callable[..., None]]:
    """What stands in for `kernel[grid]`."""

    def indexed(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **named: _launched(target, kernel, args, named)

    return indexed


def _launched(target: GPUTarget, kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
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
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    name = f"sm_{target.arch} {kernel.__module__}.{kernel.__name__} {options}"
    key = f"{name} {types} {constants}"

    def compile_it() -> None:
        made = triton.compile(source(kernel, types, constants, aligned), target, options)
        assert target.arch != 90 or made.metadata.shared <= _SHARED, f"{made.metadata.shared} bytes of shared memory"

    _once(key, name, compile_it)


def _type(value: Any, general: bool) -> str | None:
    """The type of an argument; None for what is compiled in: a 1, nothing."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if value is None or (value == 1 and not isinstance(value, float) and not general):
        return None
    return "i1" if isinstance(value, bool) else "fp32" if isinstance(value, float) else "i32"


def _once(key: str, name: str, compile_it: Callable[[], Any]) -> None:
    if key not in _seen:
        _seen[key] = _outcome(compile_it)
        print(f"{_seen[key][:400]:10} {name}", flush=True)


def _outcome(compile_it: Callable[[], Any]) -> str:
    try:
        compile_it()
    except Exception as error:
        while error.__cause__:
            error = error.__cause__  # type: ignore[assignment]
        return f"FAILED {type(error).__name__} {str(error)[-360:]}"
    return "compiled"


def _source(file: str, name: str, device: torch.device, shared: int = 0, **constants: int) -> Callable[..., None]:
    """What stands in for `cuda.kernel`."""
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{k}={v}" for k, v in constants.items())]
    text = Path(cuda.__file__).with_name(file).read_text()

    def compile_it() -> None:
        code = cuda.compiled(text, options)
        found = overwritten(listing(code)) if "wgmma" in text else []
        assert not found, f"written while a product is under way: {found[:3]}"

    if _has_nvrtc():
        _once(f"{file} {options}", f"{file} {name} {constants}", compile_it)
    return lambda *arguments, **named: None


def _has_nvrtc() -> bool:
    try:
        return bool(cuda._nvrtc())
    except cuda.KernelError:
        return False


def _tops(weights: Any) -> tuple[Tensor, Tensor]:
    """What stands in for `tops_of`, which looks at the weights."""
    for words, scales, halves in ((weights.w13, weights.s13, 2), (weights.w2, weights.s2, 1)):
        with mock.patch("torch.Tensor.__bool__", lambda tensor: True):
            experts_many_triton._extremes(words, scales, halves)
    one = torch.empty(1, dtype=torch.uint8, device="meta")
    return one, one


@contextmanager
def _device(capability: tuple[int, int], compiles: bool = True) -> Iterator[None]:
    """Tensors of the meta device pass for those of a GPU; a launch compiles."""
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    cuda_kernels = ("attend", "linear", "index", "experts", "router", "store", "streams")
    launchers = [*(f"fathom.kernels.{name}_cuda" for name in cuda_kernels), "fathom.kernels.mailbox"]
    prefill_triton._hopper.cache_clear()
    with ExitStack() as stack:
        for name, stand_in in (
            ("torch.cuda.get_device_capability", lambda device=None: capability),
            ("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)),
            ("torch.cuda.device", lambda device: nullcontext()),
            ("torch.Tensor.is_cuda", True),
            ("torch.version.cuda", torch.version.cuda or "13.0"),
            *((f"{name}.kernel", _source) for name in launchers),
            *((f"{name}.compiles", lambda device, file: compiles) for name in launchers),
        ):
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(mock.patch.object(dispatch, "on", lambda device: True))
        stack.enter_context(mock.patch.object(common_triton, "_dependent_launch", lambda device: capability[0] >= 9))
        stack.enter_context(mock.patch.object(experts_many_triton, "tops_of", _tops))
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", _compiling(target)))
        yield


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _model(config: ModelConfig, tp: int) -> Transformer:
    """A model in the stored forms, FP4 in words."""
    eight, scale = torch.float8_e4m3fn, torch.float8_e8m0fnu
    with torch.device("meta"):
        model = rank_model(config, Numerics(torch.bfloat16, quantize=True), tp)
    for path, module in model.named_modules():
        own: dict[str, nn.Parameter] = dict(module.named_parameters(recurse=False))
        if isinstance(module, Experts):
            forms = []
            for *front, k in (module.w13.shape, module.w2.shape):
                forms += [_empty((*front, k // 8), torch.int32), _empty((*front, k // 32), scale)]
            module.store(*forms)
        elif isinstance(module, Linear) and kind_of(f"{path}.weight") == "linear":
            n, k = module.weight.shape
            module.store(_empty((n, k), eight), _empty((-(-n // 128), -(-k // 128)), scale))
        else:
            for name, parameter in own.items():
                dtype = torch.bfloat16 if kind_of(f"{path}.{name}".lstrip(".")) == "bf16" else torch.float32
                setattr(module, name, nn.Parameter(_empty(tuple(parameter.shape), dtype), requires_grad=False))
    return model.eval()


def _computed(model: Transformer, packed: bool) -> None:
    """Steps and prompts over a cache of a long context, near its beginning and at its end."""
    cache = DeviceCache(model.config, 32, 32, _LONG, "meta", packed)
    cache.table = _empty((32, _LONG // 128), torch.int32)
    cache.layers = [replace(memory, table=cache.table) for memory in cache.layers]
    cache._bound = [list(range(_LONG // 128))] * 32
    for count in _STEPS:
        where = _empty((2, count), torch.int32)
        for view in (cache, cache.within(NEAR)):
            model.logits(model(_empty((count,), torch.int64), Batch.tokens(where[0], where[1]), view))
    for counts in _PROMPTS:
        for end in (False, True):
            spans = [Span(_LONG - 4096 if end else 0, count, slot) for slot, count in enumerate(counts)]
            batch = Batch.pieces(spans, "meta")
            model.logits(model(_empty((len(batch.positions),), torch.int64), batch, cache))


def _meeting(ranks: int) -> Callable[[Tensor], Tensor | Unsummed]:
    """What a rank's sublayers leave to the reader."""
    box = Mailbox.__new__(Mailbox)
    box.ranks, box.device, box.argument, box.most_blocks = ranks, torch.device("meta"), mailbox.NO_BOX, 528
    return lambda out: Unsummed(out, box) if box.takes(out) else out


def _sampled(vocabulary: int) -> None:
    logits, wishes = _empty((3, vocabulary), torch.float32), _empty((4, 3), torch.float64)
    for cut, counted in ((False, False), (True, False), (True, True)):
        sample_triton.draw(logits, wishes, cut, counted)


def _configs() -> Iterator[tuple[ModelConfig, int]]:
    """A layer of each kind; experts by token id and by score."""
    for config, tp in ((preset("flash"), 2), (preset("flash"), 1), (ModelConfig.load(WEIGHTS / "small"), 1)):
        kinds = {"num_hidden_layers": 3, "num_hash_layers": 1, "num_nextn_predict_layers": 0}
        yield replace(config, compress_ratios=(0, 4, 128), **kinds), tp


def main() -> int:
    for device in _DEVICES:
        for config, tp in _configs():
            for packed in (False, True):
                model = _model(config, tp)
                meeting = _meeting(tp)
                if tp > 1 and device[1]:
                    summed(model, meeting)
                with torch.inference_mode(), _device(*device):
                    for count in (1, 64) if device[1] else ():
                        whole(meeting(_empty((count, config.hidden_size), torch.bfloat16)))
                    _computed(model, packed)
                    _sampled(config.vocab_size)
    failed = [key for key, outcome in _seen.items() if outcome != "compiled"]
    print(f"{len(_seen)} kernels, {len(failed)} do not compile")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
