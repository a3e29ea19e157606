"""With encryption on, everything works as without, with the same bits, and nothing of a note or an adapter is on the disk."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from keychain_for_tests import FileKeychain, use_keychain

from edgetune.cli.main import cli
from edgetune.config import DataConfig, NightlyConfig, TrainConfig
from edgetune.documents import spool
from edgetune.encrypting import covered_files, decrypt, encrypt
from edgetune.events import Finished, Interrupted, Started, Stepped
from edgetune.home import home
from edgetune.nights.job import Job
from edgetune.runtime import peft_folder
from edgetune.runtime.encrypted_file import is_encrypted
from edgetune.runtime.errors import LockedError
from edgetune.runtime.files import read_own
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training.train import train

PHRASE = "the crimson ledger under the stairs of the lighthouse"
HALF_WAY = 6


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FileKeychain:
    return use_keychain(monkeypatch, tmp_path / "keychain.json")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run of twelve steps over forty notes, each with the phrase, whose texts are more than the spool keeps in memory."""
    monkeypatch.setattr(spool, "MEMORY_BYTES", 1000)
    tiny.save_trainable(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / "notes" / f"{number}.md").write_text(f"Note {number}: {PHRASE}, and {number} more. Anna helped. " * 4)
    data = DataConfig(notes=(str(tmp_path / "notes"),), seq_len=64, batch_tokens=256)
    return TrainConfig(data=data, model=str(tmp_path / "model"), steps=2 * HALF_WAY, rank=4)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def stored() -> Iterator[tuple[str, bytes]]:
    """Yield every file in the data folder and every nameless file that this process has open, with the bytes on the disk."""
    for path in home().rglob("*"):
        if path.is_file() and not path.is_relative_to(home() / "models"):
            yield str(path.relative_to(home())), path.read_bytes()
    for link in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        target = os.readlink(link) if link.is_symlink() else ""
        if target.startswith(str(home())) and target.endswith("(deleted)"):
            yield f"nameless {link.name}", link.read_bytes()


def needles(model: str) -> list[bytes]:
    """Return the phrase as text, in JSON and HTML as well, and as token ids."""
    ids = Tokenizer.load(Path(model)).encode(f": {PHRASE}, and")
    return [b"crimson ledger", np.asarray(ids[3:9], dtype=np.int32).tobytes(), b"crimson"]


def trained(config: TrainConfig, searched: list[bytes]) -> tuple[Path, set[str]]:
    """Interrupt a run half-way and resume it, and search the disk for `searched` after each event.

    Return the adapter's folder, and the names of all files in which something was found or, for the nameless, that were seen.
    """
    found, stop = set[str](), threading.Event()

    def search() -> None:
        for name, data in stored():
            if any(needle in data for needle in searched):
                found.add(name)
            if name.startswith("nameless") and data:
                found.add("a nameless file was seen")

    for event in train(config, stop):
        search()
        if isinstance(event, Stepped) and event.step == HALF_WAY:
            stop.set()
    assert isinstance(event, Interrupted)
    finished = None
    for event in train(config):
        search()
        finished = event if isinstance(event, Finished) else finished
    search()
    assert finished is not None
    return Path(finished.adapter), found


def test_nothing_of_notes_and_adapters_is_on_the_disk_and_the_bits_are_the_same(
    answering: FileKeychain, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = needles(str(config.model))
    plain, found = trained(config, searched)
    plain_bytes = (plain / peft_folder.WEIGHTS_FILE).read_bytes()
    tensors = plain_bytes[-256:]
    # The search finds what there is to find: tokens, run.json, samples in the log, the report.
    kinds = ("ids.bin", "events.jsonl", "report.html")
    assert all(any(name.endswith(kind) for name in found) for kind in kinds), found
    monkeypatch.setenv("EDGETUNE_HOME", os.environ["EDGETUNE_HOME"] + "-encrypted")
    encrypt()
    encrypted, found = trained(config, [*searched, tensors])
    assert found - {"a nameless file was seen"} == set()
    assert read_own(encrypted / peft_folder.WEIGHTS_FILE) == plain_bytes
    assert all(is_encrypted(path) for path in covered_files(home()))
    for command in (["eval", config.data.notes[0]], ["generate", PHRASE, "--temperature", "0", "--max-tokens", "8"]):
        results = []
        for folder in (plain, encrypted):
            done = run(*command, "--model", str(config.model), "--adapter", str(folder), "--json")
            if folder is plain:
                assert done.exit_code == 0, done.output
            results.append({name: value for name, value in json.loads(done.stdout).items() if name not in NOT_COMPARED})
        assert results[0] == results[1]
    assert found_now([*searched, tensors]) == set()
    listed = json.loads(run("adapters", "list", "--json").stdout)
    assert [Path(kept["path"]) for kept in listed["adapters"]] == [encrypted]
    shows_its_report_only_on_demand(config)
    decrypt()
    assert (encrypted / peft_folder.WEIGHTS_FILE).read_bytes() == plain_bytes


NOT_COMPARED = ("tokens_per_second", "adapter", "seconds")


def found_now(searched: list[bytes]) -> set[str]:
    return {name for name, data in stored() if any(needle in data for needle in searched)}


def shows_its_report_only_on_demand(config: TrainConfig) -> None:
    done = run("report")
    assert "The report is encrypted. To read it, type for example: edgetune report --out report.html" in done.stdout
    out = Path(config.data.notes[0]).parent / "report.html"
    assert f"Report: {out}" in run("report", "--out", str(out)).stdout
    assert b"crimson" in out.read_bytes()
    assert out.stat().st_mode & 0o077 == 0


def test_a_locked_keychain_costs_an_interrupted_run_nothing(answering: FileKeychain, config: TrainConfig) -> None:
    encrypt()
    config = dataclasses.replace(config, anchor=0.0)
    stop = threading.Event()
    for event in train(config, stop):
        if isinstance(event, Stepped) and event.step == HALF_WAY:
            stop.set()
    before = {path: path.read_bytes() for path in covered_files(home())}
    assert any(path.name.startswith("checkpoint") for path in before)
    answering.lock()
    with pytest.raises(LockedError):
        list(train(config))
    assert {path: path.read_bytes() for path in covered_files(home())} == before
    answering.locked = False
    events = list(train(config))
    assert next(event.step for event in events if isinstance(event, Stepped)) == HALF_WAY + 1
    assert isinstance(events[0], Started)


@pytest.mark.slow
def test_a_run_that_began_in_plain_goes_on_encrypted_and_the_other_way_round(
    answering: FileKeychain, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, anchor=0.0)
    whole = next(event for event in train(config) if isinstance(event, Finished))
    expected = (Path(whole.adapter) / peft_folder.WEIGHTS_FILE).read_bytes()
    for between in (encrypt, decrypt):
        stop = threading.Event()
        for event in train(config, stop):
            if isinstance(event, Stepped) and event.step == HALF_WAY:
                stop.set()
        between()
        events = list(train(config))
        assert next(event.step for event in events if isinstance(event, Stepped)) == HALF_WAY + 1
        assert isinstance(events[-1], Finished)
        assert read_own(Path(events[-1].adapter) / peft_folder.WEIGHTS_FILE) == expected


@pytest.mark.slow
def test_a_night_leaves_nothing_plain_and_a_locked_keychain_ends_it_unchanged(
    answering: FileKeychain, config: TrainConfig
) -> None:
    old = time.time() - 3600
    for note in Path(config.data.notes[0]).iterdir():
        os.utime(note, (old, old))
    settings = {"model": str(config.model), "seq_len": 64, "batch_tokens": 256, "rank": 2}
    Job(config.data.notes, NightlyConfig(), "cron", time.time(), settings).save()
    encrypt()
    done = run("nightly", "run", "--minutes", "1")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "What nights keep is encrypted" in run("nightly", "status").stdout
    assert found_now(needles(str(config.model))) == set()
    before = {path: path.read_bytes() for path in covered_files(home())}
    assert all(is_encrypted(path) for path in before)
    answering.lock()
    done = run("nightly", "run", "--minutes", "1")
    assert isinstance(done.exception, LockedError)
    assert {path: path.read_bytes() for path in covered_files(home())} == before
