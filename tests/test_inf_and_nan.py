"""Numbers that are none, in any tensor of a model: every command refuses them by name, and JSON never says NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from click.testing import CliRunner

from edgetune.cli.main import cli
from edgetune.cli.options import print_json
from edgetune.runtime import safetensors_file
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import SafetensorsFile

VECTORS = ("model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight")
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def spoil(folder: Path, name: str, value: float) -> None:
    """Set the last number of a stored tensor."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_trainable(tmp_path / "model", dtype=torch.bfloat16)
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    tensors = safetensors.torch.load_file(weights)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    safetensors.torch.save_file(tensors | head, weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    return tmp_path / "model"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", VECTORS)
def test_norms_are_checked_when_a_model_opens(name: str, value: float, folder: Path) -> None:
    spoil(folder, name, value)
    with pytest.raises(ModelError, match=rf"model holds inf or NaN in {name}, so it can compute nothing; copy or download"):
        open_model(folder)


@pytest.mark.parametrize("name", ["self_attn.k_proj.bias", "self_attn.q_norm.weight"])
def test_biases_and_head_norms_are_checked_too(name: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "qwen2" if "bias" in name else "qwen3")
    spoil(tmp_path / "model", f"model.layers.1.{name}", float("nan"))
    with pytest.raises(ModelError, match=rf"inf or NaN in model\.layers\.1\.{name}"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", MATRICES)
def test_embedding_and_head_are_checked_when_they_load_or_are_quantised(name: str, value: float, folder: Path) -> None:
    spoil(folder, name, value)
    base = open_model(folder)
    for quant, in_file in ((QuantConfig(), False), (None, True)):
        with pytest.raises(ModelError, match=rf"inf or NaN in {name},"):
            load_llama(base, torch.float32, quant=quant, embedding_in_file=in_file)
    with pytest.raises(ModelError, match=rf"inf or NaN in {name},"):
        quantize_folder(folder, folder.parent / "four")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_scales_of_4_bit_weights_are_checked(folder: Path, tmp_path: Path) -> None:
    for double in (True, False):
        quantize_folder(folder, tmp_path / str(double), double_quant=double)
        part = f"model.layers.1.mlp.up_proj.weight.{'nested_absmax' if double else 'absmax'}"
        spoil(tmp_path / str(double), part, float("inf"))
        with pytest.raises(ModelError, match=rf"inf or NaN in {part}"):
            load_llama(open_model(tmp_path / str(double)), torch.float32)


def test_a_dense_linear_that_is_not_quantised_is_checked(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(folder, name, float("nan"))
    with pytest.raises(ModelError, match=rf"inf or NaN in {name}"):
        load_llama(open_model(folder), torch.float32)
    with pytest.raises(ModelError, match=rf"^{name} cannot be quantised: .* holds inf or NaN"):
        load_llama(open_model(folder), torch.float32, quant=QuantConfig())


@pytest.mark.parametrize("name", [VECTORS[0], *MATRICES])
def test_every_command_refuses_such_a_model_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for number in range(12):
        (tmp_path / "notes" / f"{number}.md").write_text(f"Note {number}: the tyre of the red bicycle was flat again. " * 9)
    spoil(folder, name, float("inf"))
    notes, model = str(tmp_path / "notes"), ["--model", str(folder)]
    for command in (
        ["train", notes, *model, "--steps", "2"],
        ["eval", notes, *model, "--adapter", "none", "--json"],
        ["generate", "The", *model, "--adapter", "none"],
        ["quantize", str(folder), str(tmp_path / "four")],
        ["export", "hf", *model, "--adapter", "none", "--weights", "bf16", "--out", str(tmp_path / "out"), "--no-verify"],
    ):
        result = CliRunner().invoke(cli, command)
        assert isinstance(result.exception, ModelError), (command, result.output)
        assert f"holds inf or NaN in {name}" in str(result.exception)
        assert "NaN" not in result.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "four").exists()


def test_an_odd_offset_costs_a_piece_and_no_copy_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of early safetensors versions do not align their tensors."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd = raw[8 : 8 + length].rstrip(b" ")
    odd += b" " * (1 - (8 + len(odd)) % 2)
    (folder / "model.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + raw[8 + length :])
    base = open_model(folder)
    assert base.stored["model.embed_tokens.weight"].start % 2 == 1
    monkeypatch.setattr(safetensors_file, "_SLICE", 4096)
    file = SafetensorsFile.open(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    pieces = list(file.pieces(name))
    assert max(piece.nbytes for piece in pieces) == 4096
    assert torch.equal(torch.cat(pieces), file.tensor(name).view(-1))
    monkeypatch.setattr(SafetensorsFile, "tensor", None)  # the whole is not asked for
    base.refuse_inf_and_nan(base.long_floats(linears=True))


def test_json_has_null_where_a_number_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": (True, None, 2)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": [True, None, 2]}
