"""Cases 63 to 70 of reference api D.3: what is not computed twice, with the embedded model behind the server."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Opener
from tests.server.harness import OFF, T1, Site, said, user

TILE = 128


def words(tokens: int, salt: str) -> str:
    """Text of at least so many tokens that no other test uses (a digit is one token)."""
    return f"{salt}: " + "".join(str(n * 7919 % 10) for n in range(tokens))


def usage(site: Site, messages: list[Any], **fields: Any) -> dict[str, Any]:
    """The usage of a short answer; its counts must agree with each other under all their names."""
    answer = site.chat(messages=messages, **({"max_tokens": 2, "temperature": 0} | OFF | fields))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["usage"]
    hit, miss = found["prompt_cache_hit_tokens"], found["prompt_cache_miss_tokens"]
    assert hit + miss == found["prompt_tokens"]
    assert hit == found["prompt_tokens_details"]["cached_tokens"]
    assert found["total_tokens"] == found["prompt_tokens"] + found["completion_tokens"]
    return found


def hit(site: Site, messages: list[Any], **fields: Any) -> int:
    return usage(site, messages, **fields)["prompt_cache_hit_tokens"]


def test_case_63_the_same_long_prompt_twice(real: Site) -> None:
    turns = [user(words(4000, "63"))]
    assert hit(real, turns) == 0
    again = usage(real, turns)
    assert again["prompt_cache_hit_tokens"] >= 0.9 * again["prompt_tokens"]


def test_case_64_short_prompts_hit_too(real: Site) -> None:
    turns = [user(words(200, "64"))]
    assert hit(real, turns) == 0
    assert hit(real, turns) > 0


def test_case_65_a_turn_appended(real: Site) -> None:
    turns = [user(words(300, "65 What is 12 + 34?"))]
    first = usage(real, turns, max_tokens=20)
    answer = real.chat(messages=turns, max_tokens=20, temperature=0, **OFF).json()["choices"][0]["message"]
    second = hit(real, [*turns, answer, user("And 34 + 12?")])
    assert second >= first["prompt_tokens"] - TILE


def test_case_65_with_tools_the_answer_is_a_hit_too(real: Site) -> None:
    """The prompt ends shortly before a multiple of 128, and the answer goes beyond it."""
    fields: dict[str, Any] = {"tools": [T1], "reasoning_effort": "max", "temperature": 0}
    question = "sort: 9, 3, 7, 1, 8, 2"
    short = real.chat(question, **fields, max_tokens=1).json()["usage"]["prompt_tokens"]
    system = {"role": "system", "content": "7" * ((100 - short) % TILE)}
    turns = [system, user(question)]
    answer = real.chat(messages=turns, **fields).json()
    used = answer["usage"]
    assert used["prompt_tokens"] // TILE < used["total_tokens"] // TILE
    turns += [answer["choices"][0]["message"], user("And now?")]
    again = real.chat(messages=turns, **fields | {"max_tokens": 1}).json()["usage"]
    assert again["prompt_cache_hit_tokens"] >= used["total_tokens"] // TILE * TILE


def test_case_66_a_common_beginning_is_found(real: Site) -> None:
    shared = words(600, "66")
    turns = [[user(f"{shared} {end} {words(150, end)}")] for end in ("B", "C", "D")]
    hits = [hit(real, turn) for turn in turns]
    assert hits[0] == 0
    assert hits[2] >= 600 - TILE


def test_case_67_users_are_apart(real: Site) -> None:
    turns = [user(words(400, "67"))]
    assert [hit(real, turns, user_id=who) > 0 for who in ("ann", "bob", "ann", "bob")] == [False, False, True, True]
    assert hit(real, turns) == 0


def test_case_69_another_effort_is_another_prompt(real: Site) -> None:
    """With the embedded model's dialect only `max` adds a text, and it stands before everything else."""
    turns = [user(words(400, "69"))]
    thinking = {"thinking": {"type": "enabled"}}
    assert hit(real, turns, **thinking, reasoning_effort="high") == 0
    assert hit(real, turns, **thinking, reasoning_effort="max") <= TILE
    assert hit(real, turns, **thinking, reasoning_effort="high") > 256
    assert hit(real, turns, **thinking, reasoning_effort="max") > 256


def test_case_70_the_billing_header_changes_nothing(real: Site) -> None:
    def read(n: int, where: str) -> int:
        header = f"x-anthropic-billing-header: cc_version=2.1; cch={n};"
        text = words(400, "70" + where)
        system: Any = [{"type": "text", "text": header}, {"type": "text", "text": text}]
        if where == "string":
            system = header + "\n" + text
        answer = real.messages(system=system, max_tokens=2, **OFF)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["cache_read_input_tokens"])

    for where in ("blocks", "string"):
        assert [read(n, where) > 256 for n in (1, 2, 3)] == [False, True, True]


def settle(site: Site) -> None:
    """Wait until what was answered is on disk: the bytes there have stopped growing."""
    before = -1
    for _ in range(100):
        used = site.relay.inner.status().tiers["disk"][0]
        if used and used == before:
            return
        before = used
        time.sleep(0.1)
    raise AssertionError("nothing came to the disk")


TURNS = [user(words(500, "68"))]


def answer(site: Site) -> tuple[int, dict[str, Any]]:
    """Tokens of the prompt that were not computed again, and the answer."""
    found = site.chat(messages=TURNS, max_tokens=20, temperature=0, **OFF).json()
    return found["usage"]["prompt_cache_hit_tokens"], found["choices"][0]["message"]


@pytest.fixture(scope="module")
def filled(open_real: Opener, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that a server has left behind, and what it answered."""
    folder = tmp_path_factory.mktemp("cache")
    with open_real(disk=folder) as site:
        cached, message = answer(site)
        assert cached == 0
        settle(site)
    return folder, message


def test_case_68_a_restart_keeps_the_cache(open_real: Opener, filled: tuple[Path, dict[str, Any]]) -> None:
    folder, message = filled
    with open_real(disk=folder) as site:
        cached, again = answer(site)
    assert cached >= 384 and again == message
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert file.stat().st_mode & 0o077 == 0


def damaged(data: bytes, damage: str) -> bytes:
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return {"cut": data[:middle], "flipped": flipped, "foreign": b"something else " * 100}[damage]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_case_94_a_damaged_file_is_skipped(
    open_real: Opener, filled: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    """The kills themselves are tests of the cache; here a server finds what they may leave."""
    folder = shutil.copytree(filled[0], tmp_path / "cache")
    for file in [f for f in folder.rglob("*") if f.is_file() and f.stat().st_size > 1000]:
        file.write_bytes(damaged(file.read_bytes(), damage))
    with open_real(disk=folder) as site:
        assert answer(site) == (0, filled[1])
        assert site.relay.inner.status().notes


def test_a_history_edited_in_the_middle(real: Site) -> None:
    """What stands before the edit is still a hit, and the answer is that of a fresh prompt."""
    turns = [user(words(300, "mid-1")), said("fine"), user(words(300, "mid-2")), said("good"), user("sort: 3, 1, 2")]
    hit(real, turns)
    edited = [*turns[:3], said("bad"), turns[4]]
    hit(real, edited)
    assert hit(real, edited) >= 512
