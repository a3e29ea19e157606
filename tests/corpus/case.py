"""Defines a case of the corpus: an input, the command that meets it, and the right answer.

A case builds its input in a Place, runs `edgetune` there in this process, and states the outcome: `refused` (one sentence and
exit code 1, or 2 for wrong usage) or `taken` (exit code 0, and the right value). An exception other than SystemExit fails it.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from adapters import random_adapter
from click.testing import CliRunner
from tiny import save_trainable

from edgetune.cli.main import cli, plain_failures
from edgetune.conversion.convert import convert
from edgetune.documents.reading import read_notes
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.tokenizer import Tokenizer

DROP = object()
"""Stands for "leave this key out" in the changes to a JSON file."""
PROMPT = "The beans grew tall"
"""The text that `generate` continues to compare two models or adapters."""


@dataclass
class Outcome:
    """What a command answered."""

    code: int
    out: str
    err: str
    answers: list[str]

    @property
    def json(self) -> Any:
        """Return the last line of output, parsed."""
        return json.loads(self.out.splitlines()[-1])

    def refused(self, *words: str) -> None:
        """Check for exit code 1 or 2 and one sentence that matches every regular expression in `words`."""
        assert self.code in (1, 2), f"exit code {self.code}, expected a refusal: {self.out[-500:]} {self.err[-500:]}"
        said = self.err.strip().splitlines()[-1] if self.err.strip() else ""
        assert re.match(r"edgetune: \S|Error: \S", said), f"no sentence on standard error: {self.err[-500:]!r}"
        assert len(said) < 3000, f"a sentence of {len(said)} characters"
        self._says(words, said)
        self.answers.append("refused")

    def taken(self, *words: str) -> Outcome:
        """Check for exit code 0 and output or notices that match every regular expression in `words`; return the outcome."""
        assert self.code == 0, f"exit code {self.code}: {self.err[-700:]}"
        self._says(words, self.out + self.err)
        self.answers.append("taken")
        return self

    def _says(self, words: tuple[str, ...], text: str) -> None:
        assert "Traceback (most recent call last)" not in self.out + self.err
        for word in words:
            assert re.search(word, text, re.IGNORECASE), f"{word!r} is not in {text[-700:]!r}"


@dataclass
class Place:
    """An empty folder in which a case builds its input and runs commands. `answers` collects the outcomes for the table."""

    folder: Path
    answers: list[str] = field(default_factory=list)

    # --- inputs -------------------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file below the folder, its parents included; text as UTF-8 with its line ends unchanged. Return its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self, name: str = "model", **changes: Any) -> Path:
        """Write a tiny LLaMA with some keys of its config.json changed, or left out (DROP)."""
        path = self.folder / name
        shutil.copytree(plain_model(), path)
        change_json(path / "config.json", changes)
        return path

    def adapter(self, name: str = "adapter", **changes: Any) -> Path:
        """Write a plain PEFT adapter for the tiny LLaMA with some keys of adapter_config.json changed, or left out (DROP)."""
        path = self.folder / name
        shutil.copytree(plain_adapter(), path)
        change_json(path / "adapter_config.json", changes)
        return path

    def notes(self, count: int = 12) -> Path:
        """Write a folder of ordinary notes."""
        for number in range(count):
            self.write(f"notes/{number:02}.md", f"# Day {number}\n\nThe beans grew {number} cm, the peas {number + 3}.\n" * 3)
        return self.folder / "notes"

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, *arguments: str | Path, input: str | None = None) -> Outcome:
        """Run a command line in this process, with the same handling of failures as `main`."""
        words = [str(argument) for argument in arguments]
        return self.answer_of(lambda: cli.main(words, prog_name="edgetune"), input)

    def answer_of(self, work: Callable[[], object], input: str | None = None) -> Outcome:
        """Do some work in this process, with the same handling of failures as `main`."""

        @click.command()
        def whole() -> None:
            with plain_failures():
                work()

        result = CliRunner().invoke(whole, [], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr, self.answers)

    def opened(self, model: Path, adapter: Path | str = "none") -> Outcome:
        """Run `generate` on a model and an adapter."""
        common = ("--max-tokens", "12", "--temperature", "0", "--json")
        return self.run("generate", "--model", model, "--adapter", adapter, *common, PROMPT)

    def opens_as_plain(self, model: Path) -> None:
        """Check that a model opens and writes what the tiny LLaMA without the change writes."""
        assert self.opened(model).taken().json["text"] == text_of()

    def converted(self, gguf: Path) -> Outcome:
        """Convert a GGUF model to the folder `converted`."""
        return self.answer_of(lambda: convert(gguf, self.folder / "converted", gguf.name, "fp32"))

    def writes_as(self, gguf: Path, text: str) -> None:
        """Check that a GGUF model can be converted, and then writes a text."""
        self.converted(gguf).taken()
        assert self.opened(self.folder / "converted").taken().json["text"] == text

    def opened_adapter(self, adapter: Path) -> str:
        """Check that an adapter opens, and return what the tiny LLaMA writes with it."""
        text = self.opened(plain_model(), adapter).taken().json["text"]
        assert isinstance(text, str)
        return text

    def imported(self, adapter: Path, model: Path | None = None) -> Outcome:
        """Run `adapters import` for the tiny LLaMA, or another model."""
        return self.run("adapters", "import", adapter, "--name", "it", "--model", model or plain_model(), "--json")

    def trained(self, notes: Path, *options: str, model: Path | None = None) -> Outcome:
        """Train two steps of the tiny LLaMA, or another model."""
        common = ("--steps", "2", "--seq-len", "64", "--batch-tokens", "64", "--json")
        return self.run("train", "--model", model or plain_model(), *common, *options, notes)

    def read(self, folder: str) -> dict[str, str]:
        """Read a folder of notes, count the case as taken, and return the text of every document by its path."""
        reading = read_notes([self.folder / folder])
        self.answers.append("taken")
        return {document.path: document.text for document in reading.documents}

    def tokenizer(self, folder: Path) -> Tokenizer:
        """Open a folder's tokenizer and count the case as taken."""
        opened = Tokenizer.load(folder)
        self.answers.append("taken")
        return opened


@dataclass(frozen=True)
class Case:
    """One input of the corpus. `check` builds it, runs the commands and states what is right."""

    kind: str
    name: str
    check: Callable[[Place], None]


CASES: list[Case] = []
"""All cases, in the order in which the modules of the corpus add them."""


def of_kind(kind: str) -> Callable[[str], Callable[[Callable[[Place], None]], None]]:
    """Return a decorator that adds cases of one kind; its argument is the case's name."""

    def named(name: str) -> Callable[[Callable[[Place], None]], None]:
        return lambda check: CASES.append(Case(kind, name, check))

    return named


def change_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of the JSON object in a file, or remove them (DROP)."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: item for name, item in value.items() if item is not DROP}))


@functools.cache
def plain_model() -> Path:
    """Return the folder of the tiny LLaMA that cases change copies of."""
    folder = Path(tempfile.mkdtemp(prefix="edgetune-corpus-")).resolve() / "plain"
    save_trainable(folder)
    return folder


@functools.cache
def plain_adapter() -> Path:
    """Return the folder of the tiny LLaMA's adapter that cases change copies of. It is large enough to change the text."""
    adapter = random_adapter(open_model(plain_model()).config, size=3.0)
    peft_folder.save(adapter, plain_model().parent / "adapter", "plain")
    return plain_model().parent / "adapter"


@functools.cache
def text_of(adapted: bool = False) -> str:
    """Return what the tiny LLaMA writes, bare or with its adapter."""
    text = Place(plain_model().parent).opened(plain_model(), plain_adapter() if adapted else "none").taken().json["text"]
    assert isinstance(text, str)
    return text


def remove_plain() -> None:
    """Delete the tiny LLaMA and its adapter."""
    if plain_model.cache_info().currsize:
        shutil.rmtree(plain_model().parent, ignore_errors=True)
    for cached in (plain_model, plain_adapter, text_of):
        cached.cache_clear()
