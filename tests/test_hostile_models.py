"""Folders and files that were made to do harm, or are damaged: each is refused in one sentence, soon and in little memory.

The real commands run in this process. tests/test_checkpoint.py has the faults of a safetensors header one by one.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from adapters import random_adapter
from safetensors.torch import load_file, save_file
from tiny import save_trainable

from edgetune.cli.main import main
from edgetune.export.gguf import adapter as gguf_adapter
from edgetune.library import adapter_registry as registry
from edgetune.library import loading
from edgetune.library.places import newest_snapshot
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.model_folder import write_settings
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import SafetensorsFile

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses links, FIFOs and the memory that Unix reports")
LONGEST_MESSAGE = 2000
"""Longest message in characters: twelve faults, each with the name of a tensor."""
MOST_MEMORY = 1 << 30
"""Upper bound in bytes on what the peak memory of this process may grow by."""
WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Places:
    """Good folders, to be copied and spoilt: a dense model, two 4-bit ones, an adapter of each format, and notes."""

    root: Path

    def copy(self, name: str, to: Path) -> Path:
        source = self.root / name
        shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to)
        return to


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("good")
    save_trainable(root / "dense")
    quantize_folder(root / "dense", root / "double")
    quantize_folder(root / "dense", root / "single", double_quant=False)
    base = open_model(root / "dense")
    peft_folder.save(random_adapter(base.config, targets=("q_proj",)), root / "adapter", "a base")
    (root / "notes").mkdir()
    (root / "notes" / "a.md").write_text("The lighthouse keeper wrote it down.")
    return Places(root)


def edgetune(*arguments: object) -> int:
    """Run the `edgetune` command and return its exit code; what it does not expect itself is raised."""
    before, sys.argv = sys.argv, ["edgetune", *map(str, arguments)]
    try:
        with patch("edgetune.cli.main.give_up_network"):  # which would last as long as the tests
            main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the command did not end")


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def assert_refused(capsys: pytest.CaptureFixture[str], said: str, *arguments: object) -> None:
    """Run a command, which must end with one sentence that contains `said`, and in little memory."""
    before = peak_memory()
    code, captured = edgetune(*arguments), capsys.readouterr()
    assert code in (1, 2), captured.out[-300:]
    assert peak_memory() - before < MOST_MEMORY
    *first, message = captured.err.strip().splitlines()
    assert [line for line in first if not line.startswith("Model ")] == []
    assert message.startswith("edgetune: ")
    assert message.endswith((".", "`"))
    assert len(message) < LONGEST_MESSAGE
    assert "Traceback" not in captured.err + captured.out
    assert said in message


Change = Callable[[Path], object]
MODELS: dict[str, tuple[str, str, Change]] = {}
"""For each bad model: the good one that it is made of, a part of the message that refuses it, and the change."""


def config(said: str = "config.json", **values: object) -> tuple[str, str, Change]:
    """Set keys of config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return "dense", said, change


def config_text(text: str) -> tuple[str, str, Change]:
    """Put a text after the first brace of config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(file.read_text().replace("{", "{" + text + ", ", 1))

    return "dense", "config.json is not valid JSON", change


def content(file: str, data: bytes, said: str) -> tuple[str, str, Change]:
    """Replace a file."""
    return "dense", said, lambda folder: (folder / file).write_bytes(data)


def weights(said: str, header: object, data: bytes = b"") -> tuple[str, str, Change]:
    """Replace the weights by a file with this header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return content(WEIGHTS, struct.pack("<Q", len(raw)) + raw + data, said)


def index(said: str, make: Callable[[Iterable[str]], object]) -> tuple[str, str, Change]:
    """Add an index, made from the names of the tensors."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        (folder / INDEX).write_text(json.dumps(make(load_file(folder / SHARD).keys())))

    return "dense", said, change


def state(said: str, **values: object) -> tuple[str, str, Change]:
    """Change the quant_state of a 4-bit weight; `raw` replaces it whole."""

    def changed(old: torch.Tensor) -> torch.Tensor:
        raw = values.get("raw") or json.dumps({**json.loads(bytes(old.tolist())), **values}).encode().ljust(256)
        assert isinstance(raw, bytes)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    return part(said, ".quant_state.bitsandbytes__nf4", changed)


def part(
    said: str, suffix: str, change: Callable[[torch.Tensor], torch.Tensor], model: str = "double"
) -> tuple[str, str, Change]:
    """Change a stored part of a 4-bit weight."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = f"model.layers.0.self_attn.q_proj.weight{suffix}"
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS)

    return model, said, write


def special(file: str, make: Callable[[Path], object], said: str) -> tuple[str, str, Change]:
    """Put something that is no regular file in a file's place."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return "dense", said, change


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2) + b"{}")
        file.truncate(1 << 36)


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
for size in SIZES:
    for what, value in {
        "a word": "many", "10^30": 10**30, "2^62": 2**62, "negative": -4, "a list": [64], "an object": {"a": 1}, "true": True
    }.items():  # fmt: skip
        MODELS[f"{size} is {what}"] = config("config.json", **{size: value})
for what, value in {"a word": "abc", "a list": ["a", None], "an object": {"a": [1]}, "negative": -1}.items():
    MODELS[f"rope_theta is {what}"] = config(rope_theta=value)
for what, value in {"a word": "abc", "a list": ["a"], "a number": 3, "of an unknown key": {"1": 2}}.items():
    MODELS[f"rope_scaling is {what}"] = config("", rope_scaling=value)
MODELS |= {
    "a repeated key": config_text('"hidden_size": 32'),
    "half a surrogate pair": config_text('"_name_or_path": "\\ud800"'),
    "NaN": config_text('"attention_dropout": NaN'),
    "a number beyond a double": config_text('"attention_dropout": 1e999'),
    "a number of 5,000 digits": config_text(f'"pad_token_id": {"9" * 5000}'),
    "config.json is empty": content("config.json", b"", "config.json is not valid JSON"),
    "config.json is UTF-16": content("config.json", '{"a": 1}'.encode("utf-16"), "config.json is not valid JSON"),
    "config.json is a list": content("config.json", b"[]", "config.json does not hold a JSON object"),
    "config.json is nested deep": content("config.json", b'{"a":' + b"[" * 100_000, "config.json is not valid JSON"),
    "config.json is Latin-1": content("config.json", b'{"a": "\xff"}', "config.json is not valid JSON"),
}
MODELS |= {
    "a shard's name of 5,000 characters": index(
        "names 'xxx", lambda names: {"weight_map": dict.fromkeys(names, f"{'x' * 5000}.safetensors")}
    ),
    "a shard's name with a NUL": index("names 'a", lambda names: {"weight_map": dict.fromkeys(names, "a\0b.safetensors")}),
    "a shard's name with a newline": index("names 'a", lambda names: {"weight_map": dict.fromkeys(names, "a.safetensors\n")}),
    "a shard outside": index("names '../", lambda names: {"weight_map": dict.fromkeys(names, f"../dense/{WEIGHTS}")}),
    "a shard that is a number": index("has no weight_map", lambda names: {"weight_map": dict.fromkeys(names, 1)}),
    "an index that is a list": index("does not hold a JSON object", lambda names: list(names)),
    "an index of 5,000 shards": index(
        "names 5,000 files of weights; expected at most 512",
        lambda _: {"weight_map": {f"t{n}": f"model-{n}.safetensors" for n in range(5000)}},
    ),
    "an index with half a surrogate pair": index("half of a surrogate pair", lambda _: {"weight_map": {"a\ud800": SHARD}}),
}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
MODELS |= {
    "a million tensors": weights("its header would take", b"{" + b",".join(b'"%d":{}' % n for n in range(1_000_000)) + b"}"),
    "a header of empty lists": weights("its header is not a JSON object", b"[" + b"[]," * 300_000 + b"[]]"),
    "a header of objects": weights("lacks a dtype", b'{"a":[' + b'{"":0},' * 500_000 + b"0]}"),
    "many empty tensors": weights("is missing", {str(n): EMPTY for n in range(20_000)}),
    "a name of a million characters": weights("of dtype 'F99'", {"x" * 1_000_000: {**EMPTY, "dtype": "F99"}}),
    "a thousand dimensions": weights(
        "has 1000 dimensions", {"a": {**EMPTY, "shape": [2**47] * 1000, "data_offsets": [0, 4]}}, b"1234"
    ),
    "a name with half a surrogate pair": weights(
        "is not valid JSON", b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"
    ),
    "tensors over each other": weights(
        "overlaps another tensor", {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)
    ),
    "sparse weights": special(WEIGHTS, sparse, "is a sparse file"),
}
MODELS |= {
    "a state without dimensions": state("its shape [] is not a list of two positive numbers", shape=[]),
    "a state of three dimensions": state("is not a list of two positive numbers", shape=[8, 8, 64]),
    "a state of another shape": state("has shape [32, 128]", shape=[32, 128]),
    "a state whose sizes are text": state("is not a list of two positive numbers", shape=["64", "64"]),
    "a state of 2^60 numbers": state("too few or many", shape=[2**30, 2**30]),
    "a state whose dtype is a list": state("dtype ['bfloat16']", dtype=["bfloat16"]),
    "a state whose block size is a list": state("its block size [64]", blocksize=[64]),
    "a state whose block size is 63": state("its block size 63", blocksize=63),
    "a state with a huge offset": state("or offset 1000", nested_offset=10**300),
    "a state with an offset that is text": state("or offset '1'", nested_offset="1"),
    "a state of another type": state("its data type is 'xxx", quant_type="x" * 10_000),
    "a state that is no text": state("its quant_state is not valid JSON", raw=b"\xff" * 10),
    "a state that is a list": state("its quant_state is not valid JSON or lacks a key", raw=b"[]"),
    "a state with 5,000 digits": state(
        "its quant_state is not valid JSON", raw=b'{"quant_type":"nf4","blocksize":' + b"9" * 5000 + b"}"
    ),
    "scales in two dimensions": part("absmax has shape [1, 64]", ".absmax", lambda old: old.view(1, -1)),
    "scales that are int64": part("absmax is torch.int64", ".absmax", lambda old: old.long()),
    "a code too few": part("too few or many", "", lambda old: old[:-1]),
    "nested scales in three dimensions": part(
        "nested_absmax has shape [1, 1, 1]", ".nested_absmax", lambda old: old.view(1, 1, 1)
    ),
    "nested scales that are NaN": part(
        "holds inf or NaN in model.layers.0.self_attn.q_proj.weight.nested_absmax",
        ".nested_absmax",
        lambda old: old * float("nan"),
    ),
    "a nested table that is NaN": part(
        "holds inf or NaN in model.layers.0.self_attn.q_proj.weight.nested_quant_map",
        ".nested_quant_map",
        lambda old: old * float("nan"),
    ),
    "single scales that are inf": part(
        "holds inf or NaN in model.layers.0.self_attn.q_proj.weight.absmax", ".absmax", lambda old: old * float("inf"), "single"
    ),
}
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to /proc/self/environ": (lambda path: path.symlink_to("/proc/self/environ"), "is a link that leaves its folder"),
    "a link to a private file": (lambda path: path.symlink_to("/etc/passwd"), "is a link that leaves its folder"),
    "a link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), "is a link that leaves its folder"),
    "a loop of links": (lambda path: path.symlink_to(path.name), "a loop of links"),
    "a FIFO": (os.mkfifo, "is not a regular file"),
    "sparse": (sparse, "is larger than "),
}  # fmt: skip
COPIED = ("LICENSE", "NOTICE.txt", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.json")
"""Files that `edgetune quantize` and exports copy without reading them."""


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_refused_by_every_command(
    name: str, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, said, change = MODELS[name]
    folder = places.copy(model, tmp_path / "model")
    change(folder)
    assert_refused(capsys, said, "eval", places.root / "notes", "--model", folder, "--adapter", "none")
    if model == "dense":
        assert_refused(capsys, said, "quantize", folder, tmp_path / "out")
    export = ("export", "hf", "--model", folder, "--adapter", "none", "--out", tmp_path / "out", "--no-verify")
    assert_refused(capsys, said, *export)
    assert not (tmp_path / "out").exists()
    before = peak_memory()
    assert edgetune("models", folder) == 0  # the list survives, and says why
    assert peak_memory() - before < MOST_MEMORY
    assert len(capsys.readouterr().out) < 2 * LONGEST_MESSAGE


@pytest.mark.parametrize("file", COPIED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_companion_that_is_no_plain_file_of_the_folder_is_never_copied(
    file: str, kind: str, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = KINDS[kind]
    make(places.copy("dense", tmp_path / "model") / file)
    for arguments in (
        ("quantize", tmp_path / "model", tmp_path / "out"),
        ("export", "mps", "--model", tmp_path / "model", "--adapter", "none", "--out", tmp_path / "out", "--no-verify"),
    ):
        assert_refused(capsys, f"{file} ", *arguments)
        assert_refused(capsys, said, *arguments)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("numbers", [1 << 60, (1 << 63) - 1])
def test_memory_that_the_system_refuses_is_one_sentence(
    numbers: int, places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for ask in (lambda *_: torch.empty(numbers, dtype=torch.uint8), lambda *_: bytearray(numbers)):
        monkeypatch.setattr(loading, "open_model", ask)
        said = "This machine has too little free memory for that."
        assert_refused(capsys, said, "generate", "hi", "--model", places.root / "dense", "--adapter", "none")


def test_many_licences_are_not_copied(places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = places.copy("dense", tmp_path / "model")
    (folder / "LICENSE").write_text("a licence")
    for number in range(20):
        os.link(folder / "LICENSE", folder / f"LICENSE.{number}")
    assert_refused(capsys, "has 21 licences and notices; expected at most 16", "quantize", folder, tmp_path / "out")


def test_what_names_code_does_not_reach_an_export(places: Places, tmp_path: Path) -> None:
    folder = places.copy("dense", tmp_path / "model")
    copied = json.loads((folder / "config.json").read_text())
    outside = {
        "auto_map": {"AutoModel": "evil.Model"}, "model_file": "evil.py", "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel", "_name_or_path": "/home/somebody/model", "custom_pipelines": {"a": "evil.py"},
        "trust_remote_code": True, "_commit_hash": "a1b2", "_attn_implementation_autoset": True,
    }  # fmt: skip
    write_settings(folder, tmp_path, {**copied, **outside})
    assert json.loads((tmp_path / "config.json").read_text()) == copied


def test_a_revision_of_the_cache_that_never_ends_is_not_read(tmp_path: Path) -> None:
    entry = tmp_path / "models--a--b"
    (entry / "snapshots" / "1234").mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").symlink_to("/dev/zero")
    assert newest_snapshot(entry) == entry / "snapshots" / "1234"


# --- adapters ---------------------------------------------------------------------------------------------------------

PEFT_CONFIGS: dict[str, Any] = {
    "rank as text": {"r": "4"}, "a rank of 10^20": {"r": 10**20}, "a rank of 10^300": {"r": 10**300}, "a rank of 0": {"r": 0},
    "no rank": {"r": None}, "alpha as a word": {"lora_alpha": "much"}, "a huge alpha": {"lora_alpha": 10**300},
    "alpha as a list": {"lora_alpha": [8]}, "dropout of 2": {"lora_dropout": 2}, "dropout as a list": {"lora_dropout": [0]},
    "a huge layer": {"layers_to_transform": [10**9]}, "a negative layer": {"layers_to_transform": -1},
    "a layer as text": {"layers_to_transform": ["0"]}, "another kind": {"peft_type": ["LORA"]},
    "a start that changes the base": {"init_lora_weights": {"a": 1}}, "a bias": {"bias": "all"},
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_bad_adapter_config_is_refused(name: str, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = places.copy("adapter", tmp_path / "adapter")
    file = folder / peft_folder.CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **PEFT_CONFIGS[name]}))
    assert_refused(capsys, "dapter", "adapters", "import", folder, "--model", places.root / "dense")


@pytest.mark.parametrize("file", [peft_folder.CONFIG_FILE, peft_folder.WEIGHTS_FILE, peft_folder.EDGETUNE_FILE])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_odd_files_is_refused(
    kind: str, file: str, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (make, _) = places.copy("adapter", tmp_path / "adapter"), KINDS[kind]
    (folder / file).unlink()
    make(folder / file)
    assert_refused(capsys, "dapter", "adapters", "import", folder, "--model", places.root / "dense")


@pytest.mark.parametrize(("shape", "part"), [((8, 1 << 20), "A"), ((1 << 20, 8), "B"), ((1 << 13, 64), "A")])
def test_a_matrix_that_cannot_fit_is_named_and_never_read(
    shape: tuple[int, int], part: str, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = places.copy("adapter", tmp_path / "adapter"), open_model(places.root / "dense").config
    tensors = load_file(folder / peft_folder.WEIGHTS_FILE)
    name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
    save_file({**tensors, name: torch.zeros(shape)}, folder / peft_folder.WEIGHTS_FILE)
    monkeypatch.setattr(SafetensorsFile, "tensor", None)  # no value is read
    with pytest.raises(AdapterError, match=rf"layer 0 q_proj: .*{shape[0]}, {shape[1]}"):
        registry.read(folder, base)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (1, 64), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def gguf(*tensors: bytes, keys: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, data: int = 512) -> bytes:
    """Return a GGUF adapter; `counts` are the numbers of tensors and keys that it announces."""
    named = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    all_keys = [*(key(name, 8, text(value)) for name, value in named.items()), *keys]
    head = struct.pack("<4sIQQ", b"GGUF", 3, *(counts or (len(tensors), len(all_keys))))
    body = head + b"".join(all_keys) + b"".join(tensors)
    return body + bytes(-len(body) % 32 + data)


A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
U32, U64, ARRAY = 4, 10, 9
GGUF_FILES = {
    "alignment 7": (
        gguf(tensor(A), keys=(key("general.alignment", U32, struct.pack("<I", 7)),)),
        "its alignment is 7, expected",
    ),
    "alignment 0": (
        gguf(tensor(A), keys=(key("general.alignment", U32, struct.pack("<I", 0)),)),
        "its alignment is 0, expected",
    ),
    "alignment 2^31": (
        gguf(tensor(A), keys=(key("general.alignment", U32, struct.pack("<I", 1 << 31)),)),
        "its alignment is 2147",
    ),
    "alignment as text": (gguf(tensor(A), keys=(key("general.alignment", 8, text("32")),)), "its alignment is 32, expected"),
    "a repeated key": (gguf(tensor(A), keys=(key("general.type", 8, text("model")),)), "'general.type' is given twice"),
    "a repeated tensor": (gguf(tensor(A), tensor(A, offset=256)), "is given twice"),
    "tensors over each other": (gguf(tensor(A), tensor(B, (64, 1))), "its tensors overlap"),
    "a tensor beyond the end": (gguf(tensor(A, offset=1 << 40)), "beyond the file's end"),
    "a tensor at an odd place": (gguf(tensor(A, offset=7)), "does not begin at a multiple of the alignment, 32"),
    "an offset near 2^64": (gguf(tensor(A, offset=2**64 - 32)), "beyond the file's end"),
    "sizes of 2^62": (gguf(tensor(A, (1 << 62, 1 << 62))), "beyond the file's end"),
    "a size of 0": (gguf(tensor(A, (0, 64))), "not a matrix"),
    "no dimensions": (gguf(tensor(A, ())), "has 0 dimensions"),
    "2^31 dimensions": (gguf(text(A) + struct.pack("<I", 1 << 31)), "has 2147483648 dimensions"),
    "an unknown type of tensor": (gguf(tensor(A, kind=99_999)), "neither f32 nor f16 nor bf16"),
    "2^60 tensors": (gguf(counts=(1 << 60, 3)), "it announces"),
    "2^60 keys": (gguf(counts=(0, 1 << 60)), "it announces"),
    "a text of 2^60 bytes": (gguf(keys=(struct.pack("<Q", 1 << 60),)), "it holds a text of"),
    "an array of 2^60 items": (gguf(keys=(key("a", ARRAY, struct.pack("<IQ", U32, 1 << 60)),)), "it holds an array of"),
    "arrays in an array": (gguf(keys=(key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1)),)), "it holds an array of"),
    "a value of an unknown type": (gguf(keys=(key("a", 77, b""),)), "of the unknown type 77"),
    "a key that is no text": (gguf(keys=(text(b"\xff") + struct.pack("<I", U32),)), "is not a usable GGUF LoRA adapter"),
    "version 1": (gguf().replace(b"\3\0\0\0", b"\1\0\0\0", 1), "does not begin with GGUF, version 2 or 3"),
    "an empty file": (b"", "is not a usable GGUF LoRA adapter"),
    "no tensors": (gguf(), "it holds no tensors"),
    "64-bit alignment": (
        gguf(tensor(A), keys=(key("general.alignment", U64, struct.pack("<Q", 1 << 63)),)),
        "its alignment is 9223",
    ),
}


@pytest.mark.parametrize("name", GGUF_FILES)
def test_a_bad_gguf_adapter_is_refused(name: str, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, said = GGUF_FILES[name]
    (tmp_path / "a.gguf").write_bytes(data)
    assert_refused(capsys, said, "adapters", "import", tmp_path / "a.gguf", "--model", places.root / "dense")


def test_a_gguf_matrix_that_cannot_fit_is_named_and_never_read(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_model(places.root / "dense").config
    (tmp_path / "a.gguf").write_bytes(gguf(tensor(A, (4, 4096)), tensor(B, (64, 4), offset=1 << 16), data=1 << 17))
    monkeypatch.setattr(torch, "frombuffer", None)  # no value is read
    with pytest.raises(AdapterError, match=r"lora_A is \(4, 4096\)"):
        gguf_adapter.read_adapter(tmp_path / "a.gguf", base)
