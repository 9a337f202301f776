"""Text to token ids and back, such that only the prompt format can write control tokens. Reference recipe 3.

The tokenizer file is read twice: as it is (for control tokens and bytes), and without added tokens, for text that
a client wrote. A rendered prompt is spliced from both.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Bpe

from fathom.errors import CheckpointError

END_OF_THINKING = "</think>"
DSML = "｜DSML｜"

CONTROLS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    END_OF_THINKING,
    DSML,
    "<｜latest_reminder｜>",
)
"""Without these among its added tokens a tokenizer cannot write a prompt."""


_SHORT = 4_000
"""Characters below which texts are encoded here and now: on a busy machine, other threads would answer later."""


_PIECE, _AT_ONCE, _CUT = 50_000, 8, 100
"""A text that may be far too long is counted in pieces of so many characters, so many at a time; so many tokens of each
are not counted, because a cut may make two of one."""


class Tokenizer:
    """The tokenizer of a checkpoint.

    source: the JSON text of its file; size: token ids are below it; added: control token -> id.
    """

    def __init__(self, source: str) -> None:
        layout: dict[str, Any] = json.loads(source)
        self.source = source
        self.added: dict[str, int] = {t["content"]: t["id"] for t in layout["added_tokens"]}
        self._plain = Bpe.from_str(json.dumps(layout | {"added_tokens": []}))
        vocabulary = {token: i for token, i in layout["model"]["vocab"].items() if token not in self.added}
        self._bytes = {i: _to_bytes(token) for token, i in vocabulary.items()}
        self._bytes |= {i: token.encode() for token, i in self.added.items()}
        self.size = max(self._bytes, default=-1) + 1

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read `tokenizer.json` beside the weights. Raises CheckpointError if it is missing or no V4 tokenizer."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json: put the checkpoint's tokenizer beside its weights")
        try:
            tokenizer = Tokenizer(path.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises no narrower class
            raise CheckpointError(f"{path} is not a byte-level tokenizer file: {error}") from None
        if missing := [c for c in CONTROLS if c not in tokenizer.added]:
            raise CheckpointError(f"{path} has no added token {missing[0]}: prompts cannot be written with it")
        return tokenizer

    @cached_property
    def digest(self) -> str:
        """Names the vocabulary: ids mean something only with it."""
        return blake2b(self.source.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: a control token spelled in it stays ordinary text."""
        return self._encoded([text])[0]

    def splice(self, text: str, controls: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of a rendered prompt; `controls` are the (start, end) of its control tokens, ascending and disjoint.

        A control that this vocabulary lacks is written as ordinary text.
        """
        known = [(start, end) for start, end in controls if text[start:end] in self.added]
        begins, ends = [0, *(end for _, end in known)], [*(start for start, _ in known), len(text)]
        ids, *others = self._encoded([text[a:b] for a, b in zip(begins, ends, strict=True)])
        for (start, end), piece in zip(known, others, strict=True):
            ids += [self.added[text[start:end]], *piece]
        return ids

    def surely_more(self, text: str, most: int) -> bool:
        """Whether a text has more tokens than that for certain, found out without encoding all of it. A text of fewer
        characters is always let pass: it is encoded as quickly.
        """
        if len(text) <= max(most, _PIECE):
            return False
        count = 0
        for start in range(0, len(text), _PIECE * _AT_ONCE):
            part = text[start : start + _PIECE * _AT_ONCE]
            pieces = self._encoded([part[n : n + _PIECE] for n in range(0, len(part), _PIECE)])
            count += sum(max(0, len(ids) - _CUT) for ids in pieces)
            if count > most:
                return True
        return False

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Long ones in a batch, even of one: only then does the library let other threads of Python go on meanwhile."""
        if sum(map(len, texts)) < _SHORT:
            return [self._plain.encode(text, add_special_tokens=False).ids for text in texts]
        return [found.ids for found in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, perhaps a part of a character; an unknown id has none."""
        return self._bytes.get(token, b"")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, controls spelled out; broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")


class TextStream:
    """Text of ids that come one by one: a character is held back until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes."""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._decoder.decode(b"", final=True)


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_ALPHABET = _alphabet()


def _to_bytes(token: str) -> bytes:
    return bytes(_ALPHABET[c] for c in token)
