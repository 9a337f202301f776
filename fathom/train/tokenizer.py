"""The byte-level BPE of the models that we train: small, digits one by one, DeepSeek's control strings as added tokens.

Ids 0, 1 and 2 are begin, end and pad, the only ones flagged special; the other control strings come last, unflagged, as
in the published tokenizer (reference api A.1), so that `deepseek-recipe` works with it unchanged (reference recipe 6).
A digit is always one token and joins nothing; letters, punctuation and line breaks do not merge with one another
either, which keeps "m-a-p" and "1m2a" at two tokens an item whatever stands around them.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fathom.encoding.conversation import conversation, library
from fathom.encoding.dialect import Dialect
from fathom.errors import TrainError
from fathom.skills.base import Task
from fathom.skills.mix import stream

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CONTROL = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
_WORDS = r" ?[\p{L}\p{M}_]+| ?[^\s\p{L}\p{M}\p{N}_]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_SMALLEST = 3 + 256 + len(CONTROL)


def train_tokenizer(vocab_size: int = 1280, examples: int = 20_000, seed: int = 0) -> Tokenizer:
    """Train on text drawn from the skills, rendered as the model will see it.

    The result has at most `vocab_size` entries in all, fewer when the text has no more pairs worth merging; a size that
    cannot hold the bytes and control strings raises `TrainError`. The same arguments give the same tokenizer.
    """
    if vocab_size < _SMALLEST:
        raise TrainError(
            f"a vocabulary of {vocab_size} cannot hold the bytes and control tokens; use {_SMALLEST} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL),
        min_frequency=2,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(examples, seed), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in CONTROL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int = 1_048_576) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, each aside first and then renamed."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
    }
    for name, text in files.items():
        aside = folder / f"{name}.part"
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(folder / name)


def corpus(examples: int, seed: int) -> Iterator[str]:
    """Pieces of ordinary text from rendered training conversations; the control strings between them are left out.

    A finished turn is rendered without its thinking unless tools are given, so the trace comes once more by itself.
    """
    for task, effort in islice(stream(seed), examples):
        yield from _plain_pieces(task, effort)
        yield task.traces[effort]


def _plain_pieces(task: Task, effort: str) -> Iterator[str]:
    rendered = library().DeepseekV4Encoding().render_conversation(_finished(task, effort))
    start = 0
    for begin, end in [*rendered.special_ranges, (len(rendered.prompt),) * 2]:
        if rendered.prompt[start:begin]:
            yield rendered.prompt[start:begin]
        start = end


def _finished(task: Task, effort: str) -> Any:
    """The whole turn in the April dialect, which our models speak."""
    reply: dict[str, Any] = {"role": "assistant", "content": task.answer, "reasoning_content": task.traces[effort]}
    if task.tool_call:
        name, arguments = task.tool_call
        reply["tool_calls"] = [{"id": "0", "function": {"name": name, "arguments": json.dumps(arguments)}}]
    return conversation([{"role": "user", "content": task.question}, reply], effort, Dialect.APRIL, task.tools)
