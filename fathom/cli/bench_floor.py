"""What the hardware allows: bytes that a decode step must read, FLOPs that a prompt must cost, over an H200's rates.

No launch, no communication, no idle unit: nothing can be faster. `config` is everywhere that of one of `tp` ranks
(`parallel.plan.rank_config`): it reads its part of the tensors that are cut, the whole of the others, its rows of the
head.
The rates are measured on an H200 (PyTorch 2.11, CUDA 13.0), unless another source is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.accounting import flops, index_key_bytes, inventory, kv_bytes, layer_kinds, row_bytes, v32_kv_bytes
from fathom.config import ModelConfig

COPY_RATE = 4.3e12
"""Bytes a second that a device copy reads and writes."""
FP8_RATE, BF16_RATE = 1.58e15, 7.9e14
"""FLOP/s of dense products: what the floors of a prompt are counted with, above the 1.37e15 and 7.4e14 measured."""
SMALL_REDUCE, SMALL_BYTES = 6.3e-6, 64 * 1024
"""Seconds of an all-reduce over two H200s of at most so many bytes: one-shot, symmetric memory, in a CUDA graph."""
REDUCE_RATE = 2.45e11
"""Bytes a second of an all-reduce of 32 MB over two H200s by NCCL."""
_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that a decode step reads at least, each once: weights that every token meets, experts, KV rows."""

    always: int
    experts: float
    kv: int

    @property
    def total(self) -> float:
        """All of them."""
        return self.always + self.experts + self.kv

    @property
    def seconds(self) -> float:
        """The floor of the step."""
        return self.total / COPY_RATE


def step_bytes(
    config: ModelConfig, context: int, batch: int, *, tp: int = 1, fp8_keys: bool = False, experts: float | None = None
) -> StepBytes:
    """Of one token of each of `batch` sequences after `context` tokens; weights in the published form, MTP excluded.

    experts: how many of a layer are read, by default `distinct_experts`.
    """
    always = sum(
        spec.bytes // (tp if spec.name == "head.weight" else 1) for spec in inventory(config) if _read(spec.name)
    )
    expert = sum(spec.bytes for spec in inventory(config) if spec.name.startswith("layers.0.ffn.experts.0."))
    count = distinct_experts(config, batch) if experts is None else experts
    rows = batch * read_rows(config, context, fp8_keys)
    return StepBytes(always, config.num_hidden_layers * count * expert, rows)


def _read(name: str) -> bool:
    """Whether every step reads all of a tensor. Of the embedding and the hash tables it reads a row a token."""
    return not (name.startswith(("embed.", "mtp.")) or ".experts." in name or name.endswith("tid2eid"))


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that are chosen by at least one of `batch` tokens, if they choose independently: the mean."""
    count = config.n_routed_experts
    return count * (1 - (1 - config.num_experts_per_tok / count) ** batch)


def read_rows(config: ModelConfig, context: int, fp8_keys: bool) -> int:
    """KV bytes that a sequence's next token reads: windows, all index keys, and the rows that attention then sees."""
    count, row, entries = layer_kinds(config), row_bytes(config), context // 4
    windows = config.num_hidden_layers * min(config.sliding_window, context) * row
    csa = min(config.index_topk, entries) * row + entries * index_key_bytes(config, fp8_keys)
    return windows + count["csa"] * csa + count["hca"] * (context // 128) * row


def kept_bytes(config: ModelConfig, context: int, fp8_keys: bool) -> tuple[int, int]:
    """KV bytes that a sequence takes in the cache: by accounting, and of DeepSeek-V3.2 for the same context."""
    return kv_bytes(config, context, fp8_keys), v32_kv_bytes(context)


def all_reduce_seconds(config: ModelConfig, tokens: int) -> float:
    """Two sums over two ranks a layer, of `tokens` rows of BF16. Counted, not run."""
    size = tokens * config.hidden_size * 2
    one = SMALL_REDUCE + max(0, size - SMALL_BYTES) / REDUCE_RATE
    return 2 * config.num_hidden_layers * one


def prompt_seconds(config: ModelConfig, tokens: int, *, index_share: float = 1.0) -> float:
    """The floor of a prompt: linears and index scores at the FP8 rate, attention at that of BF16; no head but the last.

    index_share: of every query's index scores that this rank computes.
    """
    head = 2 * config.vocab_size * config.hidden_size
    depths = [round((i + 0.5) * tokens / _SAMPLES) for i in range(_SAMPLES)]
    costs = [flops(config, depth) for depth in depths]
    fp8 = sum(c.lin8 + c.lin16 - head + index_share * c.index for c in costs)
    return tokens / _SAMPLES * (fp8 / FP8_RATE + sum(c.core for c in costs) / BF16_RATE)
