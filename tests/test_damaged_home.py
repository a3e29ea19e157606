"""A home that is damaged, or of another version, costs one sentence and never a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from edgetune.cli.main import cli
from edgetune.config import NightlyConfig
from edgetune.events import EventLog, Finished, Started
from edgetune.home import home
from edgetune.library import adapter_registry as registry
from edgetune.library import promotion
from edgetune.library.exports_made import remember_export
from edgetune.library.loading import choose_model
from edgetune.nights.job import Job
from edgetune.nights.record import Kind, NightRecord, Outcome
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import EdgetuneError, ModelError

BASE = "a" * 64
"""Digest of a base model."""
STARTED = Started(
    run="r", model="demo", device="cpu", backend="cpu", plan={"steps": 3}, documents=7, heldout_documents=1, heldout_paths=(),
    tokens=900, trainable_parameters=5, parameters=50,
)  # fmt: skip
FINISHED = Finished(
    adapter="night", steps=3, tokens=1200, tokens_per_second=2000.0, heldout_bits_per_byte_before=1.7,
    heldout_bits_per_byte_after=1.6, peak_memory_bytes=10**8, device="cpu", seconds=61.5, report="report.html",
    decision={"verdict": "better", "reason": "It is so.", "first": False},
)  # fmt: skip
COMMANDS = {
    "current.json": ("adapters rollback", "adapters list"),
    "adapters/aaaaaaaaaaaa/current.json": ("adapters list --json", "adapters rollback", "report"),
    "adapters/aaaaaaaaaaaa/one/adapter_config.json": ("adapters list", "adapters list --json"),
    "adapters/aaaaaaaaaaaa/one/edgetune.json": ("adapters list", "adapters list --json"),
    "runs/2026-11-28-010000/events.jsonl": ("report", "report --json", "purge --yes --json"),
    "exports.json": ("purge --yes --json",),
    "nightly.json": ("nightly status", "nightly status --json", "nightly pause"),
    "nights/night-2026-11-28.json": ("nightly status", "nightly status --json"),
}
"""The files of a home, each with the commands that read it."""
WHOLE = (b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}", b'{"format": 99}', b"\0" * 5000)
"""Contents of a damaged file."""
VALUES: tuple[Any, ...] = (None, 5, -1, 1e308, True, "x", "y" * 5000, "\0", "\x1b[2J", [], [5], ["x"], {}, {"a": 5})
"""Values of the wrong type, or of no sense, for any key of a record."""


def fill() -> None:
    """Put one of every record into the home."""
    folder = registry.adapters_folder(BASE) / "one"
    tensors = {(0, "q_proj", "A"): torch.zeros(2, 4), (0, "q_proj", "B"): torch.zeros(4, 2)}
    about = {"base": BASE, "verdict": "better", "reason": "It is so.", "parent": "two", "heldout_bits_per_byte_before": 1.0}
    peft_folder.save(Adapter(LoraConfig(2, 2.0, targets=("q_proj",)), tensors, about), folder, "model-a")
    promotion.promote(folder, "model-a", BASE)
    with EventLog(home() / "runs" / "2026-11-28-010000" / "events.jsonl") as log:
        log.append(STARTED)
        log.append(dataclasses.replace(FINISHED, adapter=str(folder)))
    (home() / "runs" / "2026-11-28-010000" / "report.html").write_text("<html>")
    remember_export(home().parent / "export")
    Job(("/notes",), NightlyConfig(), "cron", 1000.0, {"lr": 0.001}).save()
    NightRecord("2026-11-28", Kind.NIGHT, 1000.0, 2000.0, outcome=Outcome.BETTER, new_notes=3, before=1.7, after=1.6).save()


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield a file's content with every kind of damage: the whole, and each key of each of its JSON lines."""
    yield from WHOLE
    yield content[: len(content) // 2]
    try:
        records = [json.loads(content)]
    except ValueError:
        records = [json.loads(line) for line in content.splitlines()]
    for number, record in enumerate(records):
        for position, key in enumerate(record):
            without = {name: value for name, value in record.items() if name != key}
            tried = [VALUES[(position + each) % len(VALUES)] for each in range(0, len(VALUES), 4)]
            for other in [without, *({**record, key: value} for value in tried)]:
                changed = [*records[:number], other, *records[number + 1 :]]
                yield "".join(json.dumps(each) + "\n" for each in changed).encode()


def snapshot() -> dict[Path, bytes]:
    """Return the content of every file of the home."""
    return {path: path.read_bytes() for path in home().rglob("*") if path.is_file()}


def restore(files: dict[Path, bytes]) -> None:
    """Write the files of a snapshot again."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("file", COMMANDS)
def test_a_damaged_file_is_one_sentence_or_nothing_at_all(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)  # no scheduler of this machine is asked
    fill()
    files = snapshot()
    for bad in damaged((home() / file).read_bytes()):
        for command in COMMANDS[file]:
            restore(files)
            (home() / file).write_bytes(bad)
            result = CliRunner().invoke(cli, command.split())
            shown = (command, bad[:300], result.output, result.exception)
            assert isinstance(result.exception, EdgetuneError | SystemExit | click.ClickException | None), shown
            if isinstance(result.exception, EdgetuneError):
                assert "\n" not in str(result.exception), shown
            if "--json" in command and result.exception is None:
                assert isinstance(json.loads(result.stdout), dict), shown
            assert "\x1b" not in result.output, shown


@pytest.mark.parametrize("file", ["current.json", "adapters/aaaaaaaaaaaa/current.json"])
def test_the_default_model_is_found_beside_a_damaged_record(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.library.loading.best_here", lambda: None)
    monkeypatch.setattr("edgetune.library.base_models.best_here", lambda: None)
    fill()
    files = snapshot()
    for bad in damaged((home() / file).read_bytes()):
        restore(files)
        (home() / file).write_bytes(bad)
        with contextlib.suppress(ModelError):  # the model of an intact record of an adapter in use is not on this machine
            assert choose_model(None).name == "demo"


def test_the_record_of_an_earlier_version_means_no_current_adapter(tmp_path: Path) -> None:
    """Its current.json held the adapter of all bases; the adapter itself is listed, and can be made current."""
    fill()
    (home() / "adapters" / "aaaaaaaaaaaa" / "current.json").unlink()
    adapter = home() / "adapters" / "aaaaaaaaaaaa" / "one"
    (home() / "current.json").write_text(json.dumps({"adapter": str(adapter), "model": "model-a", "base": BASE}))
    assert registry.get_current() is None
    assert "one" in CliRunner().invoke(cli, ["adapters", "list"]).stdout
