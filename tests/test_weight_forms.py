"""The frozen base's linears in bf16, in rows of 8 bits or in 4 bits: products, loading, the choice, and what remembers it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import Tensor

from edgetune.cli.main import cli
from edgetune.config import DataConfig, TrainConfig
from edgetune.events import Finished, Interrupted, Started, Stepped
from edgetune.library.loading import load_base, open_base
from edgetune.machine.forecast import forecast
from edgetune.machine.shapes import SHAPES
from edgetune.memory_settings import choose_form, choose_or_refuse, least_of
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget, int8, nf4, ops, peft_folder
from edgetune.runtime.batch import Batch
from edgetune.runtime.budget import Setting, Stored, WeightForm
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import ModelError, ResourceError, SettingError, UsageError
from edgetune.runtime.linear import Linear, LoraLinear, dense_weight
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.ops_types import Segment, Weight
from edgetune.runtime.project import Identity, Panel, ProjectPlan, project
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Recompute, Runner
from edgetune.session import Session
from edgetune.training.evaluation import evaluate
from edgetune.training.train import train
from edgetune.weight_forms import KEEP_BF16_BYTES, form_for_writing, forms_for_training, forms_of_shape, is_small

BF16, INT8, NF4 = WeightForm.BF16, WeightForm.INT8, WeightForm.NF4
LORA = LoraConfig(rank=4, alpha=8.0)
NOTES = Path(__file__).parent.parent / "examples" / "notes"
MAKE = {BF16: lambda weight: weight.bfloat16(), INT8: int8.quantize, NF4: nf4.quantize}
"""Makes a weight of each form from a dense one."""


# ---- products ----


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("form", list(WeightForm))
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 70])
def test_products_and_gradients_are_those_of_the_dense_weight(backend: str, form: WeightForm, rows: int) -> None:
    if backend == "cpu" and ops.kernels_missing() is not None:
        pytest.skip("the kernels were not built")
    linears, dense = [], []
    for outputs in (37, 65):
        weight = MAKE[form](0.1 * torch.randn(outputs, 91))
        a, b = torch.randn(3, 91), torch.randn(outputs, 3)
        linears.append(LoraLinear(Linear(weight, torch.randn(outputs)), a, b, 0.5))
        dense.append((dense_weight(weight), linears[-1].base.bias, a.clone().requires_grad_(), b.clone().requires_grad_()))
    h, dy = torch.randn(rows, 91), torch.randn(rows, 102)
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    with ops.use_backend(backend):
        y = project(ours, Identity(), linears, ProjectPlan(Panel()))
        y.backward(dy)
    wanted = torch.cat([theirs @ w.T + 0.5 * (theirs @ a.T) @ b.T + bias for w, bias, a, b in dense], dim=1)
    wanted.backward(dy)
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    for linear, (_, _, a, b) in zip(linears, dense, strict=True):
        torch.testing.assert_close(linear.lora_A.grad, a.grad, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(linear.lora_B.grad, b.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (37, 91), (3, 70_000), (2049, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_8_bits_become_dense_with_one_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = int8.quantize(torch.randn(shape))
    wanted = (rows.codes.float() * rows.scale).to(dtype)
    assert torch.equal(int8.dequantize(rows, dtype), wanted)
    assert torch.equal(Panel().dense(rows, dtype), wanted)
    assert torch.equal(dense_weight(rows), rows.codes.float() * rows.scale)


def test_the_panel_copies_no_weight_that_has_the_compute_dtype() -> None:
    weight, panel = torch.randn(5, 7).bfloat16(), Panel()
    assert panel.dense(weight, torch.bfloat16) is weight
    assert torch.equal(panel.dense(weight, torch.float32), weight.float())
    assert panel.dense(weight, torch.float32).data_ptr() == panel.dense(weight, torch.float32).data_ptr()


def test_an_adapter_merges_into_rows_of_8_bits() -> None:
    rows, a, b = int8.quantize(torch.randn(37, 91)), torch.randn(3, 91), torch.randn(37, 3)
    merged = LoraLinear(Linear(rows), a, b, 0.5).merge(torch.float32).weight
    assert isinstance(merged, Tensor)
    torch.testing.assert_close(merged, int8.dequantize(rows, torch.float32) + 0.5 * b @ a)


# ---- loading ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one model in fp32, bf16, fp16 and NF4; return the folders by these names."""
    root = tmp_path_factory.mktemp("models")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        tiny.save_trainable(root / name, layers=4, dtype=dtype)
    quantize_folder(root / "fp32", root / "nf4")
    return {path.name: path for path in root.iterdir()}


def linears(model: Llama) -> list[Weight]:
    return [linear.weight for block in model.blocks for linear in block.linears().values() if isinstance(linear, Linear)]


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_form_is_made_of_the_stored_numbers(folders: dict[str, Path], stored: str, dtype: torch.dtype) -> None:
    base = open_model(folders[stored])
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)]
    for form in WeightForm:
        model = load_llama(base, dtype, quant=form.quant)
        for block, name in zip(model.blocks, names, strict=True):
            found, original = block.q_proj.weight, base.tensor(name)
            if form is BF16:
                assert found.dtype == torch.bfloat16
                assert torch.equal(found, original.bfloat16())
                # What is stored in bf16 is mapped, and not copied.
                assert (found.data_ptr() == original.data_ptr()) == (stored == "bf16")
            elif form is INT8:
                wanted = int8.quantize(original)
                assert torch.equal(found.codes, wanted.codes)
                assert torch.equal(found.scale, wanted.scale)
            else:
                assert torch.equal(found.packed, nf4.quantize(original).packed)


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("form", list(WeightForm))
def test_the_planner_knows_the_size_of_each_form(folders: dict[str, Path], stored: str, form: WeightForm) -> None:
    base = open_model(folders[stored])
    sizes = Stored.of(base, form)
    model = load_llama(base, torch.bfloat16, quant=form.quant)
    held = sum(weight.nbytes for weight in linears(model))
    assert sizes.layer * 4 == pytest.approx(held, rel=0.01)  # NF4's tables of 256 numbers are not counted
    assert sizes.form is form
    assert sizes.mapped == (form is BF16 and stored == "bf16")


def test_a_panel_is_planned_only_where_weights_have_to_be_made_dense(folders: dict[str, Path]) -> None:
    base, setting = open_model(folders["bf16"]), Setting(64, Recompute.FULL, compact=True)
    config, panel = base.config, 96 * 64

    def scratch(form: WeightForm, dtype: torch.dtype) -> int:
        with ops.use_backend("reference"):
            return budget.parts(config, LORA, Stored.of(base, form), setting, dtype, process=0).scratch

    assert scratch(INT8, torch.bfloat16) == scratch(BF16, torch.bfloat16) + 2 * panel == scratch(NF4, torch.bfloat16)
    assert scratch(INT8, torch.float32) == scratch(BF16, torch.float32) == scratch(NF4, torch.float32)


@pytest.mark.parametrize("form", [BF16, INT8])
def test_a_linear_that_is_not_finite_is_refused_by_name(tmp_path: Path, form: WeightForm) -> None:
    model = tiny.transformers_model("llama-2-grouped")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_llama(open_model(tmp_path / "model"), torch.float32, quant=form.quant)


def row() -> Batch:
    ids = torch.randint(3, 128, (61,), generator=torch.Generator().manual_seed(3))
    return Batch(ids[:-1], ids[1:], torch.full((60,), 1 / 60), torch.arange(60), (Segment.packed(0, 60),))


def gradients(model: Llama, recompute: Recompute = Recompute.FULL) -> list[Tensor]:
    """Return the loss of a row and the adapter's gradients."""
    adapters.attach_new(model, LORA, seed=1)
    for parameter in adapters.parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    loss = Runner(model, recompute, loss_rows=16).train(row(), dropout_key=7)
    return [loss, *(parameter.grad for parameter in adapters.parameters(model) if parameter.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_that_is_streamed_from_its_file_trains_to_the_same_bits(folders: dict[str, Path], dtype: torch.dtype) -> None:
    base = open_model(folders["bf16"])
    memory = int(2.5 * Stored.of(base, BF16).layer)
    whole, streamed = (load_llama(base, dtype, quant=torch.bfloat16, layer_memory=limit) for limit in (None, memory))
    assert streamed.pager.streaming
    assert all(torch.equal(a, b) for a, b in zip(gradients(whole), gradients(streamed), strict=True))


def test_a_form_that_the_file_does_not_hold_is_not_streamed(folders: dict[str, Path]) -> None:
    for stored, form in (("fp32", BF16), ("bf16", INT8), ("bf16", NF4)):
        with pytest.raises(ModelError, match="edgetune quantize"):
            load_llama(open_model(folders[stored]), torch.float32, quant=form.quant, layer_memory=40_000)


@pytest.mark.parametrize("form", [BF16, INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit_of_any_form(folders: dict[str, Path], form: WeightForm, dtype: torch.dtype) -> None:
    found = [gradients(load_llama(open_model(folders["fp32"]), dtype, quant=form.quant), how) for how in Recompute]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- the choice ----


def test_auto_keeps_the_best_form_that_fits_a_small_model(folders: dict[str, Path]) -> None:
    base = open_model(folders["fp32"])
    assert forms_for_training("auto", "auto", base) == (BF16, INT8, NF4)
    assert forms_for_training("int8", "auto", base) == (INT8,)
    config, process = SHAPES["smollm2-135m"], 200_000_000
    assert is_small(config)
    forms = [Stored.shaped(config, form, mapped=form is BF16) for form in (BF16, INT8, NF4)]
    data, dtype = DataConfig(), torch.float32

    def chosen(memory: int) -> WeightForm | None:
        choice = choose_form(config, LORA, forms, data, dtype, memory, process)
        return None if choice is None else choice.stored.form

    smallest = least_of(config, LORA, forms, data, dtype, process)
    # With the least memory, only what its file holds in this form can be streamed.
    assert smallest.stored.form is BF16
    assert smallest.setting.layer_memory is not None
    assert chosen(smallest.parts.total) is BF16
    assert chosen(smallest.parts.total - 1) is None
    found = [chosen(memory) for memory in range(smallest.parts.total, 2_000_000_000, 50_000_000)]
    assert [form for form, _ in itertools.groupby(found)] == [BF16, NF4, INT8, BF16]
    # Between two forms lies no more than what they differ by in size.
    for form, better in ((NF4, INT8), (INT8, BF16)):
        more = config.num_layers * (better.layer_bytes(config) - form.layer_bytes(config))
        assert found.count(form) * 50_000_000 <= more + 100_000_000


def test_auto_takes_4_bits_for_a_large_model() -> None:
    for name, small in (("smollm2-135m", True), ("tinyllama-1.1b", False), ("llama-3.1-8b", False)):
        assert is_small(SHAPES[name]) == (2 * SHAPES[name].linear_parameters <= KEEP_BF16_BYTES) == small
        wanted = (BF16, INT8, NF4) if small else (NF4,)
        assert forms_of_shape("auto", "auto", SHAPES[name]) == wanted
        assert forms_of_shape("bf16", "auto", SHAPES[name]) == (BF16,)


def test_a_model_in_4_bits_stays_so_and_any_other_form_is_refused_in_a_sentence(folders: dict[str, Path]) -> None:
    base = open_model(folders["nf4"])
    for weights in ("auto", "nf4"):
        assert forms_for_training(weights, "auto", base) == (NF4,)
        assert form_for_writing(weights, base) is NF4
    for weights in ("int8", "bf16"):
        for ask in (lambda w=weights: forms_for_training(w, "auto", base), lambda w=weights: form_for_writing(w, base)):
            with pytest.raises(UsageError, match=rf"stored in 4 bits, which --weights {weights} cannot undo; leave --weights"):
                ask()
    with pytest.raises(UsageError, match="stored in 4 bits"):
        Session.load("demo", weights="int8")


def test_products_in_8_bits_go_with_4_bit_weights_alone(folders: dict[str, Path]) -> None:
    base = open_model(folders["fp32"])
    assert forms_for_training("auto", "int8", base) == forms_for_training("nf4", "int8", base) == (NF4,)
    for weights in ("bf16", "int8"):
        with pytest.raises(SettingError, match=f"--compute int8 multiplies weights in 4 bits, and --weights {weights} keeps"):
            forms_for_training(weights, "int8", base)


def test_writing_takes_the_form_that_the_adapter_was_trained_over(folders: dict[str, Path]) -> None:
    base = open_model(folders["fp32"])
    assert form_for_writing("auto", base) is BF16
    assert form_for_writing("auto", base, {"weights": "int8"}) is INT8
    assert form_for_writing("nf4", base, {"weights": "int8"}) is NF4
    for odd in ("auto", "fp4", 8, None, ["int8"]):
        assert form_for_writing("auto", base, {"weights": odd}) is BF16
    assert form_for_writing("auto", open_model(folders["nf4"]), {"weights": "bf16"}) is NF4


def test_too_little_memory_for_any_form_is_refused_with_what_would_do(folders: dict[str, Path]) -> None:
    base = open_model(folders["fp32"])
    forms = [Stored.of(base, form) for form in forms_for_training("auto", "auto", base)]
    config = TrainConfig(model=str(folders["fp32"]), memory="50MB")
    with pytest.raises(ResourceError, match=r"may use 0\.05 GB and needs \d\.\d+ GB"):
        choose_or_refuse(base.config, LORA, forms, config, torch.float32, "cpu")


# ---- runs ----


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(12):
        text = f"Day {number}: the beans by the tarred shed want water, said Marra, and went to number {number * number}.\n"
        (folder / f"{number:02}.md").write_text(2 * text)
    return folder


def config(notes: Path, model: Path, out: Path, **changes: object) -> TrainConfig:
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=128)
    return TrainConfig(**{"data": data, "model": str(model), "steps": 4, "rank": 4, "out": str(out), **changes})  # type: ignore[arg-type]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / peft_folder.WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_run_goes_on_in_the_form_it_began_in_and_ends_with_the_same_bits(
    notes: Path, tmp_path: Path, folders: dict[str, Path], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = "bf16" if weights == "auto" else weights
    events = list(train(config(notes, folders["fp32"], tmp_path / "whole", weights=weights)))
    assert isinstance(events[0], Started)
    assert events[0].plan["weights"] == form
    assert isinstance(events[-1], Finished)
    stop = threading.Event()
    cut = config(notes, folders["fp32"], tmp_path / "cut", weights=weights)
    for event in train(cut, stop):
        if isinstance(event, Stepped) and event.step == 2:
            stop.set()
        last = event
    assert isinstance(last, Interrupted)
    # What would be chosen now does not matter: the plan says the form.
    monkeypatch.setattr("edgetune.training.setup.forms_for_training", lambda *arguments: (NF4,))
    assert isinstance(list(train(cut))[-1], Finished)
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "edgetune.json").read_text())["weights"] == form


@pytest.mark.slow
def test_forms_learn_differently_and_are_remembered_for_writing(notes: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    for weights in ("bf16", "int8", "nf4"):
        list(train(config(notes, folders["fp32"], tmp_path / weights, weights=weights)))
        loaded = Session.load(str(folders["fp32"]), str(tmp_path / weights), "cpu")._loaded
        assert loaded.form == weights
    assert len({adapter_bytes(tmp_path / weights) for weights in ("bf16", "int8", "nf4")}) == 3
    scores = {}
    for weights in ("auto", "bf16", "int8", "nf4"):
        found = evaluate([str(notes)], str(folders["fp32"]), str(tmp_path / "int8"), "cpu", weights=weights)
        scores[weights] = found.bits_per_byte
        assert found.weights == ("int8" if weights == "auto" else weights)
    assert scores["auto"] == scores["int8"]
    assert scores["int8"] == pytest.approx(scores["bf16"], rel=0.002)
    assert len(set(scores.values())) == 3


def test_a_base_loads_in_the_form_for_writing_by_default(folders: dict[str, Path]) -> None:
    for name, form in (("fp32", BF16), ("nf4", NF4)):
        assert load_base(open_base(str(folders[name])), "cpu").form is form


def test_training_goes_on_over_the_form_that_the_adapter_knows(
    notes: Path, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", lambda *arguments: 1.0)
    list(train(config(notes, folders["fp32"], tmp_path / "a", weights="int8")))
    on = config(notes, folders["fp32"], tmp_path / "b", from_adapter=str(tmp_path / "a"))
    assert forecast(on).weights == "int8"
    list(train(on))
    assert json.loads((tmp_path / "b" / "edgetune.json").read_text())["weights"] == "int8"
    assert forecast(dataclasses.replace(on, weights="nf4")).weights == "nf4"
    checkpoint = open_base(str(folders["fp32"]))[1]
    assert forms_for_training("auto", "auto", checkpoint, {"weights": "int8"}) == (INT8, NF4)  # the smaller one if need be
    assert forms_for_training("auto", "int8", checkpoint, {"weights": "int8"}) == (NF4,)
    assert forms_for_training("auto", "auto", checkpoint, {"weights": ["?"]}) == (BF16, INT8, NF4)


# ---- the command line ----


def test_plan_and_eval_take_and_tell_the_form(notes: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", lambda *arguments: 1.0)
    model = ["--model", str(folders["bf16"])]
    parts = {}
    for weights in ("auto", "bf16", "int8", "nf4"):
        found = json.loads(CliRunner().invoke(cli, ["plan", *model, "--weights", weights, "--json"]).stdout)
        assert found["weights"] == ("bf16" if weights == "auto" else weights)
        parts[weights] = found["parts"]["weights"]
    assert parts["auto"] == parts["bf16"] > parts["int8"] > parts["nf4"]
    assert "weights of the layers, int8" in CliRunner().invoke(cli, ["plan", *model, "--weights", "int8"]).stdout
    shown = CliRunner().invoke(cli, ["eval", str(notes), *model, "--adapter", "none", "--weights", "int8"]).stdout
    assert shown.startswith(f"Model {folders['bf16']}, adapter none, weights in int8.")


def test_every_command_refuses_a_form_that_cannot_be_had(notes: Path) -> None:
    for command in (["plan"], ["train", str(notes)], ["eval", str(notes)], ["generate", "Once"]):
        failed = CliRunner().invoke(cli, [*command, "--model", "demo", "--weights", "bf16"]).exception
        assert isinstance(failed, UsageError), command
        assert "which --weights bf16 cannot undo; leave --weights out, or name the model" in str(failed)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_a_run_keeps_to_what_was_predicted_for_its_form(tmp_path: Path, weights: str) -> None:
    tiny.save_trainable(tmp_path / "model", width=512, inner=1408, layers=8, dtype=torch.bfloat16)
    home = {**os.environ, "EDGETUNE_HOME": str(tmp_path / "home")}

    def run(command: str, *options: str) -> list[dict[str, Any]]:
        arguments = [command, str(NOTES), "--model", str(tmp_path / "model"), "--weights", weights, "--json", *options]
        done = subprocess.run([sys.executable, "-m", "edgetune", *arguments], capture_output=True, text=True, env=home)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    (planned,) = run("plan")
    # bf16 that is stored so is streamed with the least memory; what was converted stays in memory as a whole.
    for number, limit in enumerate((planned["peak_memory_bytes"], planned["least_memory_bytes"])):
        events = run("train", "--steps", "2", "--memory", str(limit + 15_000_000), "--out", str(tmp_path / str(number)))
        plan = next(event["plan"] for event in events if event["event"] == "started")
        measured = events[-1]["peak_memory_bytes"]
        assert measured <= plan["predicted_peak_bytes"] <= limit + 15_000_000
        assert plan["weights"] == weights
        assert (plan["setting"]["layer_memory"] is not None) == (number == 1 and weights == "bf16")
