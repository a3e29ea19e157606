"""The readers to be fuzzed: for each, valid inputs to start from, and a function that reads a changed one.

A reader either works or raises one of the errors that it promises; where that is an EdgetuneError, its text is one sentence.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapters import random_adapter
from corpus.gguf_files import packed as gguf
from corpus.gguf_models import keys
from corpus.tokenizers import byte_level
from tiny import save_trainable

import edgetune
from edgetune.config_file import train_config
from edgetune.conversion.convert import convert
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.chats import encoding_of_chats, read_chats
from edgetune.documents.document import Document
from edgetune.documents.encoding import NotText, decode
from edgetune.documents.front_matter import split_front_matter
from edgetune.documents.reading import read_notes
from edgetune.export import go_template, mps
from edgetune.export.mlx import adapter as mlx_adapter
from edgetune.library import adapter_registry, kept_adapters
from edgetune.parsing import parse_bytes, seconds_until
from edgetune.runtime import bnb_layout, json_file, peft_folder
from edgetune.runtime.adapter import check_fits
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import EdgetuneError
from edgetune.runtime.safetensors_file import SafetensorsFile
from edgetune.runtime.templates import ChatTemplate
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training.sealed_files import DamagedError, read_sealed, write_sealed
from edgetune.training.unfinished_run import UnfinishedRun

TEXT = "The beans grew 12 cm.\n\n</s> é 日本 😀 \x00\t  x"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "Yes. "},
]
DEMO = Path(edgetune.__file__).parent / "demo"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>"
JINJA = (
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if true %}", "{% else %}",
        "{% endif %}",
    "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{% set x = messages %}", "{% set x = x ~ x %}", "{{ x * 99999 }}",
        "|list",
    "|join", "|length", "|tojson", "|replace('', x)", "|center(99999999)", "|indent(9999999)", "|map(attribute='__class__')",
    "|batch(0)", "|slice(0)", "|round(99)", "|truncate(-1)", "|xmlattr", "|format(x)", "|wordwrap(1)", "{{ x.__class__ }}",
    "{{ x[99999:-1:-1] }}", "{{ 2 ** 99999 }}", "{{ 1 / 0 }}", "{{ range(9**9) }}", "{{ '%s' % x }}", "{{ '{0.a}'.format(x) }}",
    "{{ raise_exception(x) }}", "{{ strftime_now(x) }}", "{% break %}", "{% continue %}", "{% generation %}",
        "{% endgeneration %}",
    "{{ namespace(a=x) }}", "{% call f() %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}",
        "{{ loop.cycle() }}", "{# ",
    " #}", "{%- ", " -%}", "{{ '", "' }}", "(" * 50, "[" * 50, "{{ x.append(x) }}", "{{ joiner(x)() }}",
        "{{ cycler(x).next() }}",
)  # fmt: skip
"""Pieces of chat templates, from which some inputs are made."""


@dataclass(frozen=True)
class Target:
    """A reader. `read` gets a changed input and an empty folder; `raises` are the errors that it promises."""

    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[bytes, Path], object]
    raises: tuple[type[Exception], ...] = (EdgetuneError,)


TARGETS: dict[str, Target] = {}


def target(
    name: str, seeds: Callable[[], Sequence[bytes]], *raises: type[Exception]
) -> Callable[[Callable[[bytes, Path], object]], None]:
    """Return a decorator that adds a reader under a name."""

    def add(read: Callable[[bytes, Path], object]) -> None:
        TARGETS[name] = Target(functools.cache(seeds), read, raises or (EdgetuneError,))

    return add


# --- valid inputs -------------------------------------------------------------------------------------------------------


@functools.cache
def model() -> Path:
    """Return a tiny LLaMA with a chat template."""
    folder = Path(tempfile.mkdtemp(prefix="edgetune-fuzz-")).resolve() / "model"
    save_trainable(folder, width=16, inner=32, layers=1)
    shutil.copy(DEMO / "chat_template.jinja", folder)
    return folder


@functools.cache
def base() -> Checkpoint:
    """Return the tiny LLaMA, opened."""
    return open_model(model())


@functools.cache
def saved() -> Path:
    """Return a folder with two forms of an adapter, and a sealed file, a bundle's manifest, a run and a token store."""
    folder = model().parent / "saved"
    adapter = random_adapter(base().config)
    peft_folder.save(adapter, folder / "peft", "base")
    (folder / "mlx").mkdir()
    mlx_adapter.write_adapter(adapter, folder / "mlx", "base", 1)
    write_sealed(folder / "sealed", {"a": torch.ones(5, 3), "b": torch.arange(4)}, {"state": json.dumps({"step": 3})})
    tokenize([Document.of("a.md", TEXT)], Tokenizer.load(model()), folder / "tokens")
    run = folder / "run"
    run.mkdir()
    UnfinishedRun(run).begin({"plan": {"steps": 3}, "threads": 2, "names": ["a"]})
    digests = dict.fromkeys(("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), "0" * 64)
    manifest = {"format": 1, "base": "0", "kernels": {}, "adapter": "adapter", "sha256": digests}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def files(*names: str) -> Callable[[], list[bytes]]:
    """Return a function that reads files below the folder of `saved`, or the model's."""
    return lambda: [(saved() / name if (saved() / name).exists() else model() / name).read_bytes() for name in names]


def texts(*values: str) -> Callable[[], list[bytes]]:
    """Return a function that returns texts as bytes."""
    return lambda: [value.encode() for value in values]


def copy(source: Path, folder: Path, **replaced: bytes) -> Path:
    """Link a folder's files into another, with the files in `replaced` written anew (`__` stands for a dot)."""
    for file in source.iterdir():
        os.link(file, folder / file.name)
    for name, data in replaced.items():
        path = folder / name.replace("__", ".")
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    return folder


# --- models ---------------------------------------------------------------------------------------------------------------


def small_weights() -> list[bytes]:
    """Return safetensors files of a few tensors."""
    return files("sealed", "peft/adapter_model.safetensors")()


@target("safetensors", small_weights)
def _(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    file = SafetensorsFile.open(folder / "x.safetensors")
    for name in file.tensors:
        file.tensor(name, 64).float().sum()


@target("JSON", files("config.json", "peft/adapter_config.json", "manifest.json"), ValueError)
def _(data: bytes, folder: Path) -> None:
    json.dumps(json_file.parse(data), ensure_ascii=False, allow_nan=False).encode()


@target("config.json", files("config.json"))
def _(data: bytes, folder: Path) -> None:
    opened = open_model(copy(model(), folder, config__json=data))
    assert opened.config.num_layers == 1


@target("index of shards", lambda: [json.dumps({"weight_map": dict.fromkeys(base().stored, "a.safetensors")}).encode()])
def _(data: bytes, folder: Path) -> None:
    copy(model(), folder, model__safetensors__index__json=data)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    open_model(folder)


@target(
    "state of a 4-bit weight",
    texts(
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [16, 16], '
        '"nested_blocksize": 256, "nested_offset": 0.1}'
    ),
    ValueError,
)
def _(data: bytes, folder: Path) -> None:
    bnb_layout.parse_state(data)


def small_gguf(dtype: torch.dtype) -> bytes:
    """Return a LLaMA of one layer with a vocabulary of 300 pieces as a GGUF file, its matrices in a dtype."""
    sizes = {"block_count": 1, "embedding_length": 16, "feed_forward_length": 32, "attention__head_count_kv": 4}
    content = keys(**sizes)
    content |= {name: value[:300] for name, value in content.items() if isinstance(value, list)}
    shapes = {"token_embd": (300, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {f"blk.0.attn_{name}": (16, 16) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32)}
    ones = {f"{name}.weight": torch.ones(shape, dtype=dtype if len(shape) == 2 else None) for name, shape in shapes.items()}
    return gguf(content, ones)


@target("GGUF models", lambda: [small_gguf(torch.float32), small_gguf(torch.bfloat16)])
def _(data: bytes, folder: Path) -> None:
    (folder / "x.gguf").write_bytes(data)
    convert(folder / "x.gguf", folder / "converted", "x", "nf4")


# --- tokenizers and templates -----------------------------------------------------------------------------------------------


def tokenizes(folder: Path) -> None:
    """Open a folder's tokenizer, and encode and decode with it."""
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids).encode()
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    if tokenizer.has_template:
        tokenizer.encode_chat(CHAT)


@target("tokenizer.json", lambda: [json.dumps(byte_level()).encode()])
def _(data: bytes, folder: Path) -> None:
    copy(model(), folder, tokenizer__json=data)
    tokenizes(folder)


@target("tokenizer.model", files("tokenizer.model"))
def _(data: bytes, folder: Path) -> None:
    tokenizes(copy(model(), folder, tokenizer__model=data))


ADDED = '{"added_tokens_decoder": {"3": {"content": "<|end|>", "special": true, "lstrip": true, "rstrip": true}}}'


@target(
    "tokenizer_config.json",
    lambda: [*files("tokenizer_config.json", "config.json")(), *texts(ADDED)()],
)
def _(data: bytes, folder: Path) -> None:
    tokenizes(copy(model(), folder, tokenizer_config__json=data, special_tokens_map__json=data, added_tokens__json=b"{}"))


@target(
    "chat template",
    lambda: [*files("chat_template.jinja")(), *texts("{{ bos_token }}{% for m in messages %}{{ m.role }}{% endfor %}")()],
)
def _(data: bytes, folder: Path) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), "x", {"bos_token": "<s>"})
    template.render(CHAT).encode("utf-8", "surrogatepass")


@target("chat template made of pieces", lambda: [str(number).encode() for number in range(64)])
def _(data: bytes, folder: Path) -> None:
    chance = random.Random(data)
    source = "".join(chance.choice(JINJA) for _ in range(chance.randint(1, 14)))
    ChatTemplate(source, "x", {"bos_token": "<s>"}).render(CHAT)


@target(
    "Go template derived from a chat template", lambda: files("chat_template.jinja")() + texts(CHATML, "{{'{'}}" + CHATML)()
)
def _(data: bytes, folder: Path) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), "x", {"eos_token": "</s>"})
    go_template.derive(template.render, "")


# --- adapters -------------------------------------------------------------------------------------------------------------


def opens(path: Path) -> None:
    """Open an adapter as `--adapter` does."""
    adapter = adapter_registry.load_for(path, base())
    check_fits(adapter, base().config)


@target("PEFT's adapter_config.json", files("peft/adapter_config.json"))
def _(data: bytes, folder: Path) -> None:
    opens(copy(saved() / "peft", folder, adapter_config__json=data))


@target("PEFT's matrices", files("peft/adapter_model.safetensors"))
def _(data: bytes, folder: Path) -> None:
    opens(copy(saved() / "peft", folder, adapter_model__safetensors=data))


@target("edgetune.json", texts('{"base": null, "heldout_bits_per_byte_before": 2.5, "documents": ["00"]}'))
def _(data: bytes, folder: Path) -> None:
    kept_adapters.describe(copy(saved() / "peft", folder, edgetune__json=data))


@target("mlx-lm's adapter_config.json", files("mlx/adapter_config.json"))
def _(data: bytes, folder: Path) -> None:
    opens(copy(saved() / "mlx", folder, adapter_config__json=data))


@target("GGUF", lambda: [gguf(), gguf(version=2, tensors={"blk.0.attn_q.weight.lora_a": torch.ones(2, 16)})])
def _(data: bytes, folder: Path) -> None:
    (folder / "x.gguf").write_bytes(data)
    opens(folder / "x.gguf")


@target("manifest of a bundle", files("manifest.json"))
def _(data: bytes, folder: Path) -> None:
    shutil.copytree(saved() / "peft", folder / "adapter")
    (folder / "manifest.json").write_bytes(data)
    mps.read_adapter(folder)


# --- notes and settings -----------------------------------------------------------------------------------------------------


NOTE = "---\ntitle: >-\n  How I\n  fixed it\ntags: [a, 'b, c']\nid: 4\n---\n# Body\n\n![x](data:image/png;base64,AAAA)\n"
TOML_NOTE = '+++\ntitle = "Spokes"\ntags = ["a"]\n+++\nBody\n'


@target("front matter", texts(NOTE, TOML_NOTE))
def _(data: bytes, folder: Path) -> None:
    front_matter = split_front_matter(data.decode("utf-8", "replace"))
    if front_matter is not None:
        front_matter.reduced().encode()


@target(
    "encodings",
    lambda: [each.encode(name) for name in ("utf-8", "utf-16", "utf-32", "cp1252") for each in ("Größe é\r\n" * 9,)],
    NotText,
)
def _(data: bytes, folder: Path) -> None:
    decode(data)[0].encode()


def chat_lines() -> list[bytes]:
    """Return chats in every form."""
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So.", "weight": 1, "train": True}]
    forms: list[Any] = [
        {"messages": messages}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"text": "### Human: a### Assistant: b"}, {"instruction": "a", "input": "", "output": "b"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *messages]},
    ]  # fmt: skip
    return [b"\n".join(json.dumps(form).encode() for form in forms), *(json.dumps(form).encode() for form in forms)]


@target("chats", chat_lines)
def _(data: bytes, folder: Path) -> None:
    read_chats([data], encoding_of_chats(data), "c.jsonl", lambda document: None)


@target("notes and their names", lambda: ["notizen/Größe.md".encode(), b"~a.txt", b".b.md.icloud", b"c.JSONL", NOTE.encode()])
def _(data: bytes, folder: Path) -> None:
    name = data[:200].replace(b"\0", b"_").replace(b"/", b"_") or b"_"
    with open(os.path.join(os.fsencode(folder), b"n.md"), "wb") as file:
        file.write(data)
    if name not in (b".", b".."):
        with open(os.path.join(os.fsencode(folder), name[:120] + b".md"), "wb") as file:
            file.write(data[::-1])
    json.dumps(read_notes([folder]).as_dict(), ensure_ascii=False).encode()


@target(
    "config.toml",
    texts('[train]\nrank = 8\nlr = 2e-4\ntargets = ["q_proj"]\nrslora = true\nuntil = "06:30"\nmemory = "2GB"\nseq_len = 64\n'),
)
def _(data: bytes, folder: Path) -> None:
    os.environ["EDGETUNE_HOME"] = str(folder)
    (folder / "config.toml").write_bytes(data)
    train_config({})


@target("sizes and clocks", texts("2GB", "1.5GiB", "06:30", "4096"))
def _(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    for read in (parse_bytes, seconds_until):
        try:
            read(text)
        except EdgetuneError:
            continue


# --- edgetune's own files -----------------------------------------------------------------------------------------------------


@target("sealed files", files("sealed"), DamagedError)
def _(data: bytes, folder: Path) -> None:
    (folder / "x").write_bytes(data)
    read_sealed(folder / "x")


@target("run.json", files("run/run.json"), DamagedError)
def _(data: bytes, folder: Path) -> None:
    (folder / "run.json").write_bytes(data)
    UnfinishedRun(folder).record()


@target("index of a token store", files("tokens/documents.json"))
def _(data: bytes, folder: Path) -> None:
    TokenStore.open(copy(saved() / "tokens", folder, documents__json=data))


@target("model_type and shapes", files("config.json"))
def _(data: bytes, folder: Path) -> None:
    try:
        value = json_file.parse(data)
    except ValueError:
        return
    if isinstance(value, dict):
        LlamaConfig.from_hf(value)
