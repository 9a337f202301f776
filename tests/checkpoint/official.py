"""Checkpoints in the published layout, made without our code: random stored bytes, and what numpy says they mean."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import oracle

Tensors = dict[str, Tensor]

QUANTISED = re.compile(r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|indexer\.wq_b|experts\.w[123]|\.[eh]_proj)\.weight$")
EXPERT = re.compile(r"ffn\.experts\.\d+\.w[123]\.weight$")
FULL = re.compile(r"(hc_.*_(fn|base|scale)|\.ape|attn_sink|gate\.bias)$")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(byte: np.ndarray) -> np.ndarray:
    """Sign, four exponent bits of bias 7, three of mantissa; 0x7F and 0xFF are NaN. Reference 3.2."""
    sign = np.where(byte & 128, -1.0, 1.0)
    exponent, mantissa = ((byte >> 3) & 15).astype(int), (byte & 7) / 8
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where((byte & 127) == 127, np.nan, sign * value).astype(np.float32)


def scales(rng: np.random.Generator, shape: tuple[int, ...], f32: bool) -> tuple[Tensor, np.ndarray]:
    byte = rng.integers(118, 123, shape, np.uint8)
    value = (2.0 ** (byte.astype(int) - 127)).astype(np.float32)
    return torch.from_numpy(value) if f32 else torch.from_numpy(byte).view(torch.float8_e8m0fnu), value


def fp8(rng: np.random.Generator, shape: tuple[int, ...], f32: bool) -> tuple[Tensor, Tensor, np.ndarray]:
    """Stored weight, stored scale, and the value W[o, i] = w[o, i] * scale[o // 128, i // 128]."""
    byte = rng.integers(0, 256, shape, np.uint8)
    byte[(byte & 127) == 127] = 0
    stored, value = scales(rng, (-(-shape[0] // 128), -(-shape[1] // 128)), f32)
    rows, columns = np.arange(shape[0]) // 128, np.arange(shape[1]) // 128
    return torch.from_numpy(byte).view(torch.float8_e4m3fn), stored, e4m3(byte) * value[rows[:, None], columns]


def fp4(rng: np.random.Generator, shape: tuple[int, ...], f32: bool) -> tuple[Tensor, Tensor, np.ndarray]:
    """As `fp8`: element 2j is the low nibble of byte j, a scale for every 32 of a row."""
    byte = rng.integers(0, 256, (shape[0], shape[1] // 2), np.uint8)
    stored, value = scales(rng, (shape[0], shape[1] // 32), f32)
    out = np.empty(shape, np.float32)
    out[:, 0::2], out[:, 1::2] = FP4[byte & 15], FP4[byte >> 4]
    return torch.from_numpy(byte.view(np.int8)), stored, out * value[:, np.arange(shape[1]) // 32]


def draw(
    config: dict[str, Any], seed: int, experts: str = "fp4", linears: str = "fp8", f32: bool = False
) -> tuple[Tensors, Tensors]:
    """The stored tensors of a checkpoint, and the float32 values of its weights, both by official name."""
    rng = np.random.default_rng(seed)
    stored, values = {}, {}
    for name, value in oracle.draw_weights(config, seed).items():
        form = experts if EXPERT.search(name) else linears if QUANTISED.search(name) else "bf16"
        if form != "bf16":
            make = fp4 if form == "fp4" else fp8
            stored[name], stored[name.removesuffix("weight") + "scale"], exact = make(rng, tuple(value.shape), f32)
            values[name] = torch.from_numpy(exact)
        else:
            keep = value.dtype == torch.int64 or FULL.search(name)
            stored[name] = value if keep else value.to(torch.bfloat16)
            values[name] = stored[name] if value.dtype == torch.int64 else stored[name].float()
    return stored, values


def write(folder: Path, config: dict[str, Any], stored: Tensors, shards: int = 2) -> Path:
    """Lay a checkpoint out in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(stored)
    where = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: stored[n].contiguous() for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def published(seed: int, **fixed: Any) -> dict[str, Any]:
    """A small configuration whose sizes suit the blocks, quantised as the published ones are."""
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    drawn = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1, "n_routed_experts": 3}
    drawn |= {"expert_dtype": "fp4", "num_experts_per_tok": 2, "hidden_size": 128, "vocab_size": 60}
    drawn["quantization_config"] = {**quantised, "activation_scheme": "dynamic"}
    return oracle.draw_config(seed, blocked=True, **(drawn | fixed))
