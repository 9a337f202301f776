"""Generation by a tiny random model, against the model asked plainly: one whole prefill for every token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fathom.api import Event, FinishReason, SamplingParams
from fathom.engine.llm import LLM, model_folder
from fathom.errors import CheckpointError, ConfigError, ContextError, PromptError
from fathom.model.batch import Batch
from fathom.model.transformer import Transformer
from tests.oracle import draw_config, draw_weights, our_model

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """One layer of each kind; the end of sentence (id 1) is out of the way unless a test asks for it."""
    config = draw_config(3, num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], sliding_window=128, eos_token_id=49)
    return our_model(config, draw_weights(config, 3))


@pytest.fixture
def llm(model: Transformer) -> LLM:
    return LLM(model, max_context=2000)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 49, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens(events: Sequence[Event]) -> list[int]:
    return [e.token for e in events if e.token is not None]


def plainly(model: Transformer, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            streams = model(torch.tensor(ids), Batch.packed([len(ids)]))
            ids.append(int(model.logits(streams[-1:]).argmax()))
    return ids[-count:]


@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 300])
def test_greedy_equals_the_model_asked_plainly(llm: LLM, model: Transformer, length: int) -> None:
    *_, end = events = list(llm.generate(prompt(length), GREEDY))
    assert tokens(events) == plainly(model, prompt(length), 12)
    assert end.finish is FinishReason.LENGTH
    assert end.usage is not None
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (length, 12)


def test_batches_equal_single_requests(llm: LLM) -> None:
    """More requests than places, of all lengths, with their own ends and seeds."""
    requests = [
        (prompt(length, length), SamplingParams(temperature=length % 2, seed=length, max_tokens=1 + length % 9))
        for length in [1, 5, 130, 64, 3, 257, 128, 2] * 5
    ]
    together = llm.generate_batch(requests)
    alone = [list(LLM(llm.model, 2000).generate(*request)) for request in requests[:8]]
    assert together[:8] == alone
    assert [len(e) - 1 for e in together] == [params.max_tokens for _, params in requests]


def test_no_requests(llm: LLM) -> None:
    assert llm.generate_batch([]) == []


def test_a_stop_id_ends_the_answer_and_is_not_shown(llm: LLM, model: Transformer) -> None:
    told = plainly(model, prompt(20), 12)
    stop = told[5]
    events = list(llm.generate(prompt(20), SamplingParams(temperature=0, max_tokens=12, stop_ids=(stop,))))
    assert tokens(events) == told[: told.index(stop)]
    assert events[-1].finish is FinishReason.STOP


def test_a_seed_gives_the_same_answer(llm: LLM) -> None:
    def answer(seed: int) -> list[int]:
        return tokens(list(llm.generate(prompt(9), SamplingParams(seed=seed, max_tokens=20))))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize("shared", [0, 100, 128, 300, 390])
def test_a_shared_prefix_is_kept_and_changes_nothing(model: Transformer, shared: int) -> None:
    """The second prompt finds the resume point at the first one's end; the third one where the first two parted."""
    llm = LLM(model, 2000)
    first = prompt(400)
    list(llm.generate(first, GREEDY))
    for round, seed in enumerate((5, 6)):
        ids = first[:shared] + prompt(60, seed=seed)
        events = list(llm.generate(ids, GREEDY))
        assert tokens(events) == plainly(model, ids, 12)
        assert events[-1].usage is not None
        found = shared // 128 * 128
        assert events[-1].usage.cached_tokens == (found if round or found == 384 else 0)


def test_an_answer_left_early_does_no_harm(llm: LLM, model: Transformer) -> None:
    events = llm.generate(prompt(200), GREEDY)
    assert next(events).token is not None
    events.close()  # type: ignore[attr-defined]
    assert tokens(list(llm.generate(prompt(200), GREEDY))) == plainly(model, prompt(200), 12)


def test_the_context_bounds_the_answer(model: Transformer) -> None:
    events = list(LLM(model, 30).generate(prompt(25), SamplingParams(temperature=0)))
    assert len(tokens(events)) == 5
    assert events[-1].finish is FinishReason.LENGTH


def test_refusals_come_before_the_first_token(model: Transformer) -> None:
    llm = LLM(model, 30)
    size = model.config.vocab_size
    for ids, kind, words in (
        ([], PromptError, "empty"),
        ([3, size], PromptError, f"token id {size} at place 1 .* 0 to {size - 1}"),
        ([-1], PromptError, "token id -1"),
        (prompt(31), ContextError, "31 tokens.* holds 30"),
        (prompt(30), ContextError, "30 tokens.* holds 30"),
    ):
        with pytest.raises(kind, match=words):
            llm.generate(ids, GREEDY)
        with pytest.raises(kind, match=words):
            llm.generate_batch([(prompt(3), GREEDY), (ids, GREEDY)])


@pytest.mark.parametrize("context", [0, 8193])
def test_a_context_that_the_model_does_not_have(model: Transformer, context: int) -> None:
    with pytest.raises(ConfigError, match=f"{context} tokens .* from 1 to 8192"):
        LLM(model, context)


def test_a_preset_without_weights() -> None:
    with pytest.raises(CheckpointError, match="'flash' is a configuration without weights"):
        model_folder("flash")
