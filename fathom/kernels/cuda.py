"""CUDA C++ kernels: compiled by NVRTC (torch brings it, no toolkit is needed), kept on disk, launched by the driver.

Used where Triton measures clearly worse: it has no say in which thread holds what of a product's operands. Every launch
is a programmatic dependent one, as those of Triton are (rules: `common_triton`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("fathom.kernels")
DEPENDENT = True
"""Whether launches may begin before the kernel before them has ended."""
_PROGRAMMATIC_STREAM_SERIALIZATION, _MOST_SHARED = 6, 8
_DIGEST, _HEADER = 16, "common.cuh"
_NO_MEMORY, _DEVICE_FAULTS = 2, (214, *range(700, 721))
"""Errors of the driver that say nothing of a kernel: memory; ECC, and whatever a launch before this one has done."""


class KernelError(RuntimeError):
    """A kernel that does not compile or cannot be launched; says why."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    """A compiled function of one device."""

    def __init__(self, file: str, function: ctypes.c_void_p, shared: int) -> None:
        self._file, self._function, self._shared = file, function, shared

    def __call__(
        self, grid: tuple[int, int], threads: int, device: torch.device, *arguments: Any, early: bool = True
    ) -> None:
        """Launch on the device's current stream; arguments are ctypes values, in the order of the parameters.

        early: as `common_triton.options` has it.
        """
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1, b"")
        stream = torch.cuda.current_stream(device).cuda_stream
        config = _Config(
            (*grid, 1), (threads, 1, 1), self._shared, stream, ctypes.pointer(attribute), int(DEPENDENT and early)
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        try:
            _checked(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "launch")
        except KernelError:
            refused.add(self._file)
            raise


refused: set[str] = set()
"""Source files of which a kernel could not be compiled, loaded or launched here: none of theirs is asked again."""


@contextmanager
def _refusing(file: str) -> Iterator[None]:
    try:
        yield
    except KernelError:
        refused.add(file)
        raise


def compiles(device: torch.device, file: str) -> bool:
    """Whether a file's kernels work on a device: Hopper or newer, NVRTC is found, and none of them was refused.
    Elsewhere Triton's stand in."""
    return file not in refused and _has_compiler(device)


@lru_cache(maxsize=8)
def _has_compiler(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        return bool(_nvrtc())
    except KernelError as error:
        _log.warning("kernels on %s: Triton's in the place of CUDA's (%s)", device, error)
        return False


@lru_cache(maxsize=256)
def kernel(file: str, name: str, device: torch.device, shared: int = 0, **constants: int) -> Kernel:
    """Function `name` of a source file beside this one, with `constants` defined. Raises KernelError.

    shared: bytes of shared memory of a block, besides what the source declares.
    """
    with _refusing(file):
        return _kernel(file, name, device, shared, constants)


def _kernel(file: str, name: str, device: torch.device, shared: int, constants: Mapping[str, int]) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}", "--std=c++17"]
    code = compiled(
        Path(__file__).with_name(file).read_text(), [*options, *(f"-D{k}={v}" for k, v in constants.items())]
    )
    torch.cuda.current_stream(device)  # the device's context is made by now
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _checked(_driver().cuModuleLoadData(ctypes.byref(module), code), f"load {file}")
    _checked(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"find {name} in {file}")
    _checked(_driver().cuFuncSetAttribute(function, _MOST_SHARED, shared), f"reserve {shared} bytes for {name}")
    return Kernel(file, function, shared)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor as a kernel takes it; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def compiled(source: str, options: Sequence[str]) -> bytes:
    """Machine code of a source, which may include common.cuh, kept in the user's cache. Raises KernelError."""
    nvrtc, numbers = _nvrtc(), (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(*(ctypes.byref(number) for number in numbers))
    version = [number.value for number in numbers]
    key = blake2b(repr((version, list(options), source, _header())).encode(), digest_size=20).hexdigest()
    path = _folder() / f"{key}.cubin"
    code = _kept(path)
    if code is None:
        code = _compiled(nvrtc, source, options)
        _keep(path, code)
    return code


def _compiled(nvrtc: Any, source: str, options: Sequence[str]) -> bytes:
    """As the compiler makes it. Raises KernelError with its first lines."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    header, name = (ctypes.c_char_p * 1)(_header().encode()), (ctypes.c_char_p * 1)(_HEADER.encode())
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 1, header, name)
    flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
    kind = "ProgramLog" if failed else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise KernelError("NVRTC: " + " ".join(text.value.decode(errors="replace").split("\n")[:3]))
    return text.raw


@lru_cache(maxsize=1)
def _header() -> str:
    return Path(__file__).with_name(_HEADER).read_text()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom" / "kernels"


def _kept(path: Path) -> bytes | None:
    """What `_keep` wrote; None where there is nothing, or something else."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    code = whole[_DIGEST:]
    return code if whole[:_DIGEST] == blake2b(code, digest_size=_DIGEST).digest() else None


def _keep(path: Path, code: bytes) -> None:
    """Written aside and renamed, for the owner only; a folder that cannot be written costs the next start time."""
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.touch(mode=0o600)
        aside.write_bytes(blake2b(code, digest_size=_DIGEST).digest() + code)
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()


def _checked(status: int, what: str) -> None:
    """Raises KernelError where another kernel may do, else OutOfMemoryError, or RuntimeError for a device's fault."""
    text = f"CUDA driver error {status}: {what}"
    if status == _NO_MEMORY:
        raise torch.OutOfMemoryError(text)
    if status in _DEVICE_FAULTS:
        raise RuntimeError(text)
    if status:
        raise KernelError(text)


@lru_cache(maxsize=1)
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The library of torch's CUDA, wherever its wheels or the system keep it. Raises KernelError."""
    major = (torch.version.cuda or "").split(".")[0]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    found = [*packages.glob(f"*/lib/libnvrtc.so.{major}"), f"libnvrtc.so.{major}"]
    for path in found:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise KernelError(f"NVRTC of CUDA {major or '(none: this torch has no CUDA)'} was not found")
