"""`--texts` is accepted only for export forms that measure something on texts; others refuse it before any work."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import pytest
import tiny
from adapters import random_adapter
from click.testing import CliRunner

from edgetune import export_adapter
from edgetune.cli.main import cli
from edgetune.export import effect
from edgetune.export.job import Job, UserFile
from edgetune.export.targets import TARGETS, check_texts, load_target
from edgetune.library.base_models import resolve
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import DataError, UsageError

FORMS = [
    ("peft", "", None),
    ("mps", "nf4", None),
    *(("hf", weights, None) for weights in ("bf16", "fp16", "fp32", "nf4", "nf4-nearest")),
    *(("mlx", weights, None) for weights in ("", "bf16", "fp16", "int4")),
    *(("gguf", weights, None) for weights in ("", "f16", "bf16", "q8_0")),
    *(("ollama", weights, None) for weights in ("q8_0", "f16", "bf16", "none")),
    *(("coreml", weights, how) for weights in ("nf4", "int4", "fp16") for how in (None, "merged")),
    *(
        pytest.param("coreml", weights, how, marks=pytest.mark.slow)
        for weights in ("nf4", "int4", "fp16")
        for how in ("inputs", "functions")
    ),
    ("coreml", "none", None),
]
PACKAGES = {"gguf": "gguf", "ollama": "gguf", "coreml": "coremltools"}


class Noticing(Sequence[Sequence[int]]):
    """Texts that record whether anything read them."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts, self.were_read = texts, False

    @overload
    def __getitem__(self, place: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, place: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        self.were_read = True
        return self._texts[place]

    def __iter__(self) -> Iterator[Sequence[int]]:
        self.were_read = True
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a one-layer model whose rows are whole blocks, with the demo's tokenizer, and an adapter in `night` beside it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    demo = resolve("demo").path
    vocabulary = open_model(demo).config.vocab_size
    tiny.save_model(folder, intermediate_size=128, num_hidden_layers=1, vocab_size=vocabulary)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    peft_folder.save(random_adapter(open_model(folder).config), folder.parent / "night", str(folder))
    return folder


def is_refused(target: str, weights: str, adapter_as: str | None, check: bool) -> bool:
    try:
        check_texts(load_target(target), weights, adapter_as, check)
    except UsageError:
        return True
    return False


@pytest.mark.parametrize(("target", "weights", "adapter_as"), FORMS)
def test_texts_are_refused_where_they_would_not_be_read_and_only_there(
    target: str, weights: str, adapter_as: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target in PACKAGES:
        pytest.importorskip(PACKAGES[target])
    monkeypatch.setattr(effect, "TOKENS", 512)
    monkeypatch.setattr(effect, "DOCUMENT_TOKENS", 64)
    base = open_model(model)
    measured_by_reader = target == "gguf" and importlib.util.find_spec("llama_cpp")
    for check in (False, True) if measured_by_reader else (False,):
        texts = Noticing([[1, *range(3, 60)], [1, *range(60, 90)]])
        adapter = peft_folder.load(model.parent / "night")
        job = Job(base, "a base", adapter, weights, adapter_as, texts=texts, force=True, check=check)
        if load_target(target).needs_user_file(weights):
            job = replace(job, user_file=UserFile(tmp_path / "user.gguf", "user.gguf", "Q8_0", 1))
        folder = tmp_path / str(check)
        folder.mkdir()
        load_target(target).write(job, folder)
        assert is_refused(target, weights, adapter_as, check) is not texts.were_read


def test_every_form_of_every_target_was_tried() -> None:
    tried = {(form.values if hasattr(form, "values") else form) for form in FORMS}  # type: ignore[attr-defined]
    known = {
        (name, weights, how)
        for name in TARGETS
        for weights in load_target(name).weights
        for how in (None, *(load_target(name).adapter_as if weights != "none" else ()))
    }
    assert tried == known


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        (["peft"], "."),
        (["mps", "--weights", "nf4"], "."),
        (
            ["hf", "--weights", "bf16"],
            ", or type `edgetune export hf --weights nf4` or `edgetune export hf --weights nf4-nearest`.",
        ),
        (["gguf", "--no-verify"], ", or type `edgetune export gguf`."),
        (
            ["coreml", "--weights", "nf4", "--adapter-as", "inputs"],
            ", or type `edgetune export coreml --weights int4` or `edgetune export coreml --weights nf4 --adapter-as merged`.",
        ),
    ],
)
def test_the_refusal_says_what_to_type_before_anything_is_opened(typed: list[str], rest: str, tmp_path: Path) -> None:
    options = ["--texts", str(tmp_path / "nowhere"), "--model", str(tmp_path / "no-model"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, ["export", *typed, *options])
    assert isinstance(result.exception, UsageError)
    command = " ".join(["edgetune export", *typed])
    assert str(result.exception) == f"`{command}` measures nothing on --texts; leave --texts out{rest}"
    assert list(tmp_path.iterdir()) == []


def test_texts_of_a_token_each_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who names texts never gets figures that were measured on other texts."""
    (tmp_path / "a.txt").write_text("Whatever this says.")
    monkeypatch.setattr("edgetune.runtime.tokenizer.Tokenizer.prompt_ids", lambda tokenizer, text: [7])
    night, texts = str(model.parent / "night"), (str(tmp_path / "a.txt"),)
    with pytest.raises(DataError, match="No text in --texts is longer than one token"):
        export_adapter("hf", str(model), night, tmp_path / "out", "nf4", texts=texts, check=False)
    assert not (tmp_path / "out").exists()
