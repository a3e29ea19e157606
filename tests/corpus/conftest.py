"""Prints the corpus as a table: the inputs of each kind, and how many were refused, taken or answered wrongly."""

from __future__ import annotations

import collections
import re

import pytest

pytest.register_assert_rewrite("corpus")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line for each kind of input that was run."""
    kinds: collections.defaultdict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "corpus":
                kinds[value[0]][value[1]] += 1
    for report in terminalreporter.stats.get("failed", []):
        if found := re.search(r"test_every_input_gets_its_right_answer\[([^:\]]+): ", report.nodeid):
            kinds[found[1]]["wrong"] += 1
    if not kinds:
        return
    kinds["all"] = sum(kinds.values(), collections.Counter())
    columns = ("refused", "taken", "wrong")
    terminalreporter.section("corpus of bad and odd inputs")
    terminalreporter.write_line(f"{'kind':<32}{'inputs':>8}" + "".join(f"{column:>9}" for column in columns))
    for kind, counts in kinds.items():
        cells = "".join(f"{counts[column]:>9}" for column in columns)
        terminalreporter.write_line(f"{kind:<32}{counts.total():>8}{cells}")
