"""An adapter that was trained with another tokenizer, template or start token than its base's is used with a notice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from adapters import random_adapter
from click.testing import CliRunner, Result

import edgetune
from edgetune.cli.main import cli
from edgetune.library.adapter_notices import adapter_notices
from edgetune.library.own_tokenizer import differences_from_base
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.session import Session

DEMO = Path(edgetune.__file__).parent / "demo"
FILES = ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
NOTICE = "The adapter was trained with its own chat template and end-of-text token, and edgetune uses the base model's"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write an adapter of the demo as TRL does: with the base's tokenizer beside it."""
    peft_folder.save(random_adapter(open_model(DEMO).config), tmp_path / "trl", "demo")
    for name in FILES:
        shutil.copy(DEMO / name, tmp_path / "trl")
    return tmp_path / "trl"


def other_format(folder: Path) -> None:
    """Give an adapter folder a chat template and an end token of its own."""
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": {"content": "<unk>"}}))


def test_a_copy_of_the_bases_tokenizer_is_no_news(folder: Path) -> None:
    assert differences_from_base(folder, DEMO) == []
    assert Session.load("demo", str(folder), "cpu").notices == ()
    imported = run("adapters", "import", str(folder), "--model", "demo", "--json")
    assert json.loads(imported.stdout)["notices"] == []


def test_another_template_or_end_is_said_at_import_and_wherever_it_is_used(folder: Path) -> None:
    other_format(folder)
    assert differences_from_base(folder, DEMO) == ["chat template", "end-of-text token"]
    assert NOTICE in run("adapters", "import", str(folder), "--model", "demo", "--name", "copy").stderr
    for name in (str(folder), "copy"):
        assert NOTICE in Session.load("demo", name, "cpu").notices[0]
        assert NOTICE in run("generate", "hi", "--model", "demo", "--adapter", name, "--max-tokens", "1").stderr
    notes = folder.parent / "note.md"
    notes.write_text("Today Marra watered the beans behind the shed.\n")
    assert NOTICE in run("eval", str(notes), "--model", "demo", "--adapter", "copy").stderr
    trained = run("train", str(notes), "--model", "demo", "--from", "copy", "--steps", "1")
    assert NOTICE in trained.stdout
    out = folder.parent / "out"
    exported = edgetune.export_adapter("peft", "demo", "copy", out, check=False)
    assert any(NOTICE in notice for notice in exported.notices)


def test_another_vocabulary_is_said(folder: Path, tmp_path: Path) -> None:
    import tiny

    tiny.save_letters(tmp_path / "base")
    tiny.save_letters(folder)
    assert "vocabulary" not in differences_from_base(folder, tmp_path / "base")
    added = {"id": 31, "content": "<note>", "special": True}
    tiny.save_letters(folder, added_tokens=[added])
    assert "vocabulary" in differences_from_base(folder, tmp_path / "base")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_beside_an_adapter_is_no_obstacle(name: str, folder: Path) -> None:
    (folder / name).write_text("{")
    assert differences_from_base(folder, DEMO) == []


def test_an_adapter_trained_with_another_start_token_is_said() -> None:
    base, tokenizer = open_model(DEMO), Tokenizer.load(DEMO)
    adapter = random_adapter(base.config)
    for about, said in (
        ({}, False),
        ({"best_step": 3, "start_ids": tokenizer.start_ids}, False),
        ({"best_step": 3}, False),  # the demo began notes with <s> before there was a record, too
        ({"best_step": 3, "start_ids": [2]}, True),
        ({"best_step": 3, "start_ids": "x"}, True),
    ):
        notices = adapter_notices("none", replace(adapter, about=about), base, tokenizer)
        assert bool(notices) is said
        assert all("began with another token" in notice for notice in notices)
