"""The chat on a real terminal (a pseudo one): a real Ctrl-C, editing lines, leaving with Ctrl-D."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs a POSIX terminal")

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import sys, time
from pathlib import Path
import fathom
from fathom.cli import chat
from fathom.cli.main import run
from fathom.encoding.chat import Chat
from fathom.encoding.codec import Codec
from fathom.encoding.tokenizer import Tokenizer
from tests.cli.conftest import Script

class Slow(Script):
    def generate(self, prompt_ids, params):
        for event in super().generate(prompt_ids, params):
            time.sleep(0.02)
            yield event

codec = Codec(Tokenizer.load(Path(fathom.__path__[0]) / "weights" / "small"))
engine = Slow(codec, ["</think>" + "long " * 2000, "hm</think>short"])
chat.open_chat = lambda *_, **__: Chat(engine, codec)
sys.exit(run(["chat"]))
"""


class Terminal:
    """A program on a pseudo terminal: type into it, wait for words."""

    def __init__(self, program: str) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        line = [sys.executable, "-c", program]
        self.process = subprocess.Popen(
            line, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=_own_terminal, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, words: str, seconds: float = 60) -> str:
        """What came up to these words; fails after so many seconds."""
        end = time.monotonic() + seconds
        while words not in self.seen and (left := end - time.monotonic()) > 0:
            try:
                if select.select([self.master], [], [], left)[0]:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                break
        assert words in self.seen, self.seen
        before, _, self.seen = self.seen.partition(words)
        return before

    def interrupt_until(self, words: str) -> None:
        """Ctrl-C, again where it came too early: CPython sleeps over one between a prompt and its wait for a key."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.until(words, seconds=3)
                return
        self.until(words, seconds=3)


def _own_terminal() -> None:
    """Ctrl-C reaches the program as it does at a terminal, also where this run was started in the background."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what runs in its background ignore it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(PROGRAM)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


def test_a_conversation_with_ctrl_c(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("tell me\n")
    terminal.until("long long")
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    terminal.interrupt_until("/quit leaves")
    terminal.type("/effort max\nagain\n")
    assert "\x1b[2mhm\x1b[0m" in terminal.until("short")
    terminal.until("tok/s")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0
