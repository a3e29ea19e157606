"""Every command uses the same model where none is named, and says which one and why."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from edgetune.cli.main import cli
from edgetune.config import TrainConfig
from edgetune.library import adapter_registry as registry
from edgetune.library.base_models import DEMO, DEMO_NOTICE, ModelChoice
from edgetune.library.loading import choose_model, open_base
from edgetune.library.promotion import promote
from edgetune.machine.forecast import forecast
from edgetune.runtime.errors import ModelError
from edgetune.runtime.quantize import quantize_folder
from edgetune.session import Session


@pytest.fixture
def hub(private_home: Path) -> Path:
    """Return the test's own Hugging Face cache."""
    return private_home.parent / "huggingface" / "hub"


def arrive(hub: Path, name: str = "Tiny/Llama", **shape: int) -> ModelChoice:
    """Put a small real model into the cache, as `hf download` does."""
    entry = hub / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("a" * 40)
    (entry / "snapshots").mkdir()
    tiny.save_trainable(entry / "snapshots" / ("a" * 40), **shape)
    return ModelChoice(entry / "snapshots" / ("a" * 40), name)


def make_current(model: str) -> Path:
    """Make an adapter of `model` the current one, without training it."""
    choice, base = open_base(model)
    folder = registry.adapters_folder(base.digest) / "night"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    promote(folder, choice.name, base.digest)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_after_a_rollback_to_the_bare_base_that_base_is_used_until_it_is_gone(hub: Path) -> None:
    arrive(hub)
    arrive(hub, "Tiny/Larger", inner=192)
    make_current("Tiny/Llama")
    assert "The bare base model is used again; base model Tiny/Llama." in run("adapters", "rollback").stdout
    chosen = choose_model()
    assert (chosen.name, chosen.why) == ("Tiny/Llama", "the one used last")
    shutil.rmtree(hub / "models--Tiny--Llama")
    assert choose_model().name == "Tiny/Larger"


def test_without_another_model_the_demo_is_used_and_the_reason_is_said() -> None:
    assert choose_model().why == "built in, since no other model is ready here"
    planned = run("plan", "--json")
    assert json.loads(planned.stdout)["model"] == DEMO
    # A busy machine takes long enough for lines of progress to follow.
    assert planned.stderr.splitlines()[:2] == [f"Model: demo ({choose_model().why}).", DEMO_NOTICE]


def test_the_best_model_is_used_and_the_reason_is_said(hub: Path) -> None:
    small = arrive(hub)
    assert choose_model() == small
    assert choose_model().why == "the only one that is ready, in your Hugging Face cache"
    large = arrive(hub, "Tiny/Larger", inner=192)
    assert choose_model() == large
    assert choose_model().why == "the largest of 2 that are ready, in your Hugging Face cache"


def test_a_real_model_that_arrives_replaces_yesterdays_demo_in_every_command(hub: Path, tmp_path: Path) -> None:
    make_current(DEMO)
    assert choose_model() == open_base(None)[0] == ModelChoice(open_base(DEMO)[0].path, DEMO)
    real = arrive(hub)
    assert choose_model() == real
    assert "the current adapter is the demo's: to use it, type --model demo" in choose_model().why
    assert forecast(TrainConfig()).model == real.name
    assert Session.load().model_name == real.name
    (tmp_path / "note.md").write_text("Marra watered the beans at the harbour allotment. " * 20)
    trained = run("train", str(tmp_path / "note.md"), "--steps", "1", "--seq-len", "64", "--batch-tokens", "64", "--json")
    assert json.loads(trained.stdout.splitlines()[0])["model"] == real.name
    assert trained.stderr.startswith(f"Model: {real.name} (the only one that is ready, in your Hugging Face cache; ")
    scored = run("eval", str(tmp_path / "note.md"))
    assert scored.stdout.startswith(f"Model {real.name} (the current adapter's), adapter ")


def test_of_two_bases_with_an_adapter_each_every_command_chooses_the_one_that_was_made_current_last(
    hub: Path, tmp_path: Path
) -> None:
    real = arrive(hub)
    make_current(real.name)
    make_current(DEMO)
    assert choose_model().name == DEMO
    promote(registry.adapters_folder(open_base(real.name)[1].digest) / "night", real.name, open_base(real.name)[1].digest)
    assert choose_model().name == open_base(None)[0].name == Session.load(adapter="none").model_name == real.name
    assert forecast(TrainConfig()).model == real.name
    assert registry.find(None, open_base(DEMO)[1].digest) is not None  # the demo's own adapter is still its current one


def test_every_command_says_in_its_first_line_which_model_it_uses(hub: Path, tmp_path: Path) -> None:
    real = arrive(hub)
    note, size = tmp_path / "note.md", ("--seq-len", "64", "--batch-tokens", "64")
    note.write_text("Marra watered the beans at the harbour allotment. " * 20)
    commands = {
        "train": ("train", str(note), "--steps", "1", *size, "--out", str(tmp_path / "out")),
        "plan": ("plan", str(note), "--steps", "1", *size),
        "generate": ("generate", "The", "--max-tokens", "1"),
        "eval": ("eval", str(note)),
        "export": ("export", "peft", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "export"), "--no-verify"),
    }
    for name, words in commands.items():
        done = run(*words)
        assert done.exit_code == 0, (name, done.output)
        lines = (done.stdout if name == "eval" else done.stderr).splitlines()
        first = next(line for line in lines if not re.match(r"[\w ]+: \d+ % after", line))  # a busy machine's progress
        assert re.match(rf"Model:? {re.escape(real.name)} \(", first), name


def test_a_demo_that_was_chosen_beside_a_real_model_stays(hub: Path) -> None:
    arrive(hub)
    make_current(DEMO)
    assert choose_model().name == DEMO
    assert choose_model().why == "the current adapter's"


def test_a_model_that_is_gone_is_one_sentence_about_the_current_adapter(hub: Path, tmp_path: Path) -> None:
    real = arrive(hub)
    make_current(real.name)
    hub.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"The base model of the current adapter, night, cannot be used: There is no model"):
        choose_model()
    assert choose_model(DEMO).name == DEMO


def test_a_name_that_leaves_the_machine_has_no_folders(tmp_path: Path) -> None:
    assert ModelChoice(tmp_path, str(tmp_path / "my-model")).public_name == "my-model"
    assert ModelChoice(tmp_path, "Tiny/Llama").public_name == "Tiny/Llama"
    tiny.save_trainable(tmp_path / "my-model")
    (tmp_path / "note.md").write_text("Marra watered the beans at the harbour allotment. " * 20)
    options = ("--model", str(tmp_path / "my-model"), "--out", str(tmp_path / "out"), "--steps", "1")
    trained = run("train", str(tmp_path / "note.md"), *options, "--seq-len", "64", "--batch-tokens", "64")
    assert trained.exit_code == 0, trained.output
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert '"base_model_name_or_path": "my-model"' in written
    assert not re.search(re.escape(str(tmp_path)), written)


def test_a_folder_that_is_written_does_not_tell_where_its_source_was_saved(tmp_path: Path) -> None:
    tiny.save_trainable(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/marra/models/mine"}))
    quantize_folder(tmp_path / "model", tmp_path / "out")
    assert "marra" not in (tmp_path / "out" / "config.json").read_text()


def test_a_mistyped_command_is_answered_with_the_one_meant() -> None:
    refused = run("nightli")
    assert refused.exit_code == 2
    assert "Did you mean 'nightly'?" in refused.output
    assert "Did you mean" not in run("xyzzy").output
