"""Measure what masking finds: recall and precision on the labelled corpus, and what it masks in real notes and chats.

    python tests/benchmarks/privacy.py [--notes N] [--real FOLDER_OR_JSONL ...]

Prints the tables of docs/privacy.md. The corpus is written anew from its seed, with templates that no rule was tuned on.
Speed is CPU time of one thread. Of real texts only counts are printed, never what was masked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import privacy_corpus  # noqa: E402
import privacy_score  # noqa: E402

from edgetune.privacy.kinds import in_words  # noqa: E402
from edgetune.privacy.masking import Masker  # noqa: E402


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--notes", type=int, default=2000, help="notes of the corpus; each has two planted items on average")
    flags.add_argument("--real", nargs="*", type=Path, default=[], help="folders of notes, and .jsonl files with a text a line")
    arguments = flags.parse_args()
    notes = privacy_corpus.notes("test", arguments.notes)
    result = privacy_score.score(notes, Masker())
    print(f"{len(notes):,} notes, {sum(result.planted.values()):,} planted items, {result.harmless:,} look-alikes\n")
    print(privacy_score.table(result))
    print(f"\nSpeed on the corpus: {result.bytes / 1e6 / result.seconds:.1f} MB/s of CPU time\n")
    for place in arguments.real:
        found, size, start = Counter[str](), 0, time.process_time()
        for text in texts(place):
            masker = Masker()
            masker.mask(text)
            found.update(masker.counts)
            size += len(text.encode())
        speed = size / 1e6 / (time.process_time() - start)
        print(f"{place.name}: {size / 1e6:.2f} MB, {speed:.1f} MB/s; {in_words(found) or 'nothing'}")


def texts(place: Path) -> Iterator[str]:
    if place.is_dir():
        yield from (path.read_text(encoding="utf-8", errors="replace") for path in sorted(place.rglob("*.md")))
    else:
        yield from (json.loads(line)["text"] for line in place.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
