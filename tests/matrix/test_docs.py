"""The docs say what the tests go through."""

from __future__ import annotations

from tests.matrix._table import PAGE, page


def test_the_tables_in_the_docs_are_those_of_the_tests():
    text = PAGE.read_text()
    assert text == page(text), "run: python -m tests.matrix"
