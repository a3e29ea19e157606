"""Files of models and adapters with random damage open as before, or are refused on purpose: no other exception, soon.

The seeds are fixed, so that a failure can be repeated. A short run is in every test run, a long one in the slow set.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from tiny import save_trainable

from edgetune.export.gguf import adapter as gguf_adapter
from edgetune.export.mlx import adapter as mlx_adapter
from edgetune.library import adapter_registry as registry
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import check_fits
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import EdgetuneError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.tokenizer import Tokenizer

LONGEST_SECONDS = 10
"""Upper bound on the time to open a damaged file."""
INTERESTING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"9",
    b"null",
    b"1e999",
    b"NaN",
    b"\\u0000",
]
"""Texts that are put into a file, for what parsers do with them."""


def damaged(data: bytes, chance: random.Random, within: int) -> bytes:
    """Return a file's bytes with up to four parts among the first `within` overwritten, inserted, deleted or repeated."""
    result = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        at, length = chance.randrange(min(len(result), within) + 1), chance.choice([1, 1, 2, 8, 64])
        part = chance.choice([*INTERESTING, chance.randbytes(length), bytes(result[at : at + length])])
        kind = chance.choice(["overwrite", "insert", "delete", "cut"])
        if kind == "cut" and chance.random() < 0.2:
            del result[at:]
        elif kind == "delete":
            del result[at : at + length]
        else:
            result[at : at + (len(part) if kind == "overwrite" else 0)] = part
    return bytes(result)


def open_base(folder: Path, base: LlamaConfig) -> None:
    load_llama(open_model(folder), torch.float32)


def open_tokenizer(folder: Path, base: LlamaConfig) -> None:
    Tokenizer.load(folder).encode("a text")


def open_adapter(path: Path, base: LlamaConfig) -> None:
    check_fits(registry.read(path, base), base)


TARGETS: list[tuple[str, str, int, Callable[[Path, LlamaConfig], None]]] = [
    ("dense", "config.json", 1 << 20, open_base),
    ("dense", "model.safetensors", 2000, open_base),
    ("nf4", "config.json", 1 << 20, open_base),
    ("nf4", "model.safetensors", 1 << 30, open_base),
    ("dense", "tokenizer_config.json", 1 << 20, open_tokenizer),
    ("peft", "adapter_config.json", 1 << 20, open_adapter),
    ("peft", "adapter_model.safetensors", 2000, open_adapter),
    ("peft", "edgetune.json", 1 << 20, open_adapter),
    ("mlx", "adapter_config.json", 1 << 20, open_adapter),
    ("mlx", "adapters.safetensors", 2000, open_adapter),
    ("gguf", "adapter.gguf", 1500, open_adapter),
]
"""Folders, the file to damage in each, the first bytes among which it is damaged, and what opens the folder."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    save_trainable(root / "dense", width=32, inner=32)
    quantize_folder(root / "dense", root / "nf4")
    base = open_model(root / "dense").config
    adapter = random_adapter(base, targets=("q_proj", "v_proj"))
    peft_folder.save(adapter, root / "peft", "a base")
    (root / "mlx").mkdir()
    mlx_adapter.write_adapter(adapter, root / "mlx", "a base", base.num_layers)
    (root / "gguf").mkdir()
    pytest.importorskip("gguf")
    gguf_adapter.write_adapter(adapter, base, root / "gguf" / gguf_adapter.ADAPTER_FILE)
    return root


def fuzz(good: Path, work: Path, seeds: range) -> dict[str, int]:
    """Damage each target once for each seed and open it; return how many opened and how many were refused."""
    base, counts = open_model(good / "dense").config, {"opened": 0, "refused": 0}
    for number, (name, file, within, opens) in enumerate(TARGETS):
        folder = work / f"{number}"
        shutil.copytree(good / name, folder)
        whole = (folder / file).read_bytes()
        opens(folder, base)  # undamaged
        for seed in seeds:
            (folder / file).unlink()  # what is mapped must not change
            (folder / file).write_bytes(damaged(whole, random.Random(f"{number} {seed}"), within))
            started = time.monotonic()
            try:
                opens(folder, base)
                counts["opened"] += 1
            except EdgetuneError:
                counts["refused"] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed} of {name}/{file}: {error!r}") from error
            assert time.monotonic() - started < LONGEST_SECONDS, f"seed {seed} of {name}/{file}"
    return counts


def test_damaged_files_are_refused_on_purpose(good: Path, tmp_path: Path) -> None:
    counts = fuzz(good, tmp_path, range(100))
    assert sum(counts.values()) == 100 * len(TARGETS)
    assert min(counts.values()) > 100  # the damage is neither always harmless nor always fatal


@pytest.mark.slow
def test_many_damaged_files_are_refused_on_purpose(good: Path, tmp_path: Path) -> None:
    assert sum(fuzz(good, tmp_path, range(100, 2000)).values()) == 1900 * len(TARGETS)
