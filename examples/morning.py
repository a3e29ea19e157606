"""The morning after: last night's adapter, turned into every form that this machine can prove.

    python examples/morning.py --out exports                       # the current adapter and its model
    python examples/morning.py --model demo --adapter NAME --targets peft,coreml

A target whose own reader is not installed is skipped, with what would install it. The last column is how far the form's
reader is from edgetune's own model on the same tokens: the largest difference of a logit, and whether it writes the same text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgetune import EdgetuneError, export_adapter
from edgetune.export.targets import TARGETS
from edgetune.reports.text import human_bytes, one_line

Row = tuple[str, str, str, str]
"""Target, path, size, agreement."""


def agreement(difference: float | None, same_text: bool | None) -> str:
    """The last column."""
    return "not proved" if difference is None else f"within {difference:.2g}, {'same' if same_text else 'another'} text"


def export_all(model: str | None, adapter: str | None, out: Path, targets: list[str]) -> tuple[list[Row], list[str]]:
    """A row for each target, its reason in the last column where there is no export, and what the exports have to say."""
    rows: list[Row] = []
    notices: dict[str, None] = {}
    for target in targets:
        try:
            made = export_adapter(target, model, adapter, out / target)
        except EdgetuneError as error:
            rows.append((target, "-", "-", f"skipped: {error}"))
            continue
        told = agreement(made.max_logit_difference, made.greedy_match)
        rows.append((target, one_line(made.path), human_bytes(made.bytes), told))
        notices |= dict.fromkeys(made.notices)
    return rows, list(notices)


def table(rows: list[Row]) -> str:
    """Columns side by side, the last as long as it is."""
    lines = [("target", "path", "size", "agreement"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse, export, print."""
    parser = argparse.ArgumentParser(description="Export last night's adapter to every target that can be proved here.")
    parser.add_argument("--model", help="as `edgetune train` takes it; default: the current adapter's")
    parser.add_argument("--adapter", help="a folder or a name; default: the current one")
    parser.add_argument("--out", type=Path, default=Path("exports"))
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    given = parser.parse_args(arguments)
    rows, notices = export_all(given.model, given.adapter, given.out, given.targets.split(","))
    print("\n".join([table(rows), *notices]))


if __name__ == "__main__":
    main()
