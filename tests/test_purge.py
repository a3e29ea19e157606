"""`edgetune purge` deletes everything of edgetune's, nothing of anybody else's, and says what it cannot reach."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli.main import cli
from edgetune.config import NightlyConfig
from edgetune.home import CONTENTS, home, keyed_digest, unfinished_folder
from edgetune.library.exports_made import exports_made, remember_export
from edgetune.library.purge import UNREACHABLE, planned_purge, purge
from edgetune.lock import Lock
from edgetune.nights.job import Job, nights_folder
from edgetune.runtime.errors import BusyError


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli, arguments, input=answer)


def fill() -> list[Path]:
    """Put one of everything that edgetune keeps into its folder; return the files."""
    keyed_digest("")  # makes the key
    base = home()
    files = [
        base / "config.toml", base / "current.json", base / "adapters" / ("a" * 12) / "night" / "adapter_config.json",
        base / "adapters" / ("a" * 12) / "current.json", base / "models" / "tiny-1b-0123456789ab" / "model.safetensors",
        base / "runs" / "2026-11-28-010000" / "report.html", base / "runs" / "2026-11-28-010000-2" / "report.html",
        base / "unfinished" / "0123456789abcdef" / "run.json", base / "unfinished" / "0123456789abcdef.lock",
        base / "unfinished" / "out-0123456789abcdef.lock", base / "unfinished" / "conversion.lock",
        base / "scratch" / "0123456789abcdef" / "ids.bin", base / ".current.json.x1.tmp",
        base / "private.txt", base / "parsed" / ("c" * 64) / ("d" * 64 + ".json"), base / "nights" / "night-2026-11-28.json",
        base / "nights" / "night-2026-11-28-010203-trial.json", base / "nights" / "notes.json",
        base / "nights" / "notes-tried.json", base / "nights" / "tonight.json", base / "nights" / "nights.lock",
        base / "nights" / "last.log", base / "nights" / ".notes.json.x1.tmp",
        base / "ledger" / "2026-11-28-010000.json", base / "ledger" / "2026-11-28-010000.notes", base / "ledger" / "forgetting",
        base / "forgotten.json", base / "training-log.jsonl", base / "unfinished" / "log.lock",
        base / "privacy-ledger" / "2026-11-28-010000.json",
    ]  # fmt: skip
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 100)
    remember_export(base.parent / "gone")
    return files


def test_everything_is_deleted_and_the_folder_with_it() -> None:
    folder = home()
    fill()
    done = run("purge", "--yes")
    assert done.exit_code == 0, done.output
    assert not folder.exists()
    assert "Deleted 31 entries" in done.stdout
    for sentence in UNREACHABLE:
        assert sentence in done.stdout


def test_every_entry_of_the_folder_is_known_to_the_purge() -> None:
    fill()
    not_filled = {"nightly.json", "encryption.json"}
    assert {Path(path).relative_to(home()).parts[0] for path in planned_purge().deleted} >= set(CONTENTS) - not_filled
    assert planned_purge().left == ()


def test_it_asks_first_and_no_is_the_default() -> None:
    files = fill()
    for answer in ("\n", "n\n", ""):
        refused = run("purge", answer=answer)
        assert refused.exit_code != 0
        assert all(file.exists() for file in files)
    assert "to delete without a question, type --yes" in str(run("purge", answer="").exception)
    assert "Delete all of it for good?" in run("purge", answer="n\n").stdout
    assert run("purge", answer="y\n").exit_code == 0
    assert not any(file.exists() for file in files)


def test_json_deletes_only_with_yes() -> None:
    files = fill()
    refused = run("purge", "--json")
    assert refused.exit_code == 2
    assert "type --yes as well" in refused.output
    assert all(file.exists() for file in files)
    record = json.loads(run("purge", "--yes", "--json").stdout)
    assert len(record["deleted"]) == 31
    assert 2600 < record["bytes"] < 3100
    assert record["unreachable"] == list(UNREACHABLE)
    assert (record["left"], record["links"], record["outside"]) == ([], [], [])


def test_what_edgetune_did_not_make_is_left_and_named() -> None:
    fill()
    others = [
        home() / "diary.txt", home() / "models" / "my-car" / "photo.jpg", home() / "runs" / "marathon.txt",
        home() / "adapters" / "usb-c" / "receipt.pdf", home() / "unfinished" / "novel.txt", home() / ".git" / "HEAD",
    ]  # fmt: skip
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    done = run("purge", "--yes")
    assert done.exit_code == 0, done.output
    assert all(file.read_text() == "mine" for file in others)
    for name in ("diary.txt", "my-car", "marathon.txt", "usb-c", "novel.txt", ".git"):
        assert name in done.stdout
    left = sorted(path for path in home().rglob("*") if path.is_file())
    assert left == sorted(others)


def test_a_folder_of_somebody_elses_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path))
    files = [tmp_path / "config.toml", tmp_path / "secret", tmp_path / "models" / "plane.stl", tmp_path / "runs" / "may.txt"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    done = run("purge", "--yes")
    assert "Nothing to delete." in done.stdout
    assert all(file.read_text() == "mine" for file in files)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    fill()
    target = tmp_path / "big-disk"
    (target / "tiny-1b-0123456789ab").mkdir(parents=True)
    (target / "tiny-1b-0123456789ab" / "model.safetensors").write_text("mine")
    (home() / "adapters" / ("b" * 12)).symlink_to(target)
    (home() / "runs" / "2026-11-28-010000" / "link").symlink_to(target)
    (home() / "models" / "linked-0123456789ab").symlink_to(target)
    record = json.loads(run("purge", "--yes", "--json").stdout)
    assert (target / "tiny-1b-0123456789ab" / "model.safetensors").read_text() == "mine"
    assert [Path(path).name for path in record["links"]] == ["b" * 12, "linked-0123456789ab"]


def test_installed_nights_are_uninstalled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill()
    taken: list[str] = []
    monkeypatch.setattr("edgetune.nights.schedulers.cron.Cron.uninstall", lambda self: taken.append("cron"))
    Job((str(tmp_path),), NightlyConfig(), "cron", 1.0).save()
    with Lock(nights_folder() / "nights.lock", "the nights of this user"), pytest.raises(BusyError):
        purge()
    assert (run("purge", "--yes").exit_code, taken) == (0, ["cron"])
    assert not home().exists() or not list(home().iterdir())
    fill()
    (home() / "nightly.json").write_text("{")
    assert "the nights that this system's scheduler still starts" in run("purge", "--yes").stdout


def test_it_is_refused_while_a_run_is_going() -> None:
    files = fill()
    with Lock(unfinished_folder() / "0123456789abcdef.lock", "this run"):
        with pytest.raises(BusyError, match=r"is already using edgetune's folder\. Wait until it ends, or end it\."):
            purge()
        refused = run("purge", "--yes")
        assert isinstance(refused.exception, BusyError)
    assert all(file.exists() for file in files)


def test_exports_and_adapters_elsewhere_are_named_if_they_are_there_still(tmp_path: Path) -> None:
    fill()
    for name in ("phone", "laptop"):
        (tmp_path / name).mkdir()
        remember_export(tmp_path / name)
    (tmp_path / "laptop").rmdir()
    record = json.loads(run("purge", "--yes", "--json").stdout)
    assert record["outside"] == [str(tmp_path / "phone")]
    assert (tmp_path / "phone").is_dir()


def test_the_list_of_exports_names_each_once_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "a"):
        remember_export(tmp_path / name)
    assert exports_made() == [str(tmp_path / "b"), str(tmp_path / "a")]
    monkeypatch.setattr("edgetune.library.exports_made.MOST_KEPT", 2)
    remember_export(tmp_path / "c")
    assert exports_made() == [str(tmp_path / "a"), str(tmp_path / "c")]
    (home() / "exports.json").write_text("{")
    assert exports_made() == []


def test_an_empty_home_has_nothing_to_delete() -> None:
    assert "Nothing to delete." in run("purge").stdout
