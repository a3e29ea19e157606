"""Readers always find a whole folder while it is replaced, and also after a crash at any moment."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetune.runtime import files
from edgetune.runtime.files import atomic_folder, exchange, mend


class Crash(BaseException):
    """Stands for the end of the process at this point."""


def write(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def test_two_folders_change_names_in_one_step(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, "1")
    assert not exchange(first, second)  # the second does not exist
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    write(second, "2")
    if not exchange(first, second):
        pytest.skip("this file system cannot")
    assert ((first / "a").read_text(), (second / "a").read_text()) == ("2", "1")


def test_a_folder_that_is_replaced_is_never_away(tmp_path: Path) -> None:
    out, missing, done = tmp_path / "out", [], threading.Event()
    write(out, "0")
    write(tmp_path / "other", "")
    if not exchange(out, tmp_path / "other") or not exchange(out, tmp_path / "other"):
        pytest.skip("this file system cannot exchange names")

    def look() -> None:
        while not done.is_set():
            if not out.exists():
                missing.append(out)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(100):
        write(out, str(number))
    done.set()
    reader.join()
    assert missing == []
    assert ((out / "a").read_text(), (out / "b").read_text()) == ("99", "99")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path: Path) -> None:
    write(tmp_path / "far", "old")
    (tmp_path / "out").symlink_to(tmp_path / "far")
    write(tmp_path / "out", "new")
    assert ((tmp_path / "out" / "a").read_text(), (tmp_path / "far" / "a").read_text()) == ("new", "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "out"]


@pytest.mark.parametrize(("exchanges", "crash"), [(True, 1), (True, 2), (False, 1), (False, 2), (False, 3), (False, 4)])
def test_a_crash_while_a_folder_is_replaced_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, crash: int
) -> None:
    out, calls = tmp_path / "out", 0
    write(out, "old")
    write(tmp_path / "new", "old")
    if exchanges and not exchange(tmp_path / "new", out):
        pytest.skip("this file system cannot exchange names")
    shutil.rmtree(tmp_path / "new")

    def failing(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == crash:
                raise Crash
            return original(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        # A process that has died cleans nothing up.
        patch.setattr(files.shutil, "rmtree", failing(lambda *_, **__: None))
        if not exchanges:
            patch.setattr(files, "exchange", lambda first, second: False)
        patch.setattr(os, "rename", failing(os.rename))
        patch.setattr(files, "sync_folder", failing(files.sync_folder))
        with pytest.raises(Crash):
            write(out, "new")
    if exchanges:
        assert (out / "a").read_text() == "new"  # even before mend() runs
    mend(out)
    assert (out / "a").read_text() == (out / "b").read_text()
    assert (out / "a").read_text() in ("old", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="Windows deletes the file when it is closed")
def test_a_scratch_file_has_no_name(tmp_path: Path) -> None:
    with files.scratch_file(tmp_path / "scratch", 4096) as file:
        assert list((tmp_path / "scratch").iterdir()) == []
        assert os.fstat(file.fileno()).st_size == 4096
    assert stat.S_IMODE((tmp_path / "scratch").stat().st_mode) == 0o700
