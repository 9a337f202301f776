"""Streams: held-out problems stay out of training, shares and seeds are honoured."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from fathom.skills.base import LEVELS
from fathom.skills.mix import SKILLS, SOURCES, held_out, stream
from fathom.skills.smalltalk import answers


def test_training_never_sees_a_held_out_problem_in_any_wording() -> None:
    trained = {(t.skill, t.key) for t, _ in islice(stream(3), 30_000)}
    kept = {(t.skill, t.key) for name in SKILLS for level in LEVELS for t in held_out(name, level, 60, 1)}
    assert len(kept) > 1000 and not trained & kept


@pytest.mark.parametrize("name", SKILLS)
def test_there_is_enough_to_ask(name: str) -> None:
    for level in LEVELS:
        drawn = held_out(name, level, 100, 0)
        assert len(drawn) == 100 == len({(t.question, repr(t.tools)) for t in drawn})
        assert drawn == held_out(name, level, 100, 0) != held_out(name, level, 100, 1)


def test_a_stream_is_a_function_of_its_seed() -> None:
    first, again, other = (list(islice(stream(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_shares_and_efforts_weigh() -> None:
    shares, efforts = {"chain": 3.0, "sort": 1.0}, {"none": 1.0, "max": 1.0}
    drawn = list(islice(stream(0, shares, efforts, levels=(2,)), 4000))
    count = Counter(t.skill for t, _ in drawn)
    assert set(count) == {"chain", "sort"} and abs(count["chain"] / 4000 - 0.75) < 0.03
    assert {e for _, e in drawn} == {"none", "max"} and {t.level for t, _ in drawn} == {2}


def test_every_source_is_drawn_by_default() -> None:
    assert {t.skill for t, _ in islice(stream(0), 2000)} == set(SOURCES)


def test_small_talk_has_hundreds_of_prompts_and_a_plain_hello() -> None:
    known = answers()
    assert len(known) > 500
    assert known["Hello"].startswith("Hello!") and known["hello"] == known["Hello"]
    assert "do not know" in known["What is the capital of France?"]
