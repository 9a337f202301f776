"""Random small DeepSeek-V4s, and the same weights in three implementations: ours, transformers', and tests/naive.py.

Configurations are dicts of published names, weights dicts of official tensor names (one tensor an expert). Nothing is
left at a neutral value: sinks, hc scales and bases, position and router biases and the hash tables are all random, or a
mistake in them would stay hidden.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.model.batch import Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer

Config = dict[str, Any]
Weights = dict[str, Tensor]

FIXED: Config = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_nextn_predict_layers": 1,
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20,
    "max_position_embeddings": 8192,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "use_cache": True,
}


def draw_config(seed: int, *, blocked: bool = False, **fixed: Any) -> Config:
    """A small configuration; `blocked` keeps every quantised dimension a multiple of its block. `fixed` overrides."""
    rng = random.Random(seed)
    layers = rng.randint(2, 5)
    ratios = [rng.choice((0, 4, 4, 128, 128)) for _ in range(layers)]
    heads = rng.choice((4, 8))
    groups = rng.choice((1, 2, 4))
    experts = rng.randint(3, 9)
    drawn = {
        "vocab_size": rng.randint(50, 200),
        "hidden_size": rng.choice((128, 256) if blocked else (48, 64, 96)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": rng.choice((128, 192) if blocked else (96, 128)),
        "qk_rope_head_dim": 64 if blocked else rng.choice((32, 64)),
        "q_lora_rank": 128 if blocked else rng.choice((32, 40)),
        "o_groups": groups,
        "o_lora_rank": 128 if blocked else rng.choice((16, 24)),
        "sliding_window": rng.choice((5, 16, 64, 128, 150)),
        "compress_ratios": [*ratios, 0],
        "rope_scaling": {
            "type": "yarn",
            "factor": rng.choice((4, 16)),
            "original_max_position_embeddings": rng.choice((16, 64, 256, 1024)),
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "index_n_heads": rng.choice((32, 48)),
        "index_head_dim": rng.choice((64, 128)),
        "index_topk": rng.choice((3, 8, 17)),
        "n_routed_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(4, experts - 1)),
        "moe_intermediate_size": 128 if blocked else rng.choice((32, 48)),
        "num_hash_layers": rng.randint(0, layers),
        "routed_scaling_factor": rng.choice((1.0, 1.5, 2.5)),
        "swiglu_limit": rng.choice((0.5, 1.0, 10.0)),
        "hc_mult": rng.choice((4, 4, 4, 2)),
    }
    merged = {**FIXED, **drawn, **fixed}
    return merged | {"num_hash_layers": min(merged["num_hash_layers"], merged["num_hidden_layers"])}


def _attention_shapes(c: Config, ratio: int) -> dict[str, tuple[int, ...]]:
    hidden, q, dim, heads = c["hidden_size"], c["q_lora_rank"], c["head_dim"], c["num_attention_heads"]
    wide = c["o_groups"] * c["o_lora_rank"]
    out: dict[str, tuple[int, ...]] = {
        "wq_a.weight": (q, hidden),
        "q_norm.weight": (q,),
        "wq_b.weight": (heads * dim, q),
        "wkv.weight": (dim, hidden),
        "kv_norm.weight": (dim,),
        "attn_sink": (heads,),
        "wo_a.weight": (wide, heads * dim // c["o_groups"]),
        "wo_b.weight": (hidden, wide),
    }
    compressors = {"compressor": dim} if ratio else {}
    if ratio == 4:
        compressors["indexer.compressor"] = c["index_head_dim"]
        out["indexer.wq_b.weight"] = (c["index_n_heads"] * c["index_head_dim"], q)
        out["indexer.weights_proj.weight"] = (c["index_n_heads"], hidden)
    for name, d in compressors.items():
        width = 2 * d if ratio == 4 else d
        out |= {f"{name}.wkv.weight": (width, hidden), f"{name}.wgate.weight": (width, hidden)}
        out |= {f"{name}.ape": (ratio, width), f"{name}.norm.weight": (d,)}
    return out


def _block_shapes(c: Config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, width, n, experts = c["hidden_size"], c["moe_intermediate_size"], c["hc_mult"], c["n_routed_experts"]
    out: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    for name in ("hc_attn", "hc_ffn"):
        out |= {f"{name}_fn": ((2 + n) * n, n * hidden), f"{name}_base": ((2 + n) * n,), f"{name}_scale": (3,)}
    out |= {f"attn.{name}": shape for name, shape in _attention_shapes(c, c["compress_ratios"][layer]).items()}
    out["ffn.gate.weight"] = (experts, hidden)
    if layer < c["num_hash_layers"]:
        out["ffn.gate.tid2eid"] = (c["vocab_size"], c["num_experts_per_tok"])
    else:
        out["ffn.gate.bias"] = (experts,)
    for expert in ["shared_experts", *(f"experts.{e}" for e in range(experts))]:
        out |= {f"ffn.{expert}.w1.weight": (width, hidden), f"ffn.{expert}.w3.weight": (width, hidden)}
        out[f"ffn.{expert}.w2.weight"] = (hidden, width)
    return out


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Every official tensor of a configuration and its shape (reference 3.1)."""
    hidden, n = c["hidden_size"], c["hc_mult"]
    head: dict[str, tuple[int, ...]] = {"hc_head_fn": (n, n * hidden), "hc_head_base": (n,), "hc_head_scale": (1,)}
    out = {"embed.weight": (c["vocab_size"], hidden), "head.weight": (c["vocab_size"], hidden)}
    out |= {"norm.weight": (hidden,), **head}
    for i in range(c["num_hidden_layers"]):
        out |= {f"layers.{i}.{name}": shape for name, shape in _block_shapes(c, i).items()}
    extra = _block_shapes(c, c["num_hidden_layers"]) | head
    extra |= {f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "norm")}
    extra |= {f"{name}.weight": (hidden, hidden) for name in ("e_proj", "h_proj")}
    return out | {f"mtp.0.{name}": shape for name, shape in extra.items()}


def _draw(name: str, shape: tuple[int, ...], experts: int, g: torch.Generator) -> Tensor:
    if name.endswith("tid2eid"):
        return torch.stack([torch.randperm(experts, generator=g)[: shape[1]] for _ in range(shape[0])])
    x = torch.randn(shape, generator=g)
    if name.endswith("_scale"):
        return 0.5 + torch.rand(shape, generator=g)
    if "norm" in name.rsplit(".", 2)[-2:][0]:
        return 1 + 0.3 * x
    if name.endswith(("_base", "ape", "attn_sink")):
        return 0.7 * x
    if name.endswith("gate.bias"):
        return 0.3 * x
    return x if name == "embed.weight" else x * 1.5 * shape[-1] ** -0.5


def draw_weights(c: Config, seed: int) -> Weights:
    """Random float32 weights for every official tensor."""
    g = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, c["n_routed_experts"], g) for name, shape in shapes(c).items()}


def stacked(weights: Weights) -> Weights:
    """Official names -> the names of our state dict: routed experts of a layer in two tensors."""
    out = {name: w for name, w in weights.items() if ".experts." not in name}
    for first in [name for name in weights if name.endswith(".experts.0.w1.weight")]:
        prefix = first.removesuffix("0.w1.weight")
        count = sum(name.startswith(prefix) for name in weights) // 3
        pairs = [torch.cat([weights[f"{prefix}{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(count)]
        out[prefix + "w13"] = torch.stack(pairs)
        out[prefix + "w2"] = torch.stack([weights[f"{prefix}{e}.w2.weight"] for e in range(count)])
    return out


def our_model(c: Config, weights: Weights, numerics: Numerics | None = None) -> Transformer:
    """Fathom's model with these weights, every name accounted for, in evaluation mode."""
    model = Transformer(ModelConfig.from_dict(c), numerics or Numerics())
    model.load_state_dict(stacked(weights), strict=True)
    return model.eval()


# --- transformers (reference 3.5)

_RENAMED = (
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.indexer.compressor.", "attn.compressor.indexer."),
    ("attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."),
    ("attn.indexer.weights_proj.", "self_attn.compressor.indexer.scorer.weights_proj."),
    ("attn.compressor.indexer.wkv.", "self_attn.compressor.indexer.kv_proj."),
    ("attn.compressor.indexer.wgate.", "self_attn.compressor.indexer.gate_proj."),
    ("attn.compressor.indexer.norm.", "self_attn.compressor.indexer.kv_norm."),
    ("attn.compressor.indexer.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.compressor.wkv.", "self_attn.compressor.kv_proj."),
    ("attn.compressor.wgate.", "self_attn.compressor.gate_proj."),
    ("attn.compressor.norm.", "self_attn.compressor.kv_norm."),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.wq_a.", "self_attn.q_a_proj."),
    ("attn.q_norm.", "self_attn.q_a_norm."),
    ("attn.wq_b.", "self_attn.q_b_proj."),
    ("attn.wkv.", "self_attn.kv_proj."),
    ("attn.kv_norm.", "self_attn.kv_norm."),
    ("attn.wo_a.", "self_attn.o_a_proj."),
    ("attn.wo_b.", "self_attn.o_b_proj."),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.", "mlp.gate."),
    ("ffn.experts.w13", "mlp.experts.gate_up_proj"),
    ("ffn.experts.w2", "mlp.experts.down_proj"),
    ("ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."),
    ("ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."),
    ("ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."),
)
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


def their_name(name: str) -> str:
    """The name that transformers has for a parameter of ours."""
    if name in _TOP:
        return _TOP[name]
    layers, index, rest = name.split(".", 2)
    for ours, theirs in _RENAMED:
        if rest.startswith(ours):
            rest = theirs + rest.removeprefix(ours)
    return f"model.{layers}.{index}.{rest}"


def transformers_model(c: Config, weights: Weights) -> nn.Module:
    """DeepseekV4ForCausalLM in float32 with eager attention and these weights (mtp.* does not exist there)."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    scaling = {**c["rope_scaling"], "rope_type": "yarn"}
    names = {k: v for k, v in c.items() if k not in ("rope_scaling", "torch_dtype", "architectures", "topk_method")}
    config = DeepseekV4Config(**names, rope_scaling=scaling, attn_implementation="eager")
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    model = _materialised(model, config)
    state = {their_name(k): v for k, v in stacked(weights).items() if not k.startswith("mtp.")}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _materialised(model: nn.Module, config: Any) -> nn.Module:
    """Their constructor fills random weights slowly; only the rotary tables, which are no weights, must be real."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    model = model.to_empty(device="cpu")
    for name, module in list(model.named_modules()):
        if isinstance(module, DeepseekV4RotaryEmbedding):
            model.set_submodule(name, DeepseekV4RotaryEmbedding(config))
    return model


class Margins:
    """How close each position of a transformers forward came to choosing another expert or another entry.

    Two correct float32 implementations may differ there: the reference leaves ties undefined. `safe` counts, per row,
    the positions before the first decision closer than `limit` of the scores' size.
    """

    def __init__(self, model: nn.Module, c: Config, limit: float = 3e-6) -> None:
        self.topk, self.limit = c["index_topk"], limit
        self.close: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("indexer.scorer"):
                module.register_forward_hook(self._indexer)
            elif hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._router)

    def _router(self, module: Any, args: Any, out: Any) -> None:
        scores = torch.nn.functional.softplus(out[0]).sqrt() + module.e_score_correction_bias
        best = scores.sort(-1, descending=True).values
        k = module.top_k
        self.close.append(((best[:, k - 1] - best[:, k]) < self.limit * best.abs().amax(-1)).view(args[0].shape[0], -1))

    def _indexer(self, module: Any, args: Any, scores: Tensor) -> None:
        seen, entries = scores.shape[1:]
        if entries <= self.topk:
            return
        visible = torch.arange(entries) < (torch.arange(1, seen + 1) // 4).unsqueeze(1)
        best = scores.masked_fill(~visible, -torch.inf).sort(-1, descending=True).values
        gap = best[..., self.topk - 1] - best[..., self.topk]
        self.close.append((gap < self.limit * scores.abs().amax(-1)) & visible[:, self.topk])

    def safe(self, rows: int, length: int) -> list[int]:
        """Per row of `length` positions, how many leading ones are decided clearly in every layer."""
        close = torch.stack([torch.zeros(rows, length, dtype=torch.bool), *self.close]).any(0)
        return [int(row.int().argmax()) if row.any() else len(row) for row in close]


# --- driving our model


class Session:
    """Sequences in cache slots, fed in any pieces. `length[slot]` tokens are in place; setting it lower rewinds."""

    def __init__(self, model: Transformer, slots: int = 1, max_context: int = 1024) -> None:
        self.model, self.cache = model, ContiguousCache(model.config, model.numerics, slots, max_context)
        self.length = [0] * slots

    @torch.inference_mode()
    def streams(self, pieces: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """One model call over the next tokens of several slots -> their streams [count, n, D], all rows."""
        spans = [Span(self.length[slot], len(ids), slot) for slot, ids in pieces.items()]
        tokens = torch.tensor([token for ids in pieces.values() for token in ids])
        out = self.model(tokens, Batch.step(spans, "all"), self.cache)
        for slot, ids in pieces.items():
            self.length[slot] += len(ids)
        return dict(zip(pieces, out.split([s.count for s in spans]), strict=True))

    @torch.inference_mode()
    def feed(self, pieces: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Like `streams`, folded to logits [count, V]."""
        return {slot: self.model.logits(x) for slot, x in self.streams(pieces).items()}


@torch.inference_mode()
def draft(session: Session, slot: int, x: Tensor, following: Sequence[int], start: int) -> Tensor:
    """The prediction block's streams for rows x [n, D-streams] at start .. and the ids that follow each of them."""
    batch = Batch.step([Span(start, len(following), slot)], "all")
    return session.model.draft(x, torch.tensor(following), batch, session.cache)


@torch.inference_mode()
def packed_logits(model: Transformer, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """One call without a cache over whole sequences laid end to end -> the logits [S, V] of each."""
    tokens = torch.tensor([token for ids in sequences for token in ids])
    lengths = [len(ids) for ids in sequences]
    return list(model.logits(model(tokens, Batch.packed(lengths))).split(lengths))


def cuts(rng: random.Random, start: int, end: int, *, unit: int = 1, most: int = 200) -> list[tuple[int, int]]:
    """A random cutting of start .. end into pieces; inner cuts fall on multiples of `unit`."""
    out, at = [], start
    while at < end:
        stop = min(end, (at + rng.randint(1, most)) // unit * unit)
        if stop > at:
            out.append((at, stop))
            at = stop
        elif (at // unit + 1) * unit >= end:
            out.append((at, end))
            break
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    if want.numel() == 0:
        return 0.0
    assert got.shape == want.shape and torch.isfinite(got).all()
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
