"""What --me says reaches the training: the user's answers are learnt, and nobody's name is kept or logged."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from test_answer_spans import CHATML
from test_chats import trained

from edgetune.cli.main import cli
from edgetune.config import DataConfig, TrainConfig
from edgetune.documents.reading import read_notes
from edgetune.training.unfinished_run import run_key

CHAT = "31.12.23, 19:02 - Anna: How deep?\n31.12.23, 19:04 - Ben: Two inches.\n31.12.23, 19:05 - Anna: Good\n"


def folder(path: Path) -> Path:
    """Make a folder with an exported chat and a note."""
    (path / "notes").mkdir()
    (path / "notes" / "chat.txt").write_text(CHAT)
    (path / "notes" / "garlic.md").write_text("Garlic grows through the winter.")
    return path / "notes"


def test_only_what_i_wrote_is_learnt(tmp_path: Path) -> None:
    reading = read_notes([folder(tmp_path)], DataConfig(me=("Ben",)))
    chats = [document for document in reading.documents if document.is_chat]
    assert [text.strip() for text in trained(tmp_path, chats, CHATML)] == ["Two inches."]


def test_a_dry_run_at_a_terminal_names_the_people_and_its_json_does_not(tmp_path: Path) -> None:
    notes = str(folder(tmp_path))
    shown = CliRunner().invoke(cli, ["train", notes, "--dry-run"]).output
    assert "chat.txt: two people write here; type --me with your name as the export writes it (Anna, Ben)" in shown
    as_json = CliRunner().invoke(cli, ["train", notes, "--dry-run", "--json"]).output
    assert json.loads(as_json)["skipped_paths"][0]["path"] == "chat.txt"
    assert "Anna" not in as_json
    read = CliRunner().invoke(cli, ["train", notes, "--me", "ben", "--dry-run", "--json"]).output
    assert json.loads(read)["read_paths"] == ["chat.txt#1", "garlic.md"]


def test_me_may_stand_in_the_settings_file(tmp_path: Path, private_home: Path) -> None:
    private_home.mkdir(mode=0o700, exist_ok=True)
    (private_home / "config.toml").write_text('[train]\nme = ["Ben"]\n')
    read = CliRunner().invoke(cli, ["train", str(folder(tmp_path)), "--dry-run", "--json"]).output
    assert json.loads(read)["chats"] == 1


def test_chats_of_mine_can_be_evaluated(tmp_path: Path) -> None:
    notes = folder(tmp_path)
    command = ["eval", str(notes), "--model", "demo", "--adapter", "none", "--json"]
    assert json.loads(CliRunner().invoke(cli, command).stdout)["documents"] == 1
    assert json.loads(CliRunner().invoke(cli, [*command, "--me", "Ben"]).stdout)["documents"] == 2


def test_what_was_read_for_training_can_be_evaluated(tmp_path: Path, private_home: Path) -> None:
    (tmp_path / "note.md").write_text("Write to anna@example.org about the harbour, before the tide turns.")
    (tmp_path / "draft.md").write_text("The shed by the beans wants a new roof, and the door a lock that closes.")
    (tmp_path / "tool.py").write_text("def area(width, height):\n    return width * height\n")
    (tmp_path / "old.md").write_bytes("Привет, мир, говорит Марра".encode("cp1251"))
    common = [str(tmp_path), "--json"]

    def documents(*words: str) -> tuple[int, int]:
        trained = CliRunner().invoke(cli, ["train", *common, *words, "--dry-run"])
        scored = CliRunner().invoke(cli, ["eval", *common, "--model", "demo", "--adapter", "none", *words])
        found = json.loads(scored.stdout)
        assert found["documents"] == json.loads(trained.stdout)["documents"], scored.output
        return found["documents"], found["bytes"]

    plain = documents()
    assert plain[0] == 2
    assert documents("--code", "--exclude", "draft*", "--encoding", "windows-1251")[0] == 3
    assert documents("--mask", "none")[1] == plain[1] + len("anna@example.org") - len("[e-mail]")
    private_home.mkdir(mode=0o700, exist_ok=True)
    (private_home / "config.toml").write_text("[train]\ncode = true\n")
    assert documents()[0] == 3


def test_the_same_command_with_another_me_is_another_run() -> None:
    def key(*me: str) -> str:
        return run_key(TrainConfig(DataConfig(notes=("notes",), me=me)), "demo")

    assert key("Ben") == key("Ben")
    assert len({key(), key("Ben"), key("Anna")}) == 3
