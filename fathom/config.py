"""The published config.json as a frozen dataclass: every field under its own name, nothing ignored. Reference 1.1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fathom.errors import ConfigError

WEIGHTS = Path(__file__).parent / "weights"

# What a hub adds or what describes the file and not the model: accepted and dropped.
HARMLESS = frozenset(
    "architectures auto_map _name_or_path _commit_hash torch_dtype dtype use_cache transformers_version "
    "initializer_range attention_dropout pad_token_id model_type is_encoder_decoder output_attentions "
    "output_hidden_states return_dict chunk_size_feed_forward id2label label2id problem_type layer_types mlp_layer_types "
    "compress_rates partial_rotary_factor rope_parameters attn_implementation _attn_implementation rope_interleave "
    "router_aux_loss_coef output_router_logits router_jitter_noise max_seq_len sep_token_id decoder_start_token_id".split()
)

# Fields that have one value in this family; another value is another model.
FIXED: Mapping[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN, applied in layers with a compression ratio only. Reference 2.5."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> RopeScaling:
        """From the published mapping; a kind other than yarn is refused."""
        kind = raw.get("type", raw.get("rope_type"))
        if kind != "yarn":
            raise ConfigError(f"rope_scaling type {kind!r} is not known; DeepSeek-V4 uses 'yarn'")
        known = {f.name: raw[f.name] for f in fields(RopeScaling) if f.name in raw}
        unknown = set(raw) - set(known) - {"type", "rope_type", "rope_theta", "attention_factor", "partial_rotary_factor"}
        if unknown:
            raise ConfigError(f"unknown rope_scaling key {sorted(unknown)[0]!r}: remove it or use the published form")
        return RopeScaling(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the checkpoint's linears are stored. Reference 3.2."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    scale_fmt: str = "ue8m0"
    weight_block_size: tuple[int, int] = (128, 128)
    activation_scheme: str = "dynamic"

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Quantization:
        """From the published mapping; another method or block size is refused."""
        known = {f.name: raw[f.name] for f in fields(Quantization) if f.name in raw}
        if "weight_block_size" in known:
            known["weight_block_size"] = tuple(known["weight_block_size"])
        quantization = Quantization(**known)
        if (quantization.quant_method, quantization.weight_block_size) != ("fp8", (128, 128)):
            raise ConfigError(f"quantization_config {dict(raw)} is not known; the published form is fp8 in 128x128 blocks")
        return quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One DeepSeek-V4 architecture. Units: sizes in elements, positions in tokens."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    compress_ratios: tuple[int, ...]
    num_nextn_predict_layers: int = 1
    num_key_value_heads: int = 1
    qk_rope_head_dim: int = 64
    sliding_window: int = 128
    compress_rope_theta: float = 160000.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 1048576
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str | None = None
    quantization_config: Quantization | None = None
    dspark: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer; layer `num_hidden_layers` is the MTP block."""
        return self.compress_ratios[layer]

    def is_hash(self, layer: int) -> bool:
        """Whether the layer routes by token id."""
        return layer < self.num_hash_layers

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """From the published JSON; an unknown key that may change the model is refused by name."""
        return _from_dict(raw)

    @staticmethod
    def load(folder: str | Path) -> ModelConfig:
        """From `folder`/config.json."""
        return ModelConfig.from_dict(_read(Path(folder)))

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form."""
        return _to_dict(self)


def _from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    kind = raw.get("model_type", "deepseek_v4")
    if kind != "deepseek_v4":
        raise ConfigError(f"model_type is {kind!r}; this program runs 'deepseek_v4' only")
    names = {f.name for f in fields(ModelConfig)}
    values: dict[str, Any] = {k: v for k, v in raw.items() if k in names}
    dspark = {k: v for k, v in raw.items() if k.startswith("dspark_")}
    unknown = sorted(set(raw) - names - HARMLESS - set(dspark))
    if unknown:
        raise ConfigError(f"config.json has the unknown key {unknown[0]!r}, which may change the model: remove it to go on")
    values.update(_nested(raw), dspark=dspark)
    missing = sorted(f.name for f in fields(ModelConfig) if _required(f) and f.name not in values)
    if missing:
        raise ConfigError(f"config.json lacks {missing[0]!r}; copy it from the published configuration")
    return ModelConfig(**values)


def _required(f: Any) -> bool:
    from dataclasses import MISSING

    return f.default is MISSING and f.default_factory is MISSING


def _nested(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not plain values."""
    out: dict[str, Any] = {}
    if raw.get("rope_scaling"):
        out["rope_scaling"] = RopeScaling.from_dict(raw["rope_scaling"])
    if raw.get("quantization_config"):
        out["quantization_config"] = Quantization.from_dict(raw["quantization_config"])
    ratios = tuple(raw.get("compress_ratios", ()))
    layers = raw.get("num_hidden_layers", len(ratios))
    extra = raw.get("num_nextn_predict_layers", 1)
    out["compress_ratios"] = ratios + (0,) * (layers + extra - len(ratios))
    return out


def _check(c: ModelConfig) -> None:
    for name, value in FIXED.items():
        if getattr(c, name) != value:
            raise ConfigError(f"{name} is {getattr(c, name)!r}; DeepSeek-V4 has {value!r} and nothing else is implemented")
    wide = c.num_attention_heads * c.head_dim
    expected = c.num_hidden_layers + c.num_nextn_predict_layers
    rules = {
        f"compress_ratios has {len(c.compress_ratios)} entries for {expected} layers (the MTP block included)": (
            expected <= len(c.compress_ratios) <= expected + 1
        ),
        "compress_ratios may hold 0, 4 and 128 only": set(c.compress_ratios) <= {0, 4, 128},
        f"o_groups {c.o_groups} does not divide heads x head_dim = {wide}": wide % c.o_groups == 0,
        "num_experts_per_tok exceeds n_routed_experts": c.num_experts_per_tok <= c.n_routed_experts,
        "qk_rope_head_dim must be even and below head_dim": c.qk_rope_head_dim % 2 == 0
        and c.qk_rope_head_dim < c.head_dim,
        f"expert_dtype {c.expert_dtype!r} is not fp4 or fp8": c.expert_dtype in (None, "fp4", "fp8"),
    }
    for message, holds in rules.items():
        if not holds:
            raise ConfigError(f"config.json: {message}")


def _to_dict(c: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    for f in fields(ModelConfig):
        value = getattr(c, f.name)
        if value is not None and f.name != "dspark":
            out[f.name] = list(value) if isinstance(value, tuple) else value
    out["torch_dtype"] = "bfloat16"
    out.update(c.dspark)
    if c.rope_scaling:
        s = c.rope_scaling
        out["rope_scaling"] = {"type": "yarn", **{f.name: getattr(s, f.name) for f in fields(RopeScaling)}}
    if c.quantization_config:
        q = c.quantization_config
        out["quantization_config"] = {f.name: getattr(q, f.name) for f in fields(Quantization)}
        out["quantization_config"]["weight_block_size"] = list(q.weight_block_size)
    return out


def _read(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(f"there is no model folder {folder}: give a folder with config.json, or flash, pro or small")
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json: it is not a checkpoint folder") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return raw


_YARN = RopeScaling(factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)

FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=6,
    compress_ratios=(0, 0) + (4, 128) * 20 + (4,) + (0,),
    rope_scaling=_YARN,
    expert_dtype="fp4",
    quantization_config=Quantization(),
)

PRO = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    head_dim=512,
    q_lora_rank=1536,
    o_groups=16,
    o_lora_rank=1024,
    moe_intermediate_size=3072,
    n_routed_experts=384,
    num_experts_per_tok=6,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4,) + (0,),
    index_topk=1024,
    routed_scaling_factor=2.5,
    rope_scaling=_YARN,
    expert_dtype="fp4",
    quantization_config=Quantization(),
)


def preset(name: str) -> ModelConfig:
    """The configuration of `flash`, `pro` (without weights here) or `small` (embedded)."""
    if name in ("flash", "pro"):
        return {"flash": FLASH, "pro": PRO}[name]
    if name == "small":
        return ModelConfig.load(WEIGHTS / "small")
    raise ConfigError(f"unknown model {name!r}: give a folder with config.json, or flash, pro or small")
