"""The engine's core, for one thread: requests in, a step at a time, events out through each request's sink."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from fathom.api import Event, FinishReason, GenerateRequest, Logprob, SamplingParams, Status
from fathom.engine.cache import PagedCache
from fathom.engine.device_cache import DeviceCache
from fathom.engine.disk import Disk
from fathom.engine.fingerprint import fingerprint
from fathom.engine.memory import Memory, furnish, host_bytes, prefill_tokens, room
from fathom.engine.pages import PagePool
from fathom.engine.prefix import PrefixCache
from fathom.engine.request import PAGE, Sequence
from fathom.engine.runner import Work
from fathom.engine.sampler import Sampler, choose
from fathom.engine.scheduler import Plan, Scheduler
from fathom.engine.team import Shared, Team
from fathom.errors import ConfigError, ContextError, FathomError, PromptError
from fathom.model.transformer import Transformer

_log = logging.getLogger("fathom.engine")

_NOTES = 8
"""Notes that are kept, the newest."""


class Core:
    """A model with its cache, its queue and its samplers.

    max_context: the most tokens of a prompt and its answer; None is what the model was made for; at most what the cache
    holds. team: the other ranks, where several hold the model.
    """

    def __init__(
        self,
        model: Transformer,
        max_context: int | None = None,
        memory: Memory | None = None,
        team: Team | None = None,
    ) -> None:
        memory, config = memory or Memory(), model.config
        longest = config.max_position_embeddings
        if max_context is not None and not 1 <= max_context <= longest:
            raise ConfigError(f"a context of {max_context} tokens is out of range: this model has from 1 to {longest}")
        self.lost = ""
        """Why nothing can be computed any more: a rank is gone, or the device. Empty while it can."""
        self.on_loss: Callable[[str], None] = team.end_soon if team else lambda reason: None
        """Hears it, on a thread of its own."""
        self._team, sizes = team, (model, memory, max_context or longest)
        self.cache: Shared | PagedCache | DeviceCache
        self.cache, self._runner = team.furnish(*sizes) if team else furnish(*sizes, room(*sizes))
        if team:
            team.on_loss = self._lose
        self._memory, self._mark = memory, fingerprint(model, self.cache.form)
        if self.cache.device.type != "cpu":
            _warm_up(config.vocab_size, self.cache.device)
        self._disk = Disk(memory.folder, self._mark, memory.disk) if memory.folder else None
        self._begin()
        self.context = min(max_context or longest, self.scheduler.capacity)
        self.vocabulary, self._eos = config.vocab_size, config.eos_token_id
        self._samplers: dict[Sequence, Sampler] = {}
        self._notes: tuple[str, ...] = ()
        if team:
            team.check()  # whatever was waited for above may have come from nobody

    def _begin(self) -> None:
        """Empty books: every page free, nobody queued."""
        pool = PagePool(self.cache.pages)
        self.prefix = PrefixCache(pool, self.cache, self._mark, host_bytes(self._memory, self.cache.device), self._disk)
        most = prefill_tokens(self._memory, self.cache.device)
        self.scheduler = Scheduler(pool, self._memory.slots, most, self.prefix, self._leaving)

    def check(self, request: GenerateRequest) -> None:
        """Refuse what cannot be computed. Raises PromptError, ContextError. Any thread."""
        ids = request.prompt_ids
        if not ids:
            raise PromptError("the prompt is empty: it needs at least one token")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            n, i = next((n, i) for n, i in enumerate(ids) if not 0 <= i < self.vocabulary)
            known = f"this model has ids from 0 to {self.vocabulary - 1}"
            raise PromptError(f"token id {i} at place {n} is out of range: {known}")
        if len(ids) >= self.context:
            limit = f"the prompt has {len(ids)} tokens, but the context holds {self.context} with the answer"
            raise ContextError(f"{limit}: shorten it, or allow a longer context")

    def add(self, request: GenerateRequest, sink: Callable[[Event], None]) -> Sequence:
        """Queue a request that was checked."""
        sequence = Sequence.open(request, self.context, sink)
        self._samplers[sequence] = Sampler(request.params, request.guide)
        self._safely(lambda: self.scheduler.add(sequence))
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End it now."""
        if self._safely(lambda: self.scheduler.cancel(sequence)):
            self._end(sequence)

    def step(self) -> bool:
        """Compute one step; False if there was nothing to compute. Whatever fails, the next step can be made."""
        return self._safely(self._step) is not False

    def _safely(self, action: Callable[[], bool | None]) -> bool | None:
        """Do it; None after a failure that nobody foresaw, which ends all requests but not the engine."""
        with self._working():
            try:
                return action()
            except Exception as error:
                self._start_over(error)
                return None

    def _working(self) -> AbstractContextManager[None]:
        """Around whatever may wait for a device, and so for another rank."""
        return self._team.working() if self._team else nullcontext()

    def _step(self) -> bool:
        plan = self.scheduler.plan()
        if not plan.pieces:
            return False
        sampling = [piece.sequence for piece in plan.pieces if piece.samples]
        try:
            logits = self._runner.run([Work.of(piece) for piece in plan.pieces])
            choices = choose(logits, [self._samplers[s] for s in sampling]) if sampling else []
            if self._team:
                self._team.check()  # likewise
        except Exception as error:
            self._fail(plan, error)
            return True
        self.scheduler.advance(plan)
        self._keep(plan)
        for sequence, choice in zip(sampling, choices, strict=True):
            if isinstance(choice, Exception):
                self._break(sequence, choice)
            else:
                self._take(sequence, *choice)
        return True

    def status(self) -> Status:
        """How it is. Any thread."""
        waiting, running = self.scheduler.waiting, len(self.scheduler.running)
        prefix, notes = self.prefix, (*self._notes, *self.prefix.notes)
        return Status(waiting=waiting, running=running, tiers=prefix.tiers, restored=dict(prefix.restored), notes=notes)

    def close(self) -> None:
        """End all that runs or waits, save the cache."""
        for sequence in list(self._samplers):
            self.cancel(sequence)
        try:
            with self._working():
                self.prefix.close()
        finally:
            if self._team:
                self._team.close()

    def _take(self, sequence: Sequence, token: int, logprob: Logprob | None) -> None:
        """A token was sampled."""
        if token == self._eos or token in sequence.request.params.stop_ids:
            self._finish(sequence, FinishReason.STOP)
            return
        full = sequence.append(token)
        first = len(sequence.ids) == sequence.prompt + 1
        self._tell(sequence, Event(token=token, logprob=logprob, usage=sequence.usage if first else None))
        if full:
            self._finish(sequence, FinishReason.LENGTH)

    def _keep(self, plan: Plan) -> None:
        """Save the resume points that the step has reached."""
        for piece in plan.pieces:
            if piece.sequence.resumable(piece.end):
                self._save(piece.sequence, piece.end)

    def _leaving(self, sequence: Sequence) -> None:
        """The last whole block of what a sequence computed is where its next turn goes on."""
        if sequence.finish is not FinishReason.ERROR:
            self._save(sequence, sequence.at - sequence.at % PAGE)

    def _save(self, sequence: Sequence, at: int) -> None:
        assert sequence.slot is not None
        try:
            self.prefix.save(sequence.namespace, sequence.ids, at, sequence.pages, sequence.slot)
        except Exception as error:  # who asked gets the answer all the same
            self._note("a resume point could not be kept", error)

    def _start_over(self, error: Exception) -> None:
        """The books are in doubt: everyone ends, and nothing that only memory holds is believed any more."""
        self._note("the cache in memory was emptied after an internal error", error)
        for sequence in list(self._samplers):
            sequence.finish = sequence.finish or FinishReason.ERROR
            self._end(sequence, _line(error))
        self._begin()

    def _fail(self, plan: Plan, error: Exception) -> None:
        """A step that broke ends the requests in it; the others go on.

        Where memory ran out those are the ones that were reading a prompt, if any: answers make the same step again.
        (Several ranks are lost with one that fails.)
        """
        if self._team and self._team.lost:
            error = FathomError(self._team.lost)
        if not self._team and _is_broken(self.cache.device):
            self._lose(f"{self.cache.device} is at fault ({_line(error)}): start again")
        scarce = isinstance(error, torch.OutOfMemoryError) and any(not piece.sequence.decoding for piece in plan.pieces)
        for piece in plan.pieces:
            if piece.sequence.finish is None and not (scarce and piece.sequence.decoding):
                self._break(piece.sequence, error)

    def _lose(self, reason: str) -> None:
        """The first reason stays."""
        if not self.lost:
            self.lost = reason
            threading.Thread(target=self.on_loss, args=(reason,), daemon=True).start()

    def _break(self, sequence: Sequence, error: Exception) -> None:
        if not isinstance(error, FathomError):
            _log.error("a request ended by an error", exc_info=error)
        self.scheduler.finish(sequence, FinishReason.ERROR)
        self._end(sequence, _line(error))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        self._end(sequence)

    def _end(self, sequence: Sequence, error: str | None = None) -> None:
        del self._samplers[sequence]
        self._tell(sequence, Event(finish=sequence.finish, usage=sequence.usage, error=error))

    def _note(self, what: str, error: Exception) -> None:
        """Say it where the user looks, once."""
        _log.error(what, exc_info=error)
        if (note := f"{what}: {_line(error)}") not in self._notes:
            self._notes = (*self._notes, note)[-_NOTES:]

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.sink(event)
        except Exception as error:  # whoever listens must not stop the others
            _log.error("a sink refused an event", exc_info=error)


def _warm_up(vocabulary: int, device: torch.device) -> None:
    """Compile what samples on a device: whole, cut by shares, cut by number."""
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=2, top_p=0.9)):
        choose(torch.zeros(1, vocabulary, device=device), [Sampler(params)])


def _is_broken(device: torch.device) -> bool:
    """Whether a GPU answers nothing but errors, as after an illegal access, for as long as the process lives."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _line(error: Exception) -> str:
    text = str(error).split("\n")[0] or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}; lower --max-seqs, --kv-gb or --max-context"
    return text if isinstance(error, FathomError) else f"internal error: {text}"
