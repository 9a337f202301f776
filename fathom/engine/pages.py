"""Which pages of the cache are free, and how many hold each of the others. Neighbours together, where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator


class PagePool:
    """Page ids 0 .. count - 1, shared by reference count.

    Free pages are kept as runs of neighbours: a sequence whose pages follow each other reads its rows as one view.

    reclaim(n): asked when pages are short; frees n more pages (by `release`), or gives up nothing and returns False.
    """

    def __init__(self, count: int, reclaim: Callable[[int], bool] | None = None) -> None:
        self.count, self.free, self.reclaim = count, count, reclaim
        self._owners = [0] * count
        self._length: dict[int, int] = {}
        self._start: dict[int, int] = {}
        if count:
            self._add_run(0, count)

    def owners(self, page: int) -> int:
        """How many hold the page; 0 when it is free."""
        return self._owners[page]

    def ensure(self, n: int) -> bool:
        """Whether n pages are free, if need be because others gave them up."""
        if n > self.free and self.reclaim:
            self.reclaim(n - self.free)
        return n <= self.free

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        """n pages with one owner each, following page `after` and each other where possible; None if n are not free."""
        if not self.ensure(n):
            return None
        pages: list[int] = []
        while len(pages) < n:
            pages += self._take(self._best(pages[-1] if pages else after), n - len(pages))
        for page in pages:
            self._owners[page] = 1
        self.free -= n
        return pages

    def share(self, page: int) -> None:
        """One owner more of a page in use."""
        assert self._owners[page], f"page {page} is free: it cannot be shared"
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """One owner fewer; the last one frees the page."""
        assert self._owners[page], f"page {page} is free already"
        self._owners[page] -= 1
        if not self._owners[page]:
            self.free += 1
            self._merge(page)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first page, length) of every run of free pages."""
        yield from self._length.items()

    def _best(self, after: int | None) -> int:
        """Where to take pages: behind `after`, or where the most neighbours are, so that there is room to grow."""
        if after is not None and after + 1 in self._length:
            return after + 1
        return max(self._length, key=lambda start: self._length[start])

    def _take(self, start: int, n: int) -> range:
        length = self._drop_run(start)
        if n < length:
            self._add_run(start + n, length - n)
        return range(start, start + min(n, length))

    def _merge(self, page: int) -> None:
        first, length = page, 1
        if page in self._start:
            first = self._start[page]
            length += self._drop_run(first)
        if page + 1 in self._length:
            length += self._drop_run(page + 1)
        self._add_run(first, length)

    def _add_run(self, start: int, length: int) -> None:
        self._length[start], self._start[start + length] = length, start

    def _drop_run(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start[start + length]
        return length
