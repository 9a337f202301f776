"""A loaded model that answers prompts: one at a time with prefix reuse, or many side by side. No scheduler yet.

Prefill runs in tiles that end at absolute multiples of 128 tokens, so that a prompt is computed in the same pieces
wherever a call begins; decode adds one token a sequence and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fathom.api import Event, FinishReason, SamplingParams, Usage
from fathom.checkpoint.load import load_model
from fathom.checkpoint.reader import Progress
from fathom.config import WEIGHTS
from fathom.engine.sampler import Sampler, sample
from fathom.errors import CheckpointError, ConfigError, ContextError, PromptError
from fathom.model.batch import TILE, Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.transformer import Transformer

SLOTS = 32
"""Sequences that `generate_batch` computes side by side."""

_SMALLEST_CACHE = 4096

_ONE_THREAD = 512
"""Up to this hidden size one thread is torch's default here: a second computes little and waits much. On two cores that
others use as well, the embedded model's shape decodes 68 tokens a second with one thread and 2 to 6 with two."""


def model_folder(model: str) -> Path:
    """The folder of a checkpoint: a path, or `small` for the embedded one. Raises CheckpointError for a bare preset."""
    if model in ("flash", "pro"):
        raise CheckpointError(f"'{model}' is a configuration without weights: give a checkpoint's folder, or small")
    return WEIGHTS / "small" if model == "small" else Path(model)


class LLM:
    """An `api.Engine` over one model.

    max_context: the most tokens of a prompt and its answer, at most (and by default) what the model was made for.
    """

    def __init__(self, model: Transformer, max_context: int | None = None) -> None:
        longest = model.config.max_position_embeddings
        if max_context is not None and not 1 <= max_context <= longest:
            raise ConfigError(f"a context of {max_context} tokens is out of range: this model has from 1 to {longest}")
        self.model = model.eval()
        self.context = max_context or longest
        self._cache: ContiguousCache | None = None
        self._held: _Sequence | None = None

    @staticmethod
    def load(
        model: str | Path,
        *,
        threads: int | None = None,
        max_context: int | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> LLM:
        """Load a checkpoint's folder, or `small`, for the CPU: weights are widened, exactly, to the compute dtype.

        threads: for torch; None is one for a small model, torch's own choice for others. progress: hears of bytes read.
        Raises CheckpointError, ConfigError.
        """
        loaded = load_model(model_folder(str(model)), progress=progress)
        if threads or loaded.config.hidden_size <= _ONE_THREAD:
            torch.set_num_threads(threads or 1)
        return LLM(loaded, max_context)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """Tokens as they are sampled, then the end. What the last prompt of this engine shares with this one is kept.

        Raises PromptError for ids that the model does not have, ContextError for a prompt without room for an answer.
        """
        self._check(prompt_ids)
        return self._run(_Sequence.open(prompt_ids, params, self))

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        """All requests, up to `SLOTS` at a time; a place that becomes free goes to the next. Raises as `generate`."""
        for prompt_ids, _ in requests:
            self._check(prompt_ids)
        sequences = [_Sequence.open(*request, self) for request in requests]
        waiting, free = iter(sequences), min(len(sequences), SLOTS)
        running: list[_Sequence] = []
        cache = self._make_cache(max((s.end for s in sequences), default=1), slots=max(free, 1))
        slots = list(range(free))
        while True:
            while slots and (sequence := next(waiting, None)):
                sequence.slot = slots.pop()
                running.append(sequence)
            if not running:
                return [s.events() for s in sequences]
            self._step(running, cache)
            slots += [s.slot for s in running if s.finish]
            running = [s for s in running if not s.finish]

    def _run(self, sequence: _Sequence) -> Iterator[Event]:
        cache = self._resume(sequence)
        self._first_step(sequence, cache)
        shown = sequence.prompt
        while True:
            # An interrupted step may leave rows half written: nothing is held until it is whole.
            self._held = sequence
            yield from (Event(token=i) for i in sequence.ids[shown:])
            if sequence.finish:
                break
            self._held, shown = None, len(sequence.ids)
            self._step([sequence], cache)
        yield sequence.ending()

    def _step(self, running: Sequence[_Sequence], cache: ContiguousCache) -> None:
        """Compute the next tile or token of every sequence; those that have caught up get a new token."""
        spans = [s.span() for s in running]
        ids = [i for s, span in zip(running, spans, strict=True) for i in s.ids[span.start : span.start + span.count]]
        device = self.model.embed.weight.device
        with torch.inference_mode():
            tokens = torch.tensor(ids, device=device)
            x_RnD = self.model(tokens, Batch.step(spans, wanted="last", device=device), cache)
            for sequence, span in zip(running, spans, strict=True):
                sequence.at += span.count
            rows = [n for n, s in enumerate(running) if s.at == len(s.ids)]
            logits_RV = self.model.logits(x_RnD[rows]) if rows else x_RnD[:0]
        ready = [running[n] for n in rows]
        for sequence, token in zip(ready, sample(logits_RV, [s.sampler for s in ready]), strict=True):
            sequence.take(token)

    def _resume(self, sequence: _Sequence) -> ContiguousCache:
        """A cache for the sequence, placed after the last whole tile that it shares with what the cache holds."""
        cache, held, self._held = self._cache, self._held, None
        if cache is None or cache.max_context < sequence.end:
            self._cache = cache = self._make_cache(sequence.end)
        elif held:
            shared = _common(held.ids[: held.at], sequence.ids[:-1])
            sequence.at = sequence.cached = shared - shared % TILE
        return cache

    def _first_step(self, sequence: _Sequence, cache: ContiguousCache) -> None:
        """Go on at the shared prefix, or from the beginning if its window is no longer kept."""
        try:
            self._step([sequence], cache)
        except ValueError:
            if not sequence.cached:
                raise
            sequence.at = sequence.cached = 0
            self._step([sequence], cache)

    def _make_cache(self, tokens: int, slots: int = 1) -> ContiguousCache:
        size = min(max(_SMALLEST_CACHE, 1 << (tokens - 1).bit_length()), self.context)
        return ContiguousCache(
            self.model.config, self.model.numerics, slots, size, device=self.model.embed.weight.device
        )

    def _check(self, prompt_ids: Sequence[int]) -> None:
        size = self.model.config.vocab_size
        if not prompt_ids:
            raise PromptError("the prompt is empty: it needs at least one token")
        for n, i in enumerate(prompt_ids):
            if not 0 <= i < size:
                raise PromptError(f"token id {i} at place {n} is out of range: this model has ids from 0 to {size - 1}")
        if len(prompt_ids) >= self.context:
            raise ContextError(
                f"the prompt has {len(prompt_ids)} tokens, but the context holds {self.context} with the answer: "
                "shorten it, or allow a longer context"
            )


@dataclass(eq=False)
class _Sequence:
    """One request under way: ids are prompt and answer so far, of which `at` are in the cache; it ends before `end`."""

    ids: list[int]
    prompt: int
    end: int
    sampler: Sampler
    stops: frozenset[int]
    at: int = 0
    cached: int = 0
    slot: int = 0
    finish: FinishReason | None = None

    @staticmethod
    def open(prompt_ids: Sequence[int], params: SamplingParams, llm: LLM) -> _Sequence:
        ids = list(prompt_ids)
        end = min(llm.context, len(ids) + (params.max_tokens or llm.context))
        stops = frozenset({llm.model.config.eos_token_id, *params.stop_ids})
        return _Sequence(ids, len(ids), end, Sampler(params), stops)

    def span(self) -> Span:
        """What to compute next: up to the next tile's border, or to the last id."""
        return Span(self.at, min(len(self.ids), self.at - self.at % TILE + TILE) - self.at, self.slot)

    def take(self, token: int) -> None:
        """A new token: the end, or a part of the answer."""
        if token in self.stops:
            self.finish = FinishReason.STOP
            return
        self.ids.append(token)
        if len(self.ids) == self.end:
            self.finish = FinishReason.LENGTH

    def ending(self) -> Event:
        return Event(finish=self.finish, usage=Usage(self.prompt, len(self.ids) - self.prompt, self.cached))

    def events(self) -> list[Event]:
        return [*(Event(token=i) for i in self.ids[self.prompt :]), self.ending()]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences share from their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
