"""Secrets and personal identifiers are masked before tokens exist, and what looks like them stays."""

from __future__ import annotations

import json
import random
import time
import tomllib
from pathlib import Path

import documents_in as made
import privacy_corpus
import privacy_items
import privacy_lookalikes
import privacy_score
import pytest
from click.testing import CliRunner

from edgetune.cli.main import cli
from edgetune.config import DataConfig
from edgetune.documents.masked import masked_value
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.summary import sentences
from edgetune.privacy import masking
from edgetune.privacy.kinds import Kind
from edgetune.privacy.masking import Masker, lower
from edgetune.privacy.own_list import new_masker
from edgetune.privacy.rules import rules
from edgetune.runtime.errors import DataError, SettingError, UsageError

RULES = Path(masking.__file__).with_name("rules.toml")
MAIL = b"From a@example.org Wed May  1 10:00:00 2024\nFrom: a@example.org\nSubject: day\n\n%s\n\n"
KEY = "ghp_" + "aB3" * 12


def test_the_corpus_is_masked_as_well_as_promised() -> None:
    result = privacy_score.score(privacy_corpus.notes("test", 250, seed=7), Masker())
    assert sum(result.planted.values()) > 400
    assert result.recall(privacy_corpus.SECRETS) >= 0.99
    assert result.precision("secrets") >= 0.95
    assert result.recall(privacy_corpus.IDENTIFIERS) >= 0.95
    assert result.precision("identifiers") >= 0.90


@pytest.mark.parametrize(
    "form", [form for form in privacy_lookalikes.HARMLESS if form not in ("imei-like", "template")]
)  # one in ten 16-digit numbers passes a card's check
def test_what_only_looks_like_a_secret_stays(form: str) -> None:
    rng = random.Random(form)
    masker = Masker()
    for _ in range(8):
        text = f"see {privacy_lookalikes.HARMLESS[form](rng)} for details"
        assert masker.mask(text) == text
    assert masker.counts == {}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"token {KEY} here", "token [API key] here"),
        ("Password: hunter2!\n", "Password: [password]\n"),
        ("d['password'] = 'hunter2'", "d['password'] = '[password]'"),
        ("the password for the router is Tiger-42", "the password for the router is [password]"),
        ("Passphrase: correct horse battery staple\n", "Passphrase: [password]\n"),
        ("PIN: 4821", "PIN: [password]"),
        ("https://anna:geheim77@example.org/x", "https://anna:[password]@example.org/x"),
        ("curl -u anna:hunter22 https://example.org", "curl -u anna:[password] https://example.org"),
        ("AccountKey=980eaec37ce3043e81f32e1c888b30bc;", "AccountKey=[API key];"),
        ("write to anna.novak@example.org.", "write to [e-mail]."),
        ("call +43 664 1234567 now", "call [phone] now"),
        ("IBAN DE89 3704 0044 0532 0130 00, please", "IBAN [IBAN], please"),
        ("Visa 4111 1111 1111 1111", "Visa [card]"),
        ("SSN 536-90-4399", "SSN [national id]"),
        ("PESEL: 44051401359", "PESEL: [national id]"),
    ],
)
def test_each_kind_has_its_placeholder(text: str, masked: str) -> None:
    assert Masker().mask(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "password: <your password>",
        "password=os.environ['DB_PASSWORD']",
        "const password = req.body.password;",
        "password: string;",
        "password: ********",
        "Password: required",
        "git clone git@github.com:org/repo.git",
        "icon@2x.png",
        "npm i lodash@4.17.21",
        "postgres://user:password@localhost/db",
        "at 10:50:14 2025 -0500",
        "00 16 01 00 06 3c 69 6e  69 74 3e 01 00 03 28 29",
        "ISBN 978-3-16-148410-0",
        "1939-1945",
        "4943 4951 4957 4967 4969 4973 4987 4993 4999",
        "git show 9fceb02d0ae598e95dc970b74767f19372d61af8",
    ],
)
def test_code_names_and_numbers_stay(text: str) -> None:
    assert Masker().mask(text) == text


def test_what_is_masked_is_counted_by_kind_and_not_kept() -> None:
    masker = Masker()
    masker.mask(f"{KEY} and {KEY}, anna@example.org")
    assert masker.counts == {"API key": 2, "e-mail address": 1}
    assert KEY not in repr(vars(masker))


def test_secrets_alone_are_masked_where_that_was_asked_for() -> None:
    text = "Password: hunter2! anna@example.org"
    assert Masker("secrets").mask(text) == "Password: [password] anna@example.org"
    assert Masker("none").mask(text) == text


def test_a_secret_that_spans_two_blocks_goes() -> None:
    key = privacy_items.private_key(random.Random(3))
    text = "a line of a note\n" * 30_000 + key + "\n" + "and another line\n" * 30_000
    for cut in (text.index("BEGIN") + 3, text.index(key) + len(key) // 2, text.index(key) + len(key) - 4):
        masker = Masker()
        masked = "".join(masker.blocks([text[:cut], text[cut:]]))
        assert masked == text.replace(key, "[private key]")
        assert masker.counts == {"private key": 1}


def test_a_private_key_without_an_end_goes_to_its_last_line() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7bq9\n" * 9
    assert Masker().mask(f"{key}\nThen we had dinner.").replace("\n", "") == "[private key]Then we had dinner."


@pytest.mark.parametrize(
    "unit",
    [
        "key=",
        "password for a ",
        "eyJa.",
        "://a:b@",
        "1 2 3 4 5 6 7 8 9 ",
        "abandon ",
        "-----BEGIN PRIVATE KEY-----\n",
        "mysql -p ",
    ],
)
def test_no_text_takes_more_than_a_second_for_a_hundred_thousand_letters(unit: str) -> None:
    masker = Masker()
    masker.mask(unit * 20)
    start = time.process_time()
    masker.mask(unit * (100_000 // len(unit)))
    assert time.process_time() - start < 1


def test_a_letter_with_a_longer_lower_case_moves_nothing() -> None:
    assert len(lower("İstanbul")) == 8
    assert Masker().mask("İİİ password: hunter22") == "İİİ password: [password]"


def test_the_rules_name_their_sources_and_compile() -> None:
    data = tomllib.loads(RULES.read_text(encoding="utf-8"))
    assert len(data["token"]) > 25
    assert all(rule["source"] for rule in data["token"])
    assert rules().version == data["version"]
    assert len({kind.placeholder for kind in Kind}) == len(Kind)


def test_messages_and_arguments_of_tools_are_masked(tmp_path: Path) -> None:
    call = {
        "id": "call_Ab12Cd34Ef56Gh78Ij90Kl12",
        "function": {"name": "login", "arguments": '{"password": "hunter22", "to": 4111111111111111}'},
    }
    messages = [
        {"role": "user", "content": "mail anna@example.org"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": f"token {KEY}"},
        {"role": "assistant", "content": "Done, +43 664 1234567."},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    reading = read_notes([tmp_path])
    turns = reading.documents[0].turns
    assert turns is not None
    assert [turn.text for turn in turns] == ["mail [e-mail]", "", "token [API key]", "Done, [phone]."]
    sent = turns[1].extras["tool_calls"][0]
    assert sent == {"id": call["id"], "function": {"name": "login", "arguments": {"password": "[password]", "to": "[card]"}}}
    assert "hunter22" not in reading.documents[0].text
    assert reading.masked == {"e-mail address": 1, "password": 1, "card number": 1, "API key": 1, "phone number": 1}


def test_a_value_is_read_with_its_key() -> None:
    masked = masked_value({"password": "tulip7x", "city": "Graz", "age": 41, "ok": True}, Masker())
    assert masked == {"password": "[password]", "city": "Graz", "age": 41, "ok": True}


def test_the_digest_of_a_note_is_that_of_its_masked_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Password: hunter2!\n")
    (tmp_path / "b.md").write_text("Password: tiger77?\n")
    reading = read_notes([tmp_path])
    assert [document.text for document in reading.documents] == ["Password: [password]\n"]
    unmasked = read_notes([tmp_path], DataConfig(mask="none"))
    assert len({document.digest for document in (*reading.documents, *unmasked.documents)}) == 3


def test_counts_stand_in_the_sentences_and_in_json_and_no_secret_does(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"{KEY}\nanna@example.org, jan@example.org\n")
    reading = read_notes([tmp_path])
    said = " ".join(sentences(reading))
    assert "Masked before training: 1 API key, 2 e-mail addresses." in said
    result = CliRunner().invoke(cli, ["train", str(tmp_path), "--dry-run", "--json"])
    assert json.loads(result.output)["masked"] == {"API key": 1, "e-mail address": 2}
    unmasked = CliRunner().invoke(cli, ["train", str(tmp_path), "--dry-run", "--json", "--mask", "none"])
    assert json.loads(unmasked.output)["masked"] == {}
    assert "example.org" not in result.output + said + repr(reading)


def test_the_users_own_list_is_masked(tmp_path: Path, private_home: Path) -> None:
    private_home.mkdir(mode=0o700)
    (private_home / "private.txt").write_text("# people\nAnna  Novak\nProjekt Zebra\n\n")
    masker = new_masker(DataConfig())
    assert (
        masker.mask("anna\nnovak leads PROJEKT ZEBRA; Annabel Novak does not")
        == "[private] leads [private]; Annabel Novak does not"
    )
    assert new_masker(DataConfig(mask="secrets")).mask("Anna Novak") == "Anna Novak"
    (private_home / "private.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(UsageError, match=r"private\.txt is not text in UTF-8"):
        new_masker(DataConfig())


def test_countries_can_be_named() -> None:
    assert new_masker(DataConfig(phone_regions="US")).mask("0664 1234567") == "0664 1234567"
    assert new_masker(DataConfig(phone_regions="at, us")).mask("0664 1234567") == "[phone]"
    with pytest.raises(SettingError, match="two-letter country codes"):
        DataConfig(phone_regions="Austria")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("---\nedgetune: false\n---\nText.\n", False),
        ("---\ntitle: A day\nedgetune: no\n---\nText.\n", False),
        ("---\nedgetune: true\n---\nText.\n", True),
        ("+++\nedgetune = false\n+++\nText.\n", False),
        ("---\ntags: [garden, private]\n---\nText.\n", False),
        ("Text. #private\n", False),
        ("Text. #Private/health\n", False),
        ("The tag `#private` is explained here.\n", True),
        ("A #privateer sails.\n", True),
        ("A class has this.#private fields.\n", True),
        ("---\ntag: private\n---\nText.\n", False),
        ("---\ntags: garden private\n---\nText.\n", False),
        ("---\n- one\nedgetune: false\n---\nFront matter that is not YAML.\n", False),
        ("---\nedgetune: false\nx: " + "y" * 40_000 + "\n---\nFront matter over the limit.\n", False),
        ("---\n{title: A day, edgetune: false}\n---\nText.\n", False),
        ("edgetune:: false\n\n- A page of Logseq's.\n", False),
        ("- tags:: garden, private\n- Text.\n", False),
        ("- A block of Logseq's. #[[private]]\n", False),
        ("- [[private]] is a page.\n", True),
        ("We tag: it is a private matter, and edgetune: false friends.\n", True),
        ("Tags: private-label\n", True),
    ],
)
def test_a_note_that_is_marked_private_is_skipped_and_counted(tmp_path: Path, text: str, kept: bool) -> None:
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "b.md").write_text("Another note.\n")
    reading = read_notes([tmp_path])
    assert len(reading.documents) == 1 + kept
    assert reading.skipped_counts() == ({} if kept else {"marked private (edgetune: false, or the tag #private)": 1})


@pytest.mark.parametrize(
    ("name", "data", "read"),
    [
        ("a.txt", b"---\nedgetune: false\n---\nSecret diary.\n", 0),
        ("a.org", b"#+FILETAGS: :private:\n* Day\nSecret diary.\n", 0),
        ("a.org", b"* Day\n** Evening :home:private:\nSecret diary.\n", 0),
        ("a.org", b"#+EDGETUNE: no\n* Day\nSecret diary.\n", 0),
        ("a.rst", b"---\nedgetune: false\n---\n\nSecret diary.\n", 0),
        ("a.html", b"<p>Secret diary. #private</p>", 0),
        ("a.html", b'<a href="#private">Public</a>', 1),
        ("a.ipynb", b'{"cells": [{"cell_type": "markdown", "source": "#private\\nSecret diary."}]}', 0),
        ("a.enex", made.enex("<note><title>A</title><tag>Private</tag><content>Secret diary.</content></note>"), 0),
        ("a.mbox", b"".join(MAIL % text for text in (b"One.", b"Secret diary. #private", b"Three.")), 2),
    ],
)
def test_a_mark_counts_in_every_format_and_nothing_of_such_a_text_is_kept(
    tmp_path: Path, private_home: Path, name: str, data: bytes, read: int
) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.md").write_text("Another note.\n")
    reading = read_notes([tmp_path])
    assert len(reading.documents) == 1 + read
    assert [(skip.path, skip.reason) for skip in reading.skipped] == (
        [(f"{name}#2" if read == 2 else name, Reason.PRIVATE)] if read != 1 else []
    )
    assert not any(b"Secret diary" in kept.read_bytes() for kept in private_home.rglob("*") if kept.is_file())


def test_an_ignore_file_keeps_files_and_folders_out(tmp_path: Path) -> None:
    for name in ("a.md", "diary/b.md", "diary/kept.md", "work/c.md", "work/secret.md", "work/deep/secret.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".edgetuneignore").write_text("# mine\ndiary/*\n!kept.md\n")
    (tmp_path / "work" / ".edgetuneignore").write_text("secret.md\n")
    assert [document.path for document in read_notes([tmp_path]).documents] == ["a.md", "diary/kept.md", "work/c.md"]
    skipped = read_notes([tmp_path]).skipped_counts()
    assert skipped["excluded by .edgetuneignore"] == 3
    # A shell expands notes/*, and the files above count for what it names.
    assert [document.path for document in read_notes([tmp_path / "a.md", tmp_path / "work"]).documents] == ["a.md", "work/c.md"]
    with pytest.raises(DataError, match=r"1 excluded by \.edgetuneignore"):
        read_notes([tmp_path / "diary" / "b.md"])


def test_a_folder_whose_ignore_file_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("c")
    (tmp_path / "b" / ".edgetuneignore").write_bytes(b"\xff\xfe\xfa")
    reading = read_notes([tmp_path])
    assert [document.path for document in reading.documents] == ["a.md"]
    assert reading.skipped_counts() == {"beside or below a .edgetuneignore that cannot be read": 1}


def test_a_word_many_times_and_a_list_of_words_are_no_seed_phrase() -> None:
    for text in ("word " * 100, " ".join(privacy_items.bip39_words())):
        assert Masker().mask(text) == text
    phrase = privacy_items.seed_phrase(random.Random(1))
    assert Masker().mask(f"keep this: {phrase}.") == "keep this: [seed phrase]."
