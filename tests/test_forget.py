"""`edgetune forget`: what is left is byte for byte what there would be if the note had never been there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
from edgetune.library import ledger, privacy_ledger, training_log
from edgetune.library.exports_made import remember_export
from edgetune.runtime import peft_folder
from edgetune.runtime.errors import BusyError, UsageError
from edgetune.training.train import train

PLANTS = ["beans", "leeks", "chard", "kale", "peas", "onions", "garlic", "radishes"]
SECRET = "The quince gin is hidden behind the third flowerpot, and nobody but Marra may know about it."


def write(folder: Path, first: int, last: int) -> None:
    """Write short notes, enough of them for some to be held out."""
    folder.mkdir(exist_ok=True)
    for number in range(first, last):
        plant, other = PLANTS[number % 8], PLANTS[(number * 3 + 1) % 8]
        text = f"Today Marra watered the {plant} behind the shed. The {other} want netting, {number} rows of them."
        (folder / f"{number:02}.md").write_text(f"# Log {number}\n\n{text}\n")


def config(folder: Path, **changes: object) -> TrainConfig:
    data = DataConfig(notes=(str(folder),), seq_len=32, batch_tokens=64)
    chosen = {"data": data, "model": str(folder.parent / "model"), "steps": 4, "rank": 4, "lr": 0.02, **changes}
    return TrainConfig(**chosen)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def easy_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a tiny model, hold out a note in five, and let the gate judge by so few, so that some nights are promoted."""
    tiny.save_trainable(tmp_path / "model")
    for name, value in (
        ("gate.FEWEST_NOTES", 2),
        ("gate.FEWEST_BYTES", 100),
        ("gate.CHANCE", 0.4),
        ("gate.GENERAL_BOUND", 9.0),
    ):
        monkeypatch.setattr(f"edgetune.library.{name}", value)
    for name, value in (("ONE_IN", 5), ("LARGEST_SHARE", 0.5)):
        monkeypatch.setattr(f"edgetune.documents.heldout.{name}", value)
    monkeypatch.setattr("edgetune.training.sample_writer.SAMPLE_TOKENS", 2)


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


def test_a_stopped_or_killed_forgetting_goes_on_and_a_cut_is_repeated_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nights(folder: Path) -> None:
        """Two runs; a deadline ends the first one after a step."""
        with monkeypatch.context() as patch:
            patch.setattr("edgetune.training.deadline.Deadline.has_passed", lambda self: True)
            *_, first = train(config(folder))
        assert isinstance(first, Finished)
        assert (first.steps, first.cut) == (1, "deadline")
        write(folder, 12, 14)
        night(folder)

    with monkeypatch.context() as patch:
        patch.setenv("EDGETUNE_HOME", str(tmp_path / "never"))
        write(tmp_path / "clean", 0, 12)
        nights(tmp_path / "clean")
        never_saw = chain(), current_sha()
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    nights(notes)
    stop, events = threading.Event(), list[Event]()
    for _, event in forget(plan([str(notes / "secret.md")]).job, stop):
        events.append(event)
        if isinstance(event, Stepped) and len([each for each in events if isinstance(each, Started)]) == 2:
            stop.set()
    assert isinstance(events[-1], Interrupted)
    job = ForgetJob.load()
    assert job is not None
    assert [len(base.runs) for base in job.bases] == [1]
    killed = forget(job, threading.Event())
    while not isinstance(next(killed)[1], Stepped):
        pass
    killed.close()
    job = ForgetJob.load()
    assert job is not None
    *_, (_, last) = forget(job, threading.Event())
    assert isinstance(last, Finished)
    assert (chain(), current_sha()) == never_saw
    assert ForgetJob.load() is None


def test_the_command_says_what_it_costs_and_keeps_the_note_out(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    (notes / "copy of it.txt").write_text(f"{SECRET}\n")  # the same words
    before = night(notes)
    assert before is not None
    export = tmp_path / "phone"
    export.mkdir()
    base = registry.default_base()
    assert base is not None
    remember_export(export, f"{base[:12]}/{Path(before.adapter).name}")
    refused = run(str(notes / "secret.md"), answer="n\n")
    assert refused.exit_code == 1
    deleted, bare = "Deleted at once: 1 adapter that saw it", "the bare base model takes its place"
    said = ("To forget 2 notes:", "copy of it.txt", deleted, bare, str(export))
    for words in said:
        assert words in refused.stdout, refused.stdout
    assert current_sha() is not None
    assert "No adapter here has learnt" in str(run("--yes", "nothing.md").exception)
    done = run("--yes", str(notes / "secret.md"))
    assert done.exit_code == 0, done.output
    assert "Forgotten. 1 run repeated" in done.stdout
    left = read_notes([str(notes)])
    assert sorted(skip.path for skip in left.skipped) == ["copy of it.txt", "secret.md"]
    assert left.skipped_counts() == {"forgotten (edgetune forget)": 2}
    log = CliRunner().invoke(cli, ["adapters", "log", "--json"])
    assert [line["event"] for line in json.loads(log.stdout)["lines"]] == [
        "trained", "promoted", "rolled back", "forgot", "trained", "promoted",
    ]  # fmt: skip
    assert "secret" not in training_log.path_of_log().read_text()
    assert run("--undo", str(notes / "secret.md")).exit_code == 0
    assert read_notes([str(notes)]).skipped_counts() == {"same text as another note": 1}


def test_a_deleted_note_leaves_the_next_run_which_offers_to_forget_it(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    night(notes)
    (notes / "secret.md").unlink()
    (notes / "00.md").rename(notes / "renamed.md")
    write(notes, 12, 14)
    current = registry.get_current()
    assert current is not None
    started, *_ = train(config(notes, only_new=True, from_adapter=str(current.adapter)))
    assert isinstance(started, Started)
    sentence = "1 note that the adapter has learnt is gone or excluded, and not trained again."
    assert any(notice.startswith(sentence) and "edgetune forget --gone" in notice for notice in started.notices)
    last = ledger.entries()[-1]
    assert "secret.md" not in {note.path for note in last.notes}
    assert plan([], gone=True).notes == ("secret.md",)
    notes.rename(tmp_path / "unmounted")
    with pytest.raises(UsageError, match="nothing to forget"):
        plan([], gone=True)


def test_held_out_notes_and_adapters_beyond_the_ledger(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    night(notes)
    (entry,) = ledger.entries()
    held_out = next(note for note in entry.notes if note.side is ledger.Side.HELD_OUT)
    planned = plan([held_out.file])
    assert planned.held_out
    assert planned.repeats == 1
    trained = next(note for note in entry.notes if note.side is ledger.Side.TRAINED)
    assert not plan([trained.file]).held_out
    # Without a record, an adapter's own marks tell that it learnt the note. It cannot be repeated.
    for path in (home() / "ledger").iterdir():
        path.unlink()
    planned = plan([trained.file])
    assert (len(planned.adapters), planned.repeats, planned.clean) == (1, 0, (None,))
    assert list(forget(planned.job, threading.Event())) == []
    assert registry.get_current() is None
    assert not (registry.adapters_folder(entry.base) / planned.adapters[0]).exists()


def test_nothing_is_deleted_while_a_run_is_going(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    *_, end = train(config(notes, steps=1))
    assert isinstance(end, Finished)
    going = train(config(notes, steps=2))
    next(going)
    with pytest.raises(BusyError):
        list(forget(plan([str(notes / "03.md")]).job, threading.Event()))
    assert Path(end.adapter).is_dir()
    assert ForgetJob.load() is None
    going.close()


def test_a_night_between_the_plan_and_the_deletion_is_repeated_too(
    tmp_path: Path, never_saw: tuple[list[tuple[str, bool]], str | None]
) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    night(notes)
    plan([str(notes / "secret.md")]).job.save()  # and killed
    for first in (12, 16):
        write(notes, first, first + 4)
        night(notes)
    job = ForgetJob.load()
    assert job is not None
    assert len(list(forget(job, threading.Event()))) > 0
    assert (chain(), current_sha()) == never_saw


def test_what_cannot_be_deleted_is_said_and_the_command_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    before = night(notes)
    assert before is not None
    unlink = os.unlink

    def refuse(path: str, **about: int) -> None:
        if path == peft_folder.WEIGHTS_FILE:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        unlink(path, **about)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(
            UsageError, match=r"cannot be deleted \(Operation not permitted\), so the note is not forgotten yet"
        ):
            carry_out(str(notes / "secret.md"))
    job = ForgetJob.load()
    assert job is not None
    assert not job.erased
    (_, *_, (_, last)) = forget(job, threading.Event())
    assert isinstance(last, Finished)
    assert "secret.md" not in {note.path for entry in ledger.entries() for note in entry.notes}


def test_a_private_run_is_repeated_with_new_noise_which_the_command_says(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    write(notes, 0, 12)
    (notes / "secret.md").write_text(SECRET)
    *_, before = train(config(notes, private="8"))
    assert isinstance(before, Finished)
    [spent], old = privacy_ledger.entries(), sha(Path(before.adapter))
    done = run("--yes", str(notes / "secret.md"))
    assert done.exit_code == 0, done.output
    assert "A private run draws new noise" in done.stdout
    assert sha(Path(before.adapter)) != old
    [after] = privacy_ledger.entries()
    assert (after.run, after.documents) == (spent.run, spent.documents - 1)
