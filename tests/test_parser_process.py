"""Documents of strangers are parsed in a process without rights, and whatever they do to it costs nothing but themselves."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import documents_in as made
import psutil
import pytest

from edgetune.config import DataConfig
from edgetune.documents import reading as reading_module
from edgetune.documents.encoding import NotText
from edgetune.documents.parser_child import _hook
from edgetune.documents.parser_process import ParserProcess
from edgetune.documents.readers import READERS, Format
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.summary import sentences

HOSTILE = "hostile_format"
linux = pytest.mark.skipif(sys.platform != "linux", reason="these limits are Linux's")


def deed(parser: ParserProcess, words: str) -> str:
    """Return what the hostile format's parser reports of a deed."""
    return parser.parse(HOSTILE, words.encode()).texts[0]


def reason(parser: ParserProcess, words: str) -> Reason:
    with pytest.raises(NotText) as refused:
        deed(parser, words)
    return refused.value.reason


def children() -> set[int]:
    found = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    return {child.pid for child in found if any("parser_child" in word for word in child.cmdline())}


def test_the_parser_can_neither_send_write_run_nor_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a private key")
    with ParserProcess() as parser:
        denied = {
            "connect 127.0.0.1", f"write {tmp_path / 'new'}", f"append {tmp_path / 'secret'}", f"read {tmp_path / 'secret'}",
            f"list {tmp_path}", f"delete {tmp_path / 'secret'}", "run true", "fork", "read /etc/passwd",
            "read /proc/self/environ",
        }  # fmt: skip
        assert {words: deed(parser, words) for words in denied} == dict.fromkeys(denied, "PermissionError")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_the_audit_hook_lets_the_parser_read_no_folder_whose_name_merely_begins_like_one_of_pythons(tmp_path: Path) -> None:
    refuse = _hook((str(tmp_path / "venv"),))
    refuse("open", (str(tmp_path / "venv" / "a.py"), "r", 0))
    refuse("os.listdir", (str(tmp_path / "venv"),))
    for event, arguments in (("open", (str(tmp_path / "venv-notes" / "a"), "r", 0)), ("os.listdir", (f"{tmp_path}/venv2",))):
        with pytest.raises(PermissionError):
            refuse(event, arguments)


@linux
def test_the_kernel_lets_the_parser_write_no_byte_of_a_file_and_gain_no_privilege() -> None:
    with ParserProcess() as parser:
        assert deed(parser, "memory-file") == "OSError"
        (child,) = children()
        status = Path(f"/proc/{child}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert parser.unlimited == frozenset()


def test_the_parser_does_not_inherit_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_TEST_TOKEN", "a key")
    with ParserProcess() as parser:
        assert deed(parser, "environment EDGETUNE_TEST_TOKEN") == "not there"


def test_a_file_that_hangs_is_a_reason_and_the_next_one_is_read() -> None:
    with ParserProcess(seconds=0.5) as parser:
        assert deed(parser, "say first") == "first"
        for words in ("sleep 600", "endless"):
            start = time.monotonic()
            assert reason(parser, words) is Reason.TOO_SLOW
            assert time.monotonic() - start < 30  # of a busy machine
            assert children() == set()
        parser._seconds = 60
        assert deed(parser, "say next") == "next"


def test_a_file_that_crashes_the_parser_is_a_reason_and_the_next_one_is_read() -> None:
    with ParserProcess() as parser:
        assert reason(parser, "crash") is Reason.UNPARSED
        assert deed(parser, "say next") == "next"


@linux
def test_a_file_that_takes_all_memory_is_a_reason_and_the_same_parser_goes_on() -> None:
    with ParserProcess() as parser:
        deed(parser, "say first")
        before = children()
        assert reason(parser, "hoard") is Reason.TOO_MUCH_MEMORY
        assert deed(parser, "say next") == "next"
        assert children() == before


def test_a_parser_that_is_killed_in_the_middle_of_a_file_is_a_reason_and_the_next_one_is_read() -> None:
    def kill() -> None:
        (child,) = children()
        psutil.Process(child).kill()

    with ParserProcess() as parser:
        deed(parser, "say first")
        timer = threading.Timer(0.3, kill)
        timer.start()
        assert reason(parser, "sleep 600") is Reason.UNPARSED
        timer.join()
        assert deed(parser, "say next") == "next"


def test_ctrl_c_ends_the_parser_within_a_second() -> None:
    calls = 0

    def waiting() -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt

    with ParserProcess() as parser:
        deed(parser, "say first")
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            parser.parse(HOSTILE, b"sleep 600", waiting)
        assert children() == set()
        assert time.monotonic() - start < 10  # of a busy machine


def test_a_parser_whose_parent_is_killed_ends_too() -> None:
    program = (
        "import sys, time; from edgetune.documents.parser_process import ParserProcess; parser = ParserProcess(); "
        "parser.parse('edgetune.documents.formats.notebook', b'{\"cells\": []}'); "
        "print(parser._child.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert child.wait(30) is None or not child.is_running()


@pytest.mark.parametrize(
    "answer", ["[]", "{", '{"texts": 3, "left_out": {}}', '{"texts": [1], "left_out": {}}', '{"reason": ["x"]}']
)
def test_a_forged_answer_is_a_reason(answer: str) -> None:
    with ParserProcess() as parser:
        assert reason(parser, f"forge {answer}") is Reason.UNPARSED
        assert deed(parser, "say next") == "next"


def test_xml_entities_are_refused_in_every_format() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
    files = {
        "docx": made.docx(made.paragraph("&b;"), before=bomb),
        "odt": made.zipped(content_xml=f"{bomb}<x>&b;</x>"),
        "epub": made.zipped_as({"META-INF/container.xml": f"{bomb}<x>&b;</x>"}),
        "enex": f"{bomb}<en-export><note><title>&b;</title></note></en-export>".encode(),
    }
    with ParserProcess() as parser:
        for name, data in files.items():
            with pytest.raises(NotText) as refused:
                parser.parse(f"edgetune.documents.formats.{name}", data)
            assert refused.value.reason is Reason.UNPARSED, name


def test_nesting_without_end_is_a_reason() -> None:
    deep = "<text:section>" * 100_000 + "</text:section>" * 100_000
    with ParserProcess() as parser:
        for name, data in (("odt", made.odt(deep)), ("notebook", b'{"cells": ' + b"[" * 100_000)):
            with pytest.raises(NotText) as refused:
                parser.parse(f"edgetune.documents.formats.{name}", data)
            assert refused.value.reason is Reason.UNPARSED, name


def test_a_pdf_whose_pages_lead_in_a_circle_ends() -> None:
    with ParserProcess() as parser, pytest.raises(NotText) as refused:
        parser.parse("edgetune.documents.formats.pdf", made.pdf(["Sow."] * 3, kids="2 0 R 2 0 R 2 0 R"))
    assert refused.value.reason in (Reason.NO_TEXT, Reason.UNPARSED)


# A whole reading


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read .odt with the hostile format, and allow it a second."""
    monkeypatch.setitem(READERS, ".odt", Format("hostile", HOSTILE))
    monkeypatch.setattr(reading_module, "ParserProcess", lambda: ParserProcess(seconds=1))


def test_a_reading_survives_every_bad_file_and_counts_each(tmp_path: Path, hostile: None) -> None:
    for name, words in {"a": "say one", "b": "sleep 600", "c": "crash", "d": "say two", "e": "say "}.items():
        (tmp_path / f"{name}.odt").write_text(words)
    (tmp_path / "f.docx").write_bytes(b"no zip file")
    (tmp_path / "g.md").write_text("A note.")
    found = read_notes([tmp_path])
    assert [document.path for document in found.documents] == ["a.odt", "d.odt", "g.md"]
    assert {skip.path: skip.reason for skip in found.skipped} == {
        "b.odt": Reason.TOO_SLOW,
        "c.odt": Reason.UNPARSED,
        "e.odt": Reason.EMPTY,
        "f.docx": Reason.UNPARSED,
    }
    assert children() == set()


def test_notes_alone_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("edgetune.documents.parser_process.subprocess.Popen", never)
    (tmp_path / "a.md").write_text("A note.")
    assert len(read_notes([tmp_path]).documents) == 1


def test_what_changed_alone_is_parsed_again(tmp_path: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = ParserProcess.parse

    def counted(self: ParserProcess, module: str, data: bytes, *rest: object) -> object:
        parsed.append(data)
        return parse(self, module, data, *rest)

    monkeypatch.setattr(ParserProcess, "parse", counted)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "keep.txt").write_text("A note.")
    for name in ("a", "b"):
        (notes / f"{name}.html").write_text(f"<p>Page {name}.")
    first = read_notes([notes])
    assert parsed == [b"<p>Page a.", b"<p>Page b."]
    entries = sorted((private_home / "parsed").rglob("*.json"))
    assert len(entries) == 2
    if os.name != "nt":
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in entries} == {0o600}
    # A name tells nothing of a note, not even to somebody who has that note.
    assert not any("html" in str(entry.relative_to(private_home)) for entry in entries)

    (notes / "a.html").rename(notes / "renamed.html")
    again = read_notes([notes])
    assert {document.digest for document in again.documents} == {document.digest for document in first.documents}
    assert len(parsed) == 2

    (notes / "b.html").write_text("<p>Page b, changed.")
    read_notes([notes])
    assert parsed[2:] == [b"<p>Page b, changed."]
    (notes / "renamed.html").unlink()
    assert len(sorted((private_home / "parsed").rglob("*.json"))) == 2
    read_notes([notes], DataConfig(exclude=("b.html",)))
    assert sorted((private_home / "parsed").rglob("*.json")) == []


def test_a_file_that_failed_is_parsed_again_after_a_month_or_by_another_version(
    tmp_path: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    now = time.time()

    def hang(self: ParserProcess, module: str, data: bytes, *rest: object) -> object:
        parsed.append(data)
        raise NotText(Reason.TOO_SLOW)

    def read(days: float) -> list[Reason]:
        parsed.clear()
        monkeypatch.setattr("edgetune.documents.parsed_cache.time.time", lambda: now + 86_400 * days)
        return [skip.reason for skip in read_notes([tmp_path]).skipped]

    monkeypatch.setattr(ParserProcess, "parse", hang)
    (tmp_path / "a.md").write_text("A note.")
    (tmp_path / "b.html").write_text("<p>A page.")
    for days, is_parsed in ((0, True), (0, False), (29.9, False), (30.1, True), (59, False), (-1, True)):
        assert read(days) == [Reason.TOO_SLOW]
        assert parsed == [b"<p>A page."] * is_parsed, days
    (entry,) = (private_home / "parsed").rglob("*.json")
    assert "page" not in entry.read_text()
    monkeypatch.setattr(Format, "version", lambda self: "another")
    assert read(-1) == [Reason.TOO_SLOW]
    assert parsed == [b"<p>A page."]
    (tmp_path / "b.html").write_text("<p>Another page.")
    assert read(-1) == [Reason.TOO_SLOW]
    assert parsed == [b"<p>Another page."]


def test_a_parser_that_cannot_start_says_nothing_of_a_file(
    tmp_path: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.md").write_text("A note.")
    (tmp_path / "b.html").write_text("<p>A page.")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/usr/bin/false" if os.name != "nt" else "where")
        assert [skip.reason for skip in read_notes([tmp_path]).skipped] == [Reason.UNPARSED]
    assert [document.text for document in read_notes([tmp_path]).documents] == ["A note.", "A page."]


def test_a_damaged_entry_is_parsed_again_and_old_ones_go(tmp_path: Path, private_home: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.html").write_text(f"<p>Page {name}.")
        read_notes([tmp_path / name])
    first, second = sorted((private_home / "parsed").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    for entry in first.iterdir():
        entry.write_text('{"texts": 3')
    assert [document.text for document in read_notes([tmp_path / "one"]).documents] == ["Page one."]
    os.utime(second, (0, 0))
    read_notes([tmp_path / "one"])
    assert sorted((private_home / "parsed").iterdir()) == [first]


def test_what_lacks_is_said_once_with_the_name_of_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / f"{number}.pdf").write_bytes(made.pdf([f"Page {number}."]))
    (tmp_path / "a.org").write_text("* Beans\n")
    (tmp_path / "b.ipynb").write_bytes(made.notebook('{"cell_type": "markdown", "source": "Text."}'))
    for name in ("c.epub", "d.odt"):
        (tmp_path / name).write_bytes(b"PK")
    monkeypatch.setattr(Format, "lacks", lambda self: bool(self.packages))
    found = read_notes([tmp_path])
    assert [document.text for document in found.documents] == ["* Beans\n", "Text."]
    assert found.skipped_counts() == {"needs the extra documents": 14}
    assert sentences(found)[1:] == (
        "12 PDF, 1 EPUB and 1 ODT files need the extra documents: pip install 'edgetune[documents]'",
        "1 Org file was read as plain text; to leave markup out, pip install 'edgetune[documents]'",
    )


def test_source_code_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("A note.")
    (tmp_path / "b.py").write_text("x = [[1]]\n")
    assert read_notes([tmp_path]).skipped_counts() == {"source code (read with --code)": 1}
    assert [document.text for document in read_notes([tmp_path], DataConfig(code=True)).documents] == ["A note.", "x = [[1]]\n"]
