"""What an engine may hold, and the cache and runner that a model gets for it, by device."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fathom.engine.cache import PagedCache
from fathom.engine.device_cache import DeviceCache, unfit
from fathom.engine.graphs import Graphs
from fathom.engine.request import PAGE, pages_for
from fathom.engine.runner import DeviceRunner, Runner, TileRunner
from fathom.errors import ConfigError
from fathom.model.transformer import Transformer

_log = logging.getLogger("fathom.engine")
_ON_A_CPU, _ON_A_GPU = 256, 4096
"""Most prompt tokens of a step: about 0.2 s of reading, on a GPU by estimate."""
_CACHE = 600_000_000
_SCRATCH = 6 << 30
"""Bytes of a GPU that are left for what a step computes: experts' rows, index scores, graphs."""
_HOST, _GPU_HOST = 512 << 20, 16 << 30
"""Bytes of memory for prefixes, on a GPU at most an eighth of all: a state of V4-Flash has 3.6 MB."""
_MOST = 64
"""Sequences of the whole context that a cache has pages for at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What an engine may hold. device, host, disk: bytes of its cache's tiers; folder: where the disk tier is, if any.

    device None: 0.6 GB on a CPU, on a GPU what weights and scratch leave. host None: 0.5 GB, beside a GPU up to 16 GB.
    slots: sequences at once. prefill: most prompt tokens of a step, which is what answers wait for while a prompt is
    read (half of it halves the longest wait and costs a tenth of the reading speed); None: by device. packed_keys:
    index keys on a GPU as FP4 (68 bytes instead of 132, slower to read). Raises ConfigError for what cannot be.
    """

    device: int | None = None
    host: int | None = None
    disk: int = 4 << 30
    folder: Path | None = None
    slots: int = 32
    prefill: int | None = None
    packed_keys: bool = False

    def __post_init__(self) -> None:
        for name, least in (("device", 1), ("host", 0), ("disk", 1), ("slots", 1), ("prefill", PAGE)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} {value} is too small: it must be at least {least}")


def prefill_tokens(memory: Memory, device: torch.device) -> int:
    """Most prompt tokens of a step."""
    return memory.prefill or (_ON_A_GPU if device.type == "cuda" else _ON_A_CPU)


def host_bytes(memory: Memory, device: torch.device) -> int:
    """Bytes of memory for prefixes that left the device."""
    if memory.host is not None or device.type != "cuda":
        return _HOST if memory.host is None else memory.host
    return min(_GPU_HOST, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)


def room(model: Transformer, memory: Memory, context: int) -> int:
    """How many pages a cache of sequences of up to `context` tokens gets where the model is. Raises ConfigError."""
    most, device = _MOST * pages_for(context), model.embed.weight.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has used and left
    if not unfit(model):
        return _room_on_a_gpu(model, memory, context, most)
    page = PagedCache(model.config, model.numerics, 1, 1, device).page_bytes
    budget = _CACHE if device.type == "cpu" else max(_CACHE, torch.cuda.mem_get_info(device)[0] - _SCRATCH) // 2
    return max(1, min((memory.device or budget) // max(page, 1), most))


def furnish(
    model: Transformer, memory: Memory, context: int, pages: int, alone: bool = True
) -> tuple[PagedCache | DeviceCache, Runner]:
    """A cache of `pages` for sequences of up to `context` tokens, and what runs the model over it.

    alone: see `Graphs.of`. Raises ConfigError where a step does not fit beside it.
    """
    device, reason = model.embed.weight.device, unfit(model)
    try:
        if not reason:
            cache = DeviceCache(model.config, memory.slots, pages, context, device, memory.packed_keys)
            runner = DeviceRunner(model, cache, Graphs.of(model, cache, alone))
            runner.warm_up(prefill_tokens(memory, device))
            return cache, runner
        if device.type == "cuda":
            _log.warning("torch operations instead of kernels, slowly: %s", reason)
        rows = PagedCache(model.config, model.numerics, memory.slots, pages, device)
        return rows, TileRunner(model, rows)
    except torch.OutOfMemoryError as error:
        text = f"{memory.slots} sequences and {pages} pages do not fit on {device}"
        raise ConfigError(f"{text}: lower --kv-gb or --max-seqs ({str(error).splitlines()[0]})") from error


def _room_on_a_gpu(model: Transformer, memory: Memory, context: int, most: int) -> int:
    device = model.embed.weight.device
    like = DeviceCache(model.config, 1, 1, context, "meta", memory.packed_keys)
    slots = memory.slots * (like.slot_bytes + 4 * pages_for(context))
    free = torch.cuda.mem_get_info(device)[0]
    budget = memory.device or max(0, free - _SCRATCH)
    pages = min((budget - slots) // max(like.page_bytes, 1), most)
    if pages < 1 or slots + pages * like.page_bytes > free:
        need = (slots + max(pages, 1) * like.page_bytes) / 1e9
        text = (
            f"the cache needs {need:.2f} GB for {memory.slots} sequences, but {free / 1e9:.2f} GB are free on {device}"
        )
        raise ConfigError(
            f"{text} with {budget / 1e9:.2f} GB allowed: lower --max-seqs, or set --kv-gb between the two"
        )
    return pages
