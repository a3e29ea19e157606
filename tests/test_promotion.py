"""Promotion: a new adapter becomes the current one unless the held-out notes speak against it."""

from __future__ import annotations

import pytest

from edgetune.library.promotion import should_promote


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(2.0, 1.9, True), (2.0, 2.0, False), (2.0, 2.1, False), (None, 2.0, True), (2.0, None, True), (None, None, True)],
)
def test_an_adapter_is_promoted_unless_it_was_measured_to_be_no_better(
    before: float | None, after: float | None, expected: bool
) -> None:
    assert should_promote(before, after) is expected
