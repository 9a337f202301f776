"""The runs of this project, each a function. Flags of the command choose folders, devices and lengths, not these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fathom.config import ModelConfig, Quantization, RopeScaling
from fathom.errors import TrainError
from fathom.train.config import DataConfig, LossConfig, OptimConfig, ScheduleConfig, TrainConfig


def small_model(hidden: int, layers: int, heads: int, vocab: int) -> ModelConfig:
    """A member of the family: V4's window, ratios, rotations and quantisation at small widths.

    Widths are multiples of 128, as the FP8 blocks and the official shapes want them. Two window layers come first, then
    CSA and HCA in turn; the prediction block follows.
    """
    compressed = tuple(4 if i % 2 == 0 else 128 for i in range(layers - 2))
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=128,
        q_lora_rank=128,
        o_groups=heads // 2,
        o_lora_rank=128,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_hash_layers=2,
        compress_ratios=(0, 0, *compressed, 0),
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65536),
        index_n_heads=4,
        index_head_dim=128,
        index_topk=32,
        routed_scaling_factor=1.5,
        expert_dtype="fp4",
        quantization_config=Quantization(),
    )


def first_light() -> TrainConfig:
    """The first embedded model: a few million parameters on two CPU cores in under an hour."""
    return TrainConfig(
        name="first_light",
        model=small_model(hidden=256, layers=6, heads=4, vocab=2048),
        schedule=ScheduleConfig(minutes=50.0, warmup=40, decay=0.4, qat=0.2),
        data=DataConfig(tokens_per_batch=8192, prompt_weight=0.05),
        optim=OptimConfig(lr=3e-3, ns_steps=(5, 1)),
        loss=LossConfig(mtp=(0.3, 0.1), mtp_every=4),
    )


def tiny() -> TrainConfig:
    """Everything at its smallest, in a few seconds: to see that a machine can train."""
    return replace(
        first_light(),
        name="tiny",
        model=small_model(hidden=128, layers=4, heads=2, vocab=2048),
        schedule=ScheduleConfig(steps=20, warmup=5),
        data=DataConfig(tokens_per_batch=1024, workers=0),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"first_light": first_light, "tiny": tiny}


def recipe(name: str) -> TrainConfig:
    """The run called `name`. Raises TrainError with the names there are."""
    if name not in RECIPES:
        raise TrainError(f"unknown recipe '{name}': use {' or '.join(RECIPES)}")
    return RECIPES[name]()
