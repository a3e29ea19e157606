"""`edgetune export` deletes nobody else's file, exports no path of this machine, and stops cleanly on Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from adapters import random_adapter
from click.testing import CliRunner
from tiny import save_trainable

from edgetune import export_adapter
from edgetune.cli.main import cli
from edgetune.conversion.origin import Origin
from edgetune.events import Event, Working
from edgetune.export import effect
from edgetune.export.job import Job
from edgetune.export.memory import check_memory
from edgetune.export.targets import TARGETS, load_target
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import ResourceError, UsageError


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, str]:
    """Save a model and an adapter for it; return their paths."""
    save_trainable(tmp_path / "somebodys-model")
    base = open_model(tmp_path / "somebodys-model")
    peft_folder.save(random_adapter(base.config), tmp_path / "night", str(base.folder))
    return str(base.folder), str(tmp_path / "night")


def test_an_export_is_replaced_by_the_next_but_nobody_elses_file(tmp_path: Path, made: tuple[str, str]) -> None:
    out = tmp_path / "out"
    export_adapter("peft", *made, out, check=False)
    export_adapter("peft", *made, out, check=False)
    assert set(json.loads((out / "golden.json").read_text())["files"]) == {path.name for path in out.iterdir()} - {
        "golden.json"
    }
    (out / "my-notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"contains my-notes.txt, which is not part of an export to peft"):
        export_adapter("peft", *made, out, check=False)
    with pytest.raises(UsageError, match=r"is not an export to mps|contains"):
        export_adapter("mps", *made, out, check=False)
    assert (out / "my-notes.txt").read_text() == "mine"


def read_only(**options: object) -> str:
    """Fail as mkdtemp does on a read-only disk; tests run as root would ignore a folder's permissions."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(options["dir"]))


def test_odd_places_are_refused_in_a_sentence(tmp_path: Path, made: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (".", "..", str(tmp_path)):
        with pytest.raises(UsageError, match="is the current folder or contains it"):
            export_adapter("peft", *made, place, check=False)
    with pytest.raises(UsageError, match="looks like a file name"):
        export_adapter("gguf", *made, "model.gguf", check=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be created"):
        export_adapter("peft", *made, tmp_path / "file" / "out", check=False)
    with pytest.raises(UsageError, match="no --adapter-as merged"):
        export_adapter("peft", *made, "out", adapter_as="merged", check=False)
    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(UsageError, match=r"cannot be created \(Read-only file system\)"):
        export_adapter("peft", *made, "out", check=False)
    assert list((tmp_path / "here" / "below").iterdir()) == []


FORMS = [
    ("peft", None),
    ("mps", None),
    ("mlx", None),
    ("mlx", "fp16"),
    ("hf", "bf16"),
    ("gguf", None),
    ("gguf", "f16"),
    ("ollama", "f16"),
]
FORMS += [("coreml", "none"), ("coreml", "fp16")]
NEEDS = {"gguf": "gguf", "ollama": "gguf", "coreml": "coremltools"}


@pytest.mark.parametrize(("target", "weights"), FORMS)
def test_no_path_of_this_machine_travels(target: str, weights: str | None, tmp_path: Path, made: tuple[str, str]) -> None:
    """The model's own files name its folder, as transformers writes it, and the GGUF file that it came from.

    Every byte of the export is searched.
    """
    if target in NEEDS:
        pytest.importorskip(NEEDS[target])
    for name in ("config.json", "tokenizer_config.json"):
        file, more = Path(made[0]) / name, {"tokenizer_file": f"{made[0]}/tokenizer.json"} if "tokenizer" in name else {}
        file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": made[0], "name_or_path": made[0], **more}))
    Origin(str(tmp_path / "m.gguf"), str(tmp_path / "m.gguf"), "Q4_1", 1, 1, "0" * 64).write(Path(made[0]))
    export_adapter(target, *made, tmp_path / "out", weights=weights, check=False)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 1
    places = (tmp_path, Path.home(), Path(__file__).parent.parent, tempfile.gettempdir())
    for file in files:
        assert [place for place in places if os.fsencode(place) in file.read_bytes()] == [], file.name


def test_too_little_memory_for_any_export_is_refused(tmp_path: Path, made: tuple[str, str]) -> None:
    with pytest.raises(ResourceError, match=r"type --memory \d+MB or more"):
        export_adapter("peft", *made, tmp_path / "out", memory=100_000_000, check=False)
    base = open_model(Path(made[0]))
    check_memory(load_target("peft").peak_memory, Job(base, "model", peft_folder.load(Path(made[1])), memory=400_000_000))


STAGES = ("sampling", "laying out", "writing", "comparing", "measuring", "proving")
STAGES_OF = {
    "peft": ("measuring",),
    "mps": ("writing", "measuring", "proving"),
    "hf": ("writing", "measuring"),
    "hf nf4": ("sampling", "writing", "measuring", "measuring"),
    "mlx": ("measuring",),
    "gguf f16": ("writing", "measuring"),
    "coreml fp16": ("laying out", "writing", "comparing", "measuring", "proving"),
}
PACKAGES = {"gguf": "gguf", "coreml": "coremltools"}


@pytest.mark.parametrize("form", STAGES_OF)
def test_each_stage_is_told_of_at_its_beginning_and_its_end(
    tmp_path: Path, made: tuple[str, str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _, weights = form.partition(" ")
    if target in PACKAGES:
        pytest.importorskip(PACKAGES[target])
    events: list[Event] = []
    proved = "proving" in STAGES_OF[form]
    # To save time, two texts calibrate the rounding and one measures it, instead of 16 and 8.
    monkeypatch.setattr(effect, "TOKENS", 512)
    export_adapter(target, *made, tmp_path / "out", weights or None, check=proved, force=True, show=events.append)
    stages: list[tuple[str, list[int], int]] = []
    for event in events:
        assert isinstance(event, Working)
        if event.done == 0:
            stages.append((event.stage, [], event.total))
        stage, counted, total = stages[-1]
        assert (event.stage, event.total) == (stage, total)
        counted.append(event.done)
    assert tuple(stage for stage, _, _ in stages) == STAGES_OF[form]
    for _, counted, total in stages:
        assert counted[-1] == total
        assert counted == sorted(set(counted))
    order = [STAGES.index(stage) for stage, _, _ in stages]
    assert order == sorted(order)


def test_the_events_page_names_every_stage_in_order() -> None:
    lines = [line.strip() for line in (Working.__doc__ or "").splitlines()]
    named = [stage for line in lines for stage in STAGES if line.startswith(f"{stage}  ")]
    assert tuple(named) == STAGES


def test_golden_says_whose_arithmetic_its_bounds_are_for(tmp_path: Path, made: tuple[str, str]) -> None:
    for target, said in (("peft", "peft in fp32"), ("mps", "edgetune on the CPU")):
        result = export_adapter(target, *made, tmp_path / target, check=False)
        assert json.loads((tmp_path / target / "golden.json").read_text())["bounds_for"] == result.proved_by == said


def test_the_help_has_every_form_of_the_weights() -> None:
    command = cli.get_command(click.Context(cli), "export")
    assert command is not None
    (option,) = [option for option in command.params if option.name == "weights"]
    assert isinstance(option, click.Option)
    said = " ".join((option.help or "").split())
    specs = {name: load_target(name) for name in TARGETS}
    forms = {name: ", ".join(filter(None, spec.weights)) for name, spec in specs.items()}
    assert said.startswith(
        "Number format of the weights. " + "; ".join(f"{name}: {known}" for name, known in forms.items() if known)
    )
    alone = [name for name, spec in specs.items() if not spec.weights[0]]
    assert said.endswith(f"the adapter alone for {', '.join(alone[:-1])} and {alone[-1]}.")


def test_a_count_is_shown_whole_a_share_in_percent_and_all_else_in_three_digits(
    tmp_path: Path, made: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_target("peft")
    facts = (("numbers_compared", 15_800_000.0), ("effect_kept", 0.98765), ("kl", 0.0123456))
    changed = replace(spec, write=lambda job, folder: replace(spec.write(job, folder), facts=facts))
    monkeypatch.setattr("edgetune.export.peft.SPEC", changed)
    options = ["--model", made[0], "--adapter", made[1], "--out", str(tmp_path / "out"), "--no-verify"]
    result = CliRunner().invoke(cli, ["export", "peft", *options])
    assert result.stdout.splitlines()[1:4] == ["numbers compared: 15,800,000", "effect kept: 99%", "kl: 0.0123"]


def test_model_and_adapter_are_named_first(tmp_path: Path, made: tuple[str, str]) -> None:
    options = ["--model", made[0], "--adapter", made[1], "--out", str(tmp_path / "out"), "--no-verify"]
    result = CliRunner().invoke(cli, ["export", "peft", *options])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == f"Model {made[0]}, adapter night."
    assert "can be extracted from this export" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("sent", "code", "said"), [(signal.SIGINT, 130, "edgetune: interrupted."), (signal.SIGTERM, 143, "")])
def test_ctrl_c_and_sigterm_leave_nothing(tmp_path: Path, made: tuple[str, str], sent: int, code: int, said: str) -> None:
    options = ["--model", made[0], "--adapter", made[1], "--out", str(tmp_path / "out"), "--no-verify"]
    slow = (
        "import edgetune.export.peft as t, dataclasses, time; "
        "t.SPEC = dataclasses.replace(t.SPEC, write=lambda *_: (print('begun', flush=True), time.sleep(60)))"
    )
    script = (
        f"{slow}; from edgetune.cli.main import main; import sys; sys.argv = {['edgetune', 'export', 'peft', *options]}; main()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        time.sleep(0.1)
        running.send_signal(sent)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == code
    assert said in errors
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
