"""Play nights over real notes that arrive little by little, and measure what each night learns, keeps and costs.

    python tests/benchmarks/nights.py --notes ../shared/data/til [--model FILE] [--nights 14] [--json FILE]
    python tests/benchmarks/nights.py --notes examples/notes --model demo --nights 3 --first 20 --each 5     to try it out

Each night is `edgetune nightly run` in a process of its own, with the defaults of a user. The notes have no dates of their own:
their order is that of the SHA-256 of their paths, the same on every machine. Afterwards the notes of each night are scored with
the bare base, with the adapter that had just learnt them, and with the last one: the share of the gain that is left is what is
still known.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import Result

PROGRAM = (sys.executable, "-m", "edgetune")
AT, UNTIL = "01:00", "07:00"
COLUMNS = ("night", "new notes", "decision", "held out", "general", "chat replies", "steps", "minutes", "peak resident MB")


def main() -> None:
    flags = common.parser(__doc__, contenders=False)
    flags.set_defaults(model=None)
    flags.add_argument("--notes", type=Path, required=True, help="the folder of notes")
    flags.add_argument("--nights", type=int, default=14, help="number of nights (default: %(default)s)")
    flags.add_argument("--first", type=int, default=100, help="notes of the first night (default: %(default)s)")
    flags.add_argument("--each", type=int, default=40, help="notes that arrive before each other night (default: %(default)s)")
    flags.add_argument("--minutes", type=float, default=10, help="longest time of a night (default: %(default)s)")
    flags.add_argument("--known", type=int, default=6, help="nights whose notes are scored at the end (default: %(default)s)")
    flags.add_argument("--train", nargs="*", default=[], help="settings of training, as NAME=VALUE of nightly.json")
    arguments = flags.parse_args()
    host = common.machine(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="edgetune-nights-", dir=arguments.workdir.parent) as folder:
        played = Nights(arguments, Path(folder))
        nights = played.all()
        known = played.still_known(nights, nights[: arguments.known])
    about = {"machine": host, "versions": common.versions(), "lacking": []}
    text = "\n\n".join([common.heading(about), table_of_nights(nights), table_of_known(known)])
    common.publish(arguments.json, text, {**about, "nights": nights, "known": known})


class Nights:
    """The nights of one person, whose folder of notes and data folder lie in `folder`."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.vault, self.batches = arguments, folder / "notes", folder / "batches"
        self.environment = {**os.environ, **common.OFFLINE, "EDGETUNE_HOME": str(folder / "home")}
        self.environment["PYTHONPATH"] = str(common.ROOT)
        self.environment["OMP_NUM_THREADS"] = str(arguments.threads)
        self.model = str(arguments.model or os.environ.get("EDGETUNE_TEST_SMOLLM2") or "demo")

    def all(self) -> list[Result]:
        """Install the nights without a scheduler, and play them one after another."""
        self._install()
        batches, nights = batches_of(self.arguments), []
        for number, batch in enumerate(batches, 1):
            self._arrive(number, batch)
            record, peak, seconds = self._run(["nightly", "run", "--minutes", str(self.arguments.minutes), "--json"])
            shown = self._decision()
            nights.append({"number": number, "peak_memory_bytes": peak, "seconds": seconds, **record, "decision": shown})
            common.say(f"night {number}: {record['sentence']}")
            common.say(table_of_nights(nights[-1:]).splitlines()[-1])
            time.sleep(1.1)  # a night that the user begins is named by the second
        return nights

    def still_known(self, nights: Sequence[Result], asked: Sequence[Result]) -> list[Result]:
        """Score the notes of some nights with the base, the first current adapter that had learnt them, and the last."""
        current = {night["number"]: night["adapter"] for night in nights if night["outcome"] in ("better", "first")}
        known: list[Result] = []
        for night in asked:
            learnt = next((adapter for number, adapter in current.items() if number >= night["number"]), None)
            if learnt is None:
                continue
            adapters = {"base": "none", "learnt": learnt, "last": list(current.values())[-1]}
            common.say(f"scoring the notes of night {night['number']}")
            bits = {name: self._score(night["number"], adapter) for name, adapter in adapters.items()}
            gain = bits["base"] - bits["learnt"]
            kept = (bits["base"] - bits["last"]) / gain if gain else math.nan
            known.append({"number": night["number"], **bits, "share_kept": kept})
        return known

    def _install(self) -> None:
        """Write the job that `nightly install` would write, since nothing here is to start nights by itself."""
        settings: dict[str, Any] = {"model": self.model}
        settings |= {name: json.loads(value) for name, _, value in (given.partition("=") for given in self.arguments.train)}
        self.vault.mkdir()
        home = Path(self.environment["EDGETUNE_HOME"])
        home.mkdir(mode=0o700)
        script = (
            "import json, sys, time; from edgetune.config import NightlyConfig; from edgetune.nights.job import Job; "
            f"Job((sys.argv[1],), NightlyConfig({AT!r}, {UNTIL!r}), 'cron', time.time(), json.loads(sys.argv[2])).save()"
        )
        command = [sys.executable, "-c", script, str(self.vault), json.dumps(settings)]
        subprocess.run(command, env=self.environment, check=True)

    def _arrive(self, number: int, batch: Sequence[Path]) -> None:
        """Put a night's notes into the folder, last changed an hour ago, and a copy beside it for `still_known`."""
        for path in batch:
            name = f"{path.parent.name}-{path.name}"
            for folder in (self.vault, self.batches / str(number)):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
                os.utime(folder / name, (time.time() - 3600, time.time() - 3600))

    def _decision(self) -> Result:
        """Return the figures that the gate decided by."""
        return dict(self._run(["report", "--json"])[0].get("decision") or {})

    def _score(self, number: int, adapter: str) -> float:
        found, _, _ = self._run(
            ["eval", str(self.batches / str(number)), "--model", self.model, "--adapter", adapter, "--json"]
        )
        return float(found["bits_per_byte"])

    def _run(self, arguments: Sequence[str]) -> tuple[Result, int, float]:
        """Run a command; return the object it prints, its peak of resident memory in bytes, and its seconds."""
        start = time.monotonic()
        with tempfile.TemporaryFile() as output:
            child = subprocess.Popen([*PROGRAM, *arguments], stdout=output, stderr=subprocess.PIPE, env=self.environment)
            try:
                assert child.stderr is not None
                said = child.stderr.read().decode(errors="replace")
                _, status, usage = os.wait4(child.pid, 0)
            except BaseException:
                child.send_signal(signal.SIGINT)
                child.wait()
                raise
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"edgetune {' '.join(arguments)} failed: {said.strip()[-500:]}")
            output.seek(0)
            found = json.loads(output.read().decode().splitlines()[-1])
        return found, usage.ru_maxrss * 1024, time.monotonic() - start


def batches_of(arguments: argparse.Namespace) -> list[list[Path]]:
    """Return the notes that arrive before each night."""
    every = [path for path in arguments.notes.rglob("*.md") if path.is_file()]
    ordered = sorted(every, key=lambda path: hashlib.sha256(str(path.relative_to(arguments.notes)).encode()).hexdigest())
    ends = [arguments.first + number * arguments.each for number in range(arguments.nights)]
    if ends[-1] > len(ordered):
        raise SystemExit(f"{arguments.notes} has {len(ordered)} notes; {arguments.nights} nights take {ends[-1]}.")
    return [ordered[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def table_of_nights(nights: Sequence[Result]) -> str:
    """Return the table of nights. Held out is in bits per byte, with yesterday's adapter (at first: the base) and tonight's."""
    rows = []
    for night in nights:
        found = night["decision"]
        rows.append([
            str(night["number"]), str(night["new_notes"]), night["outcome"],
            pair(found.get("current_bits_per_byte"), found.get("new_bits_per_byte")),
            pair(found.get("general_bits_per_byte_base"), found.get("general_bits_per_byte_new")),
            pair(found.get("replies_bits_per_byte_base"), found.get("replies_bits_per_byte_new")),
            str(night["steps"]), f"{night['seconds'] / 60:.1f}", f"{night['peak_memory_bytes'] / 1e6:,.0f}",
        ])  # fmt: skip
    return common.table(COLUMNS, rows)


def table_of_known(known: Sequence[Result]) -> str:
    """Return the table of what the last adapter still knows of each night's notes, in bits per byte."""
    rows = [
        [str(row["number"]), *(f"{row[name]:.4f}" for name in ("base", "learnt", "last")), f"{row['share_kept']:.0%}"]
        for row in known
    ]
    return common.table(("notes of night", "base", "when learnt", "last adapter", "share of the gain kept"), rows)


def pair(before: float | None, after: float | None) -> str:
    """Return two scores as one cell."""
    return "–" if before is None or after is None else f"{before:.4f} → {after:.4f}"


if __name__ == "__main__":
    main()
