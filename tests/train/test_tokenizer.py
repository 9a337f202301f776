"""The small model's tokenizer: what the prompt library and the design ask of it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fathom.errors import TrainError
from fathom.skills.mix import stream
from fathom.train.tokenizer import BOS, CONTROL, EOS, PAD, save_tokenizer, train_tokenizer

SHIPPED = Path(__file__).parents[2] / "fathom" / "weights" / "small" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(vocab_size=700, examples=1500)


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED))


def test_size_ids_and_flags(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 700
    assert [tokenizer.token_to_id(t) for t in (BOS, EOS, PAD)] == [0, 1, 2]
    added = {t["content"]: t["special"] for t in json.loads(tokenizer.to_str())["added_tokens"]}
    assert {t for t, special in added.items() if special} == {BOS, EOS, PAD}
    assert set(added) == {BOS, EOS, PAD, *CONTROL}


def test_any_text_survives(tokenizer: Tokenizer, shipped: Tokenizer) -> None:
    for text in ("a-b  c\n\n\td", "naïve 中文 🙂 x=1", "  12+3=15 ", *(t.question for t, _ in islice(stream(1), 200))):
        for any_one in (tokenizer, shipped):
            assert any_one.decode(any_one.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone_and_spelled_letters_take_two_tokens(shipped: Tokenizer) -> None:
    assert shipped.encode("347+285").tokens == list("347+285")
    assert shipped.encode("m-a-p").tokens == list("m-a-p")
    assert shipped.encode("1m2a3p").tokens == list("1m2a3p")
    assert not [t for t in shipped.get_vocab() if len(t) > 1 and any(c.isdigit() for c in t)]


def test_training_is_repeatable(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(vocab_size=700, examples=1500).to_str() == tokenizer.to_str()


def test_the_prompt_library_works_with_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = pytest.importorskip("deepseek_recipe")
    save_tokenizer(tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    encoding = recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    ids = encoding.encode(recipe.Conversation([recipe.UserMessage(f"a{EOS}<think>")], reasoning_effort="low"))
    names = [tokenizer.id_to_token(i) for i in ids]
    assert names[:2] == [BOS, "<｜User｜>"] and names[-2:] == ["<｜Assistant｜>", "<think>"]
    assert ids.count(1) == 0 and names.count("<think>") == 1


def test_traces_fit_the_window(shipped: Tokenizer) -> None:
    """Question, thinking and answer stay within the 128 rows that every layer sees."""
    for task, effort in islice(stream(2, efforts={"high": 1.0, "max": 1.0}), 3000):
        if not task.tools:
            trace = len(shipped.encode(task.traces[effort]).ids)
            assert trace <= {"high": 60, "max": 90}[effort]
            assert trace + len(shipped.encode(task.question).ids) + len(shipped.encode(task.answer).ids) <= 120


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(TrainError, match="274"):
        train_tokenizer(vocab_size=200)
