"""What tells one model's cache rows from another's."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from fathom.model.transformer import Transformer

ROWS = 1
"""Raised whenever the same weights come to give other rows, or rows are stored in another way."""

_SAMPLE = 4096


def fingerprint(model: Transformer, form: str = "rows") -> bytes:
    """16 bytes that change with whatever a stored row depends on.

    That is the configuration, the weights (a few thousand bytes of each tensor: training changes them all over), the
    numerics, what rounds in its own way (the device, the library, and whether a weight is multiplied in packed form),
    and how the cache stores its rows (`form`).
    """
    device = model.embed.weight.device
    digest = blake2b(repr((ROWS, form, model.config, model.numerics, _device(device), torch.__version__)).encode())
    packed = [name for name, module in model.named_modules() if getattr(module, "packed", None)]
    digest.update(repr(packed).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_sample(tensor))
    return digest.digest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _sample(tensor: Tensor) -> bytes:
    """Evenly spaced bytes; their distance is odd, so that they are not all the same byte of their elements."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    step = max(1, data.numel() // _SAMPLE) | 1
    return data[::step].cpu().numpy().tobytes()
