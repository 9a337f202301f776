"""`fathom chat`: a conversation in the terminal, or one turn a line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fathom.api import ChatRequest, Completion, Message
from fathom.cli.screen import Clock, Screen, summary
from fathom.cli.session import Sampling, check_effort, open_chat, piped_lines
from fathom.errors import ContextError, FathomError, PromptError

if TYPE_CHECKING:
    from fathom.encoding.chat import Chat

HELP = """\
/effort none|high|max   how hard to think
/clear                  forget the conversation
/help                   this list
/quit                   leave (so does Ctrl-D)
Ctrl-C stops an answer. To send a line that begins with a slash, put a space before it."""


def chat(
    model: str,
    effort: str,
    system: str | None,
    sampling: Sampling,
    device: str,
    threads: int | None,
    dialect: str | None,
    max_context: int | None,
) -> None:
    """Talk until the input ends. Raises FathomError; on a terminal only for what makes talking impossible."""
    check_effort(effort)
    sampling.check()
    opened = open_chat(model, device=device, threads=threads, dialect=dialect, max_context=max_context)
    talk = Talk(opened, effort, sampling, system)
    if sys.stdin.isatty():
        talk.screen.status(f"{model} · effort {effort} · /help lists the commands")
        talk.run(_typed_lines(), lasting=True)
    else:
        talk.run(piped_lines(), lasting=False)


@dataclass
class Talk:
    """One conversation and its settings."""

    model: Chat
    effort: str
    sampling: Sampling
    system: str | None = None
    screen: Screen = field(default_factory=Screen)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def run(self, lines: Iterator[str], lasting: bool) -> None:
        """One turn a line. A `lasting` talk shows an error and goes on; another ends with it."""
        for line in lines:
            try:
                if not self.turn(line):
                    return
            except FathomError as error:
                if not lasting:
                    raise
                way_out = "; /clear forgets the conversation" if isinstance(error, ContextError) else ""
                self.screen.status(f"error: {error}{way_out}")

    def turn(self, line: str) -> bool:
        """Do what a line says; False ends the talk."""
        if not line.strip():
            return True
        if line.startswith("/"):
            return self.command(*line[1:].split())
        self.answer(line)
        return True

    def command(self, name: str = "", *arguments: str) -> bool:
        """A line that begins with a slash; False ends the talk."""
        match (name, *arguments):
            case ("quit",):
                return False
            case ("clear",):
                self.clear()
            case ("help",):
                self.screen.status(HELP)
            case ("effort", effort):
                check_effort(effort)
                self.effort = effort
            case _:
                raise PromptError(f"unknown command '/{' '.join((name, *arguments))}': /help lists the commands")
        return True

    def clear(self) -> None:
        """Forget everything but the system text."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, line: str) -> None:
        """Ask, show the answer as it comes, and remember both; what was stopped is remembered as far as it came."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": line}]
        params = self.sampling.params(self.model)
        stream = self.model.stream(ChatRequest(messages=asked, effort=self.effort, params=params))
        clock, text, thinking = Clock(), "", ""
        try:
            for piece in stream:
                if isinstance(piece, Completion):
                    self._finish(piece, clock)
                    break
                clock.tick()
                text, thinking = text + piece.text, thinking + piece.thinking
                self.screen.show(piece)
        except KeyboardInterrupt:
            self.screen.end()
            self.screen.status("stopped")
        self.messages = [*asked, {"role": "assistant", "content": text, "reasoning_content": thinking}]

    def _finish(self, done: Completion, clock: Clock) -> None:
        self.screen.end()
        for call in done.tool_calls:
            print(f"{call.name}({call.arguments})", flush=True)
        self.screen.status(summary(done, clock, self.model.engine.context))


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal, with history and editing where the platform has them; Ctrl-C begins a new line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it once it is imported)
    while True:
        try:
            yield _ask("> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)
        except UnicodeDecodeError:
            print("error: that line is not UTF-8", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _ask(prompt: str) -> str:
    """One line; the prompt never goes to a redirected stdout."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
