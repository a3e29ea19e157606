"""Call llama.cpp through llama-cpp-python in a child process for each call, so that a crash becomes an error message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.runtime.errors import ModelError

_CHILD = Path(__file__).with_name("llamacpp_child.py")
_REASON_CHARACTERS = 200
"""Characters of llama.cpp's last line that an error message quotes. Chosen by hand."""


def logits(model: Path, lora: Path | None, ids: Sequence[int]) -> Tensor:
    """Run token ids (N,) through a GGUF model with a GGUF adapter; return logits (N, V) f32. Raises ModelError."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "logits"
        _ask("logits", model, lora, ids=list(ids), raw=str(raw))
        return torch.from_numpy(np.fromfile(raw, dtype="<f4").reshape(len(ids), -1))


def loss(model: Path, lora: Path | None, documents: Sequence[Sequence[int]]) -> float:
    """Return the mean loss in nats per token of documents, each of at least two ids. Raises ModelError."""
    return float(_ask("losses", model, lora, documents=[list(ids) for ids in documents])["loss"])


def tokenize(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Split each text into ids with the vocabulary in the GGUF file; no ids are added. Raises ModelError."""
    return [[int(id) for id in ids] for ids in _ask("tokenize", model, None, texts=list(texts))["ids"]]


def quantize(model: Path, out: Path) -> None:
    """Quantise a GGUF model to llama.cpp's Q4_K_M and write it to `out`. Raises ModelError."""
    _ask("quantize", model, None, out=str(out))


def _ask(action: str, model: Path, lora: Path | None, **more: Any) -> dict[str, Any]:
    """Run one action of llamacpp_child.py; return its answer. Raises ModelError where the child fails."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "action": action, "model": str(model), "lora": None if lora is None else str(lora), "answer": str(answer),
            "threads": torch.get_num_threads(), **more,
        }  # fmt: skip
        # -P keeps the script's folder off sys.path: this package's modules must not shadow the libraries that it imports.
        done = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=json.dumps(request).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_WAIT_POLICY": "passive"},
        )
        if done.returncode or not answer.is_file():
            raise ModelError(
                f"llama.cpp could not use {model.name if lora is None else lora.name} ({_reason(done)}); "
                "install the newest llama-cpp-python, or type --no-verify to write the export unproved."
            )
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Say how a process ended, followed by the start of the last line that it wrote to standard error."""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    ending = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
    return f"{ending}: {lines[-1][:_REASON_CHARACTERS]}" if lines else ending
