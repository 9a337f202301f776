"""Packing and masks against a brute-force reading of the documents; batches as a function of seed and number."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fathom.config import WEIGHTS
from fathom.skills.base import EFFORTS
from fathom.skills.mix import SKILLS, stream
from fathom.train.data import Feed, Packed, draw, lay, pack, write
from fathom.train.render import open_renderer
from tests.train.support import CharRenderer, tiny_config

DATA = tiny_config().data
EMBEDDED = WEIGHTS / "small"
needs_tokenizer = pytest.mark.skipif(not (EMBEDDED / "tokenizer.json").exists(), reason="no embedded tokenizer")


def same(a: Packed, b: Packed) -> bool:
    return all(
        torch.equal(getattr(a, f), getattr(b, f))
        for f in ("tokens", "targets", "weights", "targets_after", "weights_after", "efforts")
    )


@pytest.mark.parametrize("waste", [0.0, 0.15, 1.0])
def test_every_weight_and_target_by_brute_force(waste: float) -> None:
    documents = draw(3, replace(DATA, tokens_per_batch=2000), CharRenderer())
    packed = pack(lay(documents, waste))
    ordered = sorted(documents, key=lambda d: -len(d.tokens))
    lengths = [tile.count for tile in packed.batch.tiles for _ in range(tile.docs)]
    assert sum(lengths) == packed.tokens.shape[0]
    row = 0
    for d, length in zip(ordered, lengths, strict=True):
        assert len(d.tokens) <= length <= len(d.tokens) * (1 + waste)
        for t in range(length):
            last = len(d.tokens) - 1
            assert packed.batch.positions[row + t] == t
            assert packed.tokens[row + t] == d.tokens[min(t, last)]
            for ahead, targets, weights in (
                (1, packed.targets, packed.weights),
                (2, packed.targets_after, packed.weights_after),
            ):
                inside = t + ahead <= last
                assert weights[row + t] == pytest.approx(d.weights[t + ahead] if inside else 0.0)
                if inside:
                    assert targets[row + t] == d.tokens[t + ahead]
            assert packed.efforts[row + t] == EFFORTS.index(d.effort)
        row += length


def test_prompt_weighs_little_and_completion_whole() -> None:
    task, _ = next(stream(1, {"chain": 1.0}))
    r = CharRenderer()
    d = write(task, "high", (), r, 0.25)
    prompt = len(r.prompt([{"role": "user", "content": task.question}], "high", ()))
    assert d.weights == [0.25] * prompt + [1.0] * (len(d.tokens) - prompt)
    assert d.tokens[prompt:] == r.completion(task, "high")


def test_a_batch_depends_on_seed_and_number_only() -> None:
    first = [pack(lay(draw(n, DATA, CharRenderer()))) for n in (0, 1)]
    again = pack(lay(draw(1, DATA, CharRenderer())))
    other = pack(lay(draw(1, replace(DATA, seed=1), CharRenderer())))
    assert same(first[1], again)
    assert not same(first[0], first[1])
    assert not same(first[1], other)


def test_worker_processes_give_the_same_batches_in_order() -> None:
    config = replace(DATA, waste=0.1)
    alone, many = Feed(config, CharRenderer, first=5), Feed(replace(config, workers=2), CharRenderer, first=5)
    try:
        assert all(same(next(alone), next(many)) for _ in range(6))
    finally:
        many.close()


def test_too_long_documents_are_left_out() -> None:
    found = draw(0, replace(DATA, max_document=60, tokens_per_batch=1000), CharRenderer())
    assert max(len(d.tokens) for d in found) <= 60


@needs_tokenizer
def test_documents_continue_what_inference_renders() -> None:
    """Prompt and completion, joined, are what the prompt format writes for that conversation as history."""
    renderer = open_renderer(EMBEDDED)
    added = json.loads((EMBEDDED / "tokenizer.json").read_text())["added_tokens"]
    ids = {t["content"]: t["id"] for t in added}
    tasks = stream(7)
    for _ in range(40):
        task, effort = next(tasks)
        asked = {"role": "user", "content": task.question}
        d = write(task, effort, (), renderer, 0.0)
        completion = [t for t, w in zip(d.tokens, d.weights, strict=True) if w]
        prompt = d.tokens[: -len(completion)]
        assert prompt == renderer.prompt([asked], effort, task.tools)
        assert prompt[-1] == ids["</think>" if effort == "none" else "<think>"]
        assert completion[-1] == ids["<｜end▁of▁sentence｜>"]
        assert completion.count(ids["</think>"]) == (effort != "none")
        if effort == "none" and task.tool_call is None:
            turn = [asked, {"role": "assistant", "content": task.answer}, {"role": "user", "content": "x"}]
            assert renderer.prompt(turn, "none", task.tools)[: len(d.tokens)] == d.tokens


@needs_tokenizer
def test_a_trained_tool_call_is_read_back_as_that_call() -> None:
    from fathom.api import FinishReason
    from fathom.encoding.codec import Codec
    from fathom.encoding.tokenizer import Tokenizer

    codec, renderer = Codec(Tokenizer.load(EMBEDDED)), open_renderer(EMBEDDED)
    tasks = stream(8, {"tools": 1.0})
    for _ in range(10):
        task, effort = next(tasks)
        prompt = renderer.prompt([{"role": "user", "content": task.question}], effort, task.tools)
        reader = codec.reader(prompt)
        for token in renderer.completion(task, effort)[:-1]:
            reader.push(token)
        reader.finish(FinishReason.STOP)
        (call,) = reader.tool_calls
        assert SKILLS["tools"].verify(task, (call.name, json.loads(call.arguments)))
        assert reader.thinking == task.traces[effort]


def test_workers_get_a_renderer_that_can_travel() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(partial(open_renderer, Path("x")))).args == (Path("x"),)
