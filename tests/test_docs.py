"""The documentation is true: links lead somewhere, named files exist, and the commands shown are ones that edgetune has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import edgetune
from edgetune.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md")])
QUICK = {"generate", "eval", "models", "adapters"}
"""Commands that the test runs as shown, if they need only the built-in model and the example notes."""


def blocks(page: Path, language: str = "") -> Iterator[str]:
    """Yield the fenced blocks of a page that are in a language ("" for blocks without one)."""
    for opening, body in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        if opening == language:
            yield body


def shown_commands() -> list[tuple[str, list[str]]]:
    """Return (page, words after `edgetune`) for every command line in the documentation, without comments."""
    found = []
    for page in PAGES:
        for line in "\n".join(blocks(page)).splitlines():
            match = re.match(r"(?:\S+=\S+ )*(?:torchrun .*-m )?edgetune ([a-z].*)", line)
            words = shlex.split(match[1], comments=True) if match is not None and ":" not in match[1].split()[0] else []
            if words:
                found.append((page.name, words))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    dead = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert dead == []


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme] == []


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {
        path.name for floor in ("edgetune", "export", "runtime", "tests", "examples") for path in (ROOT / floor).rglob("*")
    }
    named = set(re.findall(r"\b\w+\.(?:py|inl|cpp|h|metal)\b", text))
    assert len(named) > 90
    assert named - files == set()


def test_the_architecture_names_every_module_of_the_product() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "edgetune").rglob("*.py") if path.parent.name not in ("cli", "demo")}
    assert {name for name in modules if name not in text} == {"__main__.py"}


def test_the_commands_shown_are_commands_with_these_options() -> None:
    commands = shown_commands()
    assert len(commands) > 15
    for page, words in commands:
        command, context = cli.get_command(click.Context(cli), words[0]), click.Context(cli)
        assert command is not None, f"{page} shows edgetune {words[0]}"
        if isinstance(command, click.Group):
            command = command.get_command(context, words[1])
            assert command is not None, f"{page} shows edgetune {' '.join(words[:2])}"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
        assert unknown == [], f"{page} shows edgetune {' '.join(words)}"


@pytest.mark.parametrize(
    "words",
    [
        words
        for page, words in shown_commands()
        if page == "README.md" and words[0] in QUICK and "rollback" not in words  # there is nothing to go back from
    ],
)
def test_the_readmes_quick_commands_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    outcome = CliRunner().invoke(cli, words)
    assert outcome.exit_code == 0, outcome.output


def test_the_readmes_python_runs(private_home: Path) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    code = code.replace("max_tokens=60", "max_tokens=6")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip()


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "edgetune._version.__version__"}
    sources = [path for floor in ("edgetune", "export", "runtime") for path in (ROOT / floor).rglob("*.py")]
    holders = [path.relative_to(ROOT).as_posix() for path in sources if f'"{edgetune.__version__}"' in path.read_text("utf-8")]
    assert holders == ["edgetune/_version.py"]


def test_the_constraints_pin_every_dependency() -> None:
    """README's commands install what the tests ran with; triton comes with torch, and llama.cpp is compiled."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"], *extras["documents"]]
    wanted = {re.split(r"[\[><=; ]", name)[0].lower() for name in needed} - {"triton", "edgetune"}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert wanted - pinned == set()
    assert not any("<" in name.partition(";")[0] for name in project["dependencies"]), "the package itself has no upper bounds"


def test_every_promise_of_security_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^- .*(?:\n  .*)*", text, re.M)
    assert len(promises) > 25
    assert [promise for promise in promises if not re.search(r"`(?:\w+/)?test_\w+\.py::test_\w+`", promise)] == []
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", text))
    functions = {
        (file, name)
        for file in {file for file, _ in named}
        for name in re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M)
    }
    assert named - functions == set()
