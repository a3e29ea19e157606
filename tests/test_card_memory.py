"""On an NVIDIA card, a run is planned from the card's memory, measured by torch's allocator and stopped with a clear error.

The tests replace torch.cuda's functions, so they need no card, and no card has confirmed them.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from edgetune.config import DataConfig, TrainConfig
from edgetune.machine.shapes import SHAPES
from edgetune.memory_settings import CARD_LATER_BYTES, candidate_settings, choose, memory_allowed, process_bytes
from edgetune.runtime import budget
from edgetune.runtime.budget import Setting, Stored
from edgetune.runtime.config import LINEARS, LoraConfig
from edgetune.runtime.device import explain_card_memory
from edgetune.runtime.errors import ResourceError
from edgetune.runtime.memory import card_memory
from edgetune.runtime.memory_meter import CardMeter, MemoryMeter, meter_for
from edgetune.runtime.runner import Recompute, Runner
from edgetune.session import Session
from edgetune.training.train import train

GB = 10**9
LORA = LoraConfig(16, 16.0, 0.0, LINEARS)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a card of 24 GB has 20 GB free, and that this process holds 1 GB and held 2 GB at its peak."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: GB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * GB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)


@pytest.mark.usefixtures("card")
def test_a_run_on_a_card_is_planned_from_the_cards_memory() -> None:
    assert memory_allowed(TrainConfig(), "cuda") == int(0.8 * 20 * GB) + GB
    assert memory_allowed(TrainConfig(memory="3GB"), "cuda") == 3 * GB
    assert process_bytes("cuda") == GB + CARD_LATER_BYTES
    assert card_memory().total == 24 * GB


def test_the_card_holds_one_adapter_and_keeps_a_dense_panel() -> None:
    config = SHAPES["tinyllama-1.1b"]
    setting, stored = Setting(512, Recompute.NONE), Stored.nf4(config)
    there = budget.parts(config, LORA, stored, setting, torch.float32, 0, "cuda")
    assert there.adapter == there.gradients == 4 * budget.adapter_parameters(config, LORA)
    panel = 4 * max(math.prod(shape) for shape in config.linear_shapes().values())
    bf16 = budget.parts(config, LORA, stored, setting, torch.bfloat16, 0, "cuda")
    assert there.scratch > panel
    assert bf16.scratch > panel // 2


def test_a_card_has_no_heap_to_keep_compact() -> None:
    assert not any(setting.compact for setting in candidate_settings(DataConfig(), list(Recompute), True, device="cuda"))


def test_8b_fits_a_24_gb_card() -> None:
    config = SHAPES["llama-3.1-8b"]
    found = choose(config, LORA, Stored.nf4(config), DataConfig(), torch.bfloat16, 20 * GB, GB, "cuda")
    assert found is not None
    assert found.setting.layer_memory is None
    assert found.parts.total <= 20 * GB


@pytest.mark.usefixtures("card")
def test_a_card_is_measured_by_its_allocator() -> None:
    meter = meter_for(torch.device("cuda"), [])
    assert isinstance(meter, CardMeter)
    with meter:
        assert (meter.now, meter.peak()) == (GB, 2 * GB)
    assert isinstance(meter_for(torch.device("cpu"), []), MemoryMeter)


@pytest.mark.usefixtures("card")
def test_running_out_is_one_sentence() -> None:
    with pytest.raises(ResourceError) as found, explain_card_memory("type --memory {less:.2f}GB"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert str(found.value) == (
        "The card ran out of memory: it has 24.00 GB, of which this process held 2.00 GB and 20.00 GB are free; "
        "close other programs that use it, or type --memory 1.60GB."
    )


@pytest.mark.usefixtures("card")
def test_training_and_writing_that_run_out_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note.md").write_text("The boat lies at the pontoon. " * 60)
    session = Session.load("demo", "none")

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Runner, "train", full)
    monkeypatch.setattr(Runner, "infer", full)
    with pytest.raises(ResourceError, match=r"ran out of memory.*--memory 1\.60GB"):
        list(train(TrainConfig(model="demo", steps=1, data=DataConfig(notes=(str(tmp_path),)))))
    with pytest.raises(ResourceError, match=r"ran out of memory.*smaller --model"):
        session.generate("The boat lies at the pontoon, and the pontoon lies in the river.", 4)
