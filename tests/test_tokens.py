"""The token store holds and marks every token of every document; it is private, atomic and made in bounded memory."""

from __future__ import annotations

import os
import stat
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.dataset.chat_notices import ChatNotices
from edgetune.dataset.chat_writer import ChatWriter, split_turns
from edgetune.dataset.pieces import CONTEXT, PIECE_CHARS, STOP, TEXT, encode_text
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.chat_forms import guanaco_text
from edgetune.documents.document import Document, Turn
from edgetune.documents.reading import read_notes
from edgetune.runtime.errors import DataError
from edgetune.runtime.start_tokens import StartTokens
from edgetune.runtime.tokenizer import EncodedAnswer, EncodedChat

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BOS, EOS, END_OF_TURN, ROLE = 256, 257, 258, 259


class ByteTokenizer:
    """Makes each byte a token. Its chat template resembles ChatML: role, text, end of turn, newline."""

    start = StartTokens((BOS,), (BOS,))
    eos_ids: tuple[int, ...] = (EOS, END_OF_TURN)
    start_ids = [BOS]  # noqa: RUF012
    has_template = False

    def encode(self, text):
        return list(text.encode())

    def encode_chat(self, messages, add_generation_prompt=True, tools=()):
        ids = []
        for message in messages:
            ids += [ROLE, *message["role"].encode(), 10, *message["content"].encode(), END_OF_TURN, 10]
        return ids + ([ROLE, *b"assistant", 10] if add_generation_prompt else [])

    def check_template(self):
        pass

    def encode_answers(self, messages, tools=()):
        ids, answers = [], {}
        for number, message in enumerate(messages):
            ids += self.encode_chat([message], add_generation_prompt=False)
            if message["role"] == "assistant":
                size = len(message["content"].encode())
                stops = END_OF_TURN in ids
                end = len(ids) - 2 * stops  # the end of the turn and a newline, else all that the template writes
                answers[number] = EncodedAnswer(end - size - (not stops), end, stops, (), size)
        return EncodedChat(ids, answers, frozenset(range(len(messages))))


class Templated(ByteTokenizer):
    has_template = True


class Spaced(ByteTokenizer):
    """Puts a space in front of every text, as sentencepiece does."""

    def encode(self, text):
        return list(b" " + text.encode())


def note(text, path="a.md"):
    return Document.of(path, text)


def chat(*texts, system=None):
    turns = tuple(Turn(("user", "assistant")[at % 2], text) for at, text in enumerate(texts))
    turns = (Turn("system", system), *turns) if system else turns
    return Document.of("c.jsonl#1", guanaco_text(turns), turns)


def spell(ids):
    names = {BOS: "<s>", EOS: "</s>", END_OF_TURN: "<end>", ROLE: "<role>"}
    return "".join(names.get(int(i), chr(int(i)) if i < 256 else "?") for i in ids)


def marked(store, mark):
    return spell(store.ids[store.trained == mark])


# Notes


def test_a_note_is_start_text_end(tmp_path):
    store = tokenize([note("héllo"), note("b", "b.md")], ByteTokenizer(), tmp_path / "store")
    assert store.ids.tolist() == [BOS, *"héllo".encode(), EOS, BOS, ord("b"), EOS]
    assert store.trained.tolist() == [CONTEXT, *[TEXT] * 6, STOP, CONTEXT, TEXT, STOP]
    assert [(d.path, d.start, d.tokens, d.bytes) for d in store.documents] == [("a.md", 0, 8, 6), ("b.md", 8, 3, 1)]
    assert store.documents[0].digest == note("héllo").digest
    assert (store.tokens, store.trained_tokens, store.bytes) == (11, 9, 7)


def test_the_store_is_private_and_reopens_equal(tmp_path):
    made = tokenize([note("one"), note("two")], ByteTokenizer(), tmp_path / "store")
    opened = TokenStore.open(tmp_path / "store")
    assert opened.documents == made.documents
    assert np.array_equal(opened.ids, made.ids)
    assert np.array_equal(opened.trained, made.trained)
    if os.name != "nt":
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "store").iterdir()} == {0o600}


def test_a_failure_leaves_the_old_store_whole_and_nothing_else(tmp_path):
    tokenize([note("old")], ByteTokenizer(), tmp_path / "store")

    def failing():
        yield note("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        tokenize(failing(), ByteTokenizer(), tmp_path / "store")
    assert spell(TokenStore.open(tmp_path / "store").ids) == "<s>old</s>"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(DataError, match="Nothing to train on"):
        tokenize([], ByteTokenizer(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "documents.json"])
def test_a_damaged_store_is_refused(tmp_path, name):
    tokenize([note("a text")], ByteTokenizer(), tmp_path / "store")
    file = tmp_path / "store" / name
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(DataError, match="Delete it and run the command again"):
        TokenStore.open(tmp_path / "store")


# Long texts


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 60), st.integers(1, 90))
def test_pieces_join_to_the_whole_and_do_not_depend_on_blocks(text, piece, block):
    pieces = list(encode_text(ByteTokenizer(), [text], piece))
    assert list(chain.from_iterable(pieces)) == ByteTokenizer().encode(text)
    assert pieces == list(encode_text(ByteTokenizer(), [text[at : at + block] for at in range(0, len(text), block)], piece))


@given(st.text(alphabet="ab \n", min_size=1, max_size=300), st.integers(1, 60))
def test_pieces_get_no_space_in_front_where_the_tokenizer_adds_one(text, piece):
    joined = list(chain.from_iterable(encode_text(Spaced(), [text], piece)))
    assert joined == Spaced().encode(text)


def test_a_very_long_text_is_never_encoded_at_once(tmp_path):
    longest = 0

    class Watched(ByteTokenizer):
        def encode(self, text):
            nonlocal longest
            longest = max(longest, len(text))
            return super().encode(text)

    store = tokenize([note("word " * 200_000), note("x" * 300_000)], Watched(), tmp_path / "store")
    assert store.trained_tokens == 1_300_002
    assert longest < 1.1 * PIECE_CHARS


def test_tokenizing_tells_its_progress_in_small_pieces_and_ends_when_that_raises(tmp_path):
    calls = []
    documents = [note("word " * 200_000), note("b", "b.md")]
    tokenize(documents, ByteTokenizer(), tmp_path / "store", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (1_000_001, 1_000_001)
    assert len(calls) > 1_000_000 / PIECE_CHARS

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, ByteTokenizer(), tmp_path / "other", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# Chats


def test_guanaco_trains_answers_and_their_ends(tmp_path):
    store = tokenize([chat("q1", "a1", "q2", "a2", "bye")], ByteTokenizer(), tmp_path / "store")
    assert spell(store.ids) == "<s>### Human: q1 ### Assistant: a1</s>### Human: q2 ### Assistant: a2</s>"
    assert marked(store, TEXT) == " a1 a2"
    assert marked(store, STOP) == "</s></s>"
    assert store.bytes == len(" a1 a2")


def test_guanacos_recipe_trains_the_whole_conversation_as_it_stands(tmp_path):
    document = chat("q1", "a1")
    store = tokenize([document], ByteTokenizer(), tmp_path / "store", train_on="all")
    assert spell(store.ids) == "<s>" + document.text + "</s>"
    assert marked(store, TEXT) == document.text
    assert store.bytes == document.size


def test_a_template_trains_answers_and_their_ends(tmp_path):
    store = tokenize([chat("q1", "a1", "q2", "a2", "bye", system="S")], Templated(), tmp_path / "store")
    assert spell(store.ids) == (
        "<s><role>system\nS<end>\n<role>user\nq1<end>\n<role>assistant\na1<end>\n<role>user\nq2<end>\n<role>assistant\na2<end>"
    )
    assert marked(store, TEXT) == "a1a2"
    assert marked(store, STOP) == "<end><end>"
    assert store.bytes == 4


def test_a_template_with_all_turns_trains_everything_and_scores_answers(tmp_path):
    store = tokenize([chat("q", "a")], Templated(), tmp_path / "store", train_on="all")
    assert marked(store, CONTEXT) == "<s>"
    assert marked(store, TEXT) == "a"
    assert spell(store.ids) == "<s><role>user\nq<end>\n<role>assistant\na<end>\n"


def test_the_format_can_be_chosen_against_the_template(tmp_path):
    store = tokenize([chat("q", "a")], Templated(), tmp_path / "store", train_on="all", chat_format="guanaco")
    assert spell(store.ids) == "<s>### Human: q ### Assistant: a</s>"


def test_a_template_without_an_end_gets_one(tmp_path):
    class Endless(Templated):
        def encode_chat(self, messages, add_generation_prompt=True):
            return [i for i in super().encode_chat(messages, add_generation_prompt) if i != END_OF_TURN]

    store = tokenize([chat("q", "a")], Endless(), tmp_path / "store")
    assert marked(store, STOP) == "</s>"
    assert spell(store.ids).endswith("a\n</s>")


def test_a_model_without_bos_starts_its_chats_as_its_template_does(tmp_path):
    class Bare(Templated):
        start = StartTokens((EOS,))
        start_ids = [EOS]  # noqa: RUF012

    assert tokenize([chat("q", "a")], Bare(), tmp_path / "store").ids[0] == ROLE


def test_a_long_conversation_goes_in_parts_and_every_answer_is_trained(tmp_path):
    texts = [f"{'qa'[at % 2]}{at}." for at in range(200)]
    store = tokenize([chat(*texts, system="S")], Templated(), tmp_path / "store")
    assert marked(store, TEXT) == "".join(texts[1::2])
    assert spell(store.ids).count("<role>system") == 7


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.integers(1, 50)), max_size=60), st.booleans())
def test_parts_lose_no_turn(shape, with_system):
    turns = [Turn(role, str(at).ljust(size, ".")) for at, (role, size) in enumerate(shape)]
    system = [Turn("system", "S")] if with_system else []
    parts = list(split_turns(system + turns, 8, 200))
    assert [turn for part in parts for turn in part if turn.role != "system"] == turns
    assert all(part[: len(system)] == system for part in parts)


def test_chats_that_nobody_answers_are_not_silently_trained_on_nothing(tmp_path):
    with pytest.raises(DataError, match="holds a token to train on"):
        tokenize([chat("is there nobody?")], ByteTokenizer(), tmp_path / "store")


# The real tokenizer


@pytest.fixture(scope="module")
def real():
    module = pytest.importorskip("edgetune.runtime.tokenizer")
    if not (SHARED / "base-16m" / "tokenizer.model").is_file():
        pytest.skip("the base model is not on this machine")
    return module.Tokenizer.load(SHARED / "base-16m")


def test_real_notes_in_pieces_are_real_notes_whole(real):
    text = "\n\n".join(document.text for document in read_notes([SHARED / "til"]).documents[:300])
    assert list(chain.from_iterable(encode_text(real, [text], 5_000))) == real.encode(text)


def test_real_chats_train_the_answers_alone(real, tmp_path):
    documents = read_notes([SHARED / "oasst_guanaco.jsonl"]).documents[:60]
    for chat_format in ("auto", "guanaco"):
        store = tokenize(documents, real, tmp_path / chat_format, chat_format=chat_format)
        for document, stored in zip(documents, store.documents, strict=True):
            ids = store.ids[stored.start : stored.start + stored.tokens]
            marks = store.trained[stored.start : stored.start + stored.tokens]
            answers = [turn.text for turn in document.turns if turn.role == "assistant"]
            assert int((marks == STOP).sum()) == len(answers)
            begin = 0
            for stop, answer in zip(np.flatnonzero(marks == STOP).tolist(), answers, strict=True):
                kept = ids[begin:stop][marks[begin:stop] == TEXT]
                assert real.decode(kept.tolist()).strip() == answer
                begin = stop + 1


def test_the_writer_is_told_by_the_template(real):
    assert ChatWriter(real, "assistant", "auto", ChatNotices()).template == real.has_template
