"""What a configuration costs before any weight is read: tensors, parameters, bytes, KV bytes, FLOPs. No torch.

`tensors` is the one description of the model's tensors; parameters are summed from it, and `inventory` turns it into
the tensors of a checkpoint in a given storage. KV bytes and FLOPs are closed forms. Reference 3.1, 3.3, 5.3, 5.4, 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from fathom.config import ModelConfig
from fathom.errors import ConfigError

# Bytes of one stored element, by the names of the safetensors format. I8 holds two FP4 values.
WIDTH = {"F32": 4, "BF16": 2, "I64": 8, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
FP8_BLOCK, FP4_BLOCK = 128, 32

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One logical tensor. `kind`: bf16 or f32 (stored so always), linear, expert (routed), or table (int64 ids)."""

    name: str
    shape: Shape
    kind: str

    @property
    def count(self) -> int:
        """Trained parameters: a hash table has none."""
        return 0 if self.kind == "table" else prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint, as its safetensors header describes it: packed FP4 is I8 of half the width."""

    name: str
    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * WIDTH[self.dtype]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a checkpoint stores them: experts fp4, fp8 or bf16; linears fp8 or bf16; scales F8_E8M0 or F32."""

    experts: str = "fp4"
    linears: str = "fp8"
    scales: str = "F8_E8M0"

    def __post_init__(self) -> None:
        known = {"experts": ("fp4", "fp8", "bf16"), "linears": ("fp8", "bf16"), "scales": ("F8_E8M0", "F32")}
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ConfigError(f"{field} cannot be stored as {getattr(self, field)!r}: use {', '.join(values)}")

    @staticmethod
    def of(config: ModelConfig) -> Storage:
        """The published form of a configuration: FP4 experts with E8M0 scales, or, as Base is, FP8 with F32 scales."""
        if not config.quantization_config:
            return Storage("bf16", "bf16")
        return Storage(config.experts_stored, "fp8", "F32" if config.experts_stored == "fp8" else "F8_E8M0")


# --- tensors


def tensors(config: ModelConfig) -> Iterator[Parameter]:
    """Every logical tensor under its official name, block by block. Reference 3.1."""
    c = config
    yield Parameter("embed.weight", (c.vocab_size, c.hidden_size), "bf16")
    for i in range(c.num_hidden_layers):
        yield from _block(c, i, f"layers.{i}.")
    yield Parameter("norm.weight", (c.hidden_size,), "bf16")
    yield from _hyper(c, "hc_head", c.hc_mult, 1)
    yield Parameter("head.weight", (c.vocab_size, c.hidden_size), "bf16")
    for i in range(c.num_nextn_predict_layers):
        yield from _mtp(c, i)


def _mtp(c: ModelConfig, index: int) -> Iterator[Parameter]:
    prefix, hidden = f"mtp.{index}.", c.hidden_size
    yield from _block(c, c.num_hidden_layers + index, prefix)
    for name in ("e_proj", "h_proj"):
        yield Parameter(f"{prefix}{name}.weight", (hidden, hidden), "linear")
    for name in ("enorm", "hnorm", "norm"):
        yield Parameter(f"{prefix}{name}.weight", (hidden,), "bf16")
    yield from _hyper(c, f"{prefix}hc_head", c.hc_mult, 1)


def _block(c: ModelConfig, layer: int, prefix: str) -> Iterator[Parameter]:
    for name in ("attn", "ffn"):
        yield Parameter(f"{prefix}{name}_norm.weight", (c.hidden_size,), "bf16")
        yield from _hyper(c, f"{prefix}hc_{name}", c.hc_mult * (2 + c.hc_mult), 3)
    yield from _attention(c, f"{prefix}attn.")
    ratio = c.ratio(layer)
    if ratio:
        yield from _compressor(c, f"{prefix}attn.compressor.", ratio, c.head_dim)
    if ratio == 4:
        yield from _indexer(c, f"{prefix}attn.indexer.")
    yield from _moe(c, f"{prefix}ffn.", c.is_hash(layer))


def _hyper(c: ModelConfig, name: str, rows: int, scales: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}_fn", (rows, c.hc_mult * c.hidden_size), "f32")
    yield Parameter(f"{name}_base", (rows,), "f32")
    yield Parameter(f"{name}_scale", (scales,), "f32")


def _attention(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    wide, middle = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    yield Parameter(f"{prefix}wq_a.weight", (c.q_lora_rank, c.hidden_size), "linear")
    yield Parameter(f"{prefix}q_norm.weight", (c.q_lora_rank,), "bf16")
    yield Parameter(f"{prefix}wq_b.weight", (wide, c.q_lora_rank), "linear")
    yield Parameter(f"{prefix}wkv.weight", (c.head_dim, c.hidden_size), "linear")
    yield Parameter(f"{prefix}kv_norm.weight", (c.head_dim,), "bf16")
    yield Parameter(f"{prefix}attn_sink", (c.num_attention_heads,), "f32")
    yield Parameter(f"{prefix}wo_a.weight", (middle, wide // c.o_groups), "linear")
    yield Parameter(f"{prefix}wo_b.weight", (c.hidden_size, middle), "linear")


def _compressor(c: ModelConfig, prefix: str, ratio: int, dim: int) -> Iterator[Parameter]:
    width = 2 * dim if ratio == 4 else dim  # CSA pools each token into two entries, by another half each time
    yield Parameter(f"{prefix}ape", (ratio, width), "f32")
    yield Parameter(f"{prefix}wkv.weight", (width, c.hidden_size), "bf16")
    yield Parameter(f"{prefix}wgate.weight", (width, c.hidden_size), "bf16")
    yield Parameter(f"{prefix}norm.weight", (dim,), "bf16")


def _indexer(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}wq_b.weight", (c.index_n_heads * c.index_head_dim, c.q_lora_rank), "linear")
    yield Parameter(f"{prefix}weights_proj.weight", (c.index_n_heads, c.hidden_size), "bf16")
    yield from _compressor(c, f"{prefix}compressor.", 4, c.index_head_dim)


def _moe(c: ModelConfig, prefix: str, is_hash: bool) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}gate.weight", (c.n_routed_experts, c.hidden_size), "bf16")
    if is_hash:
        yield Parameter(f"{prefix}gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), "table")
    else:
        yield Parameter(f"{prefix}gate.bias", (c.n_routed_experts,), "f32")
    for name in [f"experts.{e}" for e in range(c.n_routed_experts)] + ["shared_experts"]:
        kind = "linear" if name == "shared_experts" else "expert"
        up, down = (c.moe_intermediate_size, c.hidden_size), (c.hidden_size, c.moe_intermediate_size)
        for matrix, shape in (("w1", up), ("w2", down), ("w3", up)):
            yield Parameter(f"{prefix}{name}.{matrix}.weight", shape, kind)


def inventory(config: ModelConfig, storage: Storage | None = None) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint, with the scales of the quantised; `storage` defaults to `Storage.of(config)`."""
    storage = storage or Storage.of(config)
    plain = {"bf16": "BF16", "f32": "F32", "table": "I64"}
    for p in tensors(config):
        form = {"linear": storage.linears, "expert": storage.experts}.get(p.kind, p.kind)
        if form in plain:
            yield TensorSpec(p.name, p.shape, plain[form])
        else:
            yield from _quantised(p, form, storage.scales)


def _quantised(p: Parameter, form: str, scales: str) -> Iterator[TensorSpec]:
    """A quantised weight and its `.scale`: per 32 of a row for FP4, per 128 x 128 block for FP8. Reference 3.2."""
    rows, columns = p.shape
    name = p.name.removesuffix("weight") + "scale"
    if form == "fp4":
        yield TensorSpec(p.name, (rows, columns // 2), "I8")
        yield TensorSpec(name, (rows, _blocks(columns, FP4_BLOCK)), scales)
    else:
        yield TensorSpec(p.name, p.shape, "F8_E4M3")
        yield TensorSpec(name, (_blocks(rows, FP8_BLOCK), _blocks(columns, FP8_BLOCK)), scales)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def mtp_duplicates(config: ModelConfig) -> list[TensorSpec]:
    """What a Base checkpoint may carry besides: copies of embed and head, to be accepted and ignored. Reference 3.3."""
    names = [f"mtp.{i}.{x}.weight" for i in range(config.num_nextn_predict_layers) for x in ("emb.tok_emb", "head")]
    return [TensorSpec(name, (config.vocab_size, config.hidden_size), "BF16") for name in names]


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors of a checkpoint: how many, how many bytes, how many stored elements."""

    count: int
    bytes: int
    elements: int

    @staticmethod
    def of(specs: Iterable[TensorSpec]) -> Stored:
        """The sums over some tensors."""
        rows = [(1, spec.bytes, prod(spec.shape)) for spec in specs]
        return Stored(*(sum(column) for column in zip(*rows, strict=True))) if rows else Stored(0, 0, 0)


def by_dtype(specs: Iterable[TensorSpec]) -> dict[str, Stored]:
    """The sums for each dtype, the largest first."""
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.dtype, []).append(spec)
    return dict(sorted(((d, Stored.of(group)) for d, group in groups.items()), key=lambda item: -item[1].bytes))


# --- parameters


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameter counts. `active` are those that one token meets in the main layers and the head."""

    main: int
    mtp: int
    active: int
    active_with_embedding: int
    routed: int

    @property
    def total(self) -> int:
        """Main layers, embedding, head and MTP block."""
        return self.main + self.mtp


def parameters(config: ModelConfig) -> Parameters:
    """Counts of a configuration. Reference 6."""
    c, counted = config, list(tensors(config))
    mtp = sum(p.count for p in counted if p.name.startswith("mtp."))
    main = sum(p.count for p in counted) - mtp
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    routed = c.num_hidden_layers * c.n_routed_experts * expert
    active = main - routed + c.num_hidden_layers * c.num_experts_per_tok * expert
    return Parameters(main, mtp, active - c.vocab_size * c.hidden_size, active, routed)


# --- KV cache


def row_bytes(config: ModelConfig) -> int:
    """One window or compressed row: FP8 values, BF16 rope dims, a scale byte per 64 padded to 8. Reference 5.2."""
    values = config.head_dim - config.qk_rope_head_dim
    return values + 2 * config.qk_rope_head_dim + 8 * _blocks(_blocks(values, 64), 8)


def index_key_bytes(config: ModelConfig, fp8: bool = False) -> int:
    """One indexer key: FP4 values and a scale byte per 32, or the same values as e4m3 and one F32 scale. 5.2."""
    if fp8:
        return config.index_head_dim + WIDTH["F32"]
    return config.index_head_dim // 2 + _blocks(config.index_head_dim, FP4_BLOCK)


def kv_bytes_per_token(config: ModelConfig) -> float:
    """Bytes by which one more token makes the cache grow, on average. Reference 5.3."""
    count, row = layer_kinds(config), row_bytes(config)
    return count["csa"] * (row + index_key_bytes(config)) / 4 + count["hca"] * row / 128


def kv_bytes(config: ModelConfig, context: int, fp8_keys: bool = False) -> int:
    """Bytes of the rows that a sequence of `context` tokens keeps: whole windows, closed blocks, no tails. 5.3."""
    count, row = layer_kinds(config), row_bytes(config)
    windows = config.num_hidden_layers * config.sliding_window * row
    csa = count["csa"] * (context // 4) * (row + index_key_bytes(config, fp8_keys))
    return windows + csa + count["hca"] * (context // 128) * row


def layer_kinds(config: ModelConfig) -> dict[str, int]:
    """Main layers by kind of attention (swa, csa, hca) and of routing (hash, scored)."""
    ratios = config.compress_ratios[: config.num_hidden_layers]
    hashed = min(config.num_hash_layers, config.num_hidden_layers)
    attention = {"swa": ratios.count(0), "csa": ratios.count(4), "hca": ratios.count(128)}
    return {**attention, "hash": hashed, "scored": config.num_hidden_layers - hashed}


# --- FLOPs


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one decoded token (a multiply-add is 2), by the precision that a deployed engine computes them in.

    lin8: linears with FP8 activations; lin16: BF16 or F32 linears; absorb: V3.2's absorbed projections, BF16;
    core: attention over rows, BF16; index: the indexer's scores, FP4 here and FP8 in V3.2.
    """

    lin8: int
    lin16: int
    core: int
    index: int
    absorb: int = 0
    index_weight: float = 0.5

    @property
    def fp8_equivalent(self) -> float:
        """FP8 counts once, BF16 twice, FP4 x FP4 half: what reproduces the published ratios. Reference 5.4."""
        return self.lin8 + 2 * (self.lin16 + self.absorb + self.core) + self.index_weight * self.index

    @property
    def raw(self) -> int:
        """All alike."""
        return self.lin8 + self.lin16 + self.absorb + self.core + self.index


def flops(config: ModelConfig, context: int) -> Flops:
    """FLOPs of the token decoded at `context` tokens, MTP excluded. Reference 5.4."""
    core, index = _core(config, context), _index(config, context)
    return Flops(lin8=2 * _lin8(config), lin16=2 * _lin16(config), core=2 * core, index=2 * index)


def _lin8(c: ModelConfig) -> int:
    """All FP8 and FP4 weights that a token meets: one multiply-add each."""
    one = sum(prod(p.shape) for p in _attention(c, "") if p.kind == "linear")
    experts = 3 * c.hidden_size * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    index = c.index_n_heads * c.index_head_dim * c.q_lora_rank
    return c.num_hidden_layers * (one + experts) + layer_kinds(c)["csa"] * index


def _lin16(c: ModelConfig) -> int:
    hidden, count = c.hidden_size, layer_kinds(c)
    csa = 2 * hidden * (2 * c.head_dim + 2 * c.index_head_dim) + c.index_n_heads * hidden
    hca = 2 * hidden * c.head_dim
    rest = c.n_routed_experts * hidden + 2 * c.hc_mult * (2 + c.hc_mult) * c.hc_mult * hidden
    return count["csa"] * csa + count["hca"] * hca + c.num_hidden_layers * rest + c.vocab_size * hidden


def _core(c: ModelConfig, context: int) -> int:
    """QK and PV over the window and what the layer kind sees beyond it."""
    count = layer_kinds(c)
    beyond = count["csa"] * min(c.index_topk, context // 4) + count["hca"] * (context // 128)
    window = c.num_hidden_layers * min(c.sliding_window, context)
    return 2 * c.head_dim * c.num_attention_heads * (window + beyond)


def _index(c: ModelConfig, context: int) -> int:
    return layer_kinds(c)["csa"] * (context // 4) * c.index_n_heads * c.index_head_dim


# --- DeepSeek-V3.2, the comparison of the report

_V32_LAYERS = 61
_V32_ROW = (512 + 4 * 4 + 2 * 64) + (128 + 4)  # latent in FP8, its F32 scales, BF16 rope dims; index key and its scale


def v32_kv_bytes(context: int) -> int:
    """KV bytes of V3.2: a latent and an index key for every token and layer. Reference 5.2."""
    return _V32_LAYERS * _V32_ROW * context


def v32_flops(context: int) -> Flops:
    """FLOPs of one decoded token of V3.2: 61 layers, 3 of them dense, 128 heads, MLA absorbed. Reference 5.4."""
    query, out = 7168 * 1536 + 1536 * 128 * 192, 128 * 128 * 7168
    attention = query + 7168 * 576 + out + 1536 * 8192 + 7168 * 128
    return Flops(
        lin8=2 * (_V32_LAYERS * attention + 3 * 3 * 7168 * 18432 + 58 * 9 * 3 * 7168 * 2048),
        lin16=2 * (58 * 256 * 7168 + _V32_LAYERS * 7168 * 64 + 129280 * 7168),
        core=2 * _V32_LAYERS * min(2048, context) * 128 * (576 + 512),
        index=2 * _V32_LAYERS * context * 64 * 128,
        absorb=2 * _V32_LAYERS * 2 * 128 * 128 * 512,
        index_weight=1.0,
    )
