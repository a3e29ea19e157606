"""`edgetune quantize --calibrate`: bitsandbytes opens the folder, an interrupted run ends alike, and the cost is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from edgetune import quantising
from edgetune.cli.main import cli
from edgetune.conversion.cost import Cost
from edgetune.conversion.origin import Origin
from edgetune.runtime import nf4
from edgetune.runtime.calibrated_layers import CalibratedLayers, Calibration, calibration_bytes
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError, ResourceError, UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.names import is_linear
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Runner
from edgetune.texts import calibration_text, measuring_text


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny.save_trainable(tmp_path / "source", inner=128, layers=3)
    return tmp_path / "source"


def documents(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[1, *torch.randint(3, 400, (100,), generator=generator).tolist()] for _ in range(count)]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def output_error(folder: Path, source: Path, texts: list[list[int]]) -> float:
    """Return the mean squared error of the last block's output on texts."""
    dense, rounded = (Runner(load_llama(open_model(each), torch.float32)) for each in (source, folder))
    return sum(float((dense.read(ids) - rounded.read(ids)).square().mean()) for ids in texts) / len(texts)


@pytest.mark.parametrize("double_quant", [True, False])
def test_calibration_lowers_the_error_of_the_outputs_on_its_text_and_on_others(
    source: Path, tmp_path: Path, double_quant: bool
) -> None:
    near = quantize_folder(source, tmp_path / "near", double_quant=double_quant).folder
    calibration = Calibration(documents(20, 0))
    fed = quantize_folder(source, tmp_path / "fed", double_quant=double_quant, calibration=calibration).folder
    assert open_model(fed).quant == QuantConfig(double_quant=double_quant)
    for seed in (0, 1):
        texts = documents(20, seed)[:5]
        assert output_error(fed, source, texts) < 0.8 * output_error(near, source, texts)


def test_bitsandbytes_opens_the_calibrated_folder_and_dequantises_to_the_same_values(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    functional = pytest.importorskip("bitsandbytes.functional")
    quantize_folder(source, tmp_path / "four", calibration=Calibration(documents(4, 0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "four", device_map="cpu")
    checkpoint = open_model(tmp_path / "four")
    names = [name for name in checkpoint.stored if is_linear(name)]
    assert len(names) == 21
    for name in names:
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(nf4.dequantize(checkpoint.tensor(name)), functional.dequantize_4bit(weight.data, weight.quant_state))


class Killed(BaseException):
    """Stands for a SIGKILL, which nothing catches."""


@pytest.mark.parametrize("linears", [3, 7, 15, 21])
def test_a_killed_calibration_continues_and_ends_byte_identical(
    source: Path, tmp_path: Path, linears: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(quantize_folder(source, tmp_path / "whole", calibration=Calibration(documents(4, 0))).folder)

    def kill(done: int, total: int) -> None:
        if done == linears:
            raise Killed

    with pytest.raises(Killed):
        quantize_folder(source, tmp_path / "cut", calibration=Calibration(documents(4, 0), kill))
    assert not (tmp_path / "cut").exists()
    made = []
    rounded = CalibratedLayers._rounded
    monkeypatch.setattr(
        CalibratedLayers, "_rounded", lambda self, name, feedback: made.append(name) or rounded(self, name, feedback)
    )
    quantize_folder(source, tmp_path / "cut", calibration=Calibration(documents(4, 0)))
    assert content(tmp_path / "cut") == whole
    assert len(made) == {3: 21, 7: 21, 15: 7, 21: 7}[linears]  # a layer is kept once its last linear has been told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "source", "whole"]


def test_another_text_or_none_does_not_continue_what_was_begun(source: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done == 15:
            raise Killed

    with pytest.raises(Killed):
        quantize_folder(source, tmp_path / "four", calibration=Calibration(documents(4, 0), kill))
    quantize_folder(source, tmp_path / "four", calibration=Calibration(documents(4, 1)))
    quantize_folder(source, tmp_path / "fresh", calibration=Calibration(documents(4, 1)))
    assert content(tmp_path / "four") == content(tmp_path / "fresh")
    assert content(quantize_folder(source, tmp_path / "plain").folder) != content(tmp_path / "fresh")


def test_the_disk_must_hold_each_layer_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantize_folder(source, tmp_path / "plain").bytes
    free = plain + (16 << 20) + plain // 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    quantize_folder(source, tmp_path / "again")
    with pytest.raises(ResourceError, match="The disk has"):
        quantize_folder(source, tmp_path / "four", calibration=Calibration(documents(4, 0)))


def test_memory_grows_with_the_text_and_with_one_layer_but_not_with_their_number(source: Path, tmp_path: Path) -> None:
    tiny.save_trainable(tmp_path / "deep", inner=128, layers=6)
    small, deep = (open_model(folder).config for folder in (source, tmp_path / "deep"))
    assert calibration_bytes(small, 1000) == calibration_bytes(deep, 1000)
    widths = 64 + 2 * 128 + (4 + 2 * 2) * 16
    assert calibration_bytes(small, 2000) - calibration_bytes(small, 1000) == 4 * 1000 * widths


# ---- the command


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_the_command_tells_what_4_bits_cost_and_models_repeats_it(source: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", str(source), str(tmp_path / "four"))
    assert code == 0
    cost = Cost.read(tmp_path / "four")
    assert cost is not None
    assert cost.calibration_tokens == 0
    for folder, figure in ((source, cost.before), (tmp_path / "four", cost.after)):
        assert quantising.bits_per_byte(folder) == pytest.approx(figure, rel=1e-6)
    assert out.splitlines()[-1] == f"{cost.sentence()[0].upper()}{cost.sentence()[1:]}; --calibrate regains part of that."
    code, out, _ = run("models", str(tmp_path / "four"))
    assert cost.sentence() in out


def test_the_command_calibrates_on_the_built_in_text_or_on_texts(source: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", str(source), str(tmp_path / "own"), "--calibrate", "--json")
    assert code == 0, err
    assert "Calibrating takes up to" in err
    report = json.loads(out)
    assert report["cost"]["calibration_tokens"] > 4000
    note = tmp_path / "notes" / "a.md"
    note.parent.mkdir()
    note.write_text("The ferry left at ten past six. " * 40)
    code, out, _ = run("quantize", str(source), str(tmp_path / "texts"), "--texts", str(note.parent))
    assert code == 0
    assert "With calibration, 4 bits cost" in out
    cost = Cost.read(tmp_path / "texts")
    assert cost is not None
    assert 0 < cost.calibration_tokens < report["cost"]["calibration_tokens"]


def test_a_model_without_a_tokenizer_is_not_calibrated_and_its_cost_is_not_told(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer, and calibration reads text; .*leave --calibrate out"):
        quantising.quantise(str(source), tmp_path / "four", calibrate=True)
    code, out, _ = run("quantize", str(source), str(tmp_path / "four"))
    assert (code, "cost" in out) == (0, False)
    assert Cost.read(tmp_path / "four") is None


def test_a_command_that_ended_while_it_measured_is_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin("/models/a.gguf", "a", "Q4_1", 123, 456, "0" * 64)
    origin.write(source)
    whole = quantising.quantise(str(source), tmp_path / "whole", calibrate=True)
    with monkeypatch.context() as patch:
        patch.setattr(quantising, "bits_per_byte", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantising.quantise(str(source), tmp_path / "four", calibrate=True)
    assert Cost.read(tmp_path / "four") is None
    assert (
        "What 4 bits cost was not measured: type the same `edgetune quantize` command again."
        in run("models", str(tmp_path / "four"))[1]
    )
    with pytest.raises(UsageError, match="four already exists"):
        quantising.quantise(str(source), tmp_path / "four")  # without --calibrate it would be another model
    monkeypatch.setattr(CalibratedLayers, "make", None)  # nothing is quantised again
    made = quantising.quantise(str(source), tmp_path / "four", calibrate=True)
    assert (made.cost, made.result.bytes, made.result.parameters) == (
        whole.cost, whole.result.bytes, whole.result.parameters,
    )  # fmt: skip
    assert content(tmp_path / "four") == content(tmp_path / "whole")
    with pytest.raises(UsageError, match="four already exists"):
        quantising.quantise(str(source), tmp_path / "four", calibrate=True)


def interrupted(*arguments: object) -> float:
    """Stand for a measurement during which the user types Ctrl-C."""
    raise KeyboardInterrupt


def test_a_quantised_folder_remembers_the_gguf_file_that_its_source_was_converted_from(source: Path, tmp_path: Path) -> None:
    origin = Origin("/models/a.gguf", "a", "Q4_1", 123, 456, "0" * 64)
    origin.write(source)
    quantising.quantise(str(source), tmp_path / "four")
    assert Origin.read(tmp_path / "four") == origin


@pytest.mark.parametrize("text", ["[]", "{}", '{"before": 1}', '{"before": "x", "after": 1.0}', "{", '{"before": 0.0}'])
def test_a_damaged_record_of_the_cost_is_ignored(text: str, tmp_path: Path) -> None:
    cost = Cost(1.039, 1.131, 0, "0.1.0")
    cost.write(tmp_path)
    assert Cost.read(tmp_path) == cost
    assert cost.sentence() == "4 bits cost 8.9% in bits per byte on the built-in text (1.039 to 1.131)"
    (tmp_path / "quantisation.json").write_text(text)
    assert Cost.read(tmp_path) is None


def test_no_sentence_is_calibrated_on_and_measured() -> None:
    calibrated, measured = (
        {line for text in texts for line in text.splitlines() if len(line) > 20}
        for texts in (calibration_text(), measuring_text())
    )
    assert len(calibrated) > 100
    assert len(measured) > 30
    assert not calibrated & measured


def test_layers_beyond_the_limit_are_streamed_and_score_the_same(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantising.bits_per_byte(source)
    monkeypatch.setattr(quantising, "MEASURE_BYTES", 0)
    assert quantising.bits_per_byte(source) == whole


def test_a_weight_that_is_not_finite_is_refused_by_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Checkpoint.dense

    def broken(self: Checkpoint, name: str) -> torch.Tensor:
        found = dense(self, name)
        return torch.full_like(found, torch.nan) if name.endswith("layers.1.mlp.up_proj.weight") else found

    monkeypatch.setattr(Checkpoint, "dense", broken)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight of .* cannot be quantised"):
        quantize_folder(source, tmp_path / "four", calibration=Calibration(documents(4, 0)))


# ---- a real model


@pytest.mark.real
@pytest.mark.slow
def test_calibration_regains_at_least_half_of_what_nearest_loses_on_a_real_model(smollm2_folder: Path, tmp_path: Path) -> None:
    """The text that is measured is another one than that which is calibrated on."""
    near = quantising.quantise(str(smollm2_folder), tmp_path / "near").cost
    fed = quantising.quantise(str(smollm2_folder), tmp_path / "fed", calibrate=True).cost
    assert near is not None
    assert fed is not None
    assert near.before == fed.before
    assert near.after > 1.05 * near.before
    assert near.after - fed.after > 0.5 * (near.after - near.before)
