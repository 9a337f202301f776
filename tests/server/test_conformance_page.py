"""The page of the cases is true."""

from __future__ import annotations

from tests.server.conformance import CASES, PAGE, found, page


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.server.conformance"


def test_every_case_has_a_test() -> None:
    assert set(CASES) == set(found())
