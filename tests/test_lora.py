"""LoRA on NF4: gradients equal peft's, recomputation changes nothing, merging equals adapting, peft opens what we write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch

from edgetune.runtime import adapter as adapters
from edgetune.runtime import nf4, ops, peft_folder
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, LoraConfig, QuantConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.linear import Linear, LoraLinear
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.runner import Recompute, Runner

CONFIG = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model")
    return tmp_path / "model"


def shaken(model: Llama, config: LoraConfig = CONFIG) -> Llama:
    """Attach an adapter whose B is not zero, so that it has an effect, and return the model."""
    adapters.attach_new(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def row(length: int = 50, masked: int = 0) -> Batch:
    ids = torch.randint(0, 128, (length + 1,), generator=torch.Generator().manual_seed(3))
    weights = torch.ones(length)
    weights[:masked] = 0
    return Batch(ids[:-1], ids[1:], weights / weights.sum(), torch.arange(length), (Segment.packed(0, length),))


def gradients(model: Llama, recompute: Recompute, one: Batch, key: int | None = None) -> tuple[float, list[torch.Tensor]]:
    for parameter in adapters.parameters(model):
        parameter.grad = None
    loss = Runner(model, recompute, loss_rows=16).train(one, key)
    return float(loss), [parameter.grad.clone() for parameter in adapters.parameters(model)]


def peft_model(theirs: torch.nn.Module, model: Llama, folder: Path) -> torch.nn.Module:
    """Load the model's adapter into peft by way of the file format."""
    import peft

    peft_folder.save(adapters.snapshot(model, CONFIG), folder, "base")
    return peft.PeftModel.from_pretrained(theirs, str(folder), is_trainable=True)


@pytest.mark.parametrize("recompute", list(Recompute))
def test_loss_and_gradients_equal_pefts(folder: Path, tmp_path: Path, recompute: Recompute) -> None:
    model = shaken(load_llama(open_model(folder), torch.float32))
    theirs = peft_model(tiny.transformers_model("llama-2-grouped"), model, tmp_path / "adapter")
    one = row(masked=10)
    loss, ours = gradients(model, recompute, one)
    logits = theirs(one.input_ids[None]).logits[0]
    wanted = (torch.nn.functional.cross_entropy(logits, one.targets, reduction="none") * one.loss_mask).sum()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    expected = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    for layer, block in enumerate(model.blocks):
        for name, linear in block.linears().items():
            for part in "AB":
                key = next(k for k in expected if f"layers.{layer}." in k and f"{name}.lora_{part}" in k)
                torch.testing.assert_close(getattr(linear, f"lora_{part}").grad, expected[key], atol=2e-5, rtol=1e-3)
    assert len(ours) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", [None, 12345])
def test_recomputation_changes_no_bit(folder: Path, dtype: torch.dtype, key: int | None) -> None:
    """This includes dropout, whose mask depends on the step, layer and linear, not on the time of the call."""
    config = replace(CONFIG, dropout=0.3)
    model = shaken(load_llama(open_model(folder), dtype, quant=QuantConfig()), config)
    results = [gradients(model, recompute, row(), key) for recompute in Recompute]
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_dropout_changes_with_its_key_and_vanishes_without(folder: Path) -> None:
    model = shaken(load_llama(open_model(folder), torch.float32), replace(CONFIG, dropout=0.3))
    losses = [gradients(model, Recompute.FULL, row(), key)[0] for key in (None, 1, 1, 2)]
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def test_the_nf4_backward_equals_that_of_the_dense_weight(folder: Path) -> None:
    quantised = shaken(load_llama(open_model(folder), torch.float32, quant=QuantConfig()))
    dense = shaken(load_llama(open_model(folder), torch.float32, quant=QuantConfig()))
    for block in dense.blocks:
        for linear in block.linears().values():
            linear.base.weight = nf4.dequantize(linear.base.weight, torch.float32)
    (loss_a, ours), (loss_b, wanted) = (gradients(model, Recompute.FULL, row()) for model in (quantised, dense))
    assert loss_a == pytest.approx(loss_b, abs=1e-6)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_two_rows_weigh_as_one(folder: Path) -> None:
    """Gradient accumulation weighs by tokens, not by rows."""
    model = shaken(load_llama(open_model(folder), torch.float32))
    whole = row(60)
    together = gradients(
        model,
        Recompute.FULL,
        replace(
            whole,
            segments=(Segment.packed(0, 13), Segment.packed(13, 60)),
            positions=torch.cat([torch.arange(13), torch.arange(47)]),
        ),
    )
    for parameter in adapters.parameters(model):
        parameter.grad = None
    runner, loss = Runner(model), 0.0
    for start, end in ((0, 13), (13, 60)):
        part = slice(start, end)
        loss += float(
            runner.train(
                Batch(
                    whole.input_ids[part],
                    whole.targets[part],
                    whole.loss_mask[part],
                    torch.arange(end - start),
                    (Segment.packed(0, end - start),),
                )
            )
        )
    assert loss == pytest.approx(together[0], abs=1e-5)
    for parameter, wanted in zip(adapters.parameters(model), together[1], strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-4)


def test_merged_equals_adapted(folder: Path) -> None:
    model = shaken(load_llama(open_model(folder), torch.float32))
    ids = row().input_ids
    with torch.no_grad():
        adapted = model.logits(Runner(model).infer(ids, torch.arange(50), [Segment(0, 50, 0, 50)], None))
        for block in model.blocks:
            for name, linear in block.linears().items():
                assert isinstance(linear, LoraLinear)
                setattr(block, name, linear.merge(torch.float32))
        merged = model.logits(Runner(model).infer(ids, torch.arange(50), [Segment(0, 50, 0, 50)], None))
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_write_and_gives_our_logits(folder: Path, tmp_path: Path, rslora: bool) -> None:
    import peft

    config = replace(CONFIG, rslora=rslora, targets=("q_proj", "v_proj", "down_proj"))
    model = shaken(load_llama(open_model(folder), torch.float32), config)
    peft_folder.save(adapters.snapshot(model, config), tmp_path / "adapter", "base")
    theirs = peft.PeftModel.from_pretrained(tiny.transformers_model("llama-2-grouped"), str(tmp_path / "adapter"))
    ids = row().input_ids
    with torch.no_grad():
        ours = model.logits(Runner(model).infer(ids, torch.arange(50), [Segment(0, 50, 0, 50)], None))
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=1e-4, rtol=0)


def test_we_load_what_peft_writes(folder: Path, tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(
        tiny.transformers_model("llama-2-grouped"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEARS), init_lora_weights=False),
    )
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = load_llama(open_model(folder), torch.float32)
    adapters.attach(model, peft_folder.load(tmp_path / "adapter"))
    ids = row().input_ids
    with torch.no_grad():
        ours = model.logits(Runner(model).infer(ids, torch.arange(50), [Segment(0, 50, 0, 50)], None))
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=1e-4, rtol=0)


def test_saving_and_loading_changes_no_bit_and_is_private(folder: Path, tmp_path: Path) -> None:
    model = shaken(load_llama(open_model(folder), torch.float32))
    stored = adapters.snapshot(model, CONFIG, {"base": "abc"})
    peft_folder.save(stored, tmp_path / "adapter", "base")
    again = peft_folder.load(tmp_path / "adapter")
    assert again.config == CONFIG
    assert again.about == {"base": "abc"}
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in stored.tensors.items())
    assert (tmp_path / "adapter").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "adapter").iterdir())


def test_an_adapter_for_another_base_names_every_mismatch_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny.save_model(other, hidden_size=32, num_hidden_layers=3)
    stored = adapters.snapshot(shaken(load_llama(open_model(other), torch.float32)), CONFIG)
    model = load_llama(open_model(folder), torch.float32)
    with pytest.raises(AdapterError, match=r"no layer 2; layers 0-1 down_proj: .*layers 0-1 q_proj.*layers 0-1 up_proj"):
        adapters.attach(model, stored)
    assert all(isinstance(linear, Linear) for block in model.blocks for linear in block.linears().values())


def damage(folder: Path, what: str) -> None:
    config_file, weights = folder / peft_folder.CONFIG_FILE, folder / peft_folder.WEIGHTS_FILE
    config = json.loads(config_file.read_text())
    tensors = safetensors.torch.load_file(weights)
    if what == "no config":
        config_file.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "dora":
        config_file.write_text(json.dumps({**config, "use_dora": True}))
    elif what == "not lora":
        config_file.write_text(json.dumps({**config, "peft_type": "IA3"}))
    elif what == "rank 0":
        config_file.write_text(json.dumps({**config, "r": 0}))
    elif what == "no json":
        config_file.write_text("{")
    elif what == "foreign tensor":
        safetensors.torch.save_file({**tensors, "lm_head.weight": torch.ones(2)}, weights)
    elif what == "nan":
        first = next(iter(tensors))
        safetensors.torch.save_file({**tensors, first: tensors[first] * float("nan")}, weights)


@pytest.mark.parametrize(
    "what", ["no config", "no weights", "truncated", "dora", "not lora", "rank 0", "no json", "foreign tensor", "nan"]
)
def test_a_damaged_adapter_is_one_sentence(folder: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "adapter"
    peft_folder.save(adapters.snapshot(shaken(load_llama(open_model(folder), torch.float32)), CONFIG), path, "base")
    damage(path, what)
    with pytest.raises(AdapterError) as error:
        peft_folder.load(path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_adapter_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    model = shaken(load_llama(open_model(folder), torch.float32))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    with pytest.raises(AdapterError, match="mine"):
        peft_folder.save(adapters.snapshot(model, CONFIG), mine, "base")
    assert (mine / "diary.txt").read_text() == "dear diary"


def test_the_reference_and_the_best_back_end_agree_in_training(folder: Path) -> None:
    model = shaken(load_llama(open_model(folder), torch.float32, quant=QuantConfig()))
    best = gradients(model, Recompute.FULL, row(), 5)
    with ops.use_backend("reference"):
        plain = gradients(model, Recompute.FULL, row(), 5)
    assert best[0] == pytest.approx(plain[0], abs=1e-5)
    for a, b in zip(best[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
