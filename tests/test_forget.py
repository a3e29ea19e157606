"""`edgetune forget`: what is left is byte for byte what there would be if the note had never been there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from edgetune.cli.main import cli
from edgetune.config import DataConfig, TrainConfig
from edgetune.documents.lineage import NothingNew
from edgetune.documents.reading import read_notes
from edgetune.events import Event, Finished, Interrupted, Started, Stepped
from edgetune.forgetting.forget import forget, plan
from edgetune.forgetting.job import ForgetJob
from edgetune.home import home
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger, training_log
from edgetune.library.exports_made import remember_export
from edgetune.runtime import peft_folder
from edgetune.runtime.errors import BusyError, UsageError
from edgetune.training.train import train
from edgetune.training.unfinished_run import UnfinishedRun

PLANTS = ["beans", "leeks", "chard", "kale", "peas", "onions", "garlic", "radishes"]
SECRET = "The quince gin is hidden behind the third flowerpot, and nobody but Marra may know about it."


def write(folder: Path, first: int, last: int) -> None:
    """Write short notes, enough of them for some to be held out."""
    folder.mkdir(exist_ok=True)
    for number in range(first, last):
        plant, other = PLANTS[number % 8], PLANTS[(number * 3 + 1) % 8]
        text = f"# Log {number}\n\nToday Marra watered the {plant} behind the shed. The {other} want netting, {number} rows of them.\n"
        (folder / f"{number:02}.md").write_text(text)


def config(folder: Path, **changes: object) -> TrainConfig:
    data = DataConfig(notes=(str(folder),), seq_len=32, batch_tokens=64)
    chosen = {"data": data, "model": str(folder.parent / "model"), "steps": 4, "rank": 4, "lr": 0.02, **changes}
    return TrainConfig(**chosen)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def easy_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a tiny model, hold out a note in five, and let the gate judge by so few, so that some nights are promoted."""
    tiny.save_trainable(tmp_path / "model")
    for name, value in (("gate.FEWEST_NOTES", 2), ("gate.FEWEST_BYTES", 100), ("gate.CHANCE", 0.4), ("gate.GENERAL_BOUND", 9.0)):
        monkeypatch.setattr(f"edgetune.library.{name}", value)
    for name, value in (("ONE_IN", 5), ("LARGEST_SHARE", 0.5)):
        monkeypatch.setattr(f"edgetune.documents.heldout.{name}", value)
    monkeypatch.setattr("edgetune.training.loop._SAMPLE_TOKENS", 2)


def night(folder: Path, **changes: object) -> Finished | None:
    """Train as a night does: from the current adapter, on what is new; None where nothing is."""
    current = registry.get_current()
    start = None if current is None else str(current.adapter)
    try:
        *_, end = train(config(folder, only_new=True, from_adapter=start, **changes))
    except NothingNew:
        return None
    assert isinstance(end, Finished)
    return end


def chain() -> list[tuple[str, bool]]:
    """Return the SHA-256 of the tensors of every adapter in the ledger, in order, and if it was promoted."""
    return [(sha(entry.folder), entry.promoted) for entry in ledger.entries()]


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / peft_folder.WEIGHTS_FILE).read_bytes()).hexdigest()


def current_sha() -> str | None:
    current = registry.get_current()
    return None if current is None else sha(current.adapter)


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli, ["forget", *arguments], input=answer)


def carry_out(*names: str) -> list[tuple[str, Event]]:
    return list(forget(plan(names).job, threading.Event()))


def three_nights(folder: Path) -> None:
    """Three nights, with new notes before each."""
    for first in (12, 16):
        night(folder)
        write(folder, first, first + 4)
    night(folder)


@pytest.fixture
def never_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, bool]], str | None]:
    """Run three nights in a home of their own, over notes without the secret; return what came of them."""
    with monkeypatch.context() as patch:
        patch.setenv("EDGETUNE_HOME", str(tmp_path / "never"))
        write(tmp_path / "clean", 0, 12)
        three_nights(tmp_path / "clean")
        return chain(), current_sha()


def test_after_forgetting_every_adapter_is_that_of_a_folder_without_the_note(
    tmp_path: Path, never_saw: tuple[list[tuple[str, bool]], str | None]
) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    three_nights(notes)
    print(chain(), never_saw)
    assert len(chain()) == 3
    assert chain() != never_saw[0]
    (notes / "secret.md").unlink()  # a deleted note is found by its path
    events = carry_out(str(notes / "secret.md"))
    assert (chain(), current_sha()) == never_saw
    assert sum(isinstance(event, Finished) for _, event in events) == 3
    assert ForgetJob.load() is None
    left = [path for path in home().rglob("*") if path.is_file() and b"quince gin" in path.read_bytes()]
    assert left == []
    # What the next night gives is the same too.
    assert night(notes) is None
