"""The command line keeps its contract: names, JSON keys, exit codes, and a one-sentence error for every mistake."""

from __future__ import annotations

import ast
import dataclasses
import errno
import functools
import importlib.util
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import edgetune.cli.options
import edgetune.cli.train
from edgetune.cli.main import COMMANDS, cli, plain_failures
from edgetune.cli.train import train_command
from edgetune.config import DataConfig, GenerateConfig, TrainConfig
from edgetune.config_file import train_config
from edgetune.exporting import export_adapter
from edgetune.parsing import parse_bytes, seconds_until
from edgetune.runtime import ops
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import EdgetuneError, SettingError, UsageError
from edgetune.session import Session
from edgetune.settings import Kind, Names, Number, Switch, Texts, Whole, as_toml, settings_of

TRAIN_KEYS = {
    "adapter", "steps", "tokens", "tokens_per_second", "heldout_bits_per_byte_before", "heldout_bits_per_byte_after",
    "peak_memory_bytes", "device", "seconds",
}  # fmt: skip
EVAL_KEYS = {"bits_per_byte", "perplexity", "tokens", "bytes", "documents"}
GENERATE_KEYS = {"text", "prompt_tokens", "tokens", "tokens_per_second"}
BENCH_KEYS = {
    "gemm_gflops", "read_gb_per_second", "train_tokens_per_second", "train_gemm_share", "prefill_tokens_per_second",
    "decode_tokens_per_second", "decode_bandwidth_share", "peak_memory_bytes",
}  # fmt: skip


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Return the last line of output, parsed: a command's answer or a run's last event."""
        return json.loads(self.out.splitlines()[-1])


def run(*arguments: str, input: str | None = None) -> Outcome:
    """Run the command line in this process, with the same handling of failures as main()."""

    @click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def whole(words: tuple[str, ...]) -> None:
        with plain_failures():
            cli.main(list(words), prog_name="edgetune", standalone_mode=False)

    result = CliRunner().invoke(whole, list(arguments), input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number:02}.md").write_text(
            f"# Day {number}\n\nMarra watered the beans at the harbour allotment, day {number}.\n" * 3
        )
    return folder


def test_a_place_that_cannot_be_written_is_a_sentence_before_any_step(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, dir: Path, **options: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    outcome = run("train", "--model", "demo", "--steps", "1", "--out", str(tmp_path / "out"), str(notes))
    assert outcome.code == 1
    assert f"{tmp_path / 'out'} cannot be created (Permission denied)" in outcome.err
    assert "step" not in outcome.out


def test_a_file_that_is_not_ours_to_use_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, plain_failures():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere/adapters")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("edgetune: No permission to use /somewhere/adapters (Permission denied). ")
    # Any other OSError may be a bug, so it is not turned into a plain message.
    with pytest.raises(OSError, match="Input/output"), plain_failures():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_data_folder_that_cannot_be_written_names_its_variable(
    capsys: pytest.CaptureFixture[str], private_home: Path
) -> None:
    place = str(private_home / "adapters")
    with pytest.raises(SystemExit), plain_failures():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), place)
    assert capsys.readouterr().err == (
        f"edgetune: No permission to use {place} (Read-only file system). Set EDGETUNE_HOME to a folder that you can write.\n"
    )


def test_every_command_has_help_and_json() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for doing in command.commands.values() if isinstance(command, click.Group) else [command]:
            assert any("--json" in parameter.opts for parameter in doing.params), doing.name
        assert run(name, "--help").code == 0


def test_the_contracts_flags_are_there() -> None:
    flags = {option for parameter in train_command.params for option in parameter.opts}
    contract = (
        "--model --device --out --steps --epochs --minutes --until --memory --rank --alpha --dropout --targets --lr "
        "--seq-len --batch-tokens --seed --recipe --exclude --from --fresh --dry-run --json"
    )
    assert set(contract.split(" ")) <= flags


def test_every_flag_is_a_field_and_no_default_stands_in_the_command_line() -> None:
    fields = {item.name for owner in (TrainConfig, DataConfig) for item in dataclasses.fields(owner)}
    only_flags = {"dry_run", "fresh", "private_link", "as_json"}
    for parameter in train_command.params:
        assert parameter.name in fields | only_flags, parameter.name
        if parameter.name not in only_flags | {"notes", "exclude", "device"}:
            assert parameter.default is None or repr(parameter.default).startswith("Sentinel"), parameter.name
    for module in (edgetune.cli.train, edgetune.cli.options):
        assert written_defaults(module) == []


def written_defaults(module: ModuleType) -> list[str]:
    """Return the defaults that a module's source repeats, as an argument or in a help text, instead of reading config.py."""
    values = {item.default for owner in (TrainConfig, DataConfig, GenerateConfig) for item in dataclasses.fields(owner)}
    words = {value for value in values if isinstance(value, str)}
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.keyword) and node.arg == "default" and isinstance(node.value, ast.Constant):
            found += [ast.unparse(node)] if node.value.value is not None else []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.findall(r"Default: ([\w.+-]*\w)", node.value)
            found += [f"Default: {word}" for word in named if word in words or re.match(r"[\d.]", word)]
    return found


def test_every_help_text_tells_the_default_that_config_has() -> None:
    help_texts = {parameter.name: parameter.help for parameter in train_command.params if isinstance(parameter, click.Option)}
    for config in (TrainConfig(), DataConfig()):
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            if item.name in help_texts and value not in (None, (), False):
                shown = ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
                assert f"Default: {shown}" in str(help_texts[item.name]), item.name


def test_train_then_everything_that_follows(notes: Path) -> None:
    trained = run("train", str(notes), "--model", "demo", "--steps", "3", "--json")
    assert trained.code == 0
    assert set(trained.json) >= TRAIN_KEYS
    assert all(json.loads(line)["event"] for line in trained.out.splitlines())
    scored = run("eval", str(notes), "--json")
    assert set(scored.json) >= EVAL_KEYS
    written = run("generate", "The beans", "--max-tokens", "8", "--seed", "1", "--json")
    assert set(written.json) >= GENERATE_KEYS
    assert written.json["adapter"] == Path(trained.json["adapter"]).name
    assert written.json == {
        **run("generate", "The beans", "--max-tokens", "8", "--seed", "1", "--json").json,
        "tokens_per_second": written.json["tokens_per_second"],
    }
    piped = run("generate", "-", "--max-tokens", "4", "--adapter", "none", "--json", input="The beans")
    assert piped.json["adapter"] == "none"
    asked = run("ask", "What did Marra water?", "--max-tokens", "6", "--json")
    assert asked.code == 0
    assert f"Model demo (the current adapter's), adapter {written.json['adapter']}." in asked.err


def test_chat_keeps_a_history_compares_and_quits(notes: Path) -> None:
    run("train", str(notes), "--model", "demo", "--steps", "1")
    lines = "Hello\n/compare What now?\n/reset\n/nonsense\n/help\n/quit\nnever read\n"
    talked = run("chat", "--max-tokens", "5", "--seed", "3", "--json", input=lines)
    assert talked.code == 0
    answers = [json.loads(line) for line in talked.out.splitlines()]
    assert [set(answer) for answer in answers] == [{"user", "assistant"}, {"user", "base", "adapter"}]
    assert "/compare" in talked.err


def test_dry_run_reads_and_trains_nothing(notes: Path, private_home: Path) -> None:
    (notes / "photo.png").write_bytes(b"\x89PNG\0")
    plan = run("train", str(notes), "--dry-run", "--json").json
    assert plan["documents"] == 24
    assert plan["skipped_paths"][0]["path"] == "photo.png"
    assert "photo.png" in run("train", str(notes), "--dry-run").out
    assert not (private_home / "adapters").exists()


def test_dry_run_says_what_is_damaged_left_out_cut_and_not_read(notes: Path) -> None:
    (notes / "half.md").write_bytes("größere Übel, ärger".encode() + b" d\xe9j")
    (notes / "photo.md").write_text(f"A photo: ![x](data:image/png;base64,{'QUJD' * 250})\n")
    (notes / "polish.txt").write_bytes("Zażółć gęślą jaźń".encode("cp1250"))
    (notes / "diary.md").write_text("We rode to the lake and back.\n\n" * 1000)
    (notes / ".May.md.icloud").write_bytes(b"bplist00")
    arguments = ("train", str(notes), "--exclude", "drfats", "--dry-run")
    lines = run(*arguments).out.splitlines()
    for expected in (
        "Damaged: 1 letter in 1 note could not be decoded and will be learnt as \ufffd.",
        "Left out: pictures or other files embedded in 1 note, 1.01 kB.",
        "--exclude drfats matched nothing.",
    ):
        assert expected in lines
    for expected in (
        "  held out  diary.md#end: the end of a long note; the rest is trained on",
        "  skipped   .May.md.icloud: not downloaded (in iCloud or another cloud)",
        "  skipped   polish.txt: encoding not recognised (save it as UTF-8, or name it with --encoding)",
        "  half.md: 1 damaged",
        "  photo.md: 1.01 kB left out",
    ):
        assert any(line.endswith(expected) for line in lines), expected
    found = run(*arguments, "--encoding", "windows-1250", "--json").json
    assert found["encodings"]["windows-1250"] == 1
    assert (found["damaged_paths"], found["embedded_paths"]) == ({"half.md": 1}, {"photo.md": 1009})
    assert "diary.md#end" in found["heldout_paths"]
    assert 0.01 <= found["heldout_bytes"] / found["bytes"] <= 0.1
    assert run("train", str(notes), "--encoding", "klingon").code != 0


def test_models_names_the_demo_and_says_what_to_fetch() -> None:
    listed = run("models")
    assert "demo" in listed.out
    assert "hf download" in listed.out
    assert run("models", "--json").json == {"models": []}


def test_doctor() -> None:
    found = run("doctor", "--json").json
    assert found["torch"]
    assert found["backend"].split("/")[0] in ("cpu", "reference")
    assert run("doctor").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
def test_doctor_tells_of_a_state_folder_that_others_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "home"))
    assert (
        "Other users of this machine can read the folder of adapters and runs; type chmod 700 and its path."
        in run("doctor").out
    )


def test_doctor_tells_which_exports_can_be_proved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mlx_lm" else found(name, *rest))
    report = run("doctor", "--json").json
    assert "mlx: edgetune[mlx]" in report["exports_lacking"]
    assert "mlx" not in report["exports_proved"]
    assert "mps" in report["exports_proved"]


def test_a_state_folder_that_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "file" / "home"))
    outcome = run("doctor")
    assert outcome.code == 1
    assert outcome.err.endswith("Set EDGETUNE_HOME to a folder that you can write.\n")
    assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_bench_keys() -> None:
    measured = run("bench", "--shape", "demo", "--tokens", "64", "--repeats", "1", "--json").json
    assert set(measured) >= BENCH_KEYS
    assert 0 < measured["train_gemm_share"] < 1.5
    rows = {"none", "selective", "full"}
    if ops.fuses(torch.device("cpu"), torch.bfloat16):
        rows.add("none, bf16")  # the other rows are measured in 8 bits
    assert set(measured["train"]) == rows


MISTAKES = {
    "no such folder": ["train", "{tmp}/nowhere"],
    "an empty folder": ["train", "{tmp}/empty"],
    "only binaries": ["train", "{tmp}/binaries"],
    "no notes named": ["train"],
    "too little memory": ["train", "{notes}", "--model", "demo", "--memory", "50MB"],
    "cuda": ["train", "{notes}", "--device", "cuda"],
    "mps": ["train", "{notes}", "--device", "mps"],
    "recipe chat without chats": ["train", "{notes}", "--recipe", "chat"],
    "no such model": ["train", "{notes}", "--model", "nobody/nothing"],
    "no such adapter": ["generate", "hello", "--adapter", "nothing"],
    "adapter folder without adapter": ["generate", "hello", "--adapter", "{tmp}/empty"],
    "empty prompt from a pipe": ["generate", "-"],
    "quantize onto a file": ["quantize", "demo", "{tmp}/file"],
    "quantize a 4-bit model": ["quantize", "demo", "{tmp}/again"],
    "eval of nothing": ["eval", "{tmp}/empty"],
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_sentence_and_exit_1(mistake: str, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "a.md").write_bytes(b"\0\1\2" * 100)
    (tmp_path / "file").write_text("x")
    outcome = run(*(argument.format(tmp=tmp_path, notes=notes) for argument in MISTAKES[mistake]))
    assert outcome.code == 1
    assert outcome.err.startswith("edgetune: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


WRONG_USAGE = [
    "train --no-such-flag",
    "nonsense",
    "generate",
    "train --steps many",
    "train --device tpu",
    "export toaster",
    "train {notes} --rank 0",
    "train {notes} --rank 100000",
    "train {notes} --rank 8.5",
    "train {notes} --steps 0",
    "train {notes} --steps 3 --epochs 2",
    "train {notes} --epochs inf",
    "train {notes} --minutes -1",
    "train {notes} --minutes nan",
    "train {notes} --lr nan",
    "train {notes} --lr -1",
    "train {notes} --lr 1e400",
    "train {notes} --alpha inf",
    "train {notes} --dropout 1",
    "train {notes} --targets q_proj,lm_head",
    "train {notes} --targets ,",
    "train {notes} --memory lots",
    "train {notes} --memory 0",
    "train {notes} --memory 99999999999999999999GB",
    "train {notes} --until 25:00",
    "train {notes} --seq-len 1",
    "train {notes} --seq-len 1000000000000000000000",
    "train {notes} --seq-len 4096",
    "train {notes} --batch-tokens 8",
    "train {notes} --seed -1",
    "train {notes} --model=",
    "train {notes} --exclude=",
    "ask x --temperature -1",
    "ask x --temperature nan",
    "ask x --max-tokens 0",
    "ask x --seed 5000000000",
    "ask x --head nf5",
    "plan --memory 0",
    "export peft --memory -1",
    "export peft --weights q9",
    "bench --tokens 1",
]
"""Command lines that could work on no machine."""


@pytest.mark.parametrize("typed", WRONG_USAGE)
def test_wrong_usage_is_one_sentence_and_exits_2(typed: str, notes: Path) -> None:
    outcome = run(*(word.format(notes=notes) for word in typed.split(" ")))
    assert outcome.code == 2
    assert outcome.err.startswith("edgetune: ")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_model_output_cannot_move_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.session import Session

    monkeypatch.setattr(Session, "stream", lambda self, *_: iter(["red \x1b[31m", "\x07bell"]))
    shown = run("generate", "hi \x1b[2J", "--model", "demo")
    assert "\x1b" not in shown.out
    assert "\x07" not in shown.out


def test_a_number_of_too_many_digits_is_quoted_as_it_was_typed() -> None:
    outcome = run("generate", "hi", "--seed", "9" * 26)
    assert outcome.code == 2
    assert outcome.err == f"edgetune: --seed is '{'9' * 26}'; expected a whole number from 0 to 4294967295.\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys, edgetune, edgetune.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


WRONG_LINES = {
    'lr = "2e-4"': "lr is '2e-4'; expected a number above 0 and at most 1. Write for example: lr = 0.0002",
    'epochs = "three"': "epochs is 'three'; expected a number above 0",
    "rank = 8.5": "rank is 8.5; expected a whole number from 1 to 1024. Write for example: rank = 16",
    'rank = "8"': "rank is '8'; expected a whole number",
    "rank = true": "rank is true; expected a whole number",
    "alpha = false": "alpha is false; expected a number",
    'alpha = "16"': "alpha is '16'; expected a number",
    "alpha = inf": "alpha is inf; expected a number",
    "alpha = 1" + "0" * 400: "alpha is a number of more than 20 digits; expected",
    'seq_len = "512"': "seq_len is '512'; expected a whole number from 16 to 131072",
    'minutes = "30"': "minutes is '30'; expected a number",
    "minutes = nan": "minutes is nan; expected a number",
    "until = 630": 'until is 630; expected a time of day such as 06:30. Write for example: until = "06:30"',
    "until = 06:30:00": "until is 06:30:00; expected a time of day",
    "memory = 2000000000": "memory is 2000000000; expected a size such as 2GB or 900MB",
    'clip = "a"': "clip is 'a'; expected a number above 0",
    'weight_decay = "x"': "weight_decay is 'x'; expected a number from 0 to 1",
    'evaluations = "5"': "evaluations is '5'; expected a whole number",
    "steps = 2.5": "steps is 2.5; expected a whole number",
    'rslora = "no"': "rslora is 'no'; expected true or false",
    "rslora = 0": "rslora is 0; expected true or false",
    "final_lr = -3": "final_lr is -3; expected a number from 0 to 1",
    "beta1 = 2.0": "beta1 is 2.0; expected a number of at least 0 and below 1",
    "beta2 = -0.1": "beta2 is -0.1; expected a number",
    "warmup_steps = -5": "warmup_steps is -5; expected a whole number from 0",
    "evaluations = -1": "evaluations is -1; expected a whole number from 1",
    'notes = "/elsewhere/notes"': "notes is '/elsewhere/notes'; expected a list of texts",
    'exclude = "drafts"': 'expected a list of texts, none of them empty. Write for example: exclude = ["drafts/"]',
    'exclude = [""]': "exclude is ''; expected a list of texts",
    "exclude = [5]": "exclude is 5; expected a list of texts",
    'targets = "q_proj"': "targets is 'q_proj'; expected one or more of q_proj",
    'targets = ["lm_head"]': "targets is 'lm_head'; expected one or more of q_proj",
    "targets = [4, 5]": "targets is a list of 2 values; expected one or more of q_proj",
    "targets = []": "targets is an empty list; expected one or more of q_proj",
    "model = 5": "model is 5; expected a text",
    'device = "tpu"': "device is 'tpu'; expected one of auto, cpu, cuda, mps",
    "device = {}": "device is a table; expected one of auto",
    "rnak = 4": "sets 'rnak', which edgetune does not know; did you mean rank?",
    "seq-len = 64": "sets 'seq-len', which edgetune does not know; did you mean seq_len?",
    'from = "a"': "sets 'from', which edgetune does not know; did you mean from_adapter?",
    "data = {}": "sets 'data', which edgetune does not know",
    "steps = 3\nepochs = 2": "--steps 3 and --epochs 2 both say how long to train",
    "seq_len = 4096": "A batch of 2048 tokens cannot hold a sequence of 4096",
    "[trian]\nrank = 4": "holds 'trian' outside of its table [train]",
    "rank = ": "is not valid TOML",
    "a = " + "[" * 3000: "is not valid TOML",
    "a = '\xff'": "is not valid TOML in UTF-8",
}
"""Lines below [train] in config.toml, each with words of the sentence that refuses it."""


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line_of_config_toml_is_one_sentence(line: str, private_home: Path, notes: Path) -> None:
    private_home.mkdir(parents=True)
    (private_home / "config.toml").write_bytes(f"[train]\n{line}\n".encode("latin-1"))
    outcome = run("plan", "--model", "demo")
    assert outcome.code == 1
    assert WRONG_LINES[line] in outcome.err
    assert str(private_home / "config.toml") in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_list_of_tables_in_config_toml_is_one_sentence(private_home: Path) -> None:
    private_home.mkdir(parents=True)
    (private_home / "config.toml").write_text("[[train]]\nrank = 4\n")
    outcome = run("plan", "--model", "demo")
    assert outcome.err.endswith("config.toml, train is no table; expected a line [train], and settings of training below it.\n")


def bad_value(kind: Kind) -> object:
    """Return a value of a type that a kind of setting does not take."""
    return "no" if isinstance(kind, Switch | Whole | Number | Texts | Names) else 5


def test_every_setting_is_checked_in_python_and_in_config_toml(private_home: Path) -> None:
    """A field without a declaration would be forgotten by the flags, the file and the check."""
    private_home.mkdir(parents=True)
    for owner in (DataConfig, TrainConfig, GenerateConfig):
        declared = {found.name: found for found in settings_of(owner)}
        of_nights = {"left_out", "only_new"}
        assert set(declared) == {item.name for item in dataclasses.fields(owner)} - {"data"} - of_nights
        for name, found in declared.items():
            wrong = bad_value(found.kind)
            with pytest.raises(SettingError, match=rf"^{name} is .+; expected "):
                owner(**{name: wrong})
            with pytest.raises(SettingError, match=rf"^{name} is .+; expected "):
                owner(**{name: None if found.default is not None else True})
            assert owner(**{name: found.example}) is not None
            if owner is not GenerateConfig:
                (private_home / "config.toml").write_text(f"[train]\n{name} = {json.dumps(wrong)}\n")
                with pytest.raises(UsageError, match=rf"config.toml, {name} is .+; expected .+ Write for example: {name} = "):
                    train_config({})
                (private_home / "config.toml").write_text(f"[train]\n{name} = {as_toml(found.example)}\n")
                config = train_config({})
                assert getattr(config.data if owner is DataConfig else config, name) == found.example


def test_the_file_that_holds_the_settings_is_opened_with_care(private_home: Path, tmp_path: Path) -> None:
    private_home.mkdir(parents=True)
    path = private_home / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nrank = 4\n")  # a byte order mark, as Windows' editors write it
    assert train_config({}).rank == 4
    path.rename(tmp_path / "mine.toml")
    path.symlink_to(tmp_path / "mine.toml")
    assert train_config({}).rank == 4
    path.unlink()
    path.mkdir()
    assert "config.toml cannot be read (Is a directory)" in run("plan").err
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert run("plan").err.count("\n") == 1
    path.unlink()
    path.write_bytes(b"#" * 100_000_000)
    assert "larger than 1 MiB" in run("plan").err


def test_lists_and_spaces_in_flags_and_lists_in_python() -> None:
    for typed in ("q_proj,v_proj", " q_proj , v_proj ,", "q_proj,,v_proj,q_proj"):
        option = next(parameter for parameter in train_command.params if parameter.name == "targets")
        assert option.type.convert(typed, None, None) == ("q_proj", "v_proj")
    config = TrainConfig(DataConfig(notes=[Path("notes")]), targets=["q_proj"], alpha=32)  # type: ignore[arg-type, list-item]
    assert (config.data.notes, config.targets, config.alpha) == (("notes",), ("q_proj",), 32.0)
    assert isinstance(config.alpha, float)


def test_a_flag_overrides_the_line_that_it_contradicts(private_home: Path) -> None:
    private_home.mkdir(parents=True)
    (private_home / "config.toml").write_text("[train]\nsteps = 4\n")
    assert (train_config({"epochs": 2.0}).steps, train_config({"epochs": 2.0}).epochs) == (None, 2.0)
    assert train_config({}).steps == 4


def test_config_toml_stands_between_defaults_and_flags(private_home: Path) -> None:
    private_home.mkdir(parents=True)
    (private_home / "config.toml").write_text("[train]\nrank = 4\nseq_len = 128\ntargets = ['q_proj']\n")
    assert train_config({}).rank == 4
    assert train_config({"rank": 2}).rank == 2
    assert train_config({}).data.seq_len == 128
    assert train_config({}).targets == ("q_proj",)
    (private_home / "config.toml").write_text("[train]\nrnak = 4\n")
    with pytest.raises(UsageError, match="rnak"):
        train_config({})
    (private_home / "config.toml").write_text("[train\n")
    with pytest.raises(UsageError, match="TOML"):
        train_config({})


def test_a_device_that_is_typed_overrules_config_toml(private_home: Path) -> None:
    private_home.mkdir(parents=True)
    here = pick_device("auto").type
    other = "mps" if here != "mps" else "cuda"
    (private_home / "config.toml").write_text(f"[train]\ndevice = '{other}'\n")
    command = ("plan", "--model", "demo", "--memory", "1GB", "--json")
    assert run(*command).json["device"] == other
    assert run(*command, "--device", "auto").json["device"] == here


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5GiB", 1610612736), ("900MB", 900 * 10**6), ("4096", 4096), ("1k", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2XB", "1e9", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(EdgetuneError):
        parse_bytes(text)


def test_until_is_today_or_tomorrow() -> None:
    from datetime import datetime

    noon = datetime(2026, 1, 1, 12, 0)
    assert seconds_until("13:30", noon) == 5400
    assert seconds_until("11:00", noon) == 23 * 3600


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (getattr(signal, "SIGHUP", 1), 129)])
def test_a_signal_keeps_the_run_and_the_same_command_goes_on(notes: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "edgetune", "train", str(notes), "--model", "demo", "--steps", "100000", "--json"]
    # A test run that is started in the background, or by nohup, passes on that it ignores signals.
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "stepped":
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == code
    end = json.loads(rest.splitlines()[-1])
    assert end["event"] == "interrupted"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = (json.loads(line) for line in process.stdout)
    events = list(itertools.islice((event for event in told if event["event"] != "working"), 3))
    process.kill()
    process.wait()
    process.stdout.close()
    assert [event["event"] for event in events] == ["started", "resumed", "stepped"]
    assert (events[1]["step"], events[2]["step"]) == (end["step"], end["step"] + 1)


def test_python_arguments_are_checked_like_flags() -> None:
    session = Session.load("demo", "none")
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"max_tokens": "5"}, {"max_tokens": 0}, {"seed": -1}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))} is .+; expected a"):
            session.generate("The beans", **wrong)
    for memory in (0, -1, True, "2GB", 1.5):
        with pytest.raises(SettingError, match=r"memory is .+; expected a number of bytes"):
            export_adapter("peft", memory=memory)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="data is not a DataConfig"):
        TrainConfig(data={"notes": ["notes"]})  # type: ignore[arg-type]
