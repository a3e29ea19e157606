"""Export last night's adapter to every target that this machine can prove.

    python examples/morning.py --out exports                       # the current adapter and its model
    python examples/morning.py --model demo --adapter NAME --targets peft,coreml

A target whose reader is not installed is skipped, and the table says how to install it. The last column compares the
target's own reader with edgetune's model on the same tokens: the largest difference of a logit, and whether both generate
the same text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgetune import EdgetuneError, export_adapter
from edgetune.export.targets import TARGETS
from edgetune.reports.text import human_bytes, one_line

Row = tuple[str, str, str, str]
"""A row of the table: target, path, size, agreement."""


def agreement(difference: float | None, same_text: bool | None) -> str:
    """Return the last column of a row."""
    return "not proved" if difference is None else f"within {difference:.2g}, {'same' if same_text else 'another'} text"


def export_all(model: str | None, adapter: str | None, out: Path, targets: list[str]) -> tuple[list[Row], list[str]]:
    """Export to each target; return a row for each and the notices of all exports.

    If a target cannot be exported, the last column of its row gives the reason.
    """
    rows: list[Row] = []
    notices: dict[str, None] = {}
    for target in targets:
        try:
            made = export_adapter(target, model, adapter, out / target)
        except EdgetuneError as error:
            rows.append((target, "-", "-", f"skipped: {error}"))
            continue
        compared = agreement(made.max_logit_difference, made.greedy_match)
        rows.append((target, one_line(made.path), human_bytes(made.bytes), compared))
        notices |= dict.fromkeys(made.notices)
    return rows, list(notices)


def table(rows: list[Row]) -> str:
    """Return the rows as aligned columns; the last column has any length."""
    lines = [("target", "path", "size", "agreement"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, export, and print the table."""
    parser = argparse.ArgumentParser(description="Export last night's adapter to every target that can be proved here.")
    parser.add_argument("--model", help="model, as for `edgetune train` (default: the current adapter's)")
    parser.add_argument("--adapter", help="folder or name of an adapter (default: the current one)")
    parser.add_argument("--out", type=Path, default=Path("exports"), help="folder for the exports (default: %(default)s)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="targets, separated by commas (default: all)")
    given = parser.parse_args(arguments)
    rows, notices = export_all(given.model, given.adapter, given.out, given.targets.split(","))
    print("\n".join([table(rows), *notices]))


if __name__ == "__main__":
    main()
