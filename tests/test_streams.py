"""Standard output that is closed, full, left by its reader or without some letters costs no work, and says so."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from edgetune.cli.main import plain_failures
from edgetune.reports import streams
from edgetune.reports.streams import standard_streams, work_goes_on

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and descriptors of POSIX")


class Outputs:
    """Stands in for both standard streams: text streams on descriptors of this test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: int, encoding: str = "utf-8") -> None:
        self.read_errors, errors = os.pipe()
        monkeypatch.setattr(streams, "_fill_closed_descriptors", lambda: None)  # pytest's own are in place
        monkeypatch.setattr(sys, "stdout", open(out, "w", encoding=encoding, errors="strict"))  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", open(errors, "w", encoding="utf-8"))  # noqa: SIM115

    def errors(self) -> str:
        sys.stderr.close()
        with open(self.read_errors) as file:
            return file.read()


def left_pipe() -> int:
    """Return the descriptor of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_cannot_be_shown_are_replaced(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    reader, writer = os.pipe()
    Outputs(monkeypatch, writer, encoding)
    with standard_streams():
        print("Adapter: café/日本", flush=True)
    assert os.read(reader, 100) == "Adapter: café/日本\n".encode(encoding, "replace")


def test_work_goes_on_when_the_reader_leaves_and_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = Outputs(monkeypatch, left_pipe())
    with standard_streams(), work_goes_on():
        for step in range(3):
            print("step", step, flush=True)
    assert outputs.errors() == (
        "edgetune: Standard output cannot be written (Broken pipe). Nothing more is shown, and the work goes on.\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_output_is_not_taken_for_edgetunes_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = Outputs(monkeypatch, os.open("/dev/full", os.O_WRONLY))
    with standard_streams(), pytest.raises(SystemExit) as ended, plain_failures():
        print("an answer", flush=True)
    assert ended.value.code == 1
    assert outputs.errors() == (
        "edgetune: Standard output cannot be written (No space left on device). Free some space, or name another file.\n"
    )


def test_outside_of_work_a_reader_that_leaves_is_no_fault_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    Outputs(monkeypatch, left_pipe())
    with standard_streams(), pytest.raises(BrokenPipeError):
        print("a line", flush=True)


def test_standard_error_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Outputs(monkeypatch, left_pipe())
    monkeypatch.setattr(sys, "stderr", open(left_pipe(), "w"))  # noqa: SIM115
    with standard_streams(), work_goes_on():
        print("a line", flush=True)
        print("a word", file=sys.stderr, flush=True)


def test_closed_streams_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_fill_closed_descriptors", lambda: None)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with standard_streams(), work_goes_on():
        print("a line", flush=True)
        assert not sys.stdout.isatty()
    assert sys.stdout is None


def test_a_stream_in_memory_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    with standard_streams():
        assert sys.stdout is memory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the folders of a tiny model and of a few notes."""
    folder = tmp_path_factory.mktemp("small")
    tiny.save_trainable(folder / "model")
    (folder / "notes").mkdir()
    for number in range(3):
        (folder / "notes" / f"{number}.md").write_text(f"Day {number}: the beans by the shed want water, said Marra.\n")
    return str(folder / "model"), str(folder / "notes")


def train_in_shell(small: tuple[str, str], steps: int, redirection: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `edgetune train` in bash with a redirection behind it."""
    command = [sys.executable, "-m", "edgetune", "train", "--model", small[0], "--steps", str(steps), *options, small[1]]
    script = '"$@" ' + redirection + "; echo code ${PIPESTATUS[0]} >&2"
    return subprocess.run(["bash", "-c", script, "bash", *command], capture_output=True, text=True, check=True)


def test_training_without_standard_output_makes_its_adapter(small: tuple[str, str], private_home: Path) -> None:
    done = train_in_shell(small, 1, ">&-")
    assert done.stderr == "code 0\n"
    assert len(list(private_home.glob("adapters/*/*/adapter_model.safetensors"))) == 1


def test_training_goes_on_when_the_pipe_ends(small: tuple[str, str], private_home: Path) -> None:
    done = train_in_shell(small, 12, "| head -1")
    assert done.stdout.startswith("Base model")
    assert done.stderr.endswith("code 0\n")
    assert "Standard output cannot be written (Broken pipe)" in done.stderr
    assert len(list(private_home.glob("adapters/*/*/adapter_model.safetensors"))) == 1


def test_a_name_that_is_not_utf8_is_trained_into(small: tuple[str, str], tmp_path: Path) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    done = train_in_shell(small, 1, "", "--out", out)
    assert done.stderr == "code 0\n"
    assert (Path(out) / "adapter_model.safetensors").is_file()


def test_under_nohup_a_hangup_is_still_ignored(small: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "edgetune", "train", small[1], "--model", small[0], "--steps", "100000", "--json"]
    ignoring = ["bash", "-c", 'trap "" HUP; exec "$@"', "bash", *command]
    with subprocess.Popen(ignoring, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        while '"event": "stepped"' not in running.stdout.readline():
            pass
        running.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        assert running.stdout.read().splitlines()[-1].startswith('{"event": "interrupted"')
    assert running.returncode == 143
