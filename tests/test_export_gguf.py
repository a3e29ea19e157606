"""GGUF holds the merged model and the adapter, llama.cpp computes what edgetune computes, and a LoRA comes back as it was."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from adapters import random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgetune
from edgetune import export_adapter
from edgetune.conversion.convert import convert
from edgetune.conversion.gguf_file import GgufFile
from edgetune.conversion.origin import Origin
from edgetune.export import verify
from edgetune.export.gguf import adapter as gguf_adapter
from edgetune.export.gguf import llamacpp
from edgetune.export.gguf import model as gguf_model
from edgetune.export.gguf import target as gguf
from edgetune.export.gguf.names import from_llama_rows, to_llama_rows
from edgetune.export.gguf.reader import PROBES, LlamaCppReader
from edgetune.export.gguf.vocabulary import PUBLISHED_SPLITS, read_vocabulary
from edgetune.export.job import Job, UserFile
from edgetune.export.memory import check_memory
from edgetune.export.merge import merged
from edgetune.library import adapter_registry as registry
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import Checkpoint, model_shapes, open_model
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, ModelError, ResourceError, TokenizerError, UsageError
from edgetune.runtime.linear import LoraLinear
from edgetune.runtime.loader import load_llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer

library = pytest.importorskip("gguf")
DEMO = Path(edgetune.__file__).parent / "demo"
ROOT = Path(__file__).resolve().parent.parent
WINDOWED = ("mistral-window", "qwen2.5-window")
FAMILIES = [family for family in tiny.FAMILIES if family not in (*WINDOWED, *tiny.UNLIKE_LLAMA)]


def an_adapter(config: LlamaConfig, rank: int = 4, size: float = 0.03, **changes: Any) -> Adapter:
    """Return an adapter on every target with random numbers in both matrices."""
    lora = LoraConfig(rank, 8.0, **changes)
    shapes = config.linear_shapes()
    tensors = {}
    for layer in range(config.num_layers):
        for name in lora.targets:
            out, inputs = shapes[name]
            tensors[layer, name, "A"] = torch.randn(rank, inputs) / inputs**0.5
            tensors[layer, name, "B"] = torch.randn(out, rank) * size
    return Adapter(lora, tensors)


def opened(folder: Path, family: str = "llama-2-grouped", **changes: Any) -> Checkpoint:
    tiny.save_model(folder, family, **changes)
    return open_model(folder)


def nothing(writer: Any) -> None:
    writer.add_tokenizer_model("no_vocab")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the keys and tensors (in fp32) of a GGUF file with the gguf library's own reader."""
    reader = library.GGUFReader(path)
    tensors = {
        tensor.name: torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *reversed(tensor.shape.tolist())
        )
        for tensor in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


# --- the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_the_file_holds_the_merged_tensors(tmp_path: Path, kind: str) -> None:
    base = opened(tmp_path / "m")
    job = Job(base, "somewhere/tiny", an_adapter(base.config))
    assert gguf_model.write_model(job, tmp_path / "m.gguf", kind, nothing) == ()
    keys, tensors = contents(tmp_path / "m.gguf")
    for layer, block in enumerate(job.model().blocks):
        for name, linear in block.linears().items():
            assert isinstance(linear, LoraLinear)
            weight = linear.base.weight + job.needed_adapter().config.scale * linear.lora_B @ linear.lora_A
            if name in ("q_proj", "k_proj"):
                weight = to_llama_rows(weight, base.config.head_dim)
            ours = tensors[f"blk.{layer}.{gguf_adapter.LINEARS[name]}.weight"]
            step = {"f32": 1e-6, "f16": 2e-3, "bf16": 1e-2, "q8_0": 1e-2}[kind] * weight.abs().max()
            assert (ours - weight).abs().max() <= step
    assert len(tensors) == len(model_shapes(base.config))
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "tiny"  # not a path
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.dimension_count"] == 16
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o600


def test_q8_0_is_the_librarys_bit_for_bit() -> None:
    numbers = torch.cat([torch.randn(64, 96) * 3, torch.zeros(2, 96), torch.arange(192.0).view(2, 96) / 2 - 48])
    expected = library.quants.quantize(numbers.numpy(), library.GGMLQuantizationType.Q8_0)
    assert gguf_model._q8_0(numbers) == expected.tobytes()


def test_rows_that_do_not_end_with_a_block_of_q8_0_are_f16(tmp_path: Path) -> None:
    base = opened(tmp_path / "m", intermediate_size=80)
    gguf_model.write_model(Job(base, "tiny", None), tmp_path / "m.gguf", "q8_0", nothing)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in library.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_merging_holds_one_tensor_in_the_models_order(tmp_path: Path) -> None:
    base = opened(tmp_path / "m", "qwen2")
    job = Job(base, "tiny", an_adapter(base.config, targets=("q_proj", "down_proj")))
    assert [(name, tuple(tensor.shape)) for name, tensor in merged(job)] == list(model_shapes(base.config).items())


def test_llama3_scaling_is_written_as_factors(tmp_path: Path) -> None:
    base = opened(tmp_path / "m", "llama-3.2-tied-scaled")
    gguf_model.write_model(Job(base, "tiny", None), tmp_path / "m.gguf", "f16", nothing)
    _, tensors = contents(tmp_path / "m.gguf")
    factors = tensors["rope_freqs.weight"]
    assert factors[0] == 1
    assert factors[-1] == 8
    assert "output.weight" not in tensors  # the embeddings are tied


def test_a_window_is_the_longest_context_or_refused(tmp_path: Path) -> None:
    base = opened(tmp_path / "long", "mistral-window", sliding_window=600, max_position_embeddings=1024)
    notices = gguf_model.write_model(Job(base, "tiny", None), tmp_path / "m.gguf", "f16", nothing)
    assert "at most 600 tokens" in notices[0]
    assert contents(tmp_path / "m.gguf")[0]["llama.context_length"] == 600
    for family in WINDOWED:
        short = opened(tmp_path / family, family)
        with pytest.raises(ModelError, match="no sliding window"):
            gguf_model.write_model(Job(short, "tiny", None), tmp_path / "m.gguf", "f16", nothing)


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    biased = opened(tmp_path / "biased", "qwen3", attention_bias=True)
    with pytest.raises(ModelError, match="no attention biases"):
        gguf_model.write_model(Job(biased, "tiny", None), tmp_path / "m.gguf", "f16", nothing)
    scaled = opened(tmp_path / "scaled", "qwen2", rope_parameters=tiny.LLAMA3_ROPE)
    with pytest.raises(ModelError, match="llama3 rope scaling"):
        gguf_model.write_model(Job(scaled, "tiny", None), tmp_path / "m.gguf", "f16", nothing)
    base = opened(tmp_path / "plain")
    with pytest.raises(ResourceError, match=r"needs about 0\.2\d GB, .*; type --memory 2\d\dMB or more"):
        check_memory(gguf.peak_memory, Job(base, "tiny", None, "f16", memory=1 << 20))
    for kind, size in (("f16", 1e6), ("q8_0", 1e8)):
        with pytest.raises(ModelError, match="--weights bf16"):
            gguf_model.write_model(Job(base, "tiny", an_adapter(base.config, size=size)), tmp_path / "m.gguf", kind, nothing)


@pytest.mark.parametrize("weights", gguf.SPEC.weights)
def test_another_bases_adapter_is_refused(tmp_path: Path, weights: str) -> None:
    base = opened(tmp_path / "m")
    for name, changes, said in (
        (
            "wider",
            {"hidden_size": 96, "num_attention_heads": 6},
            r"does not fit this model: layers 0-1 down_proj: lora_A is .* made for another base, name that with --model",
        ),
        ("deeper", {"num_hidden_layers": 3}, "the model has no layer 2"),
    ):
        peft_folder.save(an_adapter(opened(tmp_path / name, **changes).config), tmp_path / f"for-{name}", "tiny")
        with pytest.raises(AdapterError, match=said):
            export_adapter("gguf", str(tmp_path / "m"), str(tmp_path / f"for-{name}"), tmp_path / "out", weights, check=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match=r"no adapter of tiny to export; .* or name --weights to write the base as a model"):
        gguf.write(Job(base, "tiny", None), tmp_path)


def lora_file(path: Path, tensors: dict[str, Any], **arrays: list[Any]) -> Path:
    """Write a GGUF adapter for llama as another program may write it; the keys in `arrays` have __ for a dot."""
    writer = library.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for key, values in arrays.items():
        writer.add_array(key.replace("__", "."), values)
    for name, numbers in tensors.items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- the adapter, there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWED])
def test_an_adapter_comes_back_value_for_value(tmp_path: Path, family: str) -> None:
    config = opened(tmp_path / "m", family).config
    adapter = an_adapter(config)
    gguf_adapter.write_adapter(adapter, config, tmp_path / "a.gguf")
    back = gguf_adapter.read_adapter(tmp_path / "a.gguf", config)
    assert back.config == adapter.config
    assert set(back.tensors) == set(adapter.tensors)
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert (tmp_path / "a.gguf").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("layers", [None, (1,), (0,)])
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(4, 8.0),
        LoraConfig(6, 8.1, 0.05, ("q_proj", "v_proj")),
        LoraConfig(3, 1.0, 0.1, ("k_proj", "down_proj"), rslora=True),
    ],
)
def test_peft_to_gguf_to_peft_changes_no_byte(tmp_path: Path, lora: LoraConfig, layers: tuple[int, ...] | None) -> None:
    config = opened(tmp_path / "m").config
    made = random_adapter(config, lora.rank, targets=lora.targets, layers=layers)
    peft_folder.save(replace(made, config=lora), tmp_path / "peft", "tiny")
    gguf_adapter.write_adapter(peft_folder.load(tmp_path / "peft"), config, tmp_path / "a.gguf")
    peft_folder.save(gguf_adapter.read_adapter(tmp_path / "a.gguf", config), tmp_path / "again", "tiny")
    for name in (peft_folder.WEIGHTS_FILE, peft_folder.CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def test_alpha_is_llama_cpps_where_another_wrote_it(tmp_path: Path) -> None:
    """Another program's alpha replaces edgetune's. Without alpha the scale is 1; an alpha that is no float is refused."""
    config = opened(tmp_path / "m").config
    adapter = an_adapter(config, targets=("v_proj",), rslora=True)
    gguf_adapter.write_adapter(adapter, config, tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    at = data.index(b"adapter.lora.alpha") + len("adapter.lora.alpha")
    assert struct.unpack_from("<If", data, at) == (6, 16.0)  # scale 8 / √4, rank 4
    (tmp_path / "a.gguf").write_bytes(data[:at] + struct.pack("<If", 6, 10.0) + data[at + 8 :])
    assert gguf_adapter.read_adapter(tmp_path / "a.gguf", config).config == LoraConfig(4, 10.0, 0.0, ("v_proj",))
    (tmp_path / "a.gguf").write_bytes(data.replace(b"adapter.lora.alpha", b"adapter.lora.alpho"))
    assert gguf_adapter.read_adapter(tmp_path / "a.gguf", config).config.scale == 1
    (tmp_path / "a.gguf").write_bytes(data[:at] + struct.pack("<If", 4, 10.0) + data[at + 8 :])  # an unsigned number
    with pytest.raises(AdapterError, match=r"its adapter\.lora\.alpha is \d+, expected a number"):
        gguf_adapter.read_adapter(tmp_path / "a.gguf", config)


def test_a_converters_adapter_is_read(tmp_path: Path) -> None:
    """llama.cpp's own converter may write f16, and writes no head counts."""
    config = opened(tmp_path / "m").config
    adapter = an_adapter(config, targets=("q_proj", "k_proj"))
    tensors = {}
    for (layer, name, part), tensor in adapter.tensors.items():
        rows = to_llama_rows(tensor, config.head_dim) if part == "B" else tensor
        tensors[f"blk.{layer}.attn_{name[0]}.weight.lora_{part.lower()}"] = rows.half().numpy()
    back = gguf_adapter.read_adapter(lora_file(tmp_path / "a.gguf", tensors, general__tags=["lora", "text"]), config)
    assert back.config == adapter.config
    assert all(torch.equal(back.tensors[key], tensor.half().float()) for key, tensor in adapter.tensors.items())


def test_rows_in_another_bases_order_are_refused(tmp_path: Path) -> None:
    """The shapes fit in all three cases, but the rows of q and k are in another order."""
    config = opened(tmp_path / "m").config
    adapter = an_adapter(config, targets=("q_proj", "k_proj"))
    for name, made_for, said in (
        ("arch", replace(config, model_type="qwen2"), "architecture qwen2, expected llama"),
        ("heads", replace(config, num_heads=config.num_heads * 2), "head_count 8, expected 4"),
        ("kv", replace(config, num_kv_heads=1), "head_count_kv 1, expected 2"),
    ):
        gguf_adapter.write_adapter(adapter, made_for, tmp_path / f"{name}.gguf")
        with pytest.raises(AdapterError, match=f"made for another base: .*{said}; name its model"):
            gguf_adapter.read_adapter(tmp_path / f"{name}.gguf", config)


def test_a_lora_for_a_family_without_gguf_is_refused(tmp_path: Path) -> None:
    config = opened(tmp_path / "m").config
    gguf_adapter.write_adapter(an_adapter(config), config, tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="edgetune opens none for ministral3 models; name a PEFT folder"):
        gguf_adapter.read_adapter(tmp_path / "a.gguf", replace(config, model_type="ministral3"))


@given(st.integers(1, 4), st.sampled_from([2, 4, 16, 64]), st.integers(1, 3))
def test_rows_go_there_and_back(heads: int, head_dim: int, width: int) -> None:
    rows = torch.randn(heads * head_dim, width)
    there = to_llama_rows(rows, head_dim)
    assert torch.equal(from_llama_rows(there, head_dim), rows)
    # A head's pair of rows (0, hd/2) becomes rows (0, 1).
    assert torch.equal(there[1], rows[head_dim // 2])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, LlamaConfig]:
    """Return the bytes of a small adapter's file and the configuration of its base."""
    folder = tmp_path_factory.mktemp("good")
    config = opened(folder / "m").config
    gguf_adapter.write_adapter(an_adapter(config, 1, targets=("q_proj",)), config, folder / "a.gguf")
    return (folder / "a.gguf").read_bytes(), config


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_adapter_is_one_sentence(good: tuple[bytes, LlamaConfig], tmp_path: Path, data: st.DataObject) -> None:
    whole, config = good
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 4)) if broken else 0):
        broken[data.draw(st.integers(0, min(len(broken), 700) - 1))] = data.draw(st.sampled_from([0, 1, 9, 127, 255]))
    path = tmp_path / "a.gguf"
    path.write_bytes(broken)
    try:
        adapter = gguf_adapter.read_adapter(path, config)
    except AdapterError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors.values())


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + rest


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a usable GGUF"),
        (b"PK\x03\x04" + bytes(64), "does not begin with GGUF"),
        (header(1 << 40, 0), "announces"),
        (header(0, 1 << 40), "announces"),
        (header(0, 1, struct.pack("<Q", 1 << 60)), "a text of"),
        (header(0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 50)), "an array of"),
        (header(0, 1, struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1)), "an array of"),
        (header(0, 1, struct.pack("<Q1sI", 1, b"k", 77)), "unknown type"),
        (header(0, 0), "its types are"),
        (header(0, 1, struct.pack("<Q12sIQ", 12, b"general.type", 8, 1 << 20) + bytes(1 << 20)), "its types are"),
    ],
)
def test_a_hostile_header_is_refused_at_once(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(AdapterError, match=said) as raised:
        gguf_adapter.read_adapter(tmp_path / "a.gguf", open_model(DEMO).config)
    assert len(str(raised.value)) < 600


def test_tensors_over_each_other_are_refused(tmp_path: Path) -> None:
    """Each tensor lies within the file, but together they would take 64 times its size in memory."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    pairs = (("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", "llama"))
    keys = b"".join(text(key.encode()) + struct.pack("<I", 8) + text(value.encode()) for key, value in pairs)
    count, inputs = 64, 1 << 14
    infos = [text(b"blk.%d.attn_q.weight.lora_a" % n) + struct.pack("<IQQIQ", 2, inputs, 1, 0, 0) for n in range(count)]
    for kept, said in ((infos, "its tensors overlap"), (infos[:1], "layer 0 q_proj: lora_B is missing")):
        (tmp_path / "a.gguf").write_bytes(header(len(kept), 3, keys + b"".join(kept)) + bytes(4 * inputs + 32))
        with pytest.raises(AdapterError, match=said):
            gguf_adapter.read_adapter(tmp_path / "a.gguf", open_model(DEMO).config)


def test_every_tensor_that_is_no_lora_is_named_at_once(tmp_path: Path) -> None:
    config = opened(tmp_path / "m").config
    ones, linear = torch.ones(2, 64).numpy(), "blk.0.attn_v.weight.lora_"
    wrong = {
        "output.weight.lora_a": ones, "blk.0.nothing.weight.lora_a": ones, f"{linear}a": ones * float("nan"),
        f"{linear}b": ones[0], "blk.1.attn_v.weight.lora_a": ones.astype("f8"), "blk.00.ffn_up.weight.lora_a": ones,
        "blk.0.ffn_up.weight.lora_a": ones,
    }  # fmt: skip
    said = (
        r"\(LoRA or a copy of the embedding or the head, which edgetune does not adapt: 'output\.weight\.lora_a'; "
        r"not LoRA of a LLaMA linear: 'blk\.0\.nothing\.weight\.lora_a'; not a matrix: '.*v\.weight\.lora_b'; "
        r"neither f32 nor f16 nor bf16: 'blk\.1\..*'; given twice: '.*up\.weight\.lora_a'; "
        r"inf or NaN: '.*v\.weight\.lora_a'\)"
    )
    with pytest.raises(AdapterError, match=said):
        gguf_adapter.read_adapter(lora_file(tmp_path / "a.gguf", wrong), config)
    activated = lora_file(tmp_path / "a.gguf", {f"{linear}a": ones}, adapter__alora__invocation_tokens=[1, 2])
    with pytest.raises(AdapterError, match="it is an aLoRA, which takes effect only after certain tokens"):
        gguf_adapter.read_adapter(activated, config)


def test_swapped_halves_are_named_for_every_linear(tmp_path: Path) -> None:
    config = opened(tmp_path / "m").config
    ours = an_adapter(config, targets=("q_proj", "v_proj")).tensors.items()
    names = {"q_proj": "attn_q", "v_proj": "attn_v"}
    swapped = {f"blk.{at}.{names[name]}.weight.lora_{'b' if part == 'A' else 'a'}": t.numpy() for (at, name, part), t in ours}
    with pytest.raises(AdapterError, match=r"layers 0-1 q_proj: lora_A is \(64, 4\) and lora_B \(4, 64\).* v_proj: lora_A"):
        gguf_adapter.read_adapter(lora_file(tmp_path / "a.gguf", swapped), config)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    base = opened(tmp_path / "m")
    gguf_model.write_model(Job(base, "tiny", None), tmp_path / "m.gguf", "f16", nothing)
    with pytest.raises(AdapterError):
        gguf_adapter.read_adapter(tmp_path / "m.gguf", base.config)
    with pytest.raises(AdapterError, match="cannot be read"):
        gguf_adapter.read_adapter(tmp_path / "none.gguf", base.config)


# --- the tokenizer ------------------------------------------------------------------------------------------------------

TEXTS = [*PROBES, "", "tomatoes", "water ", "\n\n  x\n", "\t\tx\ty", "a\r\nb\r\n", "\x00\x01\x7f", "e\u0301 \ufb01"]
CORPUS = [
    "The tomatoes want water in the morning and shade in the afternoon. I don't know; they'RE 12345!",
    "def water(plant):\n    for day in range(7):\n        plant.grow(day)\n\n\n    return plant\n",
    "Größe, façade, naïve, señor, łódź; Привет, мир; 日本語の文章; emoji 😀 In 2021 12,345 67",
]


def byte_level(folder: Path, pre: Any, specials: list[str]) -> None:
    """Train a byte-level BPE on CORPUS with the given pre-tokenizer and save it as a model folder's tokenizer.json."""
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Made(models.BPE())
    made.pre_tokenizer = pre
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    made.train_from_iterator(CORPUS * 3, trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": specials[0], "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def split(regex: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def splits() -> dict[str, Callable[[], Any]]:
    """Return a maker of a pre-tokenizer for each of llama.cpp's pre-tokenizer names that edgetune writes."""
    from tokenizers import pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        **{name: (lambda regex=regex: split(regex)) for regex, name in PUBLISHED_SPLITS.items()},
        "gpt-2": lambda: plain,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
    }


def tokenizer_of(folder: Path, rows: int | None = None) -> Path:
    """Write a GGUF file with a minimal model and the folder's tokenizer; return its path."""
    vocabulary = read_vocabulary(folder, rows or Tokenizer.load(folder).vocab_size)
    size = len(vocabulary.tokens)
    base = opened(folder / "model", vocab_size=size, bos_token_id=None, eos_token_id=None)
    gguf_model.write_model(Job(base, "tiny", None), folder / "m.gguf", "f16", vocabulary.add_to)
    return folder / "m.gguf"


def test_the_demos_tokens_are_written(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(DEMO, 8200)
    assert vocabulary.model == "llama"
    assert (len(vocabulary.tokens), len(vocabulary.scores), len(vocabulary.types)) == (8200, 8200, 8200)
    assert vocabulary.ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert vocabulary.types[:4] == [2, 3, 3, 6]  # unknown, control, control, a byte
    assert vocabulary.types[-1] == 5
    assert vocabulary.adds_bos
    assert vocabulary.adds_space
    assert vocabulary.template == (DEMO / "chat_template.jinja").read_text()
    with pytest.raises(TokenizerError, match="rows of embedding"):
        read_vocabulary(DEMO, 100)


def test_a_pointer_to_a_tokenizer_is_not_used_beside_a_whole_one(tmp_path: Path) -> None:
    """A clone without git-lfs has only a pointer file for tokenizer.model, while tokenizer.json is text and complete."""
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models

    made = Made(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")], byte_fallback=True))
    made.decoder = decoders.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path, 3).scores == [-1.0, -1.0, 0.0]
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert read_vocabulary(tmp_path, 3).scores == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-2", "smollm"])
def test_a_split_is_known_by_its_expression(tmp_path: Path, name: str) -> None:
    byte_level(tmp_path / "t", splits()[name](), ["<|end|>", "<|im_start|>"])
    vocabulary = read_vocabulary(tmp_path / "t", 720)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)
    assert len(vocabulary.merges) > 100
    assert vocabulary.types[0] == 3


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path / "t", split(r"\w+|\W"), ["<|end|>"])
    with pytest.raises(TokenizerError, match=r"cannot express for llama\.cpp"):
        read_vocabulary(tmp_path / "t", 720)
    byte_level(tmp_path / "t", splits()["qwen2"](), ["<|end|>"])
    source = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    for normalizer, known in (({"type": "NFC"}, True), ({"type": "Lowercase"}, False)):
        (tmp_path / "t" / "tokenizer.json").write_text(json.dumps({**source, "normalizer": normalizer}))
        with nullcontext() if known else pytest.raises(TokenizerError, match="alters texts"):
            read_vocabulary(tmp_path / "t", 720)


# --- llama.cpp itself ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> None:
    pytest.importorskip("llama_cpp")


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(tmp_path: Path, family: str) -> None:
    """Compares in f32, where an error in names, order of rows, RoPE, biases or norms shows; then with the adapter as a file."""
    base = opened(tmp_path / "m", family)
    job = Job(base, "tiny", an_adapter(base.config, size=0.1))
    ids = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = verify.golden(job, ids, job.model())
    gguf_model.write_model(job, tmp_path / "m.gguf", "f32", nothing)
    assert verify.compare(expected, LlamaCppReader(tmp_path / "m.gguf"), verify.EXACT).max_logit_difference < 1e-4
    (tmp_path / "a").mkdir()
    gguf_adapter.write_adapter(job.needed_adapter(), base.config, tmp_path / "a" / gguf_adapter.ADAPTER_FILE)
    assert verify.compare(expected, gguf.read(job, tmp_path / "a"), verify.EXACT).max_logit_difference < 1e-4
    without = verify.golden(job, ids, replace(job, adapter=None).model())
    assert not verify.compare(without, gguf.read(job, tmp_path / "a"), verify.EXACT).holds(verify.EXACT)


@pytest.fixture(scope="module")
def adapted_demo(llama: None) -> tuple[Job, verify.Golden, verify.Golden]:
    """Return a job for the demo with an adapter, and the reference's golden results with and without the adapter."""
    torch.manual_seed(0)
    base, tokenizer = open_model(DEMO), Tokenizer.load(DEMO)
    job = Job(base, "demo", an_adapter(base.config))
    prompt = [*tokenizer.start_ids, *tokenizer.encode(verify.PROMPT)]
    return job, verify.golden(job, prompt, job.model()), verify.golden(job, prompt, replace(job, adapter=None).model())


@pytest.mark.parametrize("weights", gguf.SPEC.weights)
def test_the_demo_is_proved_in_every_form(
    tmp_path: Path, weights: str, adapted_demo: tuple[Job, verify.Golden, verify.Golden]
) -> None:
    whole, expected, bare = adapted_demo
    job = replace(whole, weights=weights)
    (tmp_path / "out").mkdir()
    written = gguf.write(job, tmp_path / "out")
    bound = verify.BOUNDS["gguf", weights]
    agreement = verify.compare(expected, gguf.read(job, tmp_path / "out"), bound)
    assert agreement.holds(bound), agreement
    # The bound must tell the bare base from the adapted model.
    assert not verify.compare(bare, gguf.read(job, tmp_path / "out"), bound).holds(bound)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the base that was written for the proof is deleted
    if not weights:
        assert written.facts[0][0] == "adapter_gain_kept_on_q4_k_m"
        # Measured on a few texts that the model writes, which differ from CPU to CPU: 1.16 on an AMD Zen 4.
        assert 0.5 < written.facts[0][1] < 1.5


@pytest.mark.parametrize(("target", "weights"), [("gguf", ""), ("gguf", "q8_0"), ("ollama", "q8_0")])
def test_the_command_proves_and_keeps_it(
    tmp_path: Path, target: str, weights: str, adapted_demo: tuple[Job, verify.Golden, verify.Golden]
) -> None:
    job, expected, _ = adapted_demo
    peft_folder.save(job.needed_adapter(), tmp_path / "mine", "demo")
    result = export_adapter(target, "demo", str(tmp_path / "mine"), tmp_path / "out", weights or None)
    assert result.verified
    assert result.greedy_match
    golden = json.loads((tmp_path / "out" / verify.GOLDEN_FILE).read_text())
    assert golden["token_ids"] == expected.ids
    assert Path(result.path).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.usefixtures("llama")
def test_a_gain_lost_on_q4_k_m_is_told(tmp_path: Path) -> None:
    base = open_model(DEMO)
    ids = Tokenizer.load(DEMO).encode("The tomatoes want water in the morning and shade in the afternoon. " * 4)
    job = Job(base, "demo", an_adapter(base.config, size=1e-6), texts=[ids])
    (tmp_path / "out").mkdir()
    written = gguf.write(job, tmp_path / "out")
    assert written.facts == ()
    assert "too little to say" in written.notices[0]


def test_a_share_under_four_fifths_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests only the arithmetic, with made-up losses of base and base + adapter, first exact and then on Q4_K_M."""
    base = opened(tmp_path / "m")
    (tmp_path / "out").mkdir()
    lies = []

    def quantize(model: Path, out: Path) -> None:
        """Record the files in the export's folder, and their modes, when llama.cpp is called."""
        lies.extend((path.relative_to(tmp_path / "out"), path.stat().st_mode & 0o777) for path in (model.parent, model, out))

    monkeypatch.setattr(llamacpp, "quantize", quantize)
    asked = []

    def loss(model: Path, lora: Path | None, documents: list[list[int]]) -> float:
        asked.append((model.name, lora is not None, documents))
        return losses[len(asked) - 1]

    monkeypatch.setattr(llamacpp, "loss", loss)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: True)
    job = Job(base, "tiny", an_adapter(base.config), texts=[[1, 2, 3], [4], [5] * 1000])
    losses = [3.0, 2.0, 3.2, 2.5]
    written = gguf.write(job, tmp_path / "out")
    assert written.facts == (("adapter_gain_kept_on_q4_k_m", pytest.approx(0.7)),)
    assert "keeps 70%" in written.notices[0]
    assert [entry[:2] for entry in asked] == [
        ("base.gguf", False), ("base.gguf", True), ("q4_k_m.gguf", False), ("q4_k_m.gguf", True),
    ]  # fmt: skip
    assert asked[0][2] == [[1, 2, 3], [5] * 256]
    work = Path(".work")
    assert lies == [(work, 0o700), (work / "base.gguf", 0o600), (work / "q4_k_m.gguf", 0o600)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [gguf_adapter.ADAPTER_FILE]
    losses, asked[:] = [3.0, 2.0, 3.2, 2.3], []
    assert gguf.write(job, tmp_path / "out").notices == ()
    assert gguf.write(replace(job, check=False), tmp_path / "out").facts == ()


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-2", "smollm"])
def test_llama_cpp_reads_byte_level_text_as_we_do(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "t"
    byte_level(folder, splits()[name](), ["<|end|>", "<|im_start|>"])
    tokenizer = Tokenizer.load(folder)
    assert llamacpp.tokenize(tokenizer_of(folder), TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.usefixtures("llama")
def test_llama_cpp_reads_sentencepiece_text_as_we_do(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    assert llamacpp.tokenize(tokenizer_of(tmp_path), TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("with_model", [True, False])
def test_scores_from_merges_are_as_good_as_sentencepieces(tmp_path: Path, real_data: Path, with_model: bool) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", *(("tokenizer.model",) if with_model else ())):
        (tmp_path / name).write_bytes((real_data / "base-16m" / name).read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    assert llamacpp.tokenize(tokenizer_of(tmp_path), TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.usefixtures("llama")
def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    base = open_model(DEMO)
    job = Job(base, "demo", None, "q8_0")
    vocabulary = read_vocabulary(DEMO, 8192)
    vocabulary.tokens[300], vocabulary.tokens[301] = vocabulary.tokens[301], vocabulary.tokens[300]
    vocabulary.scores[259:] = [0.0] * len(vocabulary.scores[259:])
    gguf_model.write_model(job, tmp_path / gguf.MODEL_FILE, "q8_0", vocabulary.add_to)
    with pytest.raises(ModelError, match="into other tokens"):
        gguf.read(job, tmp_path)
    gguf.read(replace(job, force=True), tmp_path)


@pytest.mark.usefixtures("llama")
def test_a_file_that_ends_llama_cpp_is_one_sentence(tmp_path: Path) -> None:
    base = opened(tmp_path / "m")
    gguf_model.write_model(Job(base, "tiny", None), tmp_path / "m.gguf", "f16", nothing)
    os.truncate(tmp_path / "m.gguf", (tmp_path / "m.gguf").stat().st_size // 2)
    with pytest.raises(ModelError, match=r"could not use m\.gguf"):
        llamacpp.logits(tmp_path / "m.gguf", None, [1, 2, 3])


# --- a base that came from the user's own GGUF file ----------------------------------------------------------------------


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """Return a model folder with the demo's tokenizer, and the Q8_0 file that its origin names; an adapter lies beside them."""
    folder, file = tmp_path / "converted", tmp_path / "My Models" / "Tiny-Q8_0.gguf"
    file.parent.mkdir()
    tiny.save_trainable(folder)
    base = open_model(folder)
    vocabulary = read_vocabulary(folder, base.config.vocab_size)
    gguf_model.write_model(Job(base, "tiny", None), file, "q8_0", vocabulary.add_to)
    opened_file = GgufFile.open(file)
    stat = file.stat()
    Origin(str(file), str(file), "Q8_0", stat.st_size, stat.st_mtime_ns, opened_file.digest).write(folder)
    peft_folder.save(random_adapter(base.config, size=0.05), tmp_path / "night", "tiny")
    return folder, file


def bits_per_byte(model: Path, lora: Path | None, tokenizer: Tokenizer, text: str) -> float:
    """Measure a text in llama.cpp, all of it but its start token."""
    logits = llamacpp.logits(model, lora, ids := tokenizer.prompt_ids(text)).double()
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    return float(nats) / math.log(2) / len(tokenizer.decode(ids[1:], continuing=True).encode())


@pytest.mark.usefixtures("llama")
def test_an_adapter_is_proved_and_measured_on_the_users_own_file(tmp_path: Path, converted: tuple[Path, Path]) -> None:
    folder, file = converted
    text = "The tomatoes want water in the morning, and shade: 35° is too much for them."
    (tmp_path / "a.txt").write_text(text)
    result = export_adapter("gguf", str(folder), str(tmp_path / "night"), tmp_path / "out", texts=(str(tmp_path / "a.txt"),))
    assert result.verified
    adapter = tmp_path / "out" / gguf_adapter.ADAPTER_FILE
    assert result.commands == (f"llama-cli -m '{file}' --lora {adapter}",)
    facts, tokenizer = result.facts, Tokenizer.load(folder)
    assert facts["bits_per_byte_before"] == pytest.approx(bits_per_byte(file, None, tokenizer, text), rel=1e-4)
    assert facts["bits_per_byte_after"] == pytest.approx(bits_per_byte(file, adapter, tokenizer, text), rel=1e-4)
    # Q8_0 moves the model little: edgetune's own copy, which was not rounded, reads nearly the same.
    for when in ("before", "after"):
        assert facts[f"bits_per_byte_{when}"] == pytest.approx(facts[f"edgetune_bits_per_byte_{when}"], rel=0.01)
    assert facts["adapter_effect_applied"] == pytest.approx(1.0, abs=0.05)
    said = f"On your Tiny-Q8_0.gguf (Q8_0), llama.cpp reads the texts at {facts['bits_per_byte_before']:.3f} bits per byte "
    assert result.notices[0].startswith(said)
    golden = json.loads((tmp_path / "out" / verify.GOLDEN_FILE).read_text())
    assert golden["bounds"]["max_logit"] > verify.EXACT.max_logit  # by what the file alone differs
    for exported in (tmp_path / "out").iterdir():
        assert os.fsencode(tmp_path) not in exported.read_bytes()


@pytest.mark.usefixtures("llama")
def test_rows_in_the_wrong_order_or_nine_tenths_of_the_scale_are_no_proof_on_the_users_file(
    tmp_path: Path, converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = converted
    right = gguf_adapter.write_adapter

    def weaker(adapter: Adapter, config: LlamaConfig, path: Path) -> None:
        right(replace(adapter, config=replace(adapter.config, alpha=0.9 * adapter.config.alpha)), config, path)

    arguments = ("gguf", str(folder), str(tmp_path / "night"), tmp_path / "out")
    monkeypatch.setattr(gguf, "write_adapter", weaker)
    with pytest.raises(
        ModelError, match=r"was discarded: .*9[0-3]% of the adapter's effect arrives \(expected 100%, give or take"
    ):
        export_adapter(*arguments)
    monkeypatch.setattr(gguf, "write_adapter", right)
    monkeypatch.setattr(gguf_adapter, "to_llama_rows", lambda rows, head_dim: rows)
    with pytest.raises(ModelError, match="does not agree with edgetune's own model and was discarded"):
        export_adapter(*arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("llama")
def test_the_users_own_ollama_model_is_named_as_ollama_names_it(tmp_path: Path, converted: tuple[Path, Path]) -> None:
    """Without --texts the adapter is measured on texts that the adapted model writes."""
    folder, file = converted
    blob = tmp_path / "ollama" / "blobs" / f"sha256-{'a' * 64}"
    blob.parent.mkdir(parents=True)
    file.rename(blob)
    origin = Origin.read(folder)
    assert origin is not None
    replace(origin, path=str(blob), name="me/tiny:latest").write(folder)
    result = export_adapter("ollama", str(folder), str(tmp_path / "night"), tmp_path / "out", "none")
    assert result.verified
    assert result.facts["bits_per_byte_after"] < result.facts["bits_per_byte_before"]
    assert "On your me/tiny:latest (Q8_0), llama.cpp reads texts that the adapted model wrote itself at" in result.notices[1]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text == "# Type: ollama create NAME -f Modelfile\nFROM me/tiny:latest\nADAPTER ./adapter.gguf\n"
    for exported in (tmp_path / "out").iterdir():
        assert os.fsencode(tmp_path) not in exported.read_bytes()
    replace(origin, path=str(blob), name=str(blob)).write(folder)  # named by its path, Ollama's name of it is not known
    export_adapter("ollama", str(folder), str(tmp_path / "night"), tmp_path / "out", "none", check=False)
    assert f"\nFROM {blob}\n" in (tmp_path / "out" / "Modelfile").read_text()


def test_without_the_users_file_the_export_says_so_and_goes_on(tmp_path: Path, converted: tuple[Path, Path]) -> None:
    folder, file = converted
    arguments, out = (str(folder), str(tmp_path / "night")), tmp_path / "out"
    result = export_adapter("gguf", *arguments, out, check=False)
    assert result.commands == (f"llama-cli -m '{file}' --lora {out / gguf_adapter.ADAPTER_FILE}",)
    assert export_adapter("ollama", *arguments, tmp_path / "o", "none", check=False).commands == (
        f"ollama create o -f {tmp_path / 'o' / 'Modelfile'}", "ollama run o",
    )  # fmt: skip
    merged = export_adapter("gguf", *arguments, tmp_path / "merged", "f16", check=False)
    assert merged.notices[0] == (
        "This is a second copy of the model. llama.cpp runs the adapter on your own Tiny-Q8_0.gguf: "
        "type `edgetune export gguf`."
    )
    data = bytearray(file.read_bytes())
    at = data.index(b"general.name")
    data[at : at + 12] = b"general.nema"
    gone = "Your own GGUF file cannot be used, so the export goes on without it: "
    refused = r"--weights none` writes an adapter for the GGUF file .*, and that cannot be used: .*\. Put it back"
    damages = (
        (lambda: file.write_bytes(data), " has changed since it was converted."),
        (file.unlink, " cannot be read (No such"),
    )
    for damage, said in damages:
        damage()
        result = export_adapter("gguf", *arguments, out, check=False)
        assert result.commands == ()
        assert result.notices[0].startswith(f"{gone}{file}{said}")
        with pytest.raises(UsageError, match=refused):
            export_adapter("ollama", *arguments, tmp_path / "o", "none", check=False)
    Path(folder / "origin.json").unlink()
    with pytest.raises(UsageError, match=r"and this model is not from one; leave --weights out\.$"):
        export_adapter("ollama", *arguments, tmp_path / "o", "none", check=False)


@pytest.mark.usefixtures("llama")
def test_a_users_file_with_another_tokenizer_is_refused_before_anything_is_measured(
    tmp_path: Path, converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "tokenize", lambda model, texts: [[7]] * len(texts))
    with pytest.raises(ModelError, match=f"llama.cpp splits {len(PROBES)} of {len(PROBES)} test texts into other tokens"):
        export_adapter("gguf", str(converted[0]), str(tmp_path / "night"), tmp_path / "out")


def test_a_proof_on_the_users_file_takes_no_copy_of_the_base(tmp_path: Path, converted: tuple[Path, Path]) -> None:
    """It needs the memory of the file as it is, and no disk."""
    base = open_model(converted[0])
    job = Job(base, "tiny", random_adapter(base.config))
    mine = replace(job, user_file=UserFile(converted[1], "Tiny", "Q8_0", 10**9))
    small = replace(mine, user_file=UserFile(converted[1], "Tiny", "Q8_0", 0))
    assert gguf.peak_memory(mine).read[0].fixed - gguf.peak_memory(small).read[0].fixed == 10**9
    assert gguf.peak_memory(mine).write[0].fixed <= gguf.peak_memory(job).write[1].fixed


# --- a GGUF LoRA for such a base ----------------------------------------------------------------------------------------


def convert_lora(peft: Path, config: LlamaConfig, path: Path) -> None:
    """Write a PEFT folder's adapter as llama.cpp's convert_lora_to_gguf.py does: its names, order of rows, and keys."""
    arch = {"llama": library.MODEL_ARCH.LLAMA, "qwen2": library.MODEL_ARCH.QWEN2}[config.model_type]
    names = library.get_tensor_name_map(arch, config.num_layers)
    writer = library.GGUFWriter(path, library.MODEL_ARCH_NAMES[arch])
    writer.add_type(library.GGUFType.ADAPTER)
    writer.add_string(library.Keys.Adapter.TYPE, "lora")
    writer.add_name("Night")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "Tiny")
    writer.add_tags(["lora", "text-generation"])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_file_type(library.LlamaFileType.ALL_F32)
    writer.add_float32(library.Keys.Adapter.LORA_ALPHA, json.loads((peft / "adapter_config.json").read_text())["lora_alpha"])
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for full, tensor in safetensors.torch.load_file(peft / "adapter_model.safetensors").items():
        name, part = full.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        rows = tensor.float().numpy()
        linear = name.rpartition(".")[2]
        if part == "B" and linear in heads and config.model_type == "llama":
            rows = rows.reshape(heads[linear], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(f"{names.get_name(name)}.weight.lora_{part.lower()}", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peft_logits(model: Any, adapter: Path, ids: list[int]) -> torch.Tensor:
    """Run ids (N,) with transformers and peft in fp32; return logits (N, V)."""
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        return torch.Tensor(peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([ids])).logits[0])


@pytest.mark.parametrize("writer", ["edgetune", "llama.cpp's converter"])
@pytest.mark.parametrize("family", ["llama-2-grouped", "llama-head-dim", "qwen2"])
def test_a_gguf_lora_on_a_base_from_gguf_gives_pefts_logits(tmp_path: Path, family: str, writer: str) -> None:
    """Goes the whole way: a model of transformers becomes a GGUF file and that a base; its PEFT adapter becomes a GGUF LoRA."""
    model = tiny.save_model(tmp_path / "m", family, vocab_size=8192)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((DEMO / name).read_bytes())
    source = open_model(tmp_path / "m")
    vocabulary = read_vocabulary(tmp_path / "m", 8192)
    gguf_model.write_model(Job(source, "tiny", None), tmp_path / "tiny.gguf", "f32", vocabulary.add_to)
    base = open_model(convert(tmp_path / "tiny.gguf", tmp_path / "converted", "tiny", "fp32").path)
    peft_folder.save(random_adapter(source.config, alpha=6.0), tmp_path / "night", "tiny")
    if writer == "edgetune":
        gguf_adapter.write_adapter(peft_folder.load(tmp_path / "night"), source.config, tmp_path / "a.gguf")
    else:
        convert_lora(tmp_path / "night", source.config, tmp_path / "a.gguf")
    ids = torch.randint(3, 8192, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs = peft_logits(model, tmp_path / "night", ids)
    bare = verify.reference_logits(Job(base, "tiny", None).model(), ids)
    assert (bare - theirs).abs().max() > 0.1
    imported = registry.import_adapter(tmp_path / "a.gguf", base, "tiny", "back")
    for path in (tmp_path / "a.gguf", imported):
        ours = Job(base, "tiny", registry.load_for(path, base)).model()
        assert (verify.reference_logits(ours, ids) - theirs).abs().max() < 1e-4


# --- a real model -------------------------------------------------------------------------------------------------------


def trained(base: Checkpoint, ids: list[int], steps: int) -> Adapter:
    """Return an adapter of rank 8 after some steps on one text of ids (N + 1,)."""
    config, n = LoraConfig(8, 16.0, 0.0), len(ids) - 1
    model = load_llama(base, torch.bfloat16)
    adapters.attach_new(model, config, 0)
    runner, optimizer, text = Runner(model), PagedAdamW(adapters.parameters(model)), torch.tensor(ids)
    for _ in range(steps):
        batch = Batch(text[:-1], text[1:], torch.full((n,), 1 / n), torch.arange(n), (Segment.packed(0, n),))
        runner.train(batch)
        optimizer.step(2e-3)
        optimizer.zero_grad()
    return adapters.snapshot(model, config)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.usefixtures("llama")
def test_an_adapter_keeps_its_gain_on_smollm2s_own_file(tmp_path: Path, smollm2: Path, smollm2_folder: Path) -> None:
    """Trains four steps on a note, and reads that note with llama.cpp on the Q4_1 file as it was published."""
    note = ROOT / "examples" / "notes" / "repairs" / "spoke-lengths.md"
    ids = Tokenizer.load(smollm2_folder).prompt_ids(note.read_text())[:257]
    peft_folder.save(trained(open_model(smollm2_folder), ids, 4), tmp_path / "night", "smollm2")
    out = tmp_path / "out"
    result = export_adapter("gguf", str(smollm2_folder), str(tmp_path / "night"), out, texts=(str(note),))
    assert result.verified
    facts = result.facts
    assert facts["bits_per_byte_after"] < 0.9 * facts["bits_per_byte_before"]
    for when in ("before", "after"):
        assert facts[f"bits_per_byte_{when}"] == pytest.approx(facts[f"edgetune_bits_per_byte_{when}"], abs=0.02)
    assert facts["adapter_gain_kept"] == pytest.approx(1.0, abs=0.1)
    assert facts["adapter_effect_applied"] == pytest.approx(1.0, abs=0.1)
    assert result.commands == (f"llama-cli -m {smollm2} --lora {out / gguf_adapter.ADAPTER_FILE}",)
