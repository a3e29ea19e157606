"""Fixtures that many tests share: a private home, the real data where the machine has it, tiny models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when triton is imported: without a card its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an edgetune home, and Hugging Face and Ollama caches, of its own, all empty."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGETUNE_HOME", str(home / "edgetune"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_HUB_CACHE", "OLLAMA_MODELS", "EDGETUNE_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return home / "edgetune"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real notes, chats and models beside the project; skips where it is not."""
    if not DATA.is_dir():
        pytest.skip("the shared data folder is not on this machine")
    return DATA
