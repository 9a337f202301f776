"""Text to ids and back, against the tokenizers library."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Bpe

from fathom.encoding.tokenizer import TextStream, Tokenizer
from fathom.errors import CheckpointError

TEXTS = [
    "",
    "Hello, world!",
    "  tabs\tand\r\n\nlines  ",
    "杭州 ñ 👩‍🚀🏳️‍🌈",
    "x = [1, 2]; # 2>&1",
    "\x00\x7f­",
    "3.14159 12345",
]


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_is_encoded_as_the_library_does(tokenizer: Tokenizer, reference: Bpe, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_decoding_any_ids_equals_the_library(tokenizer: Tokenizer, reference: Bpe) -> None:
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(128_000) for _ in range(40)]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_a_stream_holds_back_incomplete_characters(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for _ in range(30):
        ids = [draw.randrange(tokenizer.size) for _ in range(30)]
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode("a 👩‍🚀🏳️‍🌈 b")]
    assert not any("�" in p for p in pieces)
    assert "".join(pieces) == "a 👩‍🚀🏳️‍🌈 b"


@pytest.mark.parametrize("word", ["a sentence of words. ", "7", " ", "x", "杭州 ", "🙂", "\n\n", "qzxj"])
def test_what_is_far_too_long_is_known_before_it_is_encoded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Never of a text that may have so few tokens; and of a very long one from its beginning alone."""
    text = word * (300_000 // len(word))
    count = len(tokenizer.encode(text))
    assert not any(tokenizer.surely_more(text, most) for most in (count, count + 1, 10**9))
    read, encoded = [0], tokenizer._encoded

    def counted(texts: list[str]) -> list[list[int]]:
        read[0] += sum(map(len, texts))
        return encoded(texts)

    monkeypatch.setattr(tokenizer, "_encoded", counted)
    assert tokenizer.surely_more(text * 10, count // 2)
    assert read[0] < 1_000_000


def test_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.size, 10**9]) == ""
    assert tokenizer.size == 129_280


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no tokenizer.json"),
        ("{", "not a byte-level"),
        ('{"added_tokens": [], "model": {"vocab": {}}}', "not a byte-level"),
        ('{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "no added token"),
    ],
)
def test_a_folder_without_a_usable_tokenizer(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.load(tmp_path)
