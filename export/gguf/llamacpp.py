"""llama.cpp through llama-cpp-python, asked from outside: each question is a process, so that its crash is one sentence."""

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


def logits(model: Path, lora: Path | None, ids: Sequence[int]) -> Tensor:
    """Token ids (N,) -> logits (N, V) f32 of a GGUF model with a GGUF adapter. Raises ModelError."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "logits"
        _ask("logits", model, lora, ids=list(ids), raw=str(raw))
        return torch.from_numpy(np.fromfile(raw, dtype="<f4").reshape(len(ids), -1))


def loss(model: Path, lora: Path | None, documents: Sequence[Sequence[int]]) -> float:
    """Mean nats a token of documents, each of at least two ids. Raises ModelError."""
    return float(_ask("losses", model, lora, documents=[list(ids) for ids in documents])["loss"])


def tokenize(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids that the model's own vocabulary gives each text, with none added. Raises ModelError."""
    return [[int(id) for id in ids] for ids in _ask("tokenize", model, None, texts=list(texts))["ids"]]


def quantize(model: Path, out: Path) -> None:
    """Write a GGUF model as llama.cpp's Q4_K_M. Raises ModelError."""
    _ask("quantize", model, None, out=str(out))


def _ask(action: str, model: Path, lora: Path | None, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "action": action, "model": str(model), "lora": None if lora is None else str(lora), "answer": str(answer),
            "threads": torch.get_num_threads(), **more,
        }  # fmt: skip
        # -P: the folder of the script is this package, whose modules are called like the libraries they export to.
        done = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=json.dumps(request).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_WAIT_POLICY": "passive"},
        )
        if done.returncode or not answer.is_file():
            raise ModelError(
                f"llama.cpp could not use {model.name if lora is None else lora.name} ({_reason(done)}); "
                "install the newest llama-cpp-python, or type --no-verify to write it unproved."
            )
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """How a process ended, and the last it said."""
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
    return f"{how}: {said[-1][:200]}" if said else how
