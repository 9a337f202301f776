"""`fathom serve`: a model behind the three dialects, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fathom.errors import ConfigError

if TYPE_CHECKING:
    from fathom.config import ModelConfig
    from fathom.encoding.codec import Codec
    from fathom.engine.llm import LLM

_GB = 1_000_000_000


def serve(
    model: Annotated[str, typer.Option(help="A checkpoint's folder, or small (embedded).")] = "small",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    max_context: Annotated[int | None, typer.Option(min=1, help="The most tokens of prompt and answer.")] = None,
    max_seqs: Annotated[int, typer.Option(min=1, help="Requests computed at once; others wait.")] = 64,
    kv_gb: Annotated[float, typer.Option(help="Memory of the model's cache, in GB.")] = 0.5,
    kv_host_gb: Annotated[float, typer.Option(help="Memory for prefixes that left the cache, in GB.")] = 0.5,
    kv_disk_dir: Annotated[Path | None, typer.Option(help="A folder for prefixes that survive a restart.")] = None,
    kv_disk_gb: Annotated[float, typer.Option(help="The most that this folder holds, in GB.")] = 4.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    dialect: Annotated[str | None, typer.Option(help="Prompt dialect: april or 0813.")] = None,
    strict_deepseek_compat: Annotated[bool, typer.Option(help="Refuse what the hosted service refuses.")] = False,
    isolate_messages_users: Annotated[
        bool, typer.Option(help="Messages: no shared prefixes between user_ids.")
    ] = False,
    allow_open: Annotated[bool, typer.Option(help="Listen beyond this machine although anybody may ask.")] = False,
) -> None:
    """Serve a model to SDKs and agents: OpenAI's two dialects, Anthropic's, completions."""
    from fathom.engine.engine import Memory

    if not allow_open and not _loopback(host):
        raise ConfigError(f"--host {host} is reachable from outside: make keys, or pass --allow-open to let anybody in")
    listening = _listen(host, port)
    folder = kv_disk_dir.expanduser() if kv_disk_dir else None
    memory = Memory(
        device=int(kv_gb * _GB),
        host=int(kv_host_gb * _GB),
        disk=int(kv_disk_gb * _GB),
        folder=folder / "kv" if folder else None,
        slots=max_seqs,
    )
    llm, codec = _load(model, dialect, threads, max_context, memory)
    _run(listening, llm, codec, model, folder, strict_deepseek_compat, isolate_messages_users)


def _load(
    model: str, dialect: str | None, threads: int | None, max_context: int | None, memory: object
) -> tuple[LLM, Codec]:
    from fathom.cli.screen import Loading
    from fathom.config import ModelConfig
    from fathom.encoding.codec import Codec
    from fathom.engine.llm import LLM, model_folder

    folder = model_folder(model)
    ModelConfig.load(folder)
    codec = Codec.load(folder, dialect)
    context = max_context or codec.settings.context
    llm = LLM.load(folder, threads=threads, max_context=context, memory=memory, progress=Loading(after=1.0))  # type: ignore[arg-type]
    return llm, codec


def _run(
    listening: socket.socket, llm: LLM, codec: Codec, model: str, folder: Path | None, strict: bool, users: bool
) -> None:
    import uvicorn

    from fathom.encoding.exchange import Desk
    from fathom.encoding.replay import ReplayStore
    from fathom.server.app import create_app

    replay = ReplayStore(folder / "replay" if folder else None)
    names = served_names(llm.model.config, model)
    desk = Desk(codec, names, llm.context, strict=strict, users=users, replay=replay)
    config = uvicorn.Config(
        create_app(llm, desk), log_level="warning", timeout_graceful_shutdown=30, timeout_keep_alive=75, ws="none"
    )
    server = uvicorn.Server(config)
    print(_welcome(listening, names), file=sys.stderr, flush=True)
    try:
        server.run(sockets=[listening])
    finally:
        llm.close()
        replay.close()


def served_names(config: ModelConfig, model: str) -> tuple[str, ...]:
    """What clients may call the model: its own name, and DeepSeek's for a Flash or Pro; a small one answers to both."""
    own = "small" if model == "small" else Path(model).resolve().name
    pro = config.num_hidden_layers > 50
    family = ("deepseek-v4-pro",) if pro else ("deepseek-v4-flash",)
    both = ("deepseek-v4-flash", "deepseek-v4-pro") if config.num_hidden_layers < 40 else family
    return tuple(dict.fromkeys((*both, own)))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before the model is loaded. Raises ConfigError for a busy port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from None
    return listening


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _welcome(listening: socket.socket, names: tuple[str, ...]) -> str:
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"""Fathom serves {names[-1]} on {url}  (Ctrl-C stops)

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{names[-1]}", "messages": [{{"role": "user", "content": "hello"}}]}}'

  OpenAI SDK    base_url="{url}/v1", api_key="none"
  Anthropic SDK base_url="{url}/anthropic", api_key="none"
  Claude Code   ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=none ANTHROPIC_MODEL={names[0]} claude
  Codex         codex -c model_provider=fathom -c 'model_providers.fathom={{name="Fathom", base_url="{url}/v1", \
wire_api="responses"}}' -m {names[0]}
"""
