"""With the least `--memory` that an export asks for, its peak stays within that amount; without a limit it is higher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from tiny import save_trainable

from edgetune import export_adapter
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import ResourceError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports anonymous memory")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Save 16 layers that take 100 MB in bf16 and 200 MB in fp32, and an adapter for them; return their paths."""
    folder = tmp_path_factory.mktemp("larger")
    save_trainable(folder / "model", width=512, inner=1536, layers=16, dtype=torch.bfloat16)
    base = open_model(folder / "model")
    peft_folder.save(random_adapter(base.config, rank=8, size=0.02), folder / "night", str(base.folder))
    return str(base.folder), str(folder / "night")


def peak_memory(made: tuple[str, str], out: Path, target: str, *options: str) -> int:
    """Export in a process of its own; return its peak memory in bytes, as its MemoryMeter measured it."""
    model, adapter = made
    named = ["--model", model, "--adapter", adapter, "--out", str(out), "--no-verify", "--json", *options]
    command = [sys.executable, "-m", "edgetune", "export", target, *named]
    # With two threads, each waits long for the other while other programs use the cores.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["peft", "hf"])
def test_an_export_holds_no_more_than_the_least_that_it_asks_for(made: tuple[str, str], target: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"type --memory \d+MB or more") as raised:
        export_adapter(target, *made, tmp_path / "out", memory=1, check=False)
    least = int(re.findall(r"--memory (\d+)MB", str(raised.value))[0])
    limited = peak_memory(made, tmp_path / "out", target, "--memory", f"{least}MB")
    assert limited <= least * 1_000_000
    if torch.version.cuda is None:  # a CUDA build's larger process asks for more, of which the model's layers are a small part
        # Without the limit the peak is higher, so it was the limit that kept it down.
        assert peak_memory(made, tmp_path / "out", target) > least * 1_000_000
