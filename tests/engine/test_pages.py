"""The page pool against a plain list of counts."""

from __future__ import annotations

import random

import pytest

from fathom.engine.pages import PagePool


def maximal_runs(owners: list[int]) -> set[tuple[int, int]]:
    runs, start = set(), None
    for page, count in enumerate([*owners, 1]):
        if count == 0 and start is None:
            start = page
        elif count and start is not None:
            runs.add((start, page - start))
            start = None
    return runs


@pytest.mark.parametrize("seed", range(200))
def test_random_use_agrees_with_a_list_of_counts(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(0, 40)
    pool, owners = PagePool(count), [0] * count
    for _ in range(200):
        used = [p for p in range(count) if owners[p]]
        act = draw.random()
        if act < 0.4:
            n, after = draw.randint(0, 1 + count // 3), draw.choice([None, *used])
            pages = pool.allocate(n, after)
            assert (pages is None) == (n > owners.count(0))
            for page in pages or []:
                assert owners[page] == 0, "a page in use was given away"
                owners[page] = 1
        elif used and act < 0.6:
            page = draw.choice(used)
            pool.share(page)
            owners[page] += 1
        elif used:
            page = draw.choice(used)
            pool.release(page)
            owners[page] -= 1
        assert [pool.owners(p) for p in range(count)] == owners
        assert pool.free == owners.count(0)
        assert set(pool.runs()) == maximal_runs(owners)


def test_pages_are_neighbours_where_they_can_be() -> None:
    pool = PagePool(20)
    first = pool.allocate(6)
    assert first == list(range(6))
    assert pool.allocate(3, after=5) == [6, 7, 8]
    assert pool.allocate(1, after=2) == [9], "3 is taken: the longest run instead"
    for page in (3, 4):
        pool.release(page)
    assert pool.allocate(2, after=2) == [3, 4]


def test_a_request_larger_than_every_run_is_put_together() -> None:
    pool = PagePool(9)
    pool.allocate(9)
    for page in (0, 1, 3, 6, 7, 8):
        pool.release(page)
    assert pool.allocate(5, after=2) == [3, 6, 7, 8, 0]
    assert pool.free == 1


def test_a_short_pool_asks_for_what_is_missing() -> None:
    pool = PagePool(4)
    held = pool.allocate(3) or []
    asked: list[int] = []

    def reclaim(n: int) -> bool:
        asked.append(n)
        if n > len(held):
            return False
        for _ in range(n):
            pool.release(held.pop())
        return True

    pool.reclaim = reclaim
    assert pool.allocate(1) == [3]
    assert asked == [], "one was free"
    assert pool.allocate(5) is None
    assert asked == [5]
    assert pool.ensure(2)
    assert asked == [5, 2]
    assert len(pool.allocate(2) or []) == 2
    assert held == [0]


def test_misuse_is_caught() -> None:
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="free"):
        pool.release(0)
    with pytest.raises(AssertionError, match="free"):
        pool.share(1)


def test_a_large_pool_is_quick_in_small_pieces() -> None:
    """A million pages in and out: runs are merged without looking at all pages."""
    pool = PagePool(200_000)
    for _ in range(5):
        pages = pool.allocate(200_000) or []
        for page in reversed(pages):
            pool.release(page)
    assert list(pool.runs()) == [(0, 200_000)]
