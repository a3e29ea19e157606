"""The desktop chat and the morning script run, and the Swift sketch reads only keys that exports write."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import save_model

import edgetune
from edgetune import Session
from edgetune.export.coreml.how_to_call import how_to_call
from edgetune.export.coreml.plan import Plan
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.tokenizer import Tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMO = Path(edgetune.__file__).parent / "demo"


def opened(path: str) -> ModuleType:
    """Import an example as a module; examples belong to no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


# --- the desktop chat --------------------------------------------------------------------------------------------------------


def heard(conversation: Any) -> tuple[list[str], str]:
    """Wait for the answer; return the kinds of the news items and the pieces joined to one text."""
    conversation.wait(60)
    news = conversation.news()
    return [item.kind for item in news], "".join(item.text for item in news if item.kind == "piece")


def test_the_desktop_conversation_streams_what_a_session_answers() -> None:
    session = Session.load("demo", "none")
    conversation = opened("desktop/conversation.py").Conversation(session, max_tokens=12, seed=3)
    assert not conversation.ask("   ")
    assert conversation.ask("Why does the chain slip?")
    kinds, text = heard(conversation)
    assert kinds[-1] == "end"
    assert kinds.count("piece") > 1
    asked = [{"role": "user", "content": "Why does the chain slip?"}]
    assert text == "".join(session.chat(asked, 12, 0.7, seed=3))
    assert conversation.ask("And now?")
    assert heard(conversation)[0][-1] == "end"


class Scripted:
    """Stands in for a Session: its chat yields the given pieces."""

    model_name = adapter_name = "none"

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.asked = pieces, [0]
        self.tokenizer = Tokenizer.load(DEMO)
        self.model = type("M", (), {"config": type("C", (), {"max_positions": 4096})})

    def chat(self, messages: list[dict[str, str]], *rest: Any) -> Iterator[str]:
        self.asked = [len(messages)]
        return self.pieces


def test_a_stopped_answer_stays_in_the_conversation() -> None:
    def endless() -> Iterator[str]:
        while True:
            conversation.stop()
            yield "on "

    session = Scripted(endless())
    conversation = opened("desktop/conversation.py").Conversation(session)
    conversation.ask("go")
    assert heard(conversation) == (["piece", "end"], "on ")
    session.pieces = iter(["yes"])
    conversation.ask("again")
    assert heard(conversation) == (["piece", "end"], "yes")
    assert session.asked == [3]  # the first question, the stopped answer, the second question


def test_a_failure_is_shown_as_its_sentence() -> None:
    def failing() -> Iterator[str]:
        raise TokenizerError("It has no chat template.")
        yield ""

    conversation = opened("desktop/conversation.py").Conversation(Scripted(failing()))
    conversation.ask("go")
    conversation.wait(10)
    assert [(news.kind, news.text) for news in conversation.news()] == [("failure", "It has no chat template.")]
    conversation._chat.session = session = Scripted(iter(["yes"]))
    conversation.ask("again")
    assert heard(conversation) == (["piece", "end"], "yes")
    assert session.asked == [1]  # the question that failed is not in the conversation


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Provide a display: the machine's own, or one that Xvfb makes."""
    pytest.importorskip("tkinter")
    if sys.platform != "linux" or os.environ.get("DISPLAY"):
        yield
        return
    if shutil.which("Xvfb") is None:
        pytest.skip("no display, and no Xvfb to make one")
    read_end, write_end = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write_end), "-nolisten", "tcp"], pass_fds=[write_end], stderr=subprocess.DEVNULL
    )
    os.close(write_end)
    with open(read_end) as number:
        monkeypatch.setenv("DISPLAY", f":{number.readline().strip()}")
        yield
    server.terminate()
    server.wait()


def test_the_window_stays_alive_while_an_answer_comes_and_closes_in_the_middle_of_it(
    display: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tkinter as tk

    monkeypatch.syspath_prepend(EXAMPLES / "desktop")
    app, made = opened("desktop/app.py"), []

    def endless() -> Iterator[str]:
        while True:
            time.sleep(0.001)
            yield "on and "

    session = Scripted(endless())

    class Seen(app.Window):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    def use(root: tk.Tk, n: int = 0) -> None:
        """Act as a person would, in place of mainloop."""
        (window,) = made
        window.entry.insert(0, "Why does the chain slip?")
        window.ask()
        assert window.entry.get() == ""
        while "on and on" not in window.history.get("3.0", "end"):
            root.update()
        assert window.history.get("2.0", "2.end") == "> Why does the chain slip?"
        assert window.conversation.busy
        root.destroy()

    monkeypatch.setattr(app, "Window", Seen)
    monkeypatch.setattr(app, "Session", type("S", (), {"load": lambda model, adapter: session}))
    monkeypatch.setattr(tk.Tk, "mainloop", use)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    app.main()
    assert not made[0].conversation.busy


# --- the morning -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_morning_exports_what_it_can_and_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("coremltools")
    pytest.importorskip("peft")
    folder = tmp_path / "model"
    save_model(folder, vocab_size=8192, intermediate_size=128)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    base = open_model(folder)
    model = load_llama(base, torch.float32)
    config = LoraConfig(2, 4.0)
    adapters.attach_new(model, config, 0)
    peft_folder.save(adapters.snapshot(model, config, {"base": base.digest}), tmp_path / "night", "tiny")
    arguments = ["--model", str(folder), "--adapter", str(tmp_path / "night"), "--out", str(tmp_path / "out")]
    opened("morning.py").main([*arguments, "--targets", "peft,coreml,toaster"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["target", "path", "size", "agreement"]
    assert re.match(rf"peft +{re.escape(str(tmp_path / 'out' / 'peft'))} +\S+ \wB  within \S+, same text", lines[1])
    assert re.match(r"coreml .*model.mlpackage +\S+ \wB  within \S+, same text", lines[2])
    assert re.match(r"toaster +- +-  skipped: Unknown target 'toaster'", lines[3])
    assert "can be extracted from this export" in " ".join(lines[4:])


# --- the Swift sketch --------------------------------------------------------------------------------------------------------


def test_the_swift_sketch_reads_keys_that_an_export_writes() -> None:
    """Compares with the keys of how-to-call.json and golden.json; no test compiles the sketch, and the sketch says so."""
    base = open_model(DEMO)
    ranks = dict.fromkeys(("q_proj", "v_proj"), 4)
    plan = Plan(base.config, 64, 8, base.dense, lambda name, shape: None, ranks)  # type: ignore[arg-type, return-value]
    call = how_to_call(plan, DEMO, base.digest, [])
    swift = (EXAMPLES / "swiftui" / "HowToCall.swift").read_text()
    call_keys, golden_keys = (re.findall(r'case \w+ = "(\w+)"', part) for part in swift.split("struct Golden:"))
    assert len(call_keys) == 11
    assert set(call_keys) <= set(call)
    assert call["golden"]["prompt"]
    assert golden_keys == ["prompt_tokens", "token_ids", "top_token_ids", "top_logits"]
    assert all(f'"{key}":' in (EXAMPLES.parent / "export" / "verify.py").read_text() for key in golden_keys)
    assert set(re.findall(r"let (\w+):", swift.split("struct Adapter: Decodable {")[1].split("}")[0])) <= set(call["adapter"])
    assert json.loads(json.dumps(call)) == call
    for path in (EXAMPLES / "swiftui").glob("*.swift"):
        assert path.read_text().startswith("// Unverified")
