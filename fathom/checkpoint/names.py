"""Which tensors a checkpoint of a configuration has, and where each lives in our model. Reference 3.1 to 3.4.

Our parameters carry the official names, except that the routed experts of a layer are stacked: `experts.w13` holds w1
and then w3 of each expert, `experts.w2` its w2. The list is read off an empty model: there is no second description.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from fathom.config import ModelConfig, Quantization
from fathom.errors import FormatError
from fathom.kernels.quant import FP4_BLOCK, WEIGHT_BLOCK
from fathom.model.transformer import Transformer

Shape = tuple[int, ...]

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Element types by the names of the safetensors format. I8 holds two FP4 values."""

FLOATS = ("BF16", "F32")
SCALES = ("F8_E8M0", "F32")
FORMS = {"I8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16", "F32": "bf16"}
"""The stored form of a weight by its dtype: the tensor decides, whatever the configuration says (reference 1.1)."""

ALLOWED = {
    "bf16": FLOATS,
    "f32": FLOATS,
    "table": ("I64", "I32"),
    "linear": ("F8_E4M3", *FLOATS),
    "expert": ("I8", "F8_E4M3", *FLOATS),
}
"""The dtypes in which each kind of tensor may come."""

_PLAIN = {"bf16": "BF16", "f32": "F32", "table": "I64"}
_LINEAR = re.compile(r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|indexer\.wq_b|shared_experts\.w[123]|[eh]_proj)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.w[123]\.weight$")
_DUPLICATE = re.compile(r"mtp\.\d+\.(emb\.tok_emb|head)\.weight$")


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a file, as a safetensors header describes it."""

    name: str
    dtype: str
    shape: Shape

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Entry:
    """One official tensor: its logical shape, its kind, and where our model keeps it.

    kind: bf16, f32 or table (stored so always); linear or expert (quantised in the published checkpoints).
    parameter: our name. expert, rows: the place in a stack of experts; rows is a slice of the stack's second axis.
    """

    name: str
    shape: Shape
    kind: str
    parameter: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def scale(self) -> str:
        """The name of the tensor that holds this one's scales, where it has them."""
        return self.name.removesuffix("weight") + "scale"

    @property
    def module(self) -> str:
        """The path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor that a checkpoint of `config` must have, scales apart, in the order of the model."""
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return [entry for name, shape in shapes.items() for entry in _entries(name, shape, shapes)]


def _entries(name: str, shape: Shape, shapes: dict[str, Shape]) -> Iterator[Entry]:
    if name.endswith("experts.w13"):
        yield from _stack(name.removesuffix("w13"), shape, shapes[name.removesuffix("w13") + "w2"])
    elif not name.endswith("experts.w2"):
        yield Entry(name, shape, kind_of(name), name)


def _stack(prefix: str, up: Shape, down: Shape) -> Iterator[Entry]:
    width, hidden = up[1] // 2, up[2]
    for e in range(up[0]):
        for name, rows in (("w1", slice(0, width)), ("w3", slice(width, 2 * width))):
            yield Entry(f"{prefix}{e}.{name}.weight", (width, hidden), "expert", prefix + "w13", e, rows)
        yield Entry(f"{prefix}{e}.w2.weight", down[1:], "expert", prefix + "w2", e)


def kind_of(name: str) -> str:
    """What kind of tensor a parameter of our model is, see `Entry`."""
    if name.endswith("tid2eid"):
        return "table"
    if _LINEAR.search(name):
        return "linear"
    return "bf16" if name.endswith(".weight") else "f32"


def foreign_entry(name: str, dtype: str, shape: Shape) -> Entry:
    """A tensor that a checkpoint may carry and our model does not have, so that `convert` can take it along."""
    if FORMS.get(dtype) == "fp4":
        shape = (*shape[:-1], 2 * shape[-1])
    quantised = dtype in ("I8", "F8_E4M3")
    kind = ("expert" if _EXPERT.search(name) else "linear") if quantised else _foreign_kind(dtype)
    return Entry(name, shape, kind, "")


def _foreign_kind(dtype: str) -> str:
    return {dtype: kind for kind, dtype in _PLAIN.items()}.get(dtype, "other")


def specs(entry: Entry, form: str, scales: str = "F8_E8M0") -> tuple[Spec, ...]:
    """The tensors that hold `entry`, a linear or expert in the form fp4, fp8 or bf16: it, and its scales if quantised.

    Raises FormatError where FP4 cannot hold rows of this length. Reference 3.2.
    """
    if entry.kind in _PLAIN:
        return (Spec(entry.name, _PLAIN[entry.kind], entry.shape),)
    if form == "bf16":
        return (Spec(entry.name, "BF16", entry.shape),)
    rows, columns = entry.shape
    if form == "fp8":
        blocks = -(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)
        return Spec(entry.name, "F8_E4M3", entry.shape), Spec(entry.scale, scales, blocks)
    if columns % FP4_BLOCK:
        raise FormatError(f"{entry.name} has rows of {columns} values: FP4 needs a multiple of {FP4_BLOCK}, use fp8")
    return Spec(entry.name, "I8", (rows, columns // 2)), Spec(entry.scale, scales, (rows, columns // FP4_BLOCK))


def is_foreign(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint of `config` may have `name` without our model having it.

    Copies of embed and head in the MTP block (Base, reference 3.3), and the whole of a DSpark drafter (3.4).
    """
    return bool(_DUPLICATE.match(name)) or (config.dspark is not None and name.startswith("mtp."))


def with_drafter(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """`config`, told whether the checkpoint's `mtp.*` are a DSpark drafter: then `dspark` is set, and drafting is off.

    The tensors decide: an MTP block has `mtp.0.enorm.weight` (reference 3.4). Where only that is lost its projection is
    still there, and the block is incomplete.
    """
    has_mtp = any(name.startswith("mtp.") and not _DUPLICATE.match(name) for name in names)
    is_mtp = "mtp.0.enorm.weight" in names or "mtp.0.e_proj.weight" in names
    if config.num_nextn_predict_layers == 0 or not has_mtp or is_mtp:
        return config
    said = {
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "compress_ratios": list(config.compress_ratios),
    }
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return replace(config, num_nextn_predict_layers=0, compress_ratios=ratios, dspark=said)


def stored_config(config: ModelConfig, experts: str, linears: str) -> ModelConfig:
    """`config` as it describes a checkpoint with experts and linears in these forms.

    Raises FormatError for forms that there are not, and for BF16 experts beside FP8 linears, which no config.json says.
    """
    if experts not in ("fp4", "fp8", "bf16") or linears not in ("fp8", "bf16"):
        raise FormatError(f"experts as {experts} and linears as {linears}: use fp4, fp8 or bf16, and fp8 or bf16")
    if (experts, linears) == ("bf16", "fp8"):
        raise FormatError("no config.json describes BF16 experts beside FP8 linears: store the linears as bf16 too")
    quantised = (experts, linears) != ("bf16", "bf16")
    return replace(
        config,
        expert_dtype=None if experts == "bf16" else experts,
        quantization_config=Quantization() if quantised else None,
    )
