"""Front matter becomes a title and tags with YAML's own values; text between rulers stays text."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from edgetune.config import DataConfig
from edgetune.documents.front_matter import split_front_matter
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason


def without_front_matter(text: str) -> str:
    """Return a note with its front matter reduced; any other text as it stands."""
    front_matter = split_front_matter(text)
    return text if front_matter is None else front_matter.reduced()


def yaml(inside: str) -> str:
    return without_front_matter(f"---\n{inside}\n---\nBody.\n")


@pytest.mark.parametrize(
    ("inside", "head"),
    [
        (
            "title: >-\n  How I repaired the hub of the\n  blue bicycle\ndate: 2024-05-01",
            "# How I repaired the hub of the blue bicycle\n\n",
        ),
        ("title: |\n  Two\n  lines", "# Two lines\n\n"),
        ("title: A long title that\n  goes on below\nid: 4", "# A long title that goes on below\n\n"),
        ("title: 'It''s the Duchess''s wheel'", "# It's the Duchess's wheel\n\n"),
        (r'title: "She said \"no oil\" twice"', '# She said "no oil" twice\n\n'),
        (r'title: "caf\u00e9"', "# café\n\n"),
        ("title: Spokes\ntags: null", "# Spokes\n\n"),
        ("title: ~\ntags: ~", ""),
        ("title:\ntags:\nid: 3", ""),
        ("title: 'null'", "# null\n\n"),
        ("title: yes", "# yes\n\n"),
        ("title: 2024-05-01", "# 2024-05-01\n\n"),
        ("title: 0777", "# 0777\n\n"),
        ("title: 1e999999999", "# 1e999999999\n\n"),
        ('title: "Spokes" # from the book "Wheels"', "# Spokes\n\n"),
        ('"title": Quoted key\n"id": 77812', "# Quoted key\n\n"),
        ("Title: Capital", "# Capital\n\n"),
        ("title: &t Anchored\nalias: *t", "# Anchored\n\n"),
        ("aka: &t Anchored\ntitle: *t", "# Anchored\n\n"),
        ("title: !!python/object/apply:os.system ['true']", ""),
        ("title: !custom Marked", "# Marked\n\n"),
        ("title: Beans: a diary", "# Beans: a diary\n\n"),
        ("title: Beans: a diary\ntags:\n  - garden\nlayout: post", "# Beans: a diary\n\nTags: garden\n\n"),
        ("title: @home and *there*", "# @home and *there*\n\n"),
        ("tags: [wheel, \"true, straight\", 'a b']", "Tags: wheel; true, straight; a b\n\n"),
        ("tags: [#garden, #soil]", "Tags: garden, soil\n\n"),
        ("tags: [a, null, [b], {c: d}, 7, yes]", "Tags: a, 7, yes\n\n"),
        ("tags: wheel, hub", "Tags: wheel, hub\n\n"),
        ("# only a comment\nlayout: post", ""),
        ("# only a comment", ""),
        ("title: one\ntitle: two", "# two\n\n"),
    ],
)
def test_yaml_values_are_those_that_yaml_says(inside, head):
    assert yaml(inside) == f"{head}Body.\n"


@pytest.mark.parametrize(
    "inside",
    [
        "Monday: rode to the lake and back.\nTuesday: rain, stayed in.\n\nWednesday: the hub is loose again.",
        "Anna: Hello.\nBen: Hello to you.",
        "flour: 300 g\neggs: 2",
        "Date: Monday\nWeather: fine",
        "A line of verse,\nand another.",
        "- a list\n- between rulers",
        "title: unclosed [list\n  and: {more",
        "* * *",
        "title",
        "just: one\n\tline: with a tab",
    ],
)
def test_text_between_rulers_stays_as_it_is(inside):
    note = f"---\n{inside}\n---\nBody.\n"
    assert without_front_matter(note) == note


def test_toml_is_parsed_and_other_text_between_plus_signs_stays():
    assert without_front_matter("+++\ntitle = 'It is'\ndate = 2024-05-01\n+++\nBody.") == "# It is\n\nBody."
    note = "+++\nnot = = toml\n+++\nBody."
    assert without_front_matter(note) == note


LAUGHS = "".join(f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi"))
HOSTILE = {
    "laughs": f"title: x\na: &a [1,1,1,1,1,1,1,1,1]\n{LAUGHS}",
    "brackets": "title: x\ntags: " + "[" * 8_000,
    "braces": "title: x\na: " + "{a: " * 5_000,
    "digits": "title: " + "9" * 30_000,
    "dashes": "title: x\n" + "- " * 10_000,
    "integer": "title: !!int " + "9" * 30_000,
    "loop": "title: &a [*a]",
    "keys": "title: x\n? " * 3_000,
    "anchors": "&" * 30_000,
    "escapes": 'title: "' + "\\" * 30_000,
    "tags": "title: x\ntags: [" + "a, " * 10_000 + "]",
    "pairs": "title: x\n" + "k: v\n" * 6_000,
    "spaces": "title: a: " + " " * 30_000 + "b",
}


@pytest.mark.parametrize("inside", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("fence", ["---", "+++"])
def test_hostile_front_matter_is_cheap_and_loses_nothing_below_it(fence, inside):
    started = time.process_time()
    assert without_front_matter(f"{fence}\n{inside}\n{fence}\nBody.").endswith("Body.")
    assert time.process_time() - started < 1


def test_a_drawing_is_no_note(tmp_path):
    (tmp_path / "a.md").write_text("---\nexcalidraw-plugin: parsed\ntags: [excalidraw]\n---\nN4KAkARAL\n")
    (tmp_path / "b.excalidraw.md").write_text("N4KAkARAL\n")
    (tmp_path / "c.md").write_text("---\nkanban-plugin: board\n---\n- [ ] oil the chain\n")
    for recipe in ("notes", "raw"):
        reading = read_notes([tmp_path], DataConfig(recipe=recipe))
        assert {skip.path: skip.reason for skip in reading.skipped} == {
            "a.md": Reason.DRAWING,
            "b.excalidraw.md": Reason.DRAWING,
        }
    assert read_notes([tmp_path]).documents[0].text == "- [ ] oil the chain\n"


def test_a_second_byte_order_mark_hides_no_front_matter(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf---\ntitle: two marks\n---\nText.\n")
    assert read_notes([tmp_path]).documents[0].text == "# two marks\n\nText.\n"
