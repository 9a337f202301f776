"""A small model, and a renderer that needs no tokenizer: one token a character."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fathom.skills.base import Task
from fathom.train.config import DataConfig, LossConfig, OptimConfig, ScheduleConfig, TrainConfig
from fathom.train.recipes import small_model

BOS, EOS, THINK_END, USER, ANSWER = range(5)


class CharRenderer:
    """Prompts and completions in a toy format."""

    def prompt(self, messages: Sequence[dict[str, Any]], effort: str, tools: Sequence[Any]) -> list[int]:
        ids = [BOS, {"none": 5, "high": 6, "max": 7}[effort]]
        for m in messages:
            ids += [USER if m["role"] == "user" else ANSWER, *chars(m["content"])]
        return [*ids, ANSWER]

    def completion(self, task: Task, effort: str) -> list[int]:
        thought = [] if effort == "none" else [*chars(task.traces[effort]), THINK_END]
        return [*thought, *chars(task.answer), EOS]


def chars(text: str) -> list[int]:
    return [8 + ord(c) % 100 for c in text]


def tiny_config(**schedule: Any) -> TrainConfig:
    """A few hundred thousand parameters of every kind of layer, batches of a few short documents."""
    model = small_model(hidden=128, layers=4, heads=2, vocab=128)
    return TrainConfig(
        name="test",
        model=replace(model, n_routed_experts=4, index_topk=2),
        schedule=ScheduleConfig(**({"steps": 4, "warmup": 2, "qat": 0.0} | schedule)),
        data=DataConfig(tokens_per_batch=200, shares={"parity": 1.0, "chain": 1.0}, workers=0, prompt_weight=0.1),
        optim=OptimConfig(lr=3e-3, ns_steps=(3, 1), ns_dtype="float32"),
        loss=LossConfig(mtp_every=2),
        log_seconds=1e9,
        checkpoint_minutes=1e9,
    )
