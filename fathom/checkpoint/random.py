"""Random checkpoints of any size in the published layout: the same tensor for the same seed and name, in any order.

Quantised weights are random bytes, which every code of FP4 and every finite one of FP8 can be; scales vary by a factor
of four from block to block. Sizes are such that activations neither vanish nor overflow.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fathom.checkpoint.names import DTYPES, Entry, Spec, entries, specs, stored_config
from fathom.checkpoint.reader import Progress
from fathom.checkpoint.save import Item, companion_files, write_checkpoint
from fathom.config import ModelConfig
from fathom.errors import ConfigError

SPREAD = {"fp4": 2.93 * 1.32, "fp8": 0.62 * 1.32}
"""Standard deviation of the random codes of a form, times that of the varying scales."""
_CHUNK = 1 << 22


def write_random(
    folder: str | Path,
    config: ModelConfig,
    *,
    layers: int | None = None,
    seed: int = 0,
    experts: str | None = None,
    linears: str | None = None,
    scales: str = "F8_E8M0",
    max_shard: int | None = None,
    companions: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write a random checkpoint of `config`, or of its first `layers` layers, to `folder`.

    experts, linears: the stored forms, by default those of the configuration; scales: F8_E8M0, or F32 as Base has them.
    Raises ConfigError (more layers than there are) and CheckpointError as `save.save_model`.
    """
    config = config if layers is None else first_layers(config, layers)
    forms = {"expert": experts or config.experts_stored, "linear": linears or _linears(config)}
    stored = stored_config(config, forms["expert"], forms["linear"])
    items = [_item(entry, forms.get(entry.kind, "bf16"), scales, seed, config) for entry in entries(config)]
    files = companion_files(companions) if companions else {}
    write_checkpoint(folder, items, stored, files, max_shard=max_shard, progress=progress)


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with only its first `layers` layers, and its MTP block."""
    depth = config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ConfigError(f"{layers} layers are out of range: this model has from 1 to {depth}")
    return replace(
        config,
        num_hidden_layers=layers,
        num_hash_layers=min(config.num_hash_layers, layers),
        compress_ratios=config.compress_ratios[:layers] + config.compress_ratios[depth:],
    )


def _linears(config: ModelConfig) -> str:
    return "fp8" if config.quantization_config else "bf16"


def _item(entry: Entry, form: str, scales: str, seed: int, config: ModelConfig) -> Item:
    planned = specs(entry, form, scales)

    def make() -> tuple[Tensor, ...]:
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(entry.name.encode())]))
        if len(planned) == 2:
            return _codes(planned[0], rng), _scales(planned[1], form, entry.shape[1], rng)
        return (_table(entry, config, rng) if entry.kind == "table" else _floats(entry, planned[0], rng),)

    return Item(planned, make)


def _codes(spec: Spec, rng: np.random.Generator) -> Tensor:
    raw = np.frombuffer(bytearray(rng.bytes(spec.bytes)), np.uint8)
    if spec.dtype == "F8_E4M3":
        raw &= 0b1011_1111  # the lower half of the exponents: no NaN
    return torch.from_numpy(raw).view(DTYPES[spec.dtype]).view(spec.shape)


def _scales(spec: Spec, form: str, inputs: int, rng: np.random.Generator) -> Tensor:
    """Powers of two around the one that gives the weights a standard deviation of inputs^-0.5."""
    middle = 127 + round(math.log2(inputs**-0.5 / SPREAD[form]))
    raw = torch.from_numpy(rng.integers(middle - 1, middle + 2, spec.shape, np.uint8)).view(torch.float8_e8m0fnu)
    return raw if spec.dtype == "F8_E8M0" else raw.float()


def _table(entry: Entry, config: ModelConfig, rng: np.random.Generator) -> Tensor:
    """Distinct experts for each token id."""
    rows, chosen = entry.shape
    at_once = max(1, _CHUNK // config.n_routed_experts)
    blocks = [rng.random((min(at_once, rows - i), config.n_routed_experts)) for i in range(0, rows, at_once)]
    return torch.from_numpy(np.concatenate([b.argsort(1)[:, :chosen] for b in blocks])).to(torch.int64)


def _floats(entry: Entry, spec: Spec, rng: np.random.Generator) -> Tensor:
    """Normal values around what makes the part do something: 1 for norms and gates, 0 for the rest."""
    out = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    flat, (centre, spread) = out.view(-1), distribution(entry.name, entry.shape)
    for i in range(0, flat.numel(), _CHUNK):
        part = flat[i : i + _CHUNK]
        part.copy_(torch.from_numpy(rng.standard_normal(part.numel(), np.float32)).mul_(spread).add_(centre))
    return out


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and spread of the normal values of a tensor that is not quantised."""
    if name.endswith(("norm.weight", "_scale")):
        return 1.0, 0.1
    if name == "embed.weight":
        return 0.0, 1.0
    return 0.0, 0.1 if name.endswith("gate.bias") else 0.7 if len(shape) == 1 else shape[-1] ** -0.5
