"""The published config.json as a frozen dataclass: every field under its own name, nothing ignored. Reference 1.1."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fathom.errors import ConfigError

WEIGHTS = Path(__file__).parent / "weights"

# Keys that never change what the model computes: accepted and dropped.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "the file": ("_name_or_path", "_commit_hash", "auto_map", "transformers_version", "torch_dtype", "dtype"),
    "what a caller gets": ("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    "how it is run": ("use_cache", "pad_token_id", "attn_implementation", "_attn_implementation"),
    "other tasks": ("id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    "training elsewhere": ("initializer_range", "router_aux_loss_coef", "router_jitter_noise"),
}
# What has one value in the whole family; another value is a model that is not implemented here.
FIXED: Mapping[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
}
# transformers' spellings of published fields, read by `_translated`.
THEIRS = ("layer_types", "mlp_layer_types", "rope_parameters", "partial_rotary_factor")
LAYER_TYPES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

_KNOWN = frozenset(("architectures", *FIXED, *THEIRS, *(name for names in HARMLESS.values() for name in names)))
_OPTIONAL = frozenset(("expert_dtype", "quantization_config", *FIXED))
_LISTS = {"architectures": str, "compress_ratios": int, "layer_types": str, "mlp_layer_types": str}
_OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config")
_MAY_BE_ZERO = ("num_nextn_predict_layers", "num_hash_layers", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN, applied in layers with a compression ratio only, without any attention factor. Reference 2.5."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> RopeScaling:
        """From the published mapping (`type`) or transformers' (`rope_type`). Raises ConfigError for another kind."""
        kind = raw.get("type", raw.get("rope_type"))
        if kind != "yarn":
            raise ConfigError(f"rope_scaling has the type {kind!r}: DeepSeek-V4 uses 'yarn', nothing else is known")
        own = {f.name for f in fields(RopeScaling)}
        _refuse_unknown("rope_scaling", set(raw) - own - {"type", "rope_type"})
        if missing := sorted({"factor", "original_max_position_embeddings"} - set(raw)):
            raise ConfigError(f"rope_scaling lacks {missing[0]!r}: copy it from the published configuration")
        return RopeScaling(**{k: v for k, v in raw.items() if k in own})

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_number(f"rope_scaling.{f.name}", str(f.type), getattr(self, f.name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the checkpoint's linears are stored: FP8 in 128 x 128 blocks. Reference 3.2."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    scale_fmt: str = "ue8m0"
    weight_block_size: tuple[int, int] = (128, 128)
    activation_scheme: str = "dynamic"

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Quantization:
        """From the published mapping. Raises ConfigError for another method, format or block size."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        for f in fields(Quantization):
            if values.pop(f.name, f.default) != f.default:
                text = f"quantization_config.{f.name} is {raw[f.name]!r}: only {f.default!r} is known"
                raise ConfigError(f"{text}; bring the checkpoint to the published form first")
        _refuse_unknown("quantization_config", set(values) - {"expert_dtype"})
        return Quantization()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One DeepSeek-V4 architecture. Sizes in elements, positions in tokens. Defaults are what Flash and Pro share.

    `compress_ratios` has one entry a layer and then one for the MTP block. `dspark` holds what a checkpoint with a
    DSpark drafter says of it: the drafter is not run, so num_nextn_predict_layers is 0 here and the backbone loads.
    """

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
    index_topk: int
    routed_scaling_factor: float
    rope_scaling: RopeScaling | None
    num_nextn_predict_layers: int = 1
    num_key_value_heads: int = 1
    qk_rope_head_dim: int = 64
    sliding_window: int = 128
    compress_rope_theta: float = 160000.0
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1048576
    index_n_heads: int = 64
    index_head_dim: int = 128
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
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
    dspark: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check(self)

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer: 0, 4 or 128. Layer `num_hidden_layers` is the MTP block."""
        return self.compress_ratios[layer]

    def is_hash(self, layer: int) -> bool:
        """Whether the layer routes by token id."""
        return layer < self.num_hash_layers

    @property
    def experts_stored(self) -> str:
        """`fp4`, `fp8` or `bf16`. Quantised and silent, as the first published Flash was, is fp4 (reference 1.1)."""
        return (self.expert_dtype or "fp4") if self.quantization_config else "bf16"

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
        """From the published JSON, or transformers' form of it. Raises ConfigError that names the key."""
        return _from_dict(raw)

    @staticmethod
    def load(folder: str | Path) -> ModelConfig:
        """From `folder`/config.json. Raises ConfigError: no folder, no file, no JSON, or a key that is refused."""
        return ModelConfig.from_dict(_read(Path(folder)))

    def to_dict(self) -> dict[str, Any]:
        """The published JSON form; `from_dict` of it is equal to this."""
        return _to_dict(self)


def _refuse_unknown(where: str, keys: set[str]) -> None:
    if keys:
        text = f"{where} has the unknown key {min(keys)!r}, which could change the model"
        raise ConfigError(f"{text}: use a Fathom that knows it, or remove it if it changes nothing")


def _fixed(name: str, value: Any, known: Any) -> None:
    if value != known:
        raise ConfigError(f"{name} is {value!r}: DeepSeek-V4 has {known!r}, nothing else is implemented")


def _from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    _check_form(raw)
    for name in raw.get("architectures") or ():
        _fixed("architectures", name, "DeepseekV4ForCausalLM")
    for name in FIXED.keys() & raw.keys():
        _fixed(name, raw[name], FIXED[name])
    own = {f.name for f in fields(ModelConfig)} - {"dspark"}
    dspark = {k: v for k, v in raw.items() if k.startswith("dspark_")}
    _refuse_unknown("config.json", set(raw) - own - _KNOWN - set(dspark))
    said = {k: v for k, v in raw.items() if k in own and (v is not None or k == "rope_scaling")}
    values = _merged(said, _translated(raw))
    if missing := sorted(own - _OPTIONAL - set(values)):
        raise ConfigError(f"config.json lacks {missing[0]!r}: copy it from the published configuration")
    if dspark:
        dspark |= {k: values[k] for k in ("num_nextn_predict_layers", "compress_ratios")}
        values["num_nextn_predict_layers"] = 0
    return ModelConfig(**{**values, **_nested(values, bool(dspark))}, dspark=dspark or None)


def _check_form(raw: Mapping[str, Any]) -> None:
    """Every value is of its JSON kind, so that what follows may work with it."""
    for name, kind in _LISTS.items():
        if not isinstance(raw.get(name, []), list | None) or not all(type(x) is kind for x in raw.get(name) or ()):
            raise ConfigError(f"{name} is {raw[name]!r}: it must be a list of {kind.__name__}")
    objects = {name: raw.get(name) for name in _OBJECTS}
    if isinstance(rope := raw.get("rope_parameters"), dict):
        objects |= {f"rope_parameters.{name}": value for name, value in rope.items()}
    for name, value in objects.items():
        if not isinstance(value, dict | None):
            raise ConfigError(f"{name} is {value!r}: it must be a JSON object")
    for f in fields(ModelConfig):
        if f.name in raw and f.name not in FIXED:
            _check_number(f.name, str(f.type), raw[f.name], 0 if f.name in _MAY_BE_ZERO else 1)
    _check_number("partial_rotary_factor", "float", raw.get("partial_rotary_factor") or 1.0, 0)


def _merged(values: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Published fields, completed by transformers' spellings of them; what is said twice must agree."""
    for name, value in theirs.items():
        said = values.get(name, value)
        if name == "rope_scaling":
            said = _yarn(said)
        elif name == "compress_ratios":
            said = list(said)[: len(value)]
        if said != value:
            raise ConfigError(f"config.json says {name} twice: as {said!r} and, in transformers' form, as {value!r}")
        values.setdefault(name, value)
    return values


def _translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The published fields that transformers spells another way. Its own names are in `THEIRS`."""
    out: dict[str, Any] = {}
    if kinds := raw.get("layer_types"):
        if foreign := set(kinds) - set(LAYER_TYPES):
            raise ConfigError(f"layer_types has {min(foreign)!r}: only {', '.join(LAYER_TYPES)} are known")
        out["compress_ratios"] = [LAYER_TYPES[kind] for kind in kinds]
    if kinds := raw.get("mlp_layer_types"):
        out["num_hash_layers"] = count = kinds.count("hash_moe")
        _fixed("mlp_layer_types", kinds, ["hash_moe"] * count + ["moe"] * (len(kinds) - count))
    if rope := raw.get("rope_parameters"):
        out |= _rope(rope)
    if (factor := raw.get("partial_rotary_factor")) and "head_dim" in raw:
        out["qk_rope_head_dim"] = round(raw["head_dim"] * factor)
    if dtype := (raw.get("quantization_config") or {}).get("expert_dtype"):
        out["expert_dtype"] = dtype
    return out


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters: `main` for the layers without compression, `compress` for the others."""
    _refuse_unknown("rope_parameters", set(rope) - {"main", "compress"})
    main, compress = rope.get("main") or {}, dict(rope.get("compress") or {})
    _fixed("rope_parameters.main.rope_type", main.get("rope_type", "default"), "default")
    _fixed("rope_parameters.compress.attention_factor", compress.pop("attention_factor", 1.0), 1.0)
    compress.pop("partial_rotary_factor", None)
    thetas = {"rope_theta": main.get("rope_theta"), "compress_rope_theta": compress.pop("rope_theta", None)}
    plain = compress.get("rope_type", "default") == "default"
    out = {name: value for name, value in thetas.items() if value is not None}
    return {**out, "rope_scaling": None if plain else RopeScaling.from_dict(compress)}


def _yarn(value: Any) -> RopeScaling | None:
    return value if isinstance(value, RopeScaling | None) else RopeScaling.from_dict(value)


def _nested(values: Mapping[str, Any], backbone_only: bool) -> dict[str, Any]:
    """The fields that are not plain values."""
    stored, ratios = values.get("quantization_config"), tuple(values["compress_ratios"])
    layers, extra = values["num_hidden_layers"], values["num_nextn_predict_layers"]
    if len(ratios) == layers:
        ratios += (0,) * extra  # transformers' form has no entry for the MTP block, which attends to its window only
    elif backbone_only or (extra == 0 and len(ratios) == layers + 1):
        ratios = ratios[:layers]
    return {
        "rope_scaling": _yarn(values["rope_scaling"]),
        "compress_ratios": ratios,
        "quantization_config": Quantization.from_dict(stored) if stored is not None else None,
    }


def _check_number(name: str, kind: str, value: Any, least: int) -> None:
    if kind == "int" and (type(value) is not int or value < least):
        raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least {least}")
    if kind == "float" and (type(value) not in (int, float) or not math.isfinite(value) or value <= 0):
        raise ConfigError(f"{name} is {value!r}: it must be a number above 0")


def _check(c: ModelConfig) -> None:
    for f in fields(c):
        if f.name in FIXED:
            _fixed(f.name, getattr(c, f.name), FIXED[f.name])
        _check_number(f.name, str(f.type), getattr(c, f.name), 0 if f.name in _MAY_BE_ZERO else 1)
    for message, broken in _rules(c):
        if broken:
            raise ConfigError(f"{message}; compare with the published config.json")


def _rules(c: ModelConfig) -> Iterator[tuple[str, bool]]:
    """What fields must be to each other: a message, and whether it is broken."""
    layers, entries = c.num_hidden_layers + c.num_nextn_predict_layers, len(c.compress_ratios)
    wide, rope, index = c.num_attention_heads * c.head_dim, c.qk_rope_head_dim, c.index_head_dim
    yield f"compress_ratios has {entries} entries for {layers} layers (MTP block included)", entries != layers
    yield f"compress_ratios is {c.compress_ratios}, not of 0, 4 and 128", not set(c.compress_ratios) <= {0, 4, 128}
    yield f"o_groups {c.o_groups} does not divide heads x head_dim = {wide}", wide % c.o_groups > 0
    yield "num_experts_per_tok exceeds n_routed_experts", c.num_experts_per_tok > c.n_routed_experts
    yield "num_hash_layers exceeds num_hidden_layers", c.num_hash_layers > c.num_hidden_layers
    yield f"qk_rope_head_dim {rope} is odd, or not below head_dim", rope % 2 > 0 or rope >= c.head_dim
    yield f"index_head_dim {index} is no power of two, or below qk_rope_head_dim", index.bit_count() > 1 or rope > index
    yield f"sliding_window {c.sliding_window} exceeds 256, the most that caches keep", c.sliding_window > 256
    yield "bos_token_id or eos_token_id is outside vocab_size", max(c.bos_token_id, c.eos_token_id) >= c.vocab_size
    yield f"expert_dtype {c.expert_dtype!r} is not fp4 or fp8", c.expert_dtype not in (None, "fp4", "fp8")


def _to_dict(c: ModelConfig) -> dict[str, Any]:
    plain = {f.name: getattr(c, f.name) for f in fields(c) if f.name != "dspark"}
    out: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
    }
    out |= {name: value for name, value in plain.items() if value is not None or name == "rope_scaling"}
    out["compress_ratios"] = list(c.compress_ratios)
    if c.rope_scaling:
        out["rope_scaling"] = {"type": "yarn", **asdict(c.rope_scaling)}
    if c.quantization_config:
        out["quantization_config"] = {**asdict(c.quantization_config), "weight_block_size": [128, 128]}
    return {**out, **(c.dspark or {})}


def _read(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(f"there is no model folder {folder}: give a folder with config.json, or flash, pro or small")
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json: give the folder of a checkpoint") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object: fetch it again")
    return raw


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
    compress_ratios=(0, 0) + (4, 128) * 20 + (4, 0),
    index_topk=512,
    routed_scaling_factor=1.5,
    rope_scaling=RopeScaling(factor=16, original_max_position_embeddings=65536),
    expert_dtype="fp4",
    quantization_config=Quantization(),
)

PRO = replace(
    FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    moe_intermediate_size=3072,
    n_routed_experts=384,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4, 0),
    index_topk=1024,
    routed_scaling_factor=2.5,
)


def preset(name: str) -> ModelConfig:
    """The configuration of `flash`, `pro` (no weights here) or `small` (embedded). Raises ConfigError for another."""
    if name in ("flash", "pro"):
        return FLASH if name == "flash" else PRO
    if name == "small":
        return ModelConfig.load(WEIGHTS / "small")
    raise ConfigError(f"unknown model {name!r}: give a folder with config.json, or flash, pro or small")
