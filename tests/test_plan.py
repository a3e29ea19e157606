"""The planner picks the fastest setting that fits, names the least memory if none does, and runs keep to its prediction."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import COMMON, save_trainable

from edgetune import memory_settings as planner
from edgetune.cli.main import cli
from edgetune.cli.plan import described
from edgetune.config import DataConfig, TrainConfig
from edgetune.library.base_models import resolve
from edgetune.machine.forecast import _seconds_on_layers, forecast, seconds_a_step
from edgetune.machine.load import Load
from edgetune.machine.shapes import SHAPES
from edgetune.reports.text import human_bytes
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget, peft_folder
from edgetune.runtime.budget import Setting, Stored, Vocabulary, WeightForm
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig, QuantConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.runner import Recompute

BF16, PROCESS, DATA = torch.bfloat16, 200_000_000, DataConfig(seq_len=512, batch_tokens=2048)
LORA = LoraConfig(16, 16.0)
TINY_SHAPE = {**COMMON, "model_type": "llama", "max_position_embeddings": 1024}
NOTES = Path(__file__).parent.parent / "examples" / "notes"
# Total memory in bytes, from figure 6 of arXiv 2305.14314 (QLoRA).
PAPER = {"llama-7b": 6.9e9, "llama-13b": 11.3e9, "llama-33b": 24.7e9, "llama-65b": 45.0e9}


def chosen(shape: str, memory: int, mapped: bool = True) -> planner.Choice | None:
    config = SHAPES[shape]
    return planner.choose(config, LORA, Stored.nf4(config, mapped=mapped), DATA, BF16, memory, PROCESS)


def smallest(shape: str) -> planner.Choice:
    return planner.least(SHAPES[shape], LORA, Stored.nf4(SHAPES[shape]), DATA, BF16, PROCESS)


def test_with_memory_to_spare_nothing_is_recomputed_streamed_or_paged() -> None:
    choice = chosen("tinyllama-1.1b", 64 * 10**9)
    assert choice is not None
    assert choice.setting == Setting(2048, Recompute.NONE)


@pytest.mark.parametrize("shape", ["demo", "tinyllama-1.1b", "llama-7b", "llama-65b"])
def test_less_memory_never_makes_it_faster_and_is_never_exceeded(shape: str) -> None:
    config, least = SHAPES[shape], smallest(shape).parts.total
    costs = []
    for memory in (least, least * 11 // 10, least * 3 // 2, 2 * least, 5 * least, 50 * least):
        choice = chosen(shape, memory)
        assert choice is not None
        assert choice.parts.total <= memory
        stored = Stored.nf4(config)
        costs.append(planner.cost(config, LORA, stored, choice.setting, DATA.batch_tokens, "cpu"))
    assert costs == sorted(costs, reverse=True)
    assert chosen(shape, least - 10**6) is None


def test_7b_trains_in_2_gb_by_streaming_but_not_where_it_would_first_have_to_be_quantised() -> None:
    choice = chosen("llama-7b", 2 * 10**9)
    assert choice is not None
    assert choice.setting.layer_memory is not None
    assert chosen("llama-7b", 2 * 10**9, mapped=False) is None


def test_optimizer_states_have_8_bits_only_where_nothing_else_fits() -> None:
    """Uses a high rank: even with states in a file, one parameter's take more memory in 32 bits than in 8."""
    config, lora = SHAPES["llama-7b"], LoraConfig(256, 16.0)
    stored = Stored.nf4(config)

    def choose(memory: int) -> planner.Choice | None:
        return planner.choose(config, lora, stored, DATA, BF16, memory, PROCESS)

    with_32 = [
        budget.parts(config, lora, stored, dataclasses.replace(s, layer_memory=layers), BF16, PROCESS).total
        for s in planner.candidate_settings(DATA, list(Recompute), True, bits=32)
        for layers in [budget.least_layer_memory(config, stored)]
    ]
    fits, too_little = choose(min(with_32)), choose(min(with_32) - 1)
    assert fits is not None
    assert fits.setting.optimizer_bits == 32
    assert too_little is not None
    assert too_little.setting.optimizer_bits == 8
    assert too_little.parts.total < min(with_32)
    small = planner.least(config, lora, stored, DATA, BF16, PROCESS)
    assert small.setting.optimizer_bits == 8
    assert choose(small.parts.total) is not None
    assert choose(small.parts.total - 1) is None
    assert "8-bit optimizer states" in described(dataclasses.asdict(too_little.setting))
    assert "8-bit" not in described(dataclasses.asdict(fits.setting))


def test_the_parts_are_what_the_setting_says() -> None:
    config = SHAPES["tinyllama-1.1b"]
    stored, trained = Stored.nf4(config), 4 * budget.adapter_parameters(config, LORA)

    def parts(**changes: object) -> budget.Parts:
        setting = dataclasses.replace(Setting(512, Recompute.FULL), **changes)
        return budget.parts(config, LORA, stored, setting, BF16, PROCESS)

    assert parts().gradients == trained
    assert parts().optimizer == 2 * trained
    assert parts(optimizer_bits=8).optimizer < 0.29 * 2 * trained
    assert parts(paged_optimizer=True).optimizer < trained // 10
    assert parts().activations == 22 * 512 * 2048 * 2
    assert parts(offload=True).activations == 0
    assert parts(in_file=Vocabulary.EMBEDDING).embeddings == parts().embeddings // 2
    assert parts(in_file=Vocabulary.BOTH).embeddings == 0
    assert parts(layer_memory=10**8).weights < parts().weights / 4
    assert parts(recompute=Recompute.NONE).activations > parts(recompute=Recompute.SELECTIVE).activations
    assert parts(loss_rows=64).logits < parts().logits


@pytest.mark.parametrize("shape", PAPER)
def test_the_papers_totals_come_out(shape: str) -> None:
    """Uses rank 64 on all linears, one sequence of 512 tokens, gradient checkpointing and paged states, on a GPU."""
    config = SHAPES[shape]
    lora = LoraConfig(64, 16.0, 0.1, LINEARS, False)
    setting = Setting(512, Recompute.FULL, paged_optimizer=True, compact=True)
    total = budget.parts(config, lora, Stored.nf4(config), setting, BF16, process=0, device="cuda").total
    assert 0.75 * PAPER[shape] < total < 1.1 * PAPER[shape]


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EDGETUNE_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "edgetune", *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
def test_a_run_keeps_to_the_memory_it_was_given_and_to_what_was_predicted(tmp_path: Path) -> None:
    planned = json.loads(run("plan", str(NOTES), "--model", "demo", "--json", home=tmp_path).stdout)
    for memory in (planned["least_memory_bytes"] + 15_000_000, planned["peak_memory_bytes"] + 15_000_000):
        command = ("train", str(NOTES), "--model", "demo", "--steps", "4", "--memory", str(memory), "--json")
        done = run(*command, home=tmp_path / str(memory))
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        predicted = next(event["plan"]["predicted_peak_bytes"] for event in events if event["event"] == "started")
        measured = events[-1]["peak_memory_bytes"]
        assert measured <= predicted <= memory


def test_too_little_memory_is_refused_with_what_would_do(tmp_path: Path) -> None:
    done = run("train", str(NOTES), "--model", "demo", "--memory", "100MB", home=tmp_path)
    assert done.returncode == 1
    assert "may use 0.10 GB and needs 0." in done.stderr
    assert "type --memory 0." in done.stderr
    assert done.stderr.count("\n") == 1


def test_plan_tells_of_notes_and_of_machines_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path))
    found = json.loads(CliRunner().invoke(cli, ["plan", str(NOTES), "--model", "demo", "--json"]).stdout)
    assert {"fits", "peak_memory_bytes", "parts", "tokens_per_second", "seconds"} <= found.keys()
    assert found["fits"]
    assert found["tokens_per_second"] > 0
    assert found["seconds"] == pytest.approx(found["steps"] * 2048 / found["tokens_per_second"])
    assert sum(found["parts"].values()) == found["peak_memory_bytes"]
    assert not any(tmp_path.glob("plan-*"))
    card = ["plan", "--model", "llama-65b", "--device", "cuda", "--memory", "48GB", "--batch-tokens", "512"]
    if not torch.cuda.is_available():
        described = json.loads(CliRunner().invoke(cli, [*card, "--json"]).stdout)
        assert described["fits"]
        assert described["tokens_per_second"] is None
    shown = CliRunner().invoke(cli, [*card[:-3], "1GB"]).stdout
    assert "does not fit" in shown
    assert "type --memory" in shown


def test_a_private_run_is_forecast_with_its_own_steps_and_said_to_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", lambda *arguments: 2.0)
    asked = (["plan", str(NOTES), "--model", "demo"], ["plan", str(NOTES), "--model", "demo", "--private", "8"])
    plain, private = (json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout) for words in asked)
    # A step reads four batches, of documents that are not packed: an epoch of a few steps is rounded up.
    assert plain["steps"] / 4 < private["steps"] < plain["steps"] / 2
    assert private["seconds"] == 4 * 2.0 * private["steps"]
    assert ["one by one" in CliRunner().invoke(cli, words).stdout for words in asked] == [False, True]


def test_plan_names_what_of_embedding_and_head_takes_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path))
    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", lambda *arguments: 1.0)
    config = SHAPES["tinyllama-1.1b"]
    head = 2 * config.vocab_size * config.hidden_size
    sizes = {"embedding, head in bfloat16": 2 * head, "head in bfloat16": head, "embedding, head (in file)": 0}
    least = forecast(TrainConfig(model="tinyllama-1.1b", memory="1GB", compute="bf16")).least_memory_bytes
    seen = {}
    for more in range(0, 4 * 10**9, 10**8):
        command = ["plan", "--model", "tinyllama-1.1b", "--compute", "bf16", "--memory", str(least + more)]
        shown = CliRunner().invoke(cli, command).stdout.splitlines()
        line = next(line for line in shown if "embedding" in line or "head" in line)
        seen[line[2:32].rstrip()] = line[32:].strip()
    assert seen == {label: human_bytes(size) for label, size in sizes.items()}


def test_an_adapter_to_go_on_from_is_forecast_in_its_own_shape(tmp_path: Path) -> None:
    save_trainable(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model")
    model, shape = load_llama(checkpoint, torch.float32, quant=QuantConfig()), LoraConfig(2, 16.0, targets=("q_proj",))
    adapters.attach_new(model, shape, 0)
    peft_folder.save(adapters.snapshot(model, shape), tmp_path / "adapter", "tiny")
    default = TrainConfig(DataConfig(seq_len=64, batch_tokens=64), str(tmp_path / "model"))
    named = dataclasses.replace(default, from_adapter=str(tmp_path / "adapter"))
    alike = dataclasses.replace(default, rank=2, targets=("q_proj",))
    parts = [forecast(config).parts for config in (named, alike, default)]
    assert parts[0]["adapter"] == parts[1]["adapter"] < parts[2]["adapter"]
    assert parts[0]["optimizer"] == parts[1]["optimizer"] < parts[2]["optimizer"]
    with pytest.raises(UsageError, match="--rank and --targets"):
        forecast(dataclasses.replace(named, model="llama-7b"))
    with pytest.raises(AdapterError, match="does not fit"):
        forecast(dataclasses.replace(named, model="demo"))


def test_what_a_model_needs_to_be_trained_is_the_least_that_plan_names() -> None:
    train = TrainConfig(model="demo", device="cpu")
    needed = planner.least_memory_to_train(open_model(resolve("demo").path), train)
    # This process counts too, and may have grown between the two calls.
    assert needed == pytest.approx(forecast(train).least_memory_bytes, abs=20_000_000)


def test_the_time_of_a_step_is_put_together_from_layers_and_chunks_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer with one chunk takes 1 s and two take 1.5 s; of each other chunk, 0.25 s."""
    monkeypatch.setattr("edgetune.machine.forecast._seconds_on_layers", lambda *arguments: ((0.5 + arguments[6] / 2), 0.25))
    config = LlamaConfig.from_hf({**TINY_SHAPE, "num_hidden_layers": 10})
    setting = Setting(1000, Recompute.FULL, loss_rows=256)
    stored = Stored.shaped(config, WeightForm.BF16, mapped=False)
    found = seconds_a_step(config, LoraConfig(2, 4.0), stored, setting, 3000, torch.float32, False)
    assert found == pytest.approx(3 * (1.0 + 9 * 0.5 + 3 * 0.25))


def test_a_layer_is_measured_with_one_chunk_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Llama.logits
    monkeypatch.setattr(Llama, "logits", lambda self, h: (seen.append(len(h)), original(self, h))[1])
    config = LlamaConfig.from_hf(TINY_SHAPE)
    setting = Setting(512, Recompute.FULL, loss_rows=64)
    shape = (config, LoraConfig(2, 4.0), WeightForm.BF16, setting, torch.float32, False, 2, lambda *done: None, Load(1))
    row, chunk = _seconds_on_layers(*shape)
    assert min(row, chunk) > 0
    assert seen == [64] * 5  # three steps, and two chunks alone


def test_a_new_adapter_makes_more_passes_over_few_notes_and_one_that_has_learnt_does_not() -> None:
    new, learnt = TrainConfig(), TrainConfig(from_adapter="yesterday")
    assert [planner.planned_steps(new, each) for each in (2, 20, 50, 200)] == [16, 100, 150, 600]
    assert [planner.planned_steps(learnt, each) for each in (2, 20, 50, 200)] == [6, 60, 150, 600]
    for config in (new, learnt):
        assert planner.planned_steps(dataclasses.replace(config, epochs=5.0), 20) == 100
        assert planner.planned_steps(dataclasses.replace(config, steps=7), 20) == 7
