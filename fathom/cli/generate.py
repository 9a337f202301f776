"""`fathom generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fathom.api import ChatRequest, Completion, Delta, SamplingParams
from fathom.cli.screen import Clock, Screen, summary
from fathom.cli.session import Sampling, check_effort, decoded, open_chat
from fathom.errors import FathomError, PromptError

if TYPE_CHECKING:
    from fathom.encoding.chat import Chat


def generate(
    model: str,
    prompt: str | None,
    ids: str | None,
    effort: str,
    sampling: Sampling,
    as_json: bool,
    device: str,
    threads: int | None,
    dialect: str | None,
    max_context: int | None,
) -> None:
    """Answer `prompt`, or standard input, or continue raw token `ids`; streamed, or as one JSON object."""
    check_effort(effort)
    sampling.check()
    if ids is not None and prompt is not None:
        raise PromptError("--prompt and --ids are two prompts: give one of them")
    raw = None if ids is None else _parsed(ids)
    text = _prompt(prompt) if raw is None else ""
    chat = open_chat(model, device=device, threads=threads, dialect=dialect, max_context=max_context)
    params, clock = sampling.params(chat), Clock()
    request = ChatRequest(messages=[{"role": "user", "content": text}], effort=effort, params=params)
    pieces = _continued(chat, raw, params) if raw else chat.stream(request)
    done = _shown(pieces, clock, None if as_json else Screen())
    if as_json:
        print(json.dumps(_report(done, clock), ensure_ascii=False))
    else:
        Screen().status(summary(done, clock, chat.engine.context))


def _prompt(given: str | None) -> str:
    if given is None:
        if sys.stdin.isatty():
            raise PromptError("there is no prompt: give --prompt TEXT, or pipe one in")
        given = decoded(sys.stdin.buffer.read()).rstrip("\r\n")
    if not given.strip():
        raise PromptError("the prompt is empty")
    return given


def _parsed(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError:
        raise PromptError(f"--ids '{ids}' is not a list of token ids: write it like 0,17,4") from None


def _continued(chat: Chat, ids: list[int], params: SamplingParams) -> Iterator[Delta | Completion]:
    """The continuation of raw ids as text, without a prompt format; control tokens are spelled out."""
    from fathom.encoding.tokenizer import TextStream

    tokenizer = chat.codec.tokenizer
    text, seen = TextStream(tokenizer), []
    for event in chat.engine.generate(ids, params):
        if event.error:
            raise FathomError(event.error)
        if event.token is not None:
            seen.append(event.token)
            yield Delta(text=text.push(event.token))
    yield Delta(text=text.finish())
    assert event.finish and event.usage
    answer: dict[str, Any] = {"text": tokenizer.decode(seen), "thinking": "", "tool_calls": ()}
    yield Completion(**answer, finish=event.finish, usage=event.usage, token_ids=tuple(seen))


def _shown(pieces: Iterator[Delta | Completion], clock: Clock, screen: Screen | None) -> Completion:
    for piece in pieces:
        if isinstance(piece, Completion):
            if screen:
                screen.end()
            return piece
        clock.tick()
        if screen:
            screen.show(piece)
    raise AssertionError("a stream ends with its completion")


def _report(done: Completion, clock: Clock) -> dict[str, Any]:
    return asdict(done) | {
        "seconds": round(clock.seconds(), 3),
        "seconds_to_first": round(clock.first or clock.seconds(), 3),
        "tokens_per_second": round(clock.rate(done.usage.completion_tokens), 1),
    }
