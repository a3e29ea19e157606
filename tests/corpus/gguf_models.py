"""GGUF models: headers that lie, metadata and tensors that contradict each other, split files, and odd ones that are right."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from corpus.case import CASES, Case, Place, of_kind, plain_model
from corpus.gguf_files import lying, packed
from edgetune.export.gguf.names import is_rotated, tensor_name, to_llama_rows
from edgetune.export.gguf.vocabulary import read_vocabulary

KIND = "GGUF models"
case = of_kind(KIND)
I32, MXFP4, Q4_K = 26, 39, 12
EMBEDDING, NORM = "token_embd.weight", "output_norm.weight"
Entry = Callable[[str, list[int], int, int], tuple[list[int], int, int]]


@functools.cache
def _keys() -> dict[str, Any]:
    vocabulary = read_vocabulary(plain_model(), 8192)
    ids = {f"tokenizer.ggml.{name}_token_id": id for name, id in vocabulary.ids.items()}
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": 2,
        "llama.context_length": 1024,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.scores": vocabulary.scores,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.add_bos_token": vocabulary.adds_bos,
        "tokenizer.ggml.add_space_prefix": vocabulary.adds_space,
        **ids,
    }


def keys(*without: str, **changes: Any) -> dict[str, Any]:
    """Return the keys of the tiny LLaMA without some; `changes` are keys after "llama.", with __ for a point."""
    return {name: value for name, value in _keys().items() if name not in without} | {
        f"llama.{name.replace('__', '.')}": value for name, value in changes.items()
    }


@functools.cache
def _tensors() -> dict[str, Tensor]:
    found = {}
    for name, tensor in safetensors.torch.load_file(plain_model() / "model.safetensors").items():
        found[tensor_name(name)] = to_llama_rows(tensor, 16) if is_rotated("llama", name) else tensor
    return found


def tensors(*without: str, **changes: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the tiny LLaMA without some; `changes` are tensors by their names with __ for a point."""
    kept = {name: tensor for name, tensor in _tensors().items() if name not in without}
    return kept | {name.replace("__", "."): tensor for name, tensor in changes.items()}


def model(content: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None, **options: Any) -> bytes:
    """Return the tiny LLaMA as a GGUF file, with other keys or tensors, or lies about them (see `packed`)."""
    return packed(keys() if content is None else content, tensors() if weights is None else weights, **options)


def lies(name: str, **changes: Any) -> Entry:
    """Return an `entry` that lies about one tensor's dims, kind or at."""
    return lambda found, *entry: lying(**changes)(found, *entry) if found == name else entry


def spoilt(name: str, number: float) -> dict[str, Tensor]:
    """Return the tensors with one number of one of them replaced."""
    tensor = tensors()[name].clone()
    tensor.view(-1)[-1] = number
    return tensors() | {name: tensor}


def moved(shift: int, at: str = "blk.1.ffn_up.weight") -> Entry:
    """Return an `entry` that moves one tensor by some bytes."""
    return lambda name, dims, kind, start: (dims, kind, start + shift if name == at else start)


def cut(word: bytes, more: int = 0) -> bytes:
    """Return the file up to the last place of a word in its header."""
    data = model()
    return data[: data.rindex(word) + more]


def array(kind: int, count: int, data: bytes = b"") -> tuple[int, bytes]:
    """Return an array of `count` items of a value type."""
    return 9, struct.pack("<IQ", kind, count) + data


# Name, the file, and what the refusal names.
REFUSED: tuple[tuple[str, Callable[[], bytes], tuple[str, ...]], ...] = (
    # the header
    ("an empty file", lambda: b"", ("0 bytes are too few",)),
    ("a file of 23 bytes", lambda: model()[:23], ("23 bytes are too few",)),
    ("another file under the name of GGUF", lambda: model(magic=b"PK\3\4"), ("does not begin with GGUF",)),
    ("a GGML file of 2023", lambda: model(magic=b"tjgg"), ("does not begin with GGUF",)),
    ("version 1", lambda: model(version=1), ("version 2 or 3",)),
    ("version 4", lambda: model(version=4), ("version 2 or 3",)),
    ("a file for big-endian machines", lambda: model(version=3 << 24), ("big-endian",)),
    ("a file cut within a key", lambda: cut(b"llama.rope.freq_base", 7), ("cut off",)),
    ("a file cut within the vocabulary", lambda: cut(b"tokenizer.ggml.scores", -999), ("cut off",)),
    ("a file cut within the table of tensors", lambda: cut(EMBEDDING.encode(), 20), ("cut off",)),
    ("a file cut before its tensors", lambda: cut(EMBEDDING.encode(), 2000)[:-1000], ("cut off",)),
    ("a file that lacks its last byte", lambda: model()[:-1], ("cut off", "ends 1 bytes after")),
    ("a file of which half is there", lambda: model()[: len(model()) // 2], ("cut off",)),
    ("2^60 tensors", lambda: model(counts=(2**60, 6)), (str(2**60),)),
    ("2^60 keys", lambda: model(counts=(20, 2**60)), (str(2**60),)),
    ("one tensor fewer than there are", lambda: model(counts=(len(tensors()) - 1, len(keys()))), ("missing|lacks|no matrix",)),
    ("one key more than there are", lambda: model(counts=(len(tensors()), len(keys()) + 1)), ()),
    ("a text of 2^63 bytes", lambda: model([("general.architecture", (8, struct.pack("<Q", 2**63)))]), ("text",)),
    ("a text of two mebibytes", lambda: model(keys() | {"general.description": "x" * (2 << 20)}), ("text of 2097152",)),
    ("a key that is not UTF-8", lambda: model([(b"\xff\xfe", 1), *keys().items()]), ("utf-8",)),
    ("a key given twice", lambda: model([*keys().items(), ("llama.block_count", 1)]), (r"llama\.block_count", "twice")),
    ("a tensor given twice", lambda: model(twice=True), ("given twice",)),
    ("an alignment of 7", lambda: model(keys() | {"general.alignment": 7}), ("alignment",)),
    ("an alignment of 0", lambda: model(keys() | {"general.alignment": 0}), ("alignment",)),
    ("an alignment of 2^31", lambda: model(keys() | {"general.alignment": 2**31}), ("alignment",)),
    ("an alignment that is text", lambda: model(keys() | {"general.alignment": "32"}), ("alignment",)),
    ("an array of arrays", lambda: model(keys() | {"x": array(9, 1)}), ("array",)),
    ("an array of 2^40 texts", lambda: model(keys() | {"x": array(8, 2**40)}), ("array of 1099511627776",)),
    ("an array of 2^62 numbers", lambda: model(keys() | {"x": array(12, 2**62)}), ("array of",)),
    ("arrays that hold three million items together", lambda: model(
        keys() | {f"x{n}": array(0, 10**6, bytes(10**6)) for n in range(3)}), ("array of 1000000",)),
    ("an array of an unknown type", lambda: model(keys() | {"x": array(77, 1)}), ("unknown type 77",)),
    ("a value of an unknown type", lambda: model(keys() | {"x": (99, bytes(8))}), ("unknown type 99",)),
    # the table of tensors
    ("tensors without dimensions", lambda: model(entry=lying(dims=[])), ("0 dimensions",)),
    ("tensors of nine dimensions", lambda: model(entry=lying(dims=[1] * 9)), ("9 dimensions",)),
    ("an embedding of no numbers", lambda: model(entry=lies(EMBEDDING, dims=[64, 0])), ("no numbers",)),
    ("dimensions whose product overflows", lambda: model(entry=lies(EMBEDDING, dims=[2**33, 2**33])), ("cut off",)),
    ("an embedding of 2^63 rows", lambda: model(entry=lies(EMBEDDING, dims=[64, 2**63])), ("cut off",)),
    ("an offset of 2^63", lambda: model(entry=lies(EMBEDDING, at=2**63)), ("cut off",)),
    ("a tensor after the file's end", lambda: model(entry=lies(NORM, at=1 << 24)), ("cut off", NORM)),
    ("all tensors in one place", lambda: model(entry=lying(at=0)), ("overlap",)),
    ("two tensors that share 32 bytes", lambda: model(entry=moved(-32)), ("overlap",)),
    ("a tensor at an odd offset", lambda: model(entry=moved(1)), ("alignment",)),
    ("a tensor of an unknown type", lambda: model(entry=lies(EMBEDDING, kind=99)), ("type 99",)),
    ("a tensor of a type that ggml gave up", lambda: model(entry=lies(EMBEDDING, kind=4)), ("type 4",)),
    ("Q4_K in rows of 64 numbers", lambda: model(entry=lies(EMBEDDING, kind=Q4_K)), ("rows of 64", "Q4_K")),
    ("weights in MXFP4", lambda: model(entry=lies("blk.0.ffn_up.weight", kind=MXFP4)), ("MXFP4", "fetch")),
    ("weights that are whole numbers", lambda: model(entry=lies("blk.0.ffn_up.weight", kind=I32)), ("I32", "fetch")),
    # what the file is
    ("no architecture", lambda: model(keys("general.architecture")), (r"general\.architecture",)),
    ("an architecture that is a number", lambda: model(keys() | {"general.architecture": 7}), (r"general\.architecture",)),
    ("an architecture that edgetune does not have", lambda: model(keys() | {"general.architecture": "mamba"}),
        ("mamba", "llama, qwen2, qwen3|llama")),
    ("an architecture whose name turns the terminal red", lambda: model(keys() | {"general.architecture": "\x1b[31m"}),
        ("architecture",)),
    ("a LoRA adapter named as a model", lambda: model(keys() | {"general.type": "adapter"}), ("adapter", "--adapter")),
    ("the part of a model that sees pictures", lambda: model(keys() | {"general.type": "mmproj"}), ("pictures",)),
    ("an importance matrix", lambda: model(keys() | {"general.type": "imatrix"}), ("importance",)),
    ("a mixture of experts", lambda: model(keys(expert_count=8)), ("mixture of experts",)),
    ("experts under an architecture of their own", lambda: model(keys() | {"general.architecture": "qwen3moe"}), ("qwen3moe",)),
    # the metadata
    ("no number of layers", lambda: model(keys("llama.block_count")), (r"lacks llama\.block_count",)),
    ("no layers", lambda: model(keys(block_count=0)), (r"llama\.block_count is 0",)),
    ("2^31 layers", lambda: model(keys(block_count=2**31)), (r"llama\.block_count is 2147483648",)),
    ("a number of layers in quotes", lambda: model(keys(block_count="2")), (r"llama\.block_count is '2'",)),
    ("a broken number of layers", lambda: model(keys(block_count=2.5)), (r"llama\.block_count is 2\.5",)),
    ("three layers of which two are there", lambda: model(keys(block_count=3)), (r"blk\.2\.\w+\.weight is missing",)),
    ("one layer of which two are there", lambda: model(keys(block_count=1)), (r"holds blk\.1\.",)),
    ("no heads", lambda: model(keys(attention__head_count=0)), ("head_count is 0",)),
    ("other heads than the matrices", lambda: model(keys(attention__head_count=8)), ("shape|heads",)),
    ("heads that no key/value heads divide", lambda: model(keys(attention__head_count_kv=3)), ("4 attention heads over 3",)),
    ("key/value heads for each layer", lambda: model(keys(attention__head_count_kv=[2, 2])), ("array of 2 items",)),
    ("another width than the matrices", lambda: model(keys(embedding_length=128)), ("shape",)),
    ("a width of 2^40", lambda: model(keys(embedding_length=(10, struct.pack("<Q", 2**40)))), ("length is 1099511627776",)),
    ("a negative width", lambda: model(keys(embedding_length=(5, struct.pack("<i", -64)))), ("embedding_length is -64",)),
    ("an MLP of another width than the matrices", lambda: model(keys(feed_forward_length=95)), ("ffn_gate", "shape")),
    ("a context of no tokens", lambda: model(keys(context_length=0)), ("context_length is 0",)),
    ("an epsilon of NaN", lambda: model(keys(attention__layer_norm_rms_epsilon=float("nan"))), ("epsilon is nan",)),
    ("a negative epsilon", lambda: model(keys(attention__layer_norm_rms_epsilon=-1e-5)), ("epsilon is -",)),
    ("no epsilon", lambda: model(keys("llama.attention.layer_norm_rms_epsilon")), ("lacks llama.*epsilon",)),
    ("a RoPE base of infinity", lambda: model(keys(rope__freq_base=float("inf"))), ("freq_base is inf",)),
    ("RoPE scaled by longrope", lambda: model(keys(rope__scaling__type="longrope", rope__scaling__factor=4.0)), ("longrope",)),
    ("RoPE scaled by YaRN from an unknown context", lambda: model(keys(rope__scaling__type="yarn", rope__scaling__factor=4.0)),
        ("original_context_length",)),
    ("RoPE scaled by a number", lambda: model(keys(rope__scaling__type=4)), (r"rope\.scaling\.type is 4",)),
    ("RoPE that shortens the context", lambda: model(keys(rope__scaling__factor=0.5)), ("factor", "at least 1")),
    ("RoPE over half of each head", lambda: model(keys(rope__dimension_count=8)), ("dimension_count is not 16",)),
    ("values that are shorter than keys", lambda: model(keys(attention__value_length=8)), ("value_length is not 16",)),
    ("a key that would change the logits", lambda: model(keys(logit_scale=0.1)), (r"llama\.logit_scale",)),
    # the tensors
    ("no embedding", lambda: model(None, tensors(EMBEDDING)), (EMBEDDING,)),
    ("an embedding that is a vector", lambda: model(entry=lies(EMBEDDING, dims=[64 * 8192])), (EMBEDDING,)),
    ("an embedding on its side", lambda: model(entry=lies(EMBEDDING, dims=[8192, 64])), ("token",)),
    ("no last norm", lambda: model(None, tensors(NORM)), (f"{NORM} is missing",)),
    ("a norm that is a matrix", lambda: model(entry=lies(NORM, dims=[8, 8])), (NORM, "shape")),
    ("norms of queries, which a LLaMA does not have", lambda: model(None, tensors(blk__0__attn_q_norm__weight=torch.ones(16))),
        (r"blk\.0\.attn_q_norm\.weight",)),
    ("a bias in one layer alone", lambda: model(None, tensors(blk__1__attn_q__bias=torch.ones(64))), (r"blk\.1\.attn_q\.b",)),
    ("a tensor whose name is 50,000 letters long", lambda: model(None, tensors(**{"x" * 50_000: torch.ones(8)})), ("xxx",)),
    ("factors of RoPE for another head", lambda: model(None, tensors(rope_freqs__weight=torch.ones(9))), ("rope_freqs", "9")),
    ("factors of RoPE that nothing explains", lambda: model(None, tensors(rope_freqs__weight=torch.linspace(1, 3, 8))),
        ("rope_freqs",)),
    ("factors of RoPE that are NaN", lambda: model(None, tensors(rope_freqs__weight=torch.full((8,), torch.nan))),
        ("rope_freqs",)),
    ("a NaN in a matrix", lambda: model(None, spoilt("blk.1.attn_k.weight", float("nan"))), ("NaN", r"blk\.1\.attn_k")),
    ("infinity in the embedding", lambda: model(None, spoilt(EMBEDDING, float("inf"))), ("inf", EMBEDDING)),
    ("a NaN in a norm", lambda: model(None, spoilt(NORM, float("nan"))), ("NaN", NORM)),
    ("f16 numbers that are all infinite", lambda: model(
        None, tensors(blk__0__ffn_up__weight=torch.full((96, 64), 1e9).half())), ("inf", r"blk\.0\.ffn_up")),
)  # fmt: skip


def written(place: Place, content: bytes, name: str = "model.gguf") -> Path:
    """Write a GGUF file."""
    return place.write(name, content)


def _refusing(content: Callable[[], bytes], words: tuple[str, ...]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        place.converted(written(place, content())).refused(*words)
        assert [path.name for path in place.folder.iterdir()] == ["model.gguf"]

    return check


CASES.extend(Case(KIND, name, _refusing(content, words)) for name, content, words in REFUSED)


# --- what is no plain file --------------------------------------------------------------------------------------------------


@case("a sparse file of a tebibyte")
def _(place: Place) -> None:
    path = written(place, model())
    os.truncate(path, 1 << 40)
    place.converted(path).refused("sparse")


@case("a FIFO")
def _(place: Place) -> None:
    os.mkfifo(place.folder / "model.gguf")
    place.converted(place.folder / "model.gguf").refused("not a regular file")


@case("a link to /dev/zero")
def _(place: Place) -> None:
    (place.folder / "model.gguf").symlink_to("/dev/zero")
    place.converted(place.folder / "model.gguf").refused("not a regular file")


@case("a folder whose name ends in .gguf")
def _(place: Place) -> None:
    place.converted(place.model("model.gguf")).refused("cannot be read")


@case("a file that is not there")
def _(place: Place) -> None:
    place.converted(place.folder / "model.gguf").refused("No such file")
