"""Every ctypes.Structure of the CPU back end is laid out like its C++ struct, as the compiled library reports it."""

from __future__ import annotations

import ctypes
import importlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import pytest

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="the C++ kernels were not built")
library = importlib.import_module("edgetune.runtime.backends.cpu.library")

# Maps each field's name to its offset and size in bytes, in the order of the struct.
Fields = dict[str, tuple[int, int]]


@dataclass
class Layout:
    name: str
    size: int
    fields: Fields = field(default_factory=dict)


def library_layouts() -> list[Layout]:
    """Return the C++ structs from layout.inl's list, in which an entry without a field's name begins a new struct."""
    loaded, layouts = library.load(), list[Layout]()
    structure, name, offset, size = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int64(), ctypes.c_int64()
    pointers = [ctypes.byref(place) for place in (structure, name, offset, size)]
    index = 0
    while loaded.et_layout(index, *pointers):
        if name.value:
            layouts[-1].fields[name.value.decode()] = (offset.value, size.value)
        else:
            layouts.append(Layout(structure.value.decode(), size.value))
        index += 1
    return layouts


def python_layouts() -> list[Layout]:
    """Return the ctypes.Structures that the package's modules define."""
    found = {}
    for path in sorted(Path(cpu.__file__).parent.glob("*.py")):
        # build.py needs setuptools and defines no structures.
        if path.stem in ("__init__", "build"):
            continue
        loaded = importlib.import_module(f"{cpu.__name__}.{path.stem}")
        for _, kind in inspect.getmembers(loaded, inspect.isclass):
            if issubclass(kind, ctypes.Structure) and kind.__module__ == loaded.__name__:
                found[kind] = Layout(f"{loaded.__name__}.{kind.__name__}", ctypes.sizeof(kind), fields_of(kind))
    return list(found.values())


def fields_of(kind: type[ctypes.Structure]) -> Fields:
    return {name: (getattr(kind, name).offset, getattr(kind, name).size) for name, *_ in kind._fields_}


def counterpart(layout: Layout, others: list[Layout]) -> Layout:
    """Return the layout that shares the most field names with `layout`, since the two sides name their structs differently."""

    def likeness(other: Layout) -> float:
        mine, theirs = set(layout.fields), set(other.fields)
        return len(mine & theirs) / len(mine | theirs)

    return max(others, key=likeness)


@pytest.mark.parametrize("layout", python_layouts(), ids=lambda layout: layout.name.removeprefix(f"{cpu.__name__}."))
def test_a_structure_is_laid_out_like_its_cpp_struct(layout: Layout) -> None:
    other = counterpart(layout, library_layouts())
    assert list(layout.fields.items()) == list(other.fields.items()), f"{layout.name} differs from structures.h's {other.name}"
    assert layout.size == other.size, f"{layout.name} has {layout.size} bytes; structures.h's {other.name} has {other.size}"


def test_every_cpp_struct_has_exactly_one_structure() -> None:
    structs = library_layouts()
    mirrored = sorted(counterpart(layout, structs).name for layout in python_layouts())
    assert mirrored == sorted(struct.name for struct in structs)
