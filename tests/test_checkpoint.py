"""A valid model folder opens without its weights being read; an invalid one gives one error that names all its faults."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetune.runtime import nf4
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import ModelError, ResourceError
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec, aligned_order

transformers = pytest.importorskip("transformers")


def tiny_config(**changes):
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**(settings | changes))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_config())


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    """Rewrite model.safetensors with `change` applied to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- valid folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_of_a_folder_is_there_and_equal(model, tmp_path, dtype):
    model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(tmp_path)
    checkpoint = open_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == dtype
    block = checkpoint.block_tensors(1)
    assert torch.equal(block["self_attn.k_proj.weight"], model.model.layers[1].self_attn.k_proj.weight)
    assert len(block) == 9
    assert checkpoint.quant is None


def test_a_sharded_folder_is_the_same_base_as_a_single_file(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    checkpoint = open_model(tmp_path / "sharded")
    assert len(checkpoint.files) > 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.digest == open_model(folder).digest


def test_the_digest_changes_with_weights_and_with_rope_but_not_with_bookkeeping(folder):
    before = open_model(folder).digest
    edit_json(folder / "config.json", transformers_version="1.0", use_cache=False)
    assert open_model(folder).digest == before
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    changed = open_model(folder).digest
    assert changed != before
    edit(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert open_model(folder).digest not in (before, changed)


def test_tied_embeddings_need_no_head_and_bear_an_equal_one(tmp_path):
    transformers.LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    before = open_model(tmp_path).digest
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert open_model(tmp_path).digest == before
    edit(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path)


def test_rotary_frequencies_of_old_llamas_are_ignored(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    open_model(folder)


def test_tensors_of_rotary_caches_and_masks_are_passed_over(folder):
    """ColossalAI stored the angles, and older libraries their masks; config.json gives both."""
    before = open_model(folder).digest
    attention = "model.layers.{}.self_attn"
    caches = {f"{attention.format(0)}.rotary_emb.{name}": torch.zeros(1, 1, 8, 16) for name in ("cos_cached", "sin_cached")}
    caches |= {"model.rotary_emb.inv_freq": torch.zeros(8), f"{attention.format(1)}.masked_bias": torch.tensor(-1e4)}
    edit(folder, lambda tensors: tensors.update(caches))
    assert open_model(folder).digest == before
    edit(folder, lambda tensors: tensors.update({f"{attention.format(0)}.rotary_emb.scale": torch.zeros(8)}))
    assert "model.layers.0.self_attn.rotary_emb.scale is unknown" in refusal(folder)


@pytest.mark.parametrize(
    "size", [{"num_hidden_layers": 1000}, {"vocab_size": 2**24}, {"hidden_size": 2**20}, {"intermediate_size": 2**23}]
)
def test_sizes_that_the_files_do_not_have_are_refused_before_anything_is_built(folder, size):
    edit_json(folder / "config.json", **size)
    tracemalloc.start()
    try:
        said = refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert " is missing" in said or " has shape " in said
    assert len(said) < 3000


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_biases_and_head_norms_come_with_their_block(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(
        **tiny_config(head_dim=16).to_diff_dict() | {"model_type": family.lower()}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    block = open_model(tmp_path).block_tensors(0)
    assert set(block) == set(model.model.layers[0].state_dict())


# ---- invalid folders


def test_what_is_missing_unknown_and_misshapen_is_told_at_once(folder):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 32)
        tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
        tensors["visual.patch_embed.weight"] = torch.zeros(4)

    edit(folder, damage)
    message = refusal(folder)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.layers.0.self_attn.q_proj.weight has shape [64, 32] where config.json says [64, 64]" in message
    assert "model.norm.weight is stored as torch.int32" in message
    assert "visual.patch_embed.weight is unknown" in message


def test_a_long_list_of_faults_is_cut(folder):
    edit_json(folder / "config.json", num_hidden_layers=30)
    assert "and 240 more" in refusal(folder)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int8, "lm_head.weight differs from model.embed_tokens.weight"), (torch.float8_e4m3fn, "8-bit floats (lm_head.w")],
)
def test_a_tied_head_of_another_type_is_a_fault_like_any_other(folder, dtype, said):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 64).to(dtype)}))
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("x" * 5000, torch.float32, "xxx is unknown"),
        ("x" * 5000 + ".quant_state.bitsandbytes__nf4", torch.uint8, "xxx cannot be used: its quant_state is not valid JSON"),
        ("x" * 5000, torch.float8_e4m3fn, "xxx), which edgetune does not read"),
        ("x" * 5000 + ".layers.0.self_attn.q_proj.weight", torch.float32, "xxx, where a LlamaForCausalLM has model.layers.0"),
    ],
)
def test_a_long_name_of_a_tensor_is_cut(folder, name, dtype, said):
    def change(tensors):
        if "layers.0" in name:
            tensors.clear()
        tensors[name] = torch.zeros(4).to(dtype)

    edit(folder, change)
    message = refusal(folder)
    assert said in message
    assert len(message) < 2000


def test_a_long_name_in_an_index_is_cut(sharded):
    index = sharded / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=shards | {"x" * 5000: min(shards.values())})
    message = refusal(sharded)
    assert "xxx is not in model-0000" in message
    assert len(message) < 1000


def test_the_files_of_the_weights_are_those_that_another_folder_needs(folder, sharded):
    index = "model.safetensors.index.json"
    assert [file.name for file, _ in open_model(sharded).weight_files] == [
        *sorted(p.name for p in sharded.glob("*.safetensors")),
        index,
    ]
    (folder / index).write_text("left behind by another model")
    assert [file.name for file, _ in open_model(folder).weight_files] == ["model.safetensors"]


def test_no_folder_no_config_no_weights(folder, tmp_path):
    assert "There is no model folder" in refusal(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    assert "but no model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '"x"', "\xff"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened_and_the_conversion_is_told(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert f"pickled weights ({name})" in message
    assert "save_pretrained(" in message


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "FP4"),
    ],
)
def test_other_quantisations_are_refused_by_name(folder, quantization, said):
    edit_json(folder / "config.json", quantization_config=quantization)
    assert said in refusal(folder)


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def test_missing_shards_are_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    assert f"lacks 1 of {len(shards)} weight files ({shards[1].name})" in refusal(sharded)


def test_a_truncated_shard_says_how_much_is_there(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    size = shard.stat().st_size
    with shard.open("rb+") as file:
        file.truncate(size - 100)
    assert f"{shard} is truncated: {size - 100:,} bytes where its header promises {size:,}" in refusal(sharded)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:x.safetensors", ".x.safetensors"]
)
def test_an_index_cannot_lead_out_of_its_folder(sharded, name):
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(value))
    assert "expected safetensors files of its own folder" in refusal(sharded)


def test_an_index_that_disagrees_with_its_files(sharded):
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = sorted(value["weight_map"].values())[0]
    index.write_text(json.dumps(value))
    assert "model.norm.weight is not in model-00001" in refusal(sharded)
    index.write_text('{"weight_map": {}}')
    assert "has no weight_map" in refusal(sharded)


def test_a_tensor_that_stands_twice(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    save_file(both, second)
    assert " is stored in several files: " in refusal(sharded)


# ---- 4-bit folders


def make_4bit(folder, change=lambda tensors: None, **settings):
    """Quantise a folder's linears with bitsandbytes and store them in its layout."""
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor.clone()
        if name.endswith("_proj.weight"):
            settings = {"quant_type": "nf4", "compress_statistics": True} | settings
            tensors[name], state = functional.quantize_4bit(tensor, **settings)
            tensors |= {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_weights_open_and_dequantise_as_it_does(folder, model, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    make_4bit(folder, compress_statistics=double)
    checkpoint = open_model(folder)
    assert (checkpoint.quant.quant_type, checkpoint.quant.block_size, checkpoint.quant.double_quant) == (
        "nf4",
        64,
        double,
    )
    weight = model.model.layers[0].mlp.down_proj.weight
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double))
    ours = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    assert isinstance(ours, QuantizedTensor)
    assert torch.equal(nf4.dequantize(ours), theirs)
    assert ours.packed.data_ptr() % 64 == 0


def test_fp4_weights_are_refused_by_name(folder):
    make_4bit(folder, quant_type="fp4")
    assert "its data type is 'fp4'" in refusal(folder)


def state_json(**changes):
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64], "nested_blocksize": 256}
    fields |= {"nested_offset": 0.1} | changes
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("suffix", "value", "said"),
    [
        (".absmax", None, "q_proj.weight.absmax is missing"),
        (".quant_state.bitsandbytes__nf4", None, "q_proj.weight has the scales of a 4-bit weight, and no quant_state"),
        (".absmax", torch.zeros(5, dtype=torch.uint8), "absmax has shape [5], too few or many for [64, 64]"),
        (".absmax", torch.zeros(64), "absmax is torch.float32, which contradicts its quant_state"),
        (".nested_absmax", None, "nested_absmax is missing"),
        (".nested_quant_map", torch.zeros(16), "nested_quant_map has shape [16]"),
        (".quant_map", torch.zeros(16, dtype=torch.float16), "quant_map is torch.float16"),
        ("", torch.zeros(7, 1, dtype=torch.uint8), "q_proj.weight has shape [7, 1]"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "quant_state is not valid JSON or lacks a key"),
        (".quant_state.bitsandbytes__nf4", state_json(blocksize=7), "its block size 7"),
        (".quant_state.bitsandbytes__nf4", state_json(dtype="int8"), "'int8'"),
        (".quant_state.bitsandbytes__nf4", state_json(shape=[-1, 2]), "its shape [-1, 2]"),
        (".quant_state.bitsandbytes__nf4", state_json(shape=[32, 64]), "too few or many for [32, 64]"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_offset=float("nan")), "quant_state is not valid JSON"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_offset=1e30), "offset 1e+30"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_offset="0.1"), "offset '0.1'"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_offset=10**400), "quant_state is not valid JSON"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_blocksize="256"), "nested block size '256'"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_blocksize=256.0), "nested block size 256.0"),
        (".quant_state.bitsandbytes__nf4", state_json(blocksize="64"), "its block size '64'"),
        (".quant_state.bitsandbytes__nf4", state_json(blocksize=[64]), "its block size [64]"),
        (".quant_state.bitsandbytes__nf4", state_json(dtype=["float32"]), "dtype ['float32']"),
        (".quant_state.bitsandbytes__nf4", state_json(quant_type={"nf4": 1}), "its data type is {'nf4': 1}"),
        (".quant_state.bitsandbytes__nf4", state_json(shape="64x64"), "its shape '64x64'"),
        (".quant_state.bitsandbytes__nf4", state_json(shape=[64, "64"]), "its shape [64, '64']"),
        (".quant_state.bitsandbytes__nf4", state_json(shape=[4096]), "its shape [4096] is not a list of two"),
        (".quant_state.bitsandbytes__nf4", state_json(shape=[2**31 - 1] * 2), "too few or many for [2147483647, 2147483647]"),
        (".quant_state.bitsandbytes__nf4", state_json(shape=[True, 4096]), "its shape [True, 4096]"),
        (".quant_state.bitsandbytes__nf4", torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8), "lacks a key"),
        (".quant_state.bitsandbytes__nf4", torch.frombuffer(bytearray(b"[" * 5000), dtype=torch.uint8), "not valid JSON"),
        ("", torch.zeros(2048, dtype=torch.uint8), "has shape [2048]; expected its codes as a column"),
        (".absmax", torch.zeros(2, 32, dtype=torch.uint8), "absmax has shape [2, 32]; expected [64]"),
        (".nested_absmax", torch.zeros(1, 1), "nested_absmax has shape [1, 1]; expected [1]"),
        (".nested_quant_map", torch.zeros(16, 16), "nested_quant_map has shape [16, 16]; expected [256]"),
        (".quant_state.bitsandbytes__nf4", state_json(nested_blocksize=64), "nested block size 64"),
    ],
)
def test_a_4bit_weight_in_contradiction_with_itself(folder, suffix, value, said):
    name = "model.layers.0.self_attn.q_proj.weight"

    def damage(tensors):
        tensors[name + suffix] = value
        if value is None:
            del tensors[name + suffix]

    make_4bit(folder, damage)
    assert said in refusal(folder)


def test_another_table_under_the_name_of_nf4_is_refused(folder):
    make_4bit(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight.quant_map"].mul_(0.5))
    with pytest.raises(ModelError, match=r"table of model\.layers\.0\.mlp\.up_proj\.weight is not NF4's"):
        open_model(folder).block_tensors(0)


# ---- the file format


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), start=0, stop=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry()}, b"1234", "is truncated"),
        ({"a": entry()}, b"123456789", "is damaged: 78 bytes where its header promises 77"),
        ({"a": entry(), "b": entry(start=4, stop=12)}, bytes(12), "'b' overlaps"),
        ({"a": entry(start=8, stop=16)}, bytes(16), "'a' follows unused bytes"),
        ({"a": entry(shape=(3,))}, bytes(8), "takes 12 bytes, but its offsets span 8"),
        ({"a": entry(shape=(-2,))}, bytes(8), "are not whole numbers"),
        ({"a": entry(shape=(2**60,))}, bytes(8), "are not whole numbers"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "are not whole numbers"),
        ({"a": entry(start=8, stop=0)}, bytes(8), "span -8"),
        ({"a": entry(dtype="F17")}, bytes(8), "dtype 'F17'"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "dtype"),
        ({"a": {"dtype": "F32"}}, bytes(8), "lacks a dtype, a shape or its offsets"),
        ({"a": 3}, b"", "lacks a dtype"),
        ({"__metadata__": {"a": 1}}, b"", "metadata is not text"),
        ([1, 2], b"", "not a JSON object"),
        (b"[" * 200_000, b"", "header is not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "header is not valid JSON"),
        (b"\xff\xfe", b"", "header is not valid JSON"),
    ],
)
def test_each_fault_of_a_file_is_named(tmp_path, header, data, said):
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ModelError) as caught:
        SafetensorsFile.open(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 62), struct.pack("<Q", 5000) + b"{}"])
def test_files_too_short_or_with_an_absurd_header(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ModelError, match=r"is truncated|is not a safetensors file"):
        SafetensorsFile.open(tmp_path / "x")


SPECS = [
    TensorSpec("odd", torch.uint8, (7,)),
    TensorSpec("a", torch.bfloat16, (8, 8)),
    TensorSpec("scale", torch.float32, (3,)),
    TensorSpec("empty", torch.float32, (0, 4)),
    TensorSpec("b", torch.float32, (4, 16)),
]


def test_what_is_written_is_aligned_and_read_by_the_safetensors_library(tmp_path):
    torch.manual_seed(0)
    values = {spec.name: (torch.randn(spec.shape) * 9).to(spec.dtype) for spec in SPECS}
    specs = aligned_order(SPECS)
    with SafetensorsWriter(tmp_path / "x", specs, {"format": "pt"}) as writer:
        for spec in specs:
            writer.write(spec.name, values[spec.name])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    theirs, ours = load_file(tmp_path / "x"), SafetensorsFile.open(tmp_path / "x")
    assert ours.metadata == {"format": "pt"}
    for name, value in values.items():
        assert torch.equal(theirs[name], value)
        assert torch.equal(ours.tensor(name), value)
        stored = ours.tensors[name]
        assert stored.start % (64 if stored.nbytes % 64 == 0 else stored.dtype.itemsize) == 0
        assert value.numel() == 0 or ours.tensor(name, 64).data_ptr() % 64 == 0


def test_foreign_misaligned_tensors_are_copied(tmp_path):
    header = json.dumps({"a": entry("U8", (1,), 0, 1), "b": entry("F32", (2,), 1, 9)}).encode()
    path = raw_file(tmp_path / "x", header, b"\x07" + struct.pack("<ff", 1.5, -2.0))
    assert SafetensorsFile.open(path).tensor("b").tolist() == [1.5, -2.0]


def write_zeros(path, names):
    with SafetensorsWriter(path, SPECS[1:3]) as writer:
        for name in names:
            writer.write(name, torch.zeros(8, 8) if name == "a" else torch.zeros(3))


@pytest.mark.parametrize("names", [["a"], ["a", "a"]], ids=["one never written", "one twice"])
def test_a_writer_that_fails_leaves_nothing_and_the_old_file(tmp_path, names):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError):
        write_zeros(tmp_path / "x", names)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, full_disk):
    full_disk()
    with pytest.raises(ResourceError, match="disk is full"):
        write_zeros(tmp_path / "x", ["a", "scale"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk(monkeypatch):
    """Return a function that makes every later fsync fail for lack of space."""

    def fill():
        def refuse(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", refuse)

    return fill


def test_a_symlinked_snapshot_as_in_the_hugging_face_cache_opens(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b3c"
    shutil.move(folder, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    open_model(snapshot)
