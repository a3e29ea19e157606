"""Measure what 4 bits cost a model, rounded to nearest and calibrated: bits per byte, the share regained, time and memory.

    python tests/benchmarks/quantisation.py --model FOLDER NOTES... [--texts NOTES] [--bytes N] [--json FILE]

Every NOTES (a file or folder) is a column of the table: text that no calibration reads, unless --texts names it too. The model
is quantised twice, into --workdir: to nearest, and calibrated on --texts, by default on the built-in text.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch

from edgetune.documents.reading import read_notes
from edgetune.quantising import bits_per_byte, quantise
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.memory_meter import MemoryMeter

FORMS = {"as published": None, "4 bits, to nearest": False, "4 bits, calibrated": True}
"""The forms of the model, and whether each is calibrated; None for the model as it is."""


def main() -> None:
    flags = common.parser(__doc__, contenders=False)
    flags.add_argument("notes", type=Path, nargs="+", help="files or folders of held-out text")
    flags.add_argument("--texts", action="append", default=[], help="files or folders to calibrate on (default: built-in text)")
    flags.add_argument("--bytes", type=int, default=60_000, help="most bytes of each held-out text")
    arguments = flags.parse_args()
    if arguments.model is None:
        flags.error("--model is missing; name the folder of a model in bf16, fp16 or fp32.")
    torch.set_num_threads(arguments.threads)
    held_out = {path.name: sample(path, arguments.bytes) for path in arguments.notes}
    found = [measure(label, calibrate, arguments, held_out) for label, calibrate in FORMS.items()]
    host = common.machine(arguments.threads)
    everything = {"benchmark": "quantisation", "machine": host, "versions": common.versions(), "lacking": [], "results": found}
    common.publish(arguments.json, f"{common.heading(everything)}\n\n{shown(found, list(held_out))}", everything)


def sample(path: Path, most: int) -> list[str]:
    """Return texts of at most `most` bytes in all, in the order of their digests, so that every folder is represented."""
    texts, size = [], 0
    for document in sorted(read_notes([str(path)]).documents, key=lambda document: document.digest):
        text = document.text
        if size + len(text.encode()) <= most:
            texts.append(text)
            size += len(text.encode())
    return texts


def measure(
    label: str, calibrate: bool | None, arguments: argparse.Namespace, held_out: dict[str, list[str]]
) -> dict[str, Any]:
    """Make one form of the model; return its figures: bits per byte of each text, seconds and peak memory of making it."""
    found: dict[str, Any] = {"form": label, "bits_per_byte": {}}
    folder = arguments.model
    if calibrate is not None:
        folder = arguments.workdir / ("calibrated" if calibrate else "nearest")
        shutil.rmtree(folder, ignore_errors=True)
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        with MemoryMeter(open_model(arguments.model).files) as meter:
            texts = arguments.texts if calibrate else []
            made = quantise(str(arguments.model), folder, calibrate=calibrate, texts=texts)
            found |= {"seconds": made.seconds, "peak": meter.peak(), "cost": None if made.cost is None else asdict(made.cost)}
    common.say(f"{label}: {found.get('seconds', 0):.0f} s")
    found["bits_per_byte"]["built-in"] = bits_per_byte(folder)
    for name, texts in held_out.items():
        found["bits_per_byte"][name] = bits_per_byte(folder, texts=texts)
    return found


def shown(found: list[dict[str, Any]], names: list[str]) -> str:
    """Return the table: for each text the bits per byte and, in brackets, the share regained of what nearest loses."""
    published, near = (each["bits_per_byte"] for each in found[:2])
    rows = []
    for each in found:
        cells = []
        for name, bits in each["bits_per_byte"].items():
            regained = f" ({(near[name] - bits) / (near[name] - published[name]):.0%})" if each is found[2] else ""
            cells.append(f"{bits:.4f}{regained}")
        rows.append([each["form"], *cells, common.number(each.get("seconds")), common.megabytes(each.get("peak"))])
    return common.table(["form", "built-in text", *names, "seconds", "peak memory, MB"], rows)


if __name__ == "__main__":
    main()
