"""Each base model has a current adapter of its own; going back to the one before is instant, and none is lost by it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from edgetune.cli.main import cli
from edgetune.home import home
from edgetune.library import adapter_registry as registry
from edgetune.library import promotion
from edgetune.library.kept_adapters import ancestors, delete, describe, is_current, list_adapters
from edgetune.library.loading import open_base
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import AdapterError

FIRST, SECOND = "a" * 64, "b" * 64
"""Digests of two base models."""


def kept(base: str, name: str, **about: Any) -> Path:
    """Write an adapter for a base, as training would leave it; return its folder."""
    folder = registry.adapters_folder(base) / name
    tensors = {(0, "q_proj", "A"): torch.zeros(2, 4), (0, "q_proj", "B"): torch.zeros(4, 2)}
    adapter = Adapter(LoraConfig(2, 2.0, targets=("q_proj",)), tensors, {"base": base, **about})
    peft_folder.save(adapter, folder, f"model-{base[0]}")
    return folder


def make_current(base: str, name: str) -> Path:
    folder = kept(base, name)
    promotion.promote(folder, f"model-{base[0]}", base)
    return folder.resolve()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def current(base: str) -> str | None:
    found = registry.get_current(base)
    return None if found is None else found.adapter.name


def test_a_second_base_leaves_the_first_ones_adapter_current() -> None:
    one, two = make_current(FIRST, "one"), make_current(SECOND, "two")
    assert registry.find(None, FIRST) == one
    assert registry.find(None, SECOND) == two
    assert (is_current(one), is_current(two)) == (True, True)
    latest = registry.get_current()
    assert latest is not None
    assert (latest.base, latest.model) == (SECOND, "model-b")  # the default model is the one whose adapter came last
    make_current(FIRST, "three")
    assert (current(FIRST), current(SECOND)) == ("three", "two")
    assert registry.get_current() == registry.get_current(FIRST)


def test_another_base_with_the_same_first_digits_is_not_given_the_adapter() -> None:
    make_current(FIRST, "one")
    assert registry.get_current("a" * 12 + "c" * 52) is None


@pytest.mark.parametrize("base", ["", "../../etc", "A" * 64, "a" * 65, None])
def test_what_is_no_digest_has_no_current_adapter(base: str | None) -> None:
    assert registry.get_current(base) is None


def test_rollback_goes_back_step_by_step_and_at_last_to_the_bare_base() -> None:
    for name in ("one", "two", "three"):
        make_current(FIRST, name)
    gone_back = []
    for _ in range(3):
        was, now = promotion.rollback(FIRST)
        gone_back.append((was.adapter.name, None if now is None else now.adapter.name))
    assert gone_back == [("three", "two"), ("two", "one"), ("one", None)]
    assert registry.find(None, FIRST) is None
    assert len(list_adapters()) == 3  # all are kept
    with pytest.raises(AdapterError, match="No adapter is in use, so there is nothing to go back from"):
        promotion.rollback(FIRST)


def test_rollback_skips_adapters_that_were_deleted() -> None:
    folders = [make_current(FIRST, name) for name in ("one", "two", "three")]
    delete(folders[1])
    promotion.rollback(FIRST)
    assert current(FIRST) == "one"


def test_promoting_the_current_adapter_again_does_not_make_it_its_own_predecessor() -> None:
    make_current(FIRST, "one")
    two = make_current(FIRST, "two")
    promotion.promote(two, "model-a", FIRST)
    found = registry.get_current(FIRST)
    assert found is not None
    assert [path.name for path in found.earlier] == ["one"]
    promotion.rollback(FIRST)
    assert current(FIRST) == "one"


def test_rollback_of_one_base_leaves_the_other_as_it_is() -> None:
    for name in ("one", "two"):
        make_current(FIRST, name)
    make_current(SECOND, "three")
    promotion.rollback(FIRST)
    assert (current(FIRST), current(SECOND)) == ("one", "three")


def test_a_bounded_number_of_earlier_adapters_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOST_EARLIER", 3)
    for number in range(8):
        make_current(FIRST, f"night-{number}")
    found = registry.get_current(FIRST)
    assert found is not None
    assert [path.name for path in found.earlier] == ["night-4", "night-5", "night-6"]


def test_promotion_is_one_rename_and_a_crash_before_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_current(FIRST, "one")
    replaced: list[str] = []
    original: Callable[..., None] = os.replace

    def crashing(source: Any, destination: Any, **more: Any) -> None:
        replaced.append(str(destination))
        raise KeyboardInterrupt

    second = kept(FIRST, "two")
    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        promotion.promote(second, "model-a", FIRST)
    assert replaced == [str(registry.adapters_folder(FIRST) / registry.CURRENT)]
    assert current(FIRST) == "one"
    monkeypatch.setattr(os, "replace", original)
    promotion.promote(second, "model-a", FIRST)
    assert current(FIRST) == "two"


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", "[" * 100_000, '{"adapter": 3, "model": "m", "base": "x"}', '{"earlier": 5}']
)
def test_a_damaged_record_means_no_current_adapter(damage: str) -> None:
    make_current(FIRST, "one")
    (registry.adapters_folder(FIRST) / registry.CURRENT).write_text(damage)
    assert registry.get_current(FIRST) is None
    (home() / registry.CURRENT).write_text(damage)
    assert registry.get_current() is None
    make_current(FIRST, "two")
    assert current(FIRST) == "two"


def test_the_current_adapter_of_every_base_is_refused_when_it_is_to_be_deleted() -> None:
    one, two = make_current(FIRST, "one"), make_current(SECOND, "two")
    for folder in (one, two):
        with pytest.raises(AdapterError, match="`edgetune adapters rollback`"):
            delete(folder)
    promotion.rollback(FIRST)
    delete(one)
    assert [adapter.name for adapter in list_adapters()] == ["two"]


def test_the_rollback_command_acts_on_the_default_model_without_opening_it() -> None:
    make_current(FIRST, "one")
    make_current(FIRST, "two")
    done = run("adapters", "rollback", "--json")  # no model of this digest exists, so it cannot have been opened
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["name"], record["was"], record["model"]) == ("one", "two", "model-a")
    assert record["adapter"] == str(registry.adapters_folder(FIRST).resolve() / "one")
    said = run("adapters", "rollback").stdout
    assert said == "The bare base model is used again; base model model-a. The adapter one is kept.\n"


def test_the_list_shows_each_bases_name_and_its_current_adapter() -> None:
    kept(FIRST, "early")
    make_current(FIRST, "one")
    make_current(SECOND, "two")
    lines = run("adapters", "list").stdout.splitlines()
    assert [line[:8].split(":")[0].strip() for line in lines] == ["early", "* one", "* two"]
    assert "base model-a (aaaaaaaaaaaa)" in lines[1]
    assert "base model-b (bbbbbbbbbbbb)" in lines[2]
    listed = json.loads(run("adapters", "list", "--json").stdout)["adapters"]
    assert [(each["name"], each["base_name"], each["current"]) for each in listed] == [
        ("early", "model-a", False), ("one", "model-a", True), ("two", "model-b", True),
    ]  # fmt: skip
    assert set(listed[0]) == {field.name for field in dataclasses.fields(list_adapters()[0])}


def test_the_lineage_leads_back_to_the_first_adapter() -> None:
    kept(FIRST, "one", parent=None, verdict="first", reason="With no held-out notes there is too little to judge by.")
    kept(FIRST, "two", parent="one")
    three = kept(FIRST, "three", parent="two", compared_with="two", verdict="better", data="d" * 64, configuration="c" * 64)
    adapter = describe(three)
    assert [each.name for each in ancestors(adapter)] == ["two", "one"]
    assert (adapter.parent, adapter.compared_with, adapter.verdict) == ("two", "two", "better")
    assert (adapter.data, adapter.configuration) == ("d" * 64, "c" * 64)
    shutil.rmtree(registry.adapters_folder(FIRST) / "one")
    assert [each.name for each in ancestors(adapter)] == ["two"]


@pytest.mark.parametrize("parent", ["three", "../three", "/etc", "(outside)", ".", "x" * 5000, 7])
def test_a_hostile_parent_leads_nowhere(parent: object) -> None:
    assert ancestors(describe(kept(FIRST, "three", parent=parent))) == []


def test_a_circle_of_parents_ends() -> None:
    kept(FIRST, "one", parent="two")
    assert [each.name for each in ancestors(describe(kept(FIRST, "two", parent="one")))] == ["one"]


def test_an_adapter_of_another_base_is_said_to_be_that_ones() -> None:
    kept(FIRST, "one")
    refused = run("adapters", "show", "one", "--model", "demo")
    assert "an adapter of that name belongs to model-a: name that model with --model." in str(refused.exception)
    assert "type another name" in str(run("adapters", "show", "two", "--model", "demo").exception)


def test_an_adapters_judgement_is_shown_in_words() -> None:
    digest = open_base("demo")[1].digest
    kept(digest, "one", verdict="too few", reason="Judging takes more.")
    kept(digest, "two", verdict="not better", reason="It takes more bits.")
    said = run("adapters", "show", "one", "--model", "demo").stdout
    assert "  judged: too few held-out notes were read to judge it. Judging takes more.\n" in said
    said = run("adapters", "show", "two", "--model", "demo").stdout
    assert "  judged: the new one is no better on notes it had not seen. It takes more bits.\n" in said


def test_a_broken_link_in_an_adapters_folder_is_no_failure(tmp_path: Path) -> None:
    (kept(FIRST, "one") / "README.md").symlink_to(tmp_path / "gone")
    assert run("adapters", "list").exit_code == 0
