"""The command `fathom`: options and their help. Each verb is imported when it is called, so that --help stays light."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fathom.cli.bench import bench
from fathom.cli.convert import convert
from fathom.cli.cost import cost
from fathom.cli.eval import evaluate
from fathom.cli.keys import keys
from fathom.cli.serve import serve
from fathom.cli.train import train
from fathom.errors import FathomError

app = typer.Typer(
    help="DeepSeek-V4: run it, look into it, convert it, train it.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="A checkpoint's folder, or small (embedded).")]
AnyModel = Annotated[str, typer.Option(help="A checkpoint's folder, or small, flash, pro.")]
Effort = Annotated[str, typer.Option(help="How hard to think: none, high or max.")]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; at most 2.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")]
Seed = Annotated[int | None, typer.Option(help="Repeatable sampling.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DialectName = Annotated[str | None, typer.Option("--dialect", help="Prompt dialect: april or 0813.")]
MaxContext = Annotated[int | None, typer.Option(min=1, help="The most tokens of prompt and answer.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
def chat(
    model: Model = "small",
    effort: Effort = "high",
    system: Annotated[str | None, typer.Option(help="A system text before the conversation.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    device: Device = "cpu",
    threads: Threads = None,
    dialect: DialectName = None,
    max_context: MaxContext = None,
) -> None:
    """Talk to a model; piped input is one turn a line. Answers on stdout, thinking and status on stderr."""
    from fathom.cli.chat import chat as run
    from fathom.cli.session import Sampling

    sampling = Sampling(temperature, top_p, max_tokens, seed)
    run(model, effort, system, sampling, device, threads, dialect, max_context)


@app.command()
def generate(
    model: Model = "small",
    prompt: Annotated[str | None, typer.Option(help="The question; standard input if left out.")] = None,
    ids: Annotated[str | None, typer.Option(help="Continue these token ids instead, as they are: 0,17,4")] = None,
    effort: Effort = "high",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = "cpu",
    threads: Threads = None,
    dialect: DialectName = None,
    max_context: MaxContext = None,
) -> None:
    """Answer one prompt."""
    from fathom.cli.generate import generate as run
    from fathom.cli.session import Sampling

    sampling = Sampling(temperature, top_p, max_tokens, seed)
    run(model, prompt, ids, effort, sampling, as_json, device, threads, dialect, max_context)


@app.command()
def inspect(
    model: AnyModel = "small",
    context: Annotated[int, typer.Option(min=1, help="Tokens of context for KV bytes and FLOPs.")] = 1_000_000,
    as_json: Json = False,
    plot: Annotated[str | None, typer.Option(help="Draw KV bytes and FLOPs against context to this SVG file.")] = None,
) -> None:
    """Layers, parameters, bytes, and what a token costs."""
    from fathom.cli.inspect import inspect as run

    run(model, context, as_json, plot)


# These verbs declare their own options; their modules are as light as this one.
app.command()(serve)
app.command()(bench)
app.command()(convert)
app.command()(cost)
app.command()(train)
app.command("eval")(evaluate)
app.add_typer(keys, name="keys")


def run(arguments: Sequence[str]) -> int:
    """Run a command line and give its exit code: 2 for what a user can mend, told in one line on stderr."""
    try:
        return int(app(args=list(arguments) or ["--help"], prog_name="fathom", standalone_mode=False) or 0)
    except FathomError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return 141
    except OSError as error:
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if usage := getattr(error, "format_message", None):
            return _fail(str(usage()))
        raise


def _fail(message: str) -> int:
    line = message.replace("\n", " ")
    print(f"error: {line}", file=sys.stderr)
    return 2


def _open_streams() -> None:
    """A stream that the caller closed is empty; a terminal that lacks a character shows `?` in its place."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main() -> None:
    """The console script."""
    _open_streams()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        # Whoever read us has left, or the disk is full; the interpreter would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or (141 if isinstance(error, BrokenPipeError) else _fail(str(error.strerror)))
    sys.exit(code)


if __name__ == "__main__":
    main()
