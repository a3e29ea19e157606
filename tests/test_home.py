"""The private folder is private: its owner, its modes, its key, its locks, and what a killed command leaves in it."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from edgetune.cli.main import cli, plain_failures
from edgetune.config import DataConfig, TrainConfig
from edgetune.home import home, keyed_digest
from edgetune.library.loading import open_base
from edgetune.lock import Lock
from edgetune.privacy.rules import rules
from edgetune.runtime import files
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import atomic_folder, is_ours, mend
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import write_tensors
from edgetune.scratch import delete_leftovers, scratch_folder
from edgetune.training.run_notes import read_and_split
from edgetune.training.setup import prepare_new

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes are POSIX's")
NOBODY = 65534


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rights", [0o720, 0o702, 0o777, 0o1777])
def test_a_home_that_others_can_write_is_refused(rights: int, private_home: Path) -> None:
    private_home.mkdir(mode=0o700)
    private_home.chmod(rights)
    with pytest.raises(UsageError, match=rf"Other users can write to the data folder {private_home}. Type: chmod go-w"):
        home()
    private_home.chmod(0o755)  # that others can read it, `edgetune doctor` says
    assert home() == private_home


def test_a_home_of_somebody_else_is_refused(private_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_home.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: private_home.stat().st_uid + 1)
    with pytest.raises(UsageError, match=rf"The data folder {private_home} belongs to another user. Set EDGETUNE_HOME to"):
        home()
    monkeypatch.setattr(os, "geteuid", lambda: 0)  # root may: a container's folder often belongs to a user
    assert home() == private_home


def test_files_that_others_could_read_are_made_private(private_home: Path) -> None:
    loose = ["config.toml", "current.json", "secret", "adapters/abc/night/adapter_config.json", "runs/night/events.jsonl"]
    for name in [*loose, "not-edgetunes.txt"]:
        (private_home / name).parent.mkdir(parents=True, exist_ok=True)
        (private_home / name).write_text("")
        (private_home / name).chmod(0o664)
    (private_home / "runs").chmod(0o755)
    (private_home / "runs" / "link").symlink_to(private_home / "not-edgetunes.txt")
    private_home.chmod(0o700)
    home()
    assert {mode(private_home / name) for name in loose} == {0o600}
    assert mode(private_home / "runs") == 0o700
    assert mode(private_home / "not-edgetunes.txt") == 0o664


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "x.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"The lock .*x.lock cannot be opened"), Lock(tmp_path / "x.lock", "this"):
        pass
    assert (tmp_path / "precious").read_text() == "text"


# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_digest_is_the_same_again_here_and_another_elsewhere(private_home: Path) -> None:
    first = keyed_digest("a note")
    assert first == keyed_digest("a note")
    assert first != keyed_digest("another note")
    assert first != hashlib.sha256(b"a note").hexdigest()
    assert mode(private_home / "secret") == 0o600
    (private_home / "secret").unlink()
    assert keyed_digest("a note") != first


def test_processes_that_begin_together_agree_on_one_key(private_home: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: keyed_digest("a note"), range(32)))) == 1
    assert sorted(path.name for path in private_home.iterdir()) == ["secret"]


def test_a_key_that_cannot_be_used_is_a_sentence(private_home: Path, tmp_path: Path) -> None:
    home()
    (private_home / "secret").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"secret is damaged. Delete it: edgetune makes a new one"):
        keyed_digest("a note")
    (private_home / "secret").unlink()
    (private_home / "secret").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="secret cannot be read"):
        keyed_digest("a note")


def test_an_adapter_does_not_tell_which_notes_it_was_trained_on(tmp_path: Path, private_home: Path) -> None:
    """The digest of known notes is not in the files that are given away, and is that of a run which resumes."""
    tiny.save_trainable(tmp_path / "model")
    (tmp_path / "note.md").write_text("Marra watered the beans at the harbour allotment. " * 20)
    data = DataConfig(notes=(str(tmp_path / "note.md"),), seq_len=64, batch_tokens=64)
    config = TrainConfig(data, str(tmp_path / "model"), rank=2)
    known = read_and_split(config)[1].train[0].digest
    guesses = {known, hashlib.sha256(known.encode()).hexdigest()}
    records = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        records.append(prepare_new(config, open_base(config.model), tmp_path / str(number)).record)
    masking = f"mask all {rules().version}"
    assert records[0].plan.data_digest == records[1].plan.data_digest == keyed_digest(f"{masking}\n{known}")
    assert not guesses & {records[0].plan.data_digest, records[0].notes}


# --- what a killed command leaves -------------------------------------------------------------------------------------


def test_a_scratch_folder_is_private_and_gone_afterwards(private_home: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == private_home / "scratch"
        assert mode(folder) == 0o700
        delete_leftovers()  # as another command would
        assert folder.is_dir()
    assert list((private_home / "scratch").iterdir()) == []


def test_tokens_do_not_survive_a_kill(private_home: Path) -> None:
    code = (
        "import os, signal; from edgetune.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'tokens').write_text('private'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list((private_home / "scratch").glob("*/tokens"))) == 1
    with scratch_folder():
        assert list((private_home / "scratch").glob("*/tokens")) == []


def test_eval_and_plan_keep_tokens_in_the_private_folder(
    tmp_path: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note.md").write_text("Marra watered the beans at the harbour allotment. " * 20)
    tiny.save_trainable(tmp_path / "model")

    made, mkdtemp = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *names, **options: made.append(mkdtemp(*names, **options)) or made[-1])
    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", lambda *arguments: 1.0)
    for command in ("eval", "plan"):
        done = CliRunner().invoke(cli, [command, str(tmp_path / "note.md"), "--model", str(tmp_path / "model"), "--json"])
        assert done.exit_code == 0, done.output
        assert list((private_home / "scratch").iterdir()) == []
    assert made
    assert all(Path(folder).is_relative_to(private_home / "scratch") for folder in made)


# --- folders that others can write ------------------------------------------------------------------------------------


def test_a_temporary_file_of_a_weight_file_cannot_be_foreseen(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / f".x.safetensors.{os.getpid()}").symlink_to(tmp_path / "precious")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(4)})
    assert (tmp_path / "precious").read_text() == "text"
    names = set()
    for _ in range(2):
        file, name = files.new_file(tmp_path / "x")
        file.close()
        assert mode(name) == 0o600
        names.add(name)
    assert len(names) == 2


def partial_folder(tmp_path: Path) -> Path:
    """Return the hidden folder that `quantize` resumes from, by interrupting one."""
    tiny.save_trainable(tmp_path / "model")

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(tmp_path / "model", tmp_path / "out", progress=stop)
    return next(tmp_path.glob(".out.partial-*"))


def test_quantize_resumes_in_its_own_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = partial_folder(tmp_path)
    partial.chmod(0o777)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: partial.stat().st_uid + 1)
        with pytest.raises(UsageError, match=r"out.partial-\w+ is not a folder of yours; delete it, or name a DEST"):
            quantize_folder(tmp_path / "model", tmp_path / "out")
    partial.rename(tmp_path / "elsewhere")
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is not a folder of yours"):
        quantize_folder(tmp_path / "model", tmp_path / "out")
    partial.unlink()
    (tmp_path / "elsewhere").rename(partial)
    quantize_folder(tmp_path / "model", tmp_path / "out")
    assert mode(tmp_path / "out") == 0o700


def test_what_others_left_behind_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was moved aside comes back after a crash, but never one that another user put there."""
    planted = tmp_path / ".out.old.aaaaaaaa.tmp" / "out"
    planted.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: planted.stat().st_uid + 1)
        assert not is_ours(planted)
        mend(tmp_path / "out")
    assert planted.is_dir()
    assert not (tmp_path / "out").exists()
    mend(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    with atomic_folder(tmp_path / "out") as temporary:
        assert mode(temporary) == 0o700


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"
        ),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_a_full_memory_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, plain_failures():
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "edgetune: This machine has too little free memory for that. End other programs, or choose less: a smaller model or "
        "batch.\n"
    )


def test_another_error_is_not_taken_for_a_full_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), plain_failures():
        raise RuntimeError("shapes do not agree")
