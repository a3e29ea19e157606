"""Untrusted JSON is read in one place, with a limit for each kind of file."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.runtime.errors import AdapterError, EdgetuneError
from edgetune.runtime.json_file import read_object, read_object_if_there, read_value
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG, read_untrusted

ROOT = Path(__file__).resolve().parent.parent


def test_an_object_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.json").write_text('{"name": "Zoë"}', encoding=encoding)
        assert read_object(tmp_path / "a.json", ADAPTER_CONFIG) == {"name": "Zoë"}


def test_a_file_that_may_be_missing_is_an_empty_object(tmp_path: Path) -> None:
    assert read_object_if_there(tmp_path / "a.json", ADAPTER_CONFIG) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", "does not hold a JSON object; copy the adapter again"),
        (b"{", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "a name is repeated"),
        (b'{"a": NaN}', "it holds NaN"),
        (b'{"a": 1e999}', "a number that is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_each_fault_is_one_sentence_that_names_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=said) as found:
        read_object(path, ADAPTER_CONFIG)
    assert str(path) in str(found.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(AdapterError, match="cannot be read"):
            read_value(path, ADAPTER_CONFIG)


def test_a_file_at_its_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (1 << 20))
    kind = replace(ADAPTER_CONFIG, limit=1 << 20)
    assert len(read_untrusted(tmp_path / "a", kind)) == kind.limit
    (tmp_path / "a").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(EdgetuneError, match="larger than 1 MiB"):
        read_untrusted(tmp_path / "a", kind)


@pytest.mark.parametrize("floor", ["runtime", "export"])
def test_nothing_else_below_the_product_parses_a_file_of_json(floor: str) -> None:
    """Only json_file.py calls json.loads on the content of a path; other modules call it on bytes that were checked before."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / floor).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load")
        if any(word in ast.unparse(node) for word in ("read_text", "read_bytes", "open("))
    ]
    assert [place for place in found if "llamacpp.py" not in place] == []  # llamacpp.py reads its own child's answer
