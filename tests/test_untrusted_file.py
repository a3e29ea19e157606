"""Untrusted files are opened in one place, which refuses all that is not a plain file of a sane size."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.runtime.errors import ModelError
from edgetune.runtime.untrusted_file import COMPANION, MODEL_WEIGHTS, open_untrusted, read_untrusted

unix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor /proc, and links need a privilege")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with one file, beside a private file."""
    (tmp_path / "private").write_text("a key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "LICENSE").write_text("a licence")
    return folder


@unix
def test_a_link_within_the_folder_is_followed(model: Path) -> None:
    (model / "COPYING").symlink_to("LICENSE")
    assert read_untrusted(model / "COPYING", COMPANION) == b"a licence"


@unix
def test_a_link_of_the_hugging_face_cache_is_followed_into_its_own_blobs_alone(tmp_path: Path) -> None:
    for name in ("models--a--a", "models--b--b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "1234").write_text(name)
        (tmp_path / name / "snapshots" / "5678").mkdir(parents=True)
    snapshot = tmp_path / "models--a--a" / "snapshots" / "5678"
    (snapshot / "LICENSE").symlink_to("../../blobs/1234")
    (snapshot / "NOTICE").symlink_to("../../../models--b--b/blobs/1234")
    assert read_untrusted(snapshot / "LICENSE", COMPANION) == b"models--a--a"
    with pytest.raises(ModelError, match="NOTICE is a link that leaves its folder; replace it by the file itself"):
        read_untrusted(snapshot / "NOTICE", COMPANION)


@unix
@pytest.mark.parametrize("target", ["../private", "/proc/self/environ", "/etc/hostname", "/dev/zero"])
def test_a_link_that_leaves_the_folder_is_refused(model: Path, target: str) -> None:
    (model / "NOTICE").symlink_to(target)
    with pytest.raises(ModelError, match=r"leaves its folder|cannot be read"):
        read_untrusted(model / "NOTICE", COMPANION)


@unix
@pytest.mark.parametrize("target", ["/proc/self/environ", "/dev/zero", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_weights_are_never_read_from_a_device_or_proc(model: Path, target: str) -> None:
    (model / "model.safetensors").symlink_to(target)
    with pytest.raises(ModelError, match=r"not a regular file|No such file"):
        open_untrusted(model / "model.safetensors", MODEL_WEIGHTS)


@unix
def test_weights_may_lie_on_another_disk(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert read_untrusted(model / "model.safetensors", MODEL_WEIGHTS) == b"weights"


@unix
def test_a_fifo_is_refused_without_waiting_for_a_writer(model: Path) -> None:
    os.mkfifo(model / "NOTICE")
    with pytest.raises(ModelError, match="not a regular file"):
        open_untrusted(model / "NOTICE", COMPANION)


@unix
def test_a_loop_of_links_is_refused(model: Path) -> None:
    (model / "NOTICE").symlink_to("NOTICE")
    with pytest.raises(ModelError, match="cannot be read"):
        open_untrusted(model / "NOTICE", COMPANION)


def test_a_sparse_file_over_the_limit_is_refused_before_it_is_read(model: Path) -> None:
    with (model / "NOTICE").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="NOTICE is larger than 64 MiB"):
        read_untrusted(model / "NOTICE", COMPANION)


def test_a_file_at_its_limit_is_read(model: Path) -> None:
    kind = replace(COMPANION, limit=9)
    assert read_untrusted(model / "LICENSE", kind) == b"a licence"
    (model / "LICENSE").write_text("a licence!")
    with pytest.raises(ModelError, match="is larger than"):
        read_untrusted(model / "LICENSE", kind)
