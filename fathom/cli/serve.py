"""`fathom serve`: a model behind the three dialects, until Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from fathom.api import Status
from fathom.cli.keys import default_database
from fathom.errors import ConfigError

if TYPE_CHECKING:
    from fathom.config import ModelConfig
    from fathom.encoding.codec import Codec
    from fathom.encoding.desk import Desk
    from fathom.engine.llm import LLM
    from fathom.engine.memory import Memory
    from fathom.engine.team import Team
    from fathom.server.books import Books
    from fathom.server.listen import Listener

_GB = 1_000_000_000


def serve(
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or small (embedded).")] = "small",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    max_context: Annotated[int | None, typer.Option(min=1, help="The most tokens of prompt and answer.")] = None,
    max_seqs: Annotated[int, typer.Option(min=1, help="Requests computed at once; others wait.")] = 64,
    kv_gb: Annotated[
        float | None, typer.Option(help="Memory of the model's cache, in GB: 0.6, or what a GPU has free.")
    ] = None,
    kv_host_gb: Annotated[
        float | None,
        typer.Option(help="Memory for prefixes that left the cache, in GB: 0.5, up to 16 beside a GPU."),
    ] = None,
    kv_disk_dir: Annotated[Path | None, typer.Option(help="A folder for prefixes that survive a restart.")] = None,
    kv_disk_gb: Annotated[float, typer.Option(help="The most that this folder holds, in GB.")] = 4.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    tp: Annotated[int, typer.Option(min=1, help="GPUs that hold the model together, each a part of it.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU.")] = None,
    dialect: Annotated[str | None, typer.Option(help="Prompt dialect: april or 0813.")] = None,
    strict_deepseek_compat: Annotated[bool, typer.Option(help="Refuse what the hosted service refuses.")] = False,
    isolate_messages_users: Annotated[
        bool, typer.Option(help="Messages: no shared prefixes between user_ids.")
    ] = False,
    allow_open: Annotated[bool, typer.Option(help="Listen beyond this machine although anybody may ask.")] = False,
    database: Annotated[
        str | None, typer.Option(envvar="FATHOM_DATABASE", help="Keys and ledger: a URL; SQLite in the user's data.")
    ] = None,
    bill_as: Annotated[str, typer.Option(help="The model of the price lists whose prices are charged.")] = "",
    price_list: Annotated[list[Path] | None, typer.Option(help="A price list of your own; repeatable.")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="An origin that browsers may ask from; repeatable.")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once, waiting ones included.")] = 1024,
    max_body_mb: Annotated[float, typer.Option(help="The largest body of a request.")] = 64.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers may go on after Ctrl-C or SIGTERM.")] = 20.0,
    log: Annotated[bool, typer.Option(help="A line of JSON on stderr for every request; never what was said.")] = False,
    config: Annotated[
        Path | None, typer.Option(callback=read_config, is_eager=True, help="A TOML file with any of these flags.")
    ] = None,
) -> None:
    """Serve a model to SDKs and agents: OpenAI's two dialects, Anthropic's, completions; a chat page at /."""
    from fathom.encoding.desk import Desk
    from fathom.encoding.replay import ReplayStore
    from fathom.engine.memory import Memory
    from fathom.server.app import create_app
    from fathom.server.listen import bound, loopback
    from fathom.server.metrics import Metrics
    from fathom.server.settings import ServerSettings

    _check_range("--max-body-mb", max_body_mb, 0.001, 1e6)
    _check_range("--grace", grace, 0, 86_400)
    for flag, gigabytes, least in (
        ("--kv-gb", kv_gb, 0.001),
        ("--kv-host-gb", kv_host_gb, 0),
        ("--kv-disk-gb", kv_disk_gb, 0.001),
    ):
        _check_range(flag, least if gigabytes is None else gigabytes, least, 1e6)
    for origin in cors or ():
        _check_origin(origin)
    settings = ServerSettings(max_requests=max_requests, max_body=int(max_body_mb * 1e6), cors=tuple(cors or ()))
    books = _open_books(database or default_database(), price_list or [])
    if not allow_open and not loopback(host) and not len(books.keyring or ()):
        raise ConfigError(
            f"--host {host} is reachable from outside and there are no keys: make one with fathom keys create, "
            "or pass --allow-open to let anybody in"
        )
    listening = bound(host, port)
    folder = kv_disk_dir.expanduser() if kv_disk_dir else None
    memory = Memory(
        device=None if kv_gb is None else int(kv_gb * _GB),
        host=None if kv_host_gb is None else int(kv_host_gb * _GB),
        disk=int(kv_disk_gb * _GB),
        folder=folder / "kv" if folder else None,
        slots=max_seqs,
    )
    llm, codec = _load(model, dialect, device, tp, threads, max_context, memory)
    names = served_names(llm.model.config, model)
    replay = ReplayStore(folder / "replay" if folder else None)
    desk = Desk(codec, names, llm.context, strict=strict_deepseek_compat, users=isolate_messages_users, replay=replay)
    books.bill_as = bill_as or ("deepseek-v4-pro" if names[0] == "deepseek-v4-pro" else "deepseek-v4-flash")
    books.metrics = Metrics(llm.status)
    books.price(datetime.now(UTC))
    if log:
        _log_requests()
    _run(listening, create_app(llm, desk, settings=settings, books=books), llm, books, desk, grace)


def _check_range(flag: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{flag} {value:g} is out of range: it must be from {least:g} to {most:,.0f}")


def _check_origin(origin: str) -> None:
    found = urlsplit(origin)
    whole = found.scheme and found.netloc and origin == f"{found.scheme}://{found.netloc}"
    if origin not in ("*", "null") and not whole:
        raise ConfigError(f"--cors '{origin}' is no origin: write https://chat.example.org, or * for all")


def _load(
    model: str,
    dialect: str | None,
    device: str,
    tp: int,
    threads: int | None,
    max_context: int | None,
    memory: Memory,
) -> tuple[LLM, Codec]:
    from fathom.cli.screen import Loading, tell_of_device
    from fathom.config import ModelConfig
    from fathom.encoding.codec import Codec
    from fathom.engine.llm import LLM, model_folder

    folder = model_folder(model)
    ModelConfig.load(folder)
    codec = Codec.load(folder, dialect)
    context = max_context or codec.settings.context
    loading = Loading(after=1.0)
    tell_of_device(device)
    llm = LLM.load(folder, device=device, threads=threads, max_context=context, memory=memory, progress=loading, tp=tp)
    return llm, codec


def _run(listening: socket.socket, app: Any, llm: LLM, books: Books, desk: Desk, grace: float) -> None:
    from fathom.server.listen import Listener, Patience

    if books.keyring:
        books.keyring.watch()
    listener = Listener(app, Patience(end=grace))
    llm.core.on_loss = partial(_give_up, listener, llm.team)
    print(_welcome(listening, desk.served, bool(len(books.keyring or ()))), file=sys.stderr, flush=True)
    try:
        listener.run(sockets=[listening])
    finally:
        llm.close()
        desk.replay.close()
        if books.keyring:
            books.keyring.close()
        if books.meter:
            books.meter.close()
    if llm.core.lost:
        print(f"error: {llm.core.lost}", file=sys.stderr, flush=True)
        os._exit(2)  # a GPU that still waits for the lost rank would hold up every other way out


def _give_up(listener: Listener, team: Team | None, reason: str) -> None:
    """Tell everybody who still waits, and end."""
    listener.reason = reason
    for _ in range(2):  # the first asks, the second hangs up
        time.sleep(0.5)
        listener.handle_exit(signal.SIGTERM, None)
    if team:
        team.end_soon(reason)


def _open_books(url: str, lists: Sequence[Path]) -> Books:
    """Keys, ledger and prices. Raises ConfigError before anything is loaded."""
    from fathom.server.books import Books
    from fathom.server.database import open_database
    from fathom.server.keys import Keyring
    from fathom.server.metering import Meter
    from fathom.server.metrics import Metrics
    from fathom.server.prices import LISTS, PriceBook

    prices = PriceBook.load([*sorted(LISTS.glob("*.csv")), *lists])
    opened = open_database(url)
    meter = Meter(opened, _journal(url))
    return Books(Metrics(Status), prices, "deepseek-v4-flash", meter, Keyring(opened))


def _journal(url: str) -> Path:
    """Where finished requests wait for the database: beside an SQLite file, else in the user's data."""
    from fathom.server.database import place, sqlite_file

    if file := sqlite_file(url):
        return file.with_name(file.name + ".journal")
    name = sha256(place(url).encode()).hexdigest()[:16]
    return Path.home() / ".local" / "share" / "fathom" / f"{name}.journal"


def _log_requests() -> None:
    import logging

    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("fathom.requests").setLevel(logging.INFO)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the flags of a TOML file as defaults: what stands on the command line wins. Raises ConfigError."""
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    known = {name.lstrip("-").replace("-", "_"): p for p in context.command.params for name in p.opts}
    given = {key.replace("-", "_"): value for key, value in found.items()}
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"--config {path}: unknown setting '{unknown[0]}'; known are {', '.join(sorted(known))}")
    for key, value in given.items():
        if wanted := _mismatch(known[key], value):
            raise ConfigError(f"--config {path}: {key} must be {wanted}")
    context.default_map = {**{str(known[k].name): v for k, v in given.items()}, **(context.default_map or {})}
    return path


def _mismatch(parameter: Any, value: object) -> str | None:
    """What a setting's value must be, where it is not; numbers and names are checked by the flag itself."""
    if getattr(parameter, "multiple", False):
        fine = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if fine else "a list of strings"
    if getattr(parameter, "is_flag", False) != isinstance(value, bool):
        return "one value" if isinstance(value, bool) else "true or false"
    return "one value" if isinstance(value, list | dict) else None


def served_names(config: ModelConfig, model: str) -> tuple[str, ...]:
    """What clients may call the model: its own name, and DeepSeek's for a Flash or Pro; a small one answers to both."""
    own = "small" if model == "small" else Path(model).resolve().name
    pro = config.num_hidden_layers > 50
    family = ("deepseek-v4-pro",) if pro else ("deepseek-v4-flash",)
    both = ("deepseek-v4-flash", "deepseek-v4-pro") if config.num_hidden_layers < 40 else family
    return tuple(dict.fromkeys((*both, own)))


def _welcome(listening: socket.socket, names: tuple[str, ...], keys: bool) -> str:
    key = "KEY" if keys else "none"
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": key},
        "models": {names[-1]: {}},
    }
    opencode = {"model": f"fathom/{names[-1]}", "provider": {"fathom": provider}}
    return f"""Fathom serves {names[-1]} on {url}  (the page is there, too; Ctrl-C stops)

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{names[-1]}", "messages": [{{"role": "user", "content": "hello"}}]}}'

  OpenAI SDK    base_url="{url}/v1", api_key="{key}"
  Anthropic SDK base_url="{url}/anthropic", api_key="{key}"
  Claude Code   ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key} ANTHROPIC_MODEL={names[0]} claude
  Codex         codex -c model_provider=fathom -c 'model_providers.fathom={{name="Fathom", base_url="{url}/v1", \
wire_api="responses"}}' -m {names[0]}
  OpenCode      OPENCODE_CONFIG_CONTENT='{json.dumps(opencode)}' opencode
"""
