"""`edgetune encrypt` and `decrypt`: every file of the data folder, at every moment a kill may come, and with every keychain."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keyring.backends.chainer
import keyring.backends.fail
import keyring.backends.null
import pytest
from click.testing import CliRunner, Result
from keychain_for_tests import FileKeychain, use_keychain

from edgetune import encryption, keychain
from edgetune.cli.main import cli
from edgetune.encrypting import covered_files, decrypt, encrypt, plain_files
from edgetune.encryption import ENCRYPTED, FILE, State, load
from edgetune.events import EventLog, Finished, read_events
from edgetune.home import CONTENTS, home, keyed_digest, unfinished_folder
from edgetune.library.exports_made import exports_made, remember_export
from edgetune.lock import Lock
from edgetune.nights.begin import LOCKED_FILE
from edgetune.progress import Stages
from edgetune.runtime.encrypted_file import is_encrypted
from edgetune.runtime.errors import BusyError, LockedError, UsageError
from edgetune.runtime.files import atomic_write, read_own
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG, read_untrusted

PHRASE = b"the crimson ledger under the stairs"
PLAIN = ("config.toml", "private.txt", "models", "encryption.json")
"""Entries of the data folder that stay plain."""


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FileKeychain:
    return use_keychain(monkeypatch, tmp_path / "keychain.json")


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli, arguments, input=answer)


def fill() -> dict[Path, bytes]:
    """Put one of everything that edgetune keeps into its folder; return the files that are to be encrypted, and their bytes."""
    keyed_digest("")  # makes the key of digests
    base, adapter = home(), home() / "adapters" / ("a" * 12) / "night"
    paths = [
        base / "current.json", base / "exports.json", adapter / "adapter_model.safetensors", adapter.parent / "current.json",
        base / "parsed" / ("c" * 64) / ("d" * 64 + ".json"), base / "runs" / "2026-11-28-010000" / "report.html",
        base / "unfinished" / "0123456789abcdef" / "tokens" / "ids.bin", base / "nightly.json",
        base / "nights" / "night-2026-11-28.json",
        adapter / "adapter_config.json",
        base / "runs" / "2026-11-28-010000" / "events.jsonl",
    ]  # fmt: skip
    plain = [base / "config.toml", base / "private.txt", base / "models" / "tiny-1b-0123456789ab" / "model.safetensors",
             base / "nights" / "last.log", base / "unfinished" / "0123456789abcdef.lock"]  # fmt: skip
    for number, path in enumerate([*paths, *plain]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHRASE * (number * 600 + 1) + b"\n")
        path.chmod(0o600)
        os.utime(path, (1_700_000_000 + number,) * 2)
    return {path: path.read_bytes() for path in [*paths, base / "secret"]}


def tree() -> dict[str, str]:
    """Return a digest of each file of the data folder but the locks, by its path, and with its time and mode."""
    files = [path for path in home().rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {
        str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns} {path.stat().st_mode}"
        for path in files
    }


def test_every_entry_of_the_data_folder_is_encrypted_or_said_to_be_plain() -> None:
    assert {*ENCRYPTED, *PLAIN} == set(CONTENTS)


def test_encrypt_leaves_nothing_plain_and_decrypt_brings_back_every_byte(answering: FileKeychain) -> None:
    files = fill()
    before = tree()
    done = run("encrypt")
    assert done.exit_code == 0, done.output
    assert f"Encryption at rest is on. {len(files)} files in" in done.stdout
    assert "your notes themselves" in done.stdout
    for path, data in files.items():
        assert PHRASE not in path.read_bytes()
        assert data not in path.read_bytes()
        assert read_own(path) == data
        assert f"{path.stat().st_mtime_ns} {path.stat().st_mode}" == before[str(path)].split(" ", 1)[1]
    assert set(covered_files(home())) == set(files)
    assert answering.entries.keys() == {f"edgetune {load(home()).key_id}"}  # type: ignore[union-attr]
    assert "were so already" in run("encrypt").stdout
    assert run("doctor", "--json").exit_code == 0
    assert json.loads(run("doctor", "--json").stdout.splitlines()[-1])["encryption"] == "on"
    done = run("decrypt")
    assert done.exit_code == 0, done.output
    assert tree() == before
    assert answering.entries == {}
    assert "Encryption at rest is off. To turn it on" in str(run("decrypt").exception)


def in_child(work: Callable[[], object], kill_at: int) -> bool:
    """Do work in a child process that is killed before its nth rename; return True if the child came to the end."""
    child = os.fork()
    if child == 0:
        left, replace = kill_at, os.replace

        def kill_or_replace(source: Path, path: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, path)

        os.replace = kill_or_replace  # type: ignore[assignment]
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_encrypt_and_decrypt_can_be_killed_before_any_rename_and_typed_again(answering: FileKeychain) -> None:
    files = dict(list(fill().items())[:4])
    for path in set(covered_files(home())) - set(files):
        path.unlink()
    before = tree()
    for kill_at in range(1, len(files) + 4):  # two states, the files, and the state that it is on
        assert not in_child(encrypt, kill_at)
        state = load(home())
        assert (None if state is None else state.state) == (
            None if kill_at == 1 else State.PREPARING if kill_at == 2 else State.ENCRYPTING
        )
        assert all(read_own(path) == data for path, data in files.items())
        if kill_at > 2:
            with pytest.raises(BusyError, match="type edgetune encrypt to finish it"):
                atomic_write(home() / "current.json", "{}")
        encrypt()
        assert plain_files(home()) == len(answering.entries) - 1 == 0
        assert all(read_own(path) == data for path, data in files.items())
        decrypt()
    for kill_at in range(1, len(files) + 2):  # a state, and the files
        encrypt()
        assert not in_child(decrypt, kill_at)
        assert all(read_own(path) == data for path, data in files.items())
        decrypt()
    assert tree() == before
    assert not (home() / FILE).exists()
    assert answering.entries == {}


def test_what_a_killed_write_left_half_encrypted_does_not_stop_decrypt(answering: FileKeychain) -> None:
    files = fill()
    encrypt()
    whole = (home() / "nightly.json").read_bytes()
    left = home() / ".nightly.json.abcd1234.tmp"
    for half in (whole[:20], whole[:-1]):
        left.write_bytes(half)
        assert run("decrypt").exit_code == 0
        assert not left.exists()
        assert all(path.read_bytes() == data for path, data in files.items())
        encrypt()


@pytest.mark.usefixtures("answering")
def test_progress_counts_small_files_too() -> None:
    fill()
    for number in range(60):
        (home() / "nights" / f"empty-{number}.json").write_bytes(b"")
    shares: list[float] = []
    encrypt(lambda done, total: shares.append(done / total))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 60  # every file, though empty, moves it on


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_file_that_was_half_converted_by_a_killed_process_is_no_hindrance(answering: FileKeychain) -> None:
    adapter = next(path for path in fill() if path.name == "adapter_model.safetensors")
    adapter.write_bytes(PHRASE * 100_000)
    before = tree()
    for left in (home() / ".current.json.abcd1234.tmp", home() / "nights" / ".notes.json.abcd1234.tmp"):
        left.write_bytes(PHRASE)

    def kill(done: int, total: int) -> None:
        if done > 0 and list(adapter.parent.glob(".*.tmp")):
            os.kill(os.getpid(), signal.SIGKILL)

    for killed, then in ((encrypt, encrypt), (decrypt, encrypt), (decrypt, decrypt)):
        assert not in_child(lambda convert=killed: convert(kill), 0)  # type: ignore[misc]
        assert len(list(adapter.parent.glob(".*.tmp"))) == 1
        then()
        assert read_own(adapter) == PHRASE * 100_000
        assert list(home().rglob(".*.tmp")) == []
        assert then is decrypt or plain_files(home()) == 0
    assert tree() == before
    assert answering.entries == {}


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("word", ["encrypt", "decrypt"])
def test_ctrl_c_stops_a_conversion_with_a_sentence_and_the_same_command_goes_on(
    answering: FileKeychain, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    files = fill()
    if word == "decrypt":
        encrypt()

    def interrupted(self: Stages, stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stages, "__call__", interrupted)
        stopped = run(word)
    assert stopped.exit_code == 1  # the program itself turns click's Abort into 130
    assert "Nothing is lost: run the same command again to continue." in stopped.stderr
    assert 0 < plain_files(home()) < len(files)
    assert run(word).exit_code == 0
    assert plain_files(home()) == (0 if word == "encrypt" else len(files))
    assert all(read_own(path) == data for path, data in files.items())


def test_decrypt_that_was_killed_after_it_deleted_the_key_comes_to_its_end(answering: FileKeychain) -> None:
    fill()
    encrypt()
    record = load(home())
    assert record is not None
    decrypt()
    record.save(home(), State.DECRYPTING)
    encryption.forget_keys()
    assert json.loads(run("doctor", "--json").stdout.splitlines()[-1])["encryption"] == "locked"
    assert run("decrypt").exit_code == 0
    record.save(home(), State.DECRYPTING)
    assert run("encrypt").exit_code == 0
    assert plain_files(home()) == 0


def test_a_conversion_that_was_interrupted_one_way_can_go_the_other(answering: FileKeychain) -> None:
    files = fill()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for first, then in ((encrypt, decrypt), (encrypt, encrypt), (decrypt, encrypt)):
        with pytest.raises(KeyboardInterrupt):
            first(stop)
        assert 0 < plain_files(home()) < len(files)
        then()
        assert plain_files(home()) == (len(files) if then is decrypt else 0)
        assert all(read_own(path) == data for path, data in files.items())


def test_a_file_that_another_program_changes_meanwhile_is_not_lost(answering: FileKeychain) -> None:
    path = next(path for path in fill() if path.name == "report.html")

    def change(done: int, total: int) -> None:
        path.write_bytes(b"newer" + b"x" * done)

    with pytest.raises(BusyError, match=r"Another program has changed .*report.html meanwhile"):
        encrypt(change)
    assert path.read_bytes().startswith(b"newer")
    encrypt()
    assert read_own(path).startswith(b"newer")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_it_waits_for_no_run_and_changes_nothing_while_one_is_going(answering: FileKeychain) -> None:
    fill()
    before = tree()
    with Lock(unfinished_folder() / "0123456789abcdef.lock", "this run"):
        pass
    child = os.fork()
    if child == 0:
        with Lock(unfinished_folder() / "0123456789abcdef.lock", "this run"):
            (home().parent / "ready").write_text("")
            time.sleep(60)
        os._exit(0)
    try:
        while not (home().parent / "ready").exists():
            time.sleep(0.01)
        assert "is already using edgetune's folder" in str(run("encrypt").exception)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert tree() == before
    assert answering.entries == {}


def test_records_written_while_it_is_on_are_encrypted_without_a_change_to_their_writers(answering: FileKeychain) -> None:
    encrypt()
    remember_export(Path("/somewhere/else"))
    digest = keyed_digest("a note")
    with EventLog(home() / "runs" / "a" / "events.jsonl") as log:
        log.append(Finished("a", 1, 2, 3.0, None, None, 4, "cpu", 5.0))
    for name in ("exports.json", "secret", "runs/a/events.jsonl"):
        assert is_encrypted(home() / name)
    assert exports_made() == ["/somewhere/else"]
    assert len(list(read_events(home() / "runs" / "a" / "events.jsonl"))) == 1
    decrypt()
    assert keyed_digest("a note") == digest
    assert exports_made() == ["/somewhere/else"]


# --- keychains --------------------------------------------------------------------------------------------------------


def test_a_locked_keychain_gives_one_sentence_and_changes_nothing(answering: FileKeychain) -> None:
    files = fill()
    encrypt()
    before = tree()
    answering.lock()
    for command in (["report"], ["adapters", "list"], ["nightly", "status"], ["nightly", "run", "--scheduled"], ["decrypt"]):
        done = run(*command)
        assert isinstance(done.exception, LockedError), (command, done.output)
        assert str(done.exception) == (
            "The keychain does not give edgetune its key (KeyringLocked). Unlock it and type the command again."
        )
    found = json.loads(run("doctor", "--json").stdout.splitlines()[-1])
    assert found["encryption"] == "locked"
    assert any("does not give edgetune its key" in problem for problem in found["problems"])
    (home() / "nights" / LOCKED_FILE).unlink()  # where the scheduled night has noted the time, for `nightly status`
    assert tree() == before
    answering.locked = False
    assert all(read_own(path) == data for path, data in files.items())


def test_a_keychain_without_the_key_or_with_another_one_is_said(answering: FileKeychain) -> None:
    path = next(iter(fill()))
    encrypt()
    entry = f"edgetune {load(home()).key_id}"  # type: ignore[union-attr]
    kept = answering.entries[entry]
    for wrong, sentence in (
        ({}, "does not have the key"),
        ({entry: "AAAA"}, "is not the one"),
        ({entry: "%"}, "is not the one"),
    ):
        answering.path.write_text(json.dumps(wrong))
        encryption.forget_keys()
        for work in (lambda: read_own(path), encrypt, decrypt):
            with pytest.raises(LockedError, match=sentence):
                work()
    answering.path.write_text(json.dumps({entry: kept}))
    assert PHRASE not in path.read_bytes()
    decrypt()


@pytest.mark.parametrize("backend", ["fail", "null", "plaintext", "chain"])
def test_a_keychain_that_keeps_nothing_or_keeps_it_in_a_plain_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    class Plaintext:
        __module__ = "keyrings.alt.file"

    class Chain:
        __module__ = "keyring.backends.chainer"
        backends = (keyring.backends.null.Keyring(), Plaintext())

    backends = {
        "fail": keyring.backends.fail.Keyring(), "null": keyring.backends.null.Keyring(), "plaintext": Plaintext(),
        "chain": Chain(),
    }  # fmt: skip
    fill()
    before = tree()
    monkeypatch.setattr("keyring.get_keyring", lambda: backends[backend])
    with pytest.raises(LockedError, match=r"There is no keychain to use .* encrypt the disk instead\.$"):
        encrypt()
    assert tree() == before


def test_the_systems_keychain_is_found_in_a_chain(monkeypatch: pytest.MonkeyPatch, answering: FileKeychain) -> None:
    class Chain:
        backends = (keyring.backends.null.Keyring(), answering)

    monkeypatch.setattr("keyring.get_keyring", Chain)
    assert keychain.system_keychain() is answering


def test_a_keychain_that_asks_somebody_who_is_not_there_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, answering: FileKeychain
) -> None:
    monkeypatch.setattr(keychain, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(answering, "get_password", lambda service, name: time.sleep(30))
    with pytest.raises(LockedError, match="did not answer within 0 s"):
        keychain.fetch("a")


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(LockedError, match=r"pip install 'edgetune\[encryption\]'"):
        encrypt()
    monkeypatch.undo()


# --- damage, copies, purge --------------------------------------------------------------------------------------------


def test_decrypt_names_what_was_damaged_and_keeps_the_key(answering: FileKeychain) -> None:
    files = fill()
    encrypt()
    damaged = home() / "nightly.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    done = run("decrypt")
    assert "1 file could not be decrypted" in str(done.exception)
    assert str(damaged) in str(done.exception)
    assert len(answering.entries) == 1
    damaged.write_bytes(whole)
    assert run("decrypt").exit_code == 0
    assert all(path.read_bytes() == data for path, data in files.items())


def test_a_file_copied_out_of_the_data_folder_says_where_it_belongs(answering: FileKeychain, tmp_path: Path) -> None:
    path = next(iter(fill()))
    encrypt()
    (tmp_path / "copy").write_bytes(path.read_bytes())
    with pytest.raises(LockedError, match="comes from edgetune's data folder, where alone it can be read"):
        read_untrusted(tmp_path / "copy", ADAPTER_CONFIG)
    (home() / FILE).unlink()
    with pytest.raises(LockedError, match=r"encryption\.json is missing"):
        read_own(path)


def test_the_folder_may_be_a_link_or_move_as_a_whole(
    answering: FileKeychain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fill()
    encrypt()
    os.rename(home(), tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "link"))
    old = next(iter(files)).parent
    for path, data in files.items():
        assert read_own(tmp_path / "link" / path.relative_to(old)) == data
        assert read_own(tmp_path / "elsewhere" / path.relative_to(old)) == data
    atomic_write(tmp_path / "elsewhere" / "current.json", "{}")
    assert is_encrypted(tmp_path / "link" / "current.json")


def test_a_damaged_state_is_said_and_nothing_is_written_plain(answering: FileKeychain) -> None:
    fill()
    encrypt()
    for text in ("", "[]", "{}", '{"format": 2, "state": "on", "key_id": "a", "check": "b"}', '{"format": 1, "state": "x"}'):
        (home() / FILE).write_text(text)
        with pytest.raises(UsageError, match=r"encryption\.json"):
            atomic_write(home() / "current.json", "{}")


def test_purge_deletes_the_key_too_and_names_what_it_cannot_reach(answering: FileKeychain) -> None:
    fill()
    encrypt()
    (home() / "nightly.json").unlink()
    assert run("purge", "--yes").exit_code == 0
    assert answering.entries == {}
    fill()
    encrypt()
    answering.lock()
    done = run("purge", "--yes")
    assert done.exit_code == 0, done.output
    assert "the entry edgetune in the system's keychain, which did not answer: delete it there" in done.stdout
    assert "exports and adapters written elsewhere, which only files name that cannot be decrypted" in done.stdout
    assert [path.name for path in home().iterdir()] == []
