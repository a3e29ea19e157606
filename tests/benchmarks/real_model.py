"""SmolLM2-135M-Instruct as the model of a benchmark: found as the tests find it, and converted once into --workdir."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import common

SHAPE = "smollm2"
"""The value of --shape that stands for the real model."""


def source(named: Path | None, workdir: Path) -> Path:
    """Return the model folder or GGUF file that --model or EDGETUNE_TEST_SMOLLM2 names; end the script if there is none."""
    if named is not None:
        return named
    sys.path.insert(0, str(common.ROOT / "tests"))
    import smollm2_file

    found = smollm2_file.find(workdir)
    if found is None:
        raise SystemExit(f"{smollm2_file.ADVICE} Or type --model and its folder.")
    return found


def folder(named: Path | None, workdir: Path) -> Path:
    """Return SmolLM2 as a model folder in bf16. A GGUF file is converted into `workdir`, unless that was done before."""
    workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = source(named, workdir)
    if found.is_dir():
        return found
    converted = workdir / SHAPE
    if not converted.exists():
        from edgetune.conversion.convert import convert

        common.say(f"converting {found}")
        convert(found, converted, SHAPE, "bf16")
    return converted


def nf4_and_dense(named: Path | None, workdir: Path) -> None:
    """Write the model's NF4 form and the same weights in bf16 into `workdir`, as common.random_folders does."""
    nf4, dense = workdir / f"{SHAPE}-nf4", workdir / f"{SHAPE}-bf16"
    if not nf4.exists():
        from edgetune.runtime.quantize import quantize_folder

        quantize_folder(folder(named, workdir), nf4)
    if not (dense / "config.json").exists():
        base = folder(named, workdir)
        dense.mkdir(exist_ok=True, mode=0o700)
        common.write_dense(nf4, dense / "model.safetensors")
        shutil.copyfile(base / "config.json", dense / "config.json")


def text_ids(workdir: Path, count: int) -> list[int]:
    """Return `count` ids of real text, examples/notes: its activations have the outliers that decide on 8-bit products."""
    from edgetune.runtime.tokenizer import Tokenizer

    tokenizer, ids = Tokenizer.load(workdir / f"{SHAPE}-nf4"), []
    for path in sorted((common.ROOT / "examples" / "notes").rglob("*.md")):
        ids += tokenizer.encode(path.read_text(encoding="utf-8"))
        if len(ids) >= count:
            break
    return ids[:count]
