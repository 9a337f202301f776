"""DeepSeek-V4 a second time: reference sections 2 and 4 for one sequence, token by token.

No cache, no batching, no import from `fathom`: every position and every block is a plain Python loop, and torch is used
only inside one token. Slow and obvious, so that the model can be held to it. Differentiable while `quantize` is off.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def power_of_two_at_least(amax: np.ndarray, mantissa: float, exponent: int) -> np.ndarray:
    """The least power of two S with amax <= S * mantissa * 2**exponent, by the definition of frexp."""
    m, e = np.frexp(amax)
    return np.ldexp(1.0, e - exponent + (m > mantissa))


def nearest_code(x: np.ndarray, mantissa_bits: int, least_exponent: int, largest: float) -> np.ndarray:
    """Round to a small float format, ties to the even code; `least_exponent` is that of its smallest normal number."""
    _, e = np.frexp(x)
    quantum = np.ldexp(1.0, np.maximum(e - 1, least_exponent) - mantissa_bits)
    return np.clip(np.rint(x / quantum) * quantum, -largest, largest)


def blocks_of(x: Tensor, size: int) -> np.ndarray:
    """The vector cut into blocks, one a row, the last one filled up with zeros; float64 is exact for float32 input."""
    values = x.detach().to(torch.float64).numpy()
    return np.pad(values, (0, -len(values) % size)).reshape(-1, size)


def fp8_sim(x: Tensor, size: int) -> Tensor:
    """Quantise a vector to e4m3 with one power-of-two scale per block (section 4). 448 = 0.875 * 2**9."""
    blocks = blocks_of(x, size)
    amax = np.abs(blocks).max(1, keepdims=True)
    scale = power_of_two_at_least(np.maximum(amax, np.float32(1e-4)), 0.875, 9)
    return torch.from_numpy(nearest_code(blocks / scale, 3, -6, 448.0) * scale).flatten()[: len(x)].to(x.dtype)


def fp4_sim(x: Tensor, size: int = 32) -> Tensor:
    """Quantise a vector to e2m1 with one power-of-two scale per block (section 4). 6 = 0.75 * 2**3."""
    blocks = blocks_of(x, size)
    amax = np.abs(blocks).max(1, keepdims=True)
    scale = power_of_two_at_least(np.maximum(amax, 6 * 2.0**-126), 0.75, 3)
    return torch.from_numpy(nearest_code(blocks / scale, 1, 0, 6.0) * scale).flatten()[: len(x)].to(x.dtype)


@lru_cache
def sylvester(n: int) -> Tensor:
    """The Hadamard matrix [[A, A], [A, -A]] of order n, grown from [[1]]."""
    rows = [[1.0]]
    while len(rows) < n:
        rows = [row + row for row in rows] + [row + [-v for v in row] for row in rows]
    return torch.tensor(rows)


def rope_frequencies(config: Mapping[str, Any], ratio: int) -> list[np.float32]:
    """Section 2.5: plain base in window layers, compress_rope_theta with YaRN in layers that compress.

    In float32, as are the angles below: the model was trained with that rounding, which grows with the position.
    """
    dims = config["qk_rope_head_dim"]
    base = np.float32(config["compress_rope_theta"] if ratio else config["rope_theta"])
    plain = [np.float32(1) / base ** np.float32(2 * i / dims) for i in range(dims // 2)]
    scaling = config.get("rope_scaling")
    if not ratio or not scaling:
        return plain

    def dim_of(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dims * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(float(base)))

    low = max(math.floor(dim_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(dim_of(scaling["beta_slow"])), dims - 1)
    out = []
    for i, f in enumerate(plain):
        ramp = np.float32(min(max((i - low) / max(high - low, 0.001), 0.0), 1.0))
        out.append(f * (1 - ramp) + f / np.float32(scaling["factor"]) * ramp)
    return out


def rotate(x: Tensor, position: int, frequencies: Sequence[np.float32], sign: int = 1) -> Tensor:
    """Rotate the last dims of [..., d] pairwise by position * frequency; sign -1 undoes it."""
    dims = 2 * len(frequencies)
    keep, pairs = x[..., :-dims], x[..., -dims:].unflatten(-1, (-1, 2))
    angles = [float(np.float32(position) * f) for f in frequencies]
    cos = torch.tensor([math.cos(a) for a in angles], dtype=x.dtype)
    sin = torch.tensor([sign * math.sin(a) for a in angles], dtype=x.dtype)
    real, imag = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1).flatten(-2)
    return torch.cat((keep, turned), -1)


@dataclass
class Outputs:
    """Streams [S, n, D] and logits [S, V] of every position; `mtp` [S-1, V] predicts token t+2 at row t."""

    streams: Tensor
    logits: Tensor
    mtp: Tensor | None


class Naive:
    """Official tensor names -> float tensors (dequantised), published config names, activation quantisers on or off."""

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any], quantize: bool = False) -> None:
        self.w, self.c, self.quantize = weights, config, quantize
        self.eps = config["rms_norm_eps"]

    # ---- pieces of one token

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear of section 4's first row: its input is quantised in blocks of 128 when quantisers are on."""
        return self.w[name + ".weight"] @ (fp8_sim(x, 128) if self.quantize else x)

    def rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.w[name + ".weight"] * self.rms(x)

    def stored_row(self, row: Tensor) -> Tensor:
        """What the cache holds of a key-value row: e4m3 in blocks of 64, and BF16 for the rotated dims."""
        if not self.quantize:
            return row
        nope = len(row) - self.c["qk_rope_head_dim"]
        return torch.cat((fp8_sim(row[:nope], 64), row[nope:].to(torch.bfloat16).to(row.dtype)))

    def index_vector(self, v: Tensor) -> Tensor:
        """Hadamard and FP4 of an indexer key [d], or of the query heads [h, d]."""
        if not self.quantize:
            return v
        size = v.shape[-1]
        turned = v @ sylvester(size).to(v.dtype) * size**-0.5
        return fp4_sim(turned.flatten()).view(v.shape)  # blocks of 32 never straddle two heads

    # ---- 2.3 hyper-connections

    def hc_pre(self, prefix: str, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, eps = self.c["hc_mult"], self.c["hc_eps"]
        scale, base = self.w[prefix + "_scale"], self.w[prefix + "_base"]
        m = self.w[prefix + "_fn"] @ self.rms(X.flatten())
        pre = torch.sigmoid(m[:n] * scale[0] + base[:n]) + eps
        post = 2 * torch.sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
        C = (m[2 * n :] * scale[2] + base[2 * n :]).view(n, n)
        C = C.softmax(1) + eps
        C = C / (C.sum(0, keepdim=True) + eps)
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            C = C / (C.sum(1, keepdim=True) + eps)
            C = C / (C.sum(0, keepdim=True) + eps)
        return sum(pre[i] * X[i] for i in range(n)), post, C

    def hc_post(self, y: Tensor, X: Tensor, post: Tensor, C: Tensor) -> Tensor:
        n = self.c["hc_mult"]
        return torch.stack([post[j] * y + sum(C[i, j] * X[i] for i in range(n)) for j in range(n)])

    def logits(self, prefix: str, X: Tensor) -> Tensor:
        """2.11; `prefix` is empty or "mtp.0."."""
        n = self.c["hc_mult"]
        m = self.w[prefix + "hc_head_fn"] @ self.rms(X.flatten())
        pre = torch.sigmoid(m * self.w[prefix + "hc_head_scale"] + self.w[prefix + "hc_head_base"]) + self.c["hc_eps"]
        h = sum(pre[i] * X[i] for i in range(n))
        return self.w["head.weight"] @ self.norm(prefix + "norm", h)

    # ---- 2.7 compressor, 2.8 indexer

    def entries(self, prefix: str, xs: list[Tensor], ratio: int, frequencies: Sequence[np.float32]) -> list[Tensor]:
        """Compressed entries of all complete blocks, before they are stored."""
        d = len(self.w[prefix + ".norm.weight"])
        a = [self.w[prefix + ".wkv.weight"] @ x for x in xs]
        z = [self.w[prefix + ".wgate.weight"] @ x + self.w[prefix + ".ape"][s % ratio] for s, x in enumerate(xs)]
        out = []
        for b in range(len(xs) // ratio):
            own = range(b * ratio, (b + 1) * ratio)
            if ratio == 4:
                before = range((b - 1) * ratio, b * ratio) if b else ()
                items = [(z[s][:d], a[s][:d]) for s in before] + [(z[s][d:], a[s][d:]) for s in own]
            else:
                items = [(z[s], a[s]) for s in own]
            share = torch.stack([item[0] for item in items]).softmax(0)
            pooled = (share * torch.stack([item[1] for item in items])).sum(0)
            out.append(rotate(self.norm(prefix + ".norm", pooled), b * ratio, frequencies))
        return out

    def selected(
        self, prefix: str, x: Tensor, qr: Tensor, t: int, keys: list[Tensor], f: Sequence[np.float32]
    ) -> list[int]:
        """The index_topk best visible entries of query t; equal scores go to the lower index."""
        heads, d = self.c["index_n_heads"], self.c["index_head_dim"]
        q = rotate(self.linear(prefix + ".wq_b", qr).view(heads, d), t, f)
        q = self.index_vector(q)
        w = self.w[prefix + ".weights_proj.weight"] @ x * (d**-0.5 * heads**-0.5)
        if t < 3:
            return []
        scores = (torch.relu(torch.stack(keys[: (t + 1) // 4]) @ q.T) @ w).tolist()
        return sorted(range(len(scores)), key=lambda b: (-scores[b], b))[: self.c["index_topk"]]

    # ---- 2.6 attention

    def attention(self, prefix: str, xs: list[Tensor], ratio: int) -> list[Tensor]:
        heads, c, groups = self.c["num_attention_heads"], self.c["head_dim"], self.c["o_groups"]
        f = rope_frequencies(self.c, ratio)
        rows = [
            self.stored_row(rotate(self.norm(prefix + ".kv_norm", self.linear(prefix + ".wkv", x)), s, f))
            for s, x in enumerate(xs)
        ]
        pooled = [self.stored_row(e) for e in self.entries(prefix + ".compressor", xs, ratio, f)] if ratio else []
        keys = []
        if ratio == 4:
            keys = [self.index_vector(e) for e in self.entries(prefix + ".indexer.compressor", xs, ratio, f)]
        out = []
        for t, x in enumerate(xs):
            qr = self.norm(prefix + ".q_norm", self.linear(prefix + ".wq_a", x))
            q = rotate(self.rms(self.linear(prefix + ".wq_b", qr).view(heads, c)), t, f)
            seen = rows[max(0, t + 1 - self.c["sliding_window"]) : t + 1]
            if ratio == 4:
                seen = seen + [pooled[b] for b in self.selected(prefix + ".indexer", x, qr, t, keys, f)]
            elif ratio:
                seen = seen + pooled[: (t + 1) // ratio]
            e = torch.stack(seen)
            scores = torch.cat((q @ e.T * c**-0.5, self.w[prefix + ".attn_sink"][:, None]), 1)
            o = rotate(scores.softmax(1)[:, :-1] @ e, t, f, sign=-1).view(groups, -1)
            wo_a = self.w[prefix + ".wo_a.weight"].unflatten(0, (groups, -1))
            z = torch.cat([wo_a[g] @ o[g] for g in range(groups)])
            out.append(self.linear(prefix + ".wo_b", z))
        return out

    # ---- 2.10 experts

    def expert(self, prefix: str, x: Tensor, weight: Tensor | float) -> Tensor:
        limit = self.c["swiglu_limit"]
        a = torch.clamp(self.linear(prefix + ".w1", x), max=limit)
        b = torch.clamp(self.linear(prefix + ".w3", x), -limit, limit)
        return self.linear(prefix + ".w2", weight * (a * torch.sigmoid(a) * b))

    def moe(self, prefix: str, x: Tensor, token: int) -> Tensor:
        s = torch.nn.functional.softplus(self.w[prefix + ".gate.weight"] @ x).sqrt()
        if prefix + ".gate.tid2eid" in self.w:
            chosen = self.w[prefix + ".gate.tid2eid"][token].tolist()
        else:
            biased = (s + self.w[prefix + ".gate.bias"]).tolist()
            chosen = sorted(range(len(biased)), key=lambda e: (-biased[e], e))[: self.c["num_experts_per_tok"]]
        total = sum(s[e] for e in chosen)
        y = self.expert(prefix + ".shared_experts", x, 1.0)
        for e in chosen:
            y = y + self.expert(f"{prefix}.experts.{e}", x, s[e] / total * self.c["routed_scaling_factor"])
        return y

    # ---- 2.2 block, 2.12 prediction block, the whole

    def block(self, prefix: str, layer: int, Xs: Sequence[Tensor], tokens: Sequence[int]) -> list[Tensor]:
        """One layer over all positions; `Xs[t]` is [n, D]. Layer number L is the prediction block."""
        mixes = [self.hc_pre(prefix + "hc_attn", X) for X in Xs]
        ys = self.attention(
            prefix + "attn", [self.norm(prefix + "attn_norm", m[0]) for m in mixes], self.c["compress_ratios"][layer]
        )
        Xs = [self.hc_post(y, X, m[1], m[2]) for y, X, m in zip(ys, Xs, mixes, strict=True)]
        mixes = [self.hc_pre(prefix + "hc_ffn", X) for X in Xs]
        ys = [
            self.moe(prefix + "ffn", self.norm(prefix + "ffn_norm", m[0]), token)
            for m, token in zip(mixes, tokens, strict=True)
        ]
        return [self.hc_post(y, X, m[1], m[2]) for y, X, m in zip(ys, Xs, mixes, strict=True)]

    def merged(self, Xs: Sequence[Tensor], next_tokens: Sequence[int]) -> list[Tensor]:
        """2.12: the input of the prediction block for rows that know the id of their next token."""
        out = []
        for X, token in zip(Xs, next_tokens, strict=True):
            e = self.linear("mtp.0.e_proj", self.norm("mtp.0.enorm", self.w["embed.weight"][token]))
            out.append(torch.stack([self.linear("mtp.0.h_proj", self.norm("mtp.0.hnorm", x)) + e for x in X]))
        return out

    def predict(self, Xs: Sequence[Tensor], next_tokens: Sequence[int]) -> list[Tensor]:
        """The streams of the prediction block; its layer number is L."""
        return self.block("mtp.0.", self.c["num_hidden_layers"], self.merged(Xs, next_tokens), next_tokens)

    def forward(self, tokens: Sequence[int]) -> Outputs:
        """All positions of one sequence, and the prediction block where the weights have it."""
        Xs = [self.w["embed.weight"][token].repeat(self.c["hc_mult"], 1) for token in tokens]
        for i in range(self.c["num_hidden_layers"]):
            Xs = self.block(f"layers.{i}.", i, Xs, tokens)
        logits = torch.stack([self.logits("", X) for X in Xs])
        mtp = None
        if "mtp.0.enorm.weight" in self.w and len(tokens) > 1:
            mtp = torch.stack([self.logits("mtp.0.", X) for X in self.predict(Xs[:-1], tokens[1:])])
        return Outputs(torch.stack(Xs), logits, mtp)
