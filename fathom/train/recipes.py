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
    """The first embedded model: ten million parameters, on one GPU in ten minutes."""
    return TrainConfig(
        name="first_light",
        model=small_model(hidden=256, layers=6, heads=4, vocab=1280),
        schedule=ScheduleConfig(minutes=8.5, warmup=100, decay=0.4, qat=0.2),
        data=DataConfig(tokens_per_batch=49152, prompt_weight=0.05, workers=14),
        optim=OptimConfig(lr=3e-3, ns_steps=(5, 1)),
        loss=LossConfig(mtp=(0.3, 0.1), mtp_every=4),
    )


def first_light_cpu() -> TrainConfig:
    """The same without a GPU: half the width and small batches, for two cores and the better part of an hour."""
    base = first_light()
    return replace(
        base,
        name="first_light_cpu",
        model=small_model(hidden=128, layers=6, heads=2, vocab=1280),
        schedule=ScheduleConfig(minutes=50.0, warmup=40, decay=0.4, qat=0.2),
        data=DataConfig(tokens_per_batch=4096, prompt_weight=0.05, workers=1),
        loss=LossConfig(mtp=(0.3, 0.1), mtp_every=8),
    )


def tiny() -> TrainConfig:
    """Everything at its smallest, in half a minute: to see that a machine can train."""
    return replace(
        first_light(),
        name="tiny",
        model=small_model(hidden=128, layers=4, heads=2, vocab=1280),
        schedule=ScheduleConfig(steps=20, warmup=5),
        data=DataConfig(tokens_per_batch=1024, workers=0),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {f.__name__: f for f in (first_light, first_light_cpu, tiny)}


def recipe(name: str) -> TrainConfig:
    """The run called `name`. Raises TrainError with the names there are."""
    if name not in RECIPES:
        raise TrainError(f"unknown recipe '{name}': use one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def adapted(config: TrainConfig, minutes: float | None, workers: int | None, vocabulary: int) -> TrainConfig:
    """The run on this machine: another length or number of workers, if given; its tokenizer must fit the model."""
    if vocabulary > config.model.vocab_size:
        raise TrainError(
            f"the tokenizer has {vocabulary} tokens and the model of '{config.name}' {config.model.vocab_size}: "
            "use the tokenizer that the recipe was made for"
        )
    if minutes is not None:
        config = replace(config, schedule=replace(config.schedule, minutes=minutes, steps=None))
    return config if workers is None else replace(config, data=replace(config.data, workers=workers))
