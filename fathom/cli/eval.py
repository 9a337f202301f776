"""`fathom eval`: measure a checkpoint on problems that it was not trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fathom.api import ChatModel, Completion
from fathom.errors import ConfigError


def evaluate(
    task: Annotated[str, typer.Argument(help="What to measure: skills.")],
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or small.")] = "small",
    effort: Annotated[
        list[str] | None, typer.Option(help="none, high or max; again for several. All if absent.")
    ] = None,
    skill: Annotated[list[str] | None, typer.Option(help="One skill; again for several. All if absent.")] = None,
    level: Annotated[list[int] | None, typer.Option(help="1, 2 or 3; again for several. All if absent.")] = None,
    samples: Annotated[int, typer.Option(help="Problems of each skill and level.")] = 100,
    seed: Annotated[int, typer.Option(help="Which held-out problems are drawn.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Bound of an answer, thinking included.")] = 192,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report as JSON and Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, not as a table.")] = False,
) -> None:
    """Ask held-out problems and print accuracy by skill and effort, with 95 % intervals."""
    from fathom.evals.run import TASKS, write
    from fathom.evals.skills import Plan
    from fathom.evals.skills import evaluate as run

    if task not in TASKS:
        raise ConfigError(f"unknown task '{task}': use {', '.join(TASKS)}")
    plan = Plan(
        skills=tuple(skill or Plan.skills),
        efforts=tuple(effort or Plan.efforts),
        levels=tuple(level or Plan.levels),
        samples=samples,
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
    )
    chat, end = _open(model, device, threads)
    report = run(chat, plan, lambda completion: _thinking(completion, end), _progress)
    if out:
        write(report, out)
    print(json.dumps(report.to_dict(), indent=2) if as_json else report.to_markdown())


def _open(model: str, device: str, threads: int | None) -> tuple[ChatModel, int]:
    """The model behind its prompt format, and the id of the token that ends thinking."""
    from fathom.encoding.chat import Chat
    from fathom.encoding.codec import Codec
    from fathom.encoding.tokenizer import END_OF_THINKING
    from fathom.engine.llm import LLM, model_folder

    folder = model_folder(model)
    codec = Codec.load(folder)
    return Chat(LLM.load(folder, device=device, threads=threads), codec), codec.tokenizer.added[END_OF_THINKING]


def _thinking(completion: Completion, end: int) -> int:
    """Sampled tokens before the end of thinking; all of them when a thinking answer never came to it."""
    ids = completion.token_ids
    if end in ids:
        return ids.index(end)
    return len(ids) if completion.thinking else 0


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
