"""Which implementation computes an op on a device: torch, the reference, or the Triton kernel beside it.

`kernels/linear.py` holds an op and its reference; the function of the same name in `kernels/linear_triton.py` (or
`_cuda`) is its twin. On a CUDA device, where no gradient is wanted, the twin is asked first; it returns NotImplemented
for shapes and formats that it does not have, and then the reference computes them. What was chosen is said once a
device, and once an op where a kernel does not compile. FATHOM_KERNELS=torch forces the references everywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

from fathom.errors import ConfigError
from fathom.kernels import cuda

_log = logging.getLogger("fathom.kernels")
_OLDEST = (8, 9)
"""The first compute capability with e4m3 conversions."""
_broken: set[str] = set()

P = ParamSpec("P")
R = TypeVar("R")


def beside(module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a reference whose twin, of the same name, stands in `fathom.kernels.<module>`.

    What comes first says where: a tensor, a tuple that begins with one, or something stored in `planes`.
    """

    def wrap(reference: Callable[P, R]) -> Callable[P, R]:
        name = reference.__name__

        @wraps(reference)
        def op(*args: P.args, **kwargs: P.kwargs) -> R:
            first = _leading(args[0])
            if isinstance(first, torch.Tensor) and first.is_cuda and not torch.is_grad_enabled() and on(first.device):
                with torch.cuda.device(first.device):  # where Triton launches: each thread has its own, at first cuda:0
                    out: Any = tried(module, name, lambda twin: twin(*args, **kwargs))
                if out is not NotImplemented:
                    return out
            return reference(*args, **kwargs)

        return op

    return wrap


def _leading(first: Any) -> Any:
    return first[0] if isinstance(first, tuple) else getattr(first, "planes", (first,))[0]


@lru_cache(maxsize=16)
def on(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`. Says which way it went, and why. Raises ConfigError."""
    reason = _against(device)
    if reason:
        _log.warning("kernels on %s: torch (%s)", device, reason)
    else:
        _log.info("kernels on %s: Triton", device)
    return not reason


def _against(device: torch.device) -> str:
    """What speaks against Triton on `device`; nothing: empty."""
    wish = os.environ.get("FATHOM_KERNELS", "")
    if wish not in ("", "torch"):
        raise ConfigError(f"FATHOM_KERNELS={wish} is not known: it may be unset, or torch for the reference kernels")
    if wish:
        return "FATHOM_KERNELS=torch"
    if device.type != "cuda":
        return "not a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        least, found = (".".join(map(str, version)) for version in (_OLDEST, capability))
        return f"compute capability {found}; the kernels need {least} or newer"
    try:
        import_module("fathom.kernels.common_triton").ready()
    except Exception as error:
        return f"Triton cannot be used: {(str(error) or type(error).__name__).splitlines()[0]}"
    return ""


def tried(module: str, name: str, call: Callable[[Any], R]) -> R:
    """What `call` makes of a kernel; NotImplemented where it makes nothing, also because it does not compile.

    Where CUDA's do not, Triton's are asked first: the file is refused from then on, and the op is tried once more.
    """
    op = f"{module}.{name}"
    while op not in _broken:
        refused = len(cuda.refused)
        try:
            return call(getattr(import_module(f"fathom.kernels.{module}"), name))
        except Exception as error:
            if not _is_compilation(error):
                raise
            if len(cuda.refused) == refused:
                _broken.add(op)
            text = str(error).strip().splitlines()
            _log.warning(
                "%s: this kernel does not compile here, a slower way is taken (%s)", op, text[0] if text else error
            )
    return NotImplemented


def _is_compilation(error: Exception) -> bool:
    """Whether the compiler gave up, rather than the device or its memory."""
    by_triton = any(kind.__module__.startswith("triton.") for kind in type(error).__mro__)
    return by_triton or isinstance(error, ImportError | cuda.KernelError) or "PassManager" in str(error)
