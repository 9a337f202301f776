"""The terminal chat and `generate`, over an engine that says what it is told."""

from __future__ import annotations

import logging

import pytest

from fathom.api import Delta
from fathom.cli.chat import Talk
from fathom.cli.main import run
from fathom.cli.screen import Clock, Screen, tell_of_device
from fathom.cli.session import Sampling
from fathom.encoding.chat import Chat
from fathom.encoding.codec import Codec
from fathom.engine.llm import LLM
from tests.cli.conftest import Piped, Script


def test_a_pipe_is_one_turn_a_line(capsys: pytest.CaptureFixture[str], pipe: Piped, script: Script) -> None:
    script.answers = ["easy</think>one", "hm</think>two 👩‍🚀"]
    pipe("first\n\nsecond ü\r\n".encode())
    assert run(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo 👩‍🚀\n"
    assert err.startswith("easy\n")
    assert "tok/s" in err
    assert "of 1,000" in err
    assert script.asked(1).endswith(
        "<｜User｜>first<｜Assistant｜></think>one<｜end▁of▁sentence｜><｜User｜>second ü<｜Assistant｜><think>"
    )


def test_commands(capsys: pytest.CaptureFixture[str], pipe: Piped, script: Script) -> None:
    script.answers = ["</think>a", "</think>b", "</think>c"]
    pipe(b"one\n/effort none\ntwo\n/clear\n/help\n /three\n/quit\nnever\n")
    assert run(["chat", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    assert out == "a\nb\nc\n"
    assert "/effort none|high|max" in err
    assert script.asked(0) == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>one<｜Assistant｜><think>"
    assert script.asked(1).endswith("two<｜Assistant｜></think>")
    assert script.asked(2) == "<｜begin▁of▁sentence｜>Be brief.<｜User｜> /three<｜Assistant｜></think>"


@pytest.mark.parametrize(("line", "words"), [("/quti", "/quti"), ("/effort", "/effort"), ("/effort big", "big")])
def test_a_wrong_command_ends_a_pipe(
    capsys: pytest.CaptureFixture[str], pipe: Piped, script: Script, line: str, words: str
) -> None:
    pipe(line.encode())
    assert run(["chat"]) == 2
    assert words in capsys.readouterr().err
    assert script.prompts == []


def test_a_wrong_command_does_not_end_a_terminal(capsys: pytest.CaptureFixture[str], codec: Codec) -> None:
    script = Script(codec, ["</think>a"])
    Talk(Chat(script, codec), "high", Sampling()).run(iter(["/nonsense", "hello"]), lasting=True)
    out, err = capsys.readouterr()
    assert out == "a\n"
    assert "unknown command '/nonsense'" in err


def test_a_conversation_that_outgrew_its_context_can_begin_anew(
    capsys: pytest.CaptureFixture[str], codec: Codec, tiny: LLM
) -> None:
    lines = iter(["1" * 300, "/clear", "hello"])
    Talk(Chat(tiny, codec), "none", Sampling(max_tokens=2, seed=0)).run(lines, lasting=True)
    err = capsys.readouterr().err
    assert "holds 200" in err and "/clear forgets" in err
    assert err.count("error: ") == 1 and "2 tokens" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(
    capsys: pytest.CaptureFixture[str], pipe: Piped, script: Script
) -> None:
    script.answers = [None, "</think>still here"]
    pipe(b"one\ntwo\n")
    assert run(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "still here\n"
    assert "stopped" in err
    assert "one" in script.asked(1)


def test_thinking_is_dimmed_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    for dims in (True, False):
        screen = Screen(dims=dims)
        for delta in (Delta("a"), Delta("b"), Delta(text="c\x1b[2J")):
            screen.show(delta)
        screen.end()
        out, err = capsys.readouterr()
        assert out == "c␛[2J\n"
        assert err == ("\x1b[2mab\x1b[0m\n" if dims else "ab\n")


def test_generate_streams_the_answer(capsys: pytest.CaptureFixture[str], pipe: Piped, script: Script) -> None:
    script.answers = ["why</think>because"] * 2
    assert run(["generate", "--prompt", "q", "--temperature", "0.5", "--top-p", "0.9", "--seed", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == "because\n"
    assert err.startswith("why\n")
    assert (script.params[0].temperature, script.params[0].top_p, script.params[0].seed) == (0.5, 0.9, 4)
    pipe(b"from a pipe\nof two lines\n")
    assert run(["generate", "--effort", "none"]) == 0
    assert script.asked(1).endswith("<｜User｜>from a pipe\nof two lines<｜Assistant｜></think>")


@pytest.mark.usefixtures("with_tiny")
def test_raw_ids_are_continued_as_they_are(capsys: pytest.CaptureFixture[str], codec: Codec) -> None:
    assert run(["generate", "--ids", "0,5,7", "--max-tokens", "4", "--temperature", "0", "--json"]) == 0
    first = capsys.readouterr().out
    assert run(["generate", "--ids", "0,5,7", "--max-tokens", "4", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip("\n")
    assert '"prompt_tokens": 3' in first


def test_the_clock_counts_from_the_first_piece() -> None:
    clock = Clock(begin=-1e9)
    assert clock.rate(1) == 0
    clock.tick()
    first = clock.first
    clock.tick()
    assert clock.first == first


def test_a_gpu_is_got_ready_in_the_open(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in ("fathom.engine", "fathom.kernels")]
    for logger in loggers:
        for name in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
        logger.handlers = []
    tell_of_device("cpu")
    assert not any(logger.handlers for logger in loggers)
    tell_of_device("cuda")
    tell_of_device("cuda")
    loggers[0].info("decode graph of 8 captured")
    loggers[1].info("kernels on cuda:0: Triton")
    assert capfd.readouterr().err == "decode graph of 8 captured\nkernels on cuda:0: Triton\n"
