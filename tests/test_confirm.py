"""The checks that doctor runs on a device all pass on a correct device, and each fault is found."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import metal_shim
import pytest
import tiny
import torch
from click.testing import CliRunner
from fake_mps import Machine, fake_mps
from torch import Tensor

from edgetune.machine import device_checks as module
from edgetune.machine.device_checks import CHECKS, Confirmation, _run, confirm, without_paths
from edgetune.runtime import ops
from edgetune.runtime.backends import reference
from edgetune.runtime.ops_types import AttentionInputs
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.quantize import quantize_folder

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of six thin layers that takes the place of the built-in one."""
    root = tmp_path_factory.mktemp("models")
    tiny.save_model(root / "dense", num_hidden_layers=6)
    quantize_folder(root / "dense", root / "small")
    return root / "small"


@pytest.fixture
def scaled_down(monkeypatch: pytest.MonkeyPatch, small: Path) -> Iterator[None]:
    """Run the checks on smaller shapes, a smaller model, fewer tokens and one thread."""
    monkeypatch.setattr(module, "resolve", lambda name: SimpleNamespace(path=small))
    monkeypatch.setattr(module, "SHAPES", ((48, 128), (9, 67)))
    monkeypatch.setattr(module, "_TOKENS", 64)
    monkeypatch.setattr(module, "_NEW_TOKENS", 2)
    monkeypatch.setattr(module, "_BORROWED_BYTES", 1 << 20)
    with tiny.threads(1):
        yield


def test_a_report_tells_no_path() -> None:
    def fails(device: torch.device) -> str:
        raise ImportError("cannot open /home/alice/.venv/lib/x.so (C:\\Users\\alice\\x.dll): no such file")

    assert _run("a check", fails, CPU).detail == "ImportError: cannot open … (…): no such file"
    assert without_paths(f"no {sys.prefix}/lib/x.so,\n nor {Path.home()}/my notes") == "no …, nor … notes"


def test_a_report_tells_no_home_with_a_space_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/Marra Jones"))
    assert without_paths("cannot open /Users/Marra Jones/lib/x.so: gone") == "cannot open …: gone"


@pytest.mark.slow
def test_this_machines_cpu_confirms_everything_at_full_size() -> None:
    assert [one for one in confirm(CPU) if not one.ok and one.name != "kernels"] == []


@pytest.fixture
def mac(scaled_down: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with fake_mps(monkeypatch) as machine:
        yield machine


def test_this_machines_cpu_confirms_everything(scaled_down: None) -> None:
    announced: list[str] = []
    found = confirm(CPU, announced.append)
    assert announced == [one.name for one in found] == [name for name in CHECKS if name != "memory"]
    missing = ops.kernels_missing()
    assert [one for one in found if not one.ok and one.name != "kernels"] == []
    assert found[0].ok == (missing is None)


@pytest.mark.slow
@metal_shim.needs_a_compiler
def test_a_faithful_apple_gpu_confirms_everything(mac: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []

    # Borrowed memory counts as allocated until the cache is emptied.
    def allocated() -> int:
        return mac.cached + sum(lent)

    zeros = torch.zeros
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", allocated)
    monkeypatch.setattr(torch.mps, "empty_cache", lent.clear)
    monkeypatch.setattr(module.torch, "zeros", lambda *a, **k: (lent.append(module._BORROWED_BYTES), zeros(*a, **k))[1])
    assert [one for one in confirm(MPS) if not one.ok] == []


def spoil_gradients(right: Callable[..., None]) -> Callable[..., None]:
    def wrong(dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
        right(dact, gate, up, dgate, dup)
        dgate.mul_(1.001)
        dup.mul_(1.001)

    return wrong


FAULTS = {
    "dequantize": ("NF4 dequantisation", lambda right: lambda q, dtype, out=None: right(q, dtype, out) * 1.02),
    "matvec": ("products of few rows", lambda right: lambda x, q: right(x, q) * 1.05),
    "swiglu_backward": ("elementwise parts", spoil_gradients),
    "dropout": ("elementwise parts", lambda right: lambda x, p, key: right(x, p, key + 1)),
    "rms_norm": ("training steps", lambda right: lambda h, weight, eps: right(h, weight, eps) * 1.01),
}


@pytest.mark.parametrize("op", list(FAULTS))
def test_a_broken_op_is_found(scaled_down: None, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    name, spoil = FAULTS[op]

    class Broken:
        """A stand-in for the C++ back end in which one op is wrong."""

        NAME = "broken"

        def __getattr__(self, attribute: str) -> object:
            right = getattr(reference, attribute)
            return spoil(right) if attribute == op else right

    monkeypatch.setattr(ops, "_best", lambda kind: Broken())
    found = _run(name, CHECKS[name], CPU)
    assert not found.ok
    assert "error" in found.detail or "dropout" in found.detail


@pytest.mark.parametrize("fault", ["only bf16", "window"])
def test_attention_that_is_wrong_in_one_way_alone_is_found(
    scaled_down: None, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Tries the faults that a card's flash attention could have."""
    right = ops.attention_forward

    def wrong(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if fault == "window" and inputs.window is not None:
            inputs = dataclasses.replace(inputs, window=inputs.window + 8)
        o, lse = right(inputs)
        return o * 1.05 if fault == "only bf16" and inputs.q.dtype == torch.bfloat16 else o, lse

    monkeypatch.setattr(ops, "attention_forward", wrong)
    found = _run("attention", CHECKS["attention"], CPU)
    assert not found.ok
    assert ("bfloat16" if fault == "only bf16" else "window 100") in found.detail


@pytest.mark.parametrize(("bits", "first"), [(32, 3), (8, 9)])
def test_an_optimizer_that_leaves_the_end_of_a_large_parameter_is_found(
    scaled_down: None, monkeypatch: pytest.MonkeyPatch, bits: int, first: int
) -> None:
    right, numbers = PagedAdamW.step, itertools.count()

    # The check takes three steps with the optimizer to compare with, then three with the device's.
    def wrong(self: PagedAdamW, rate: float) -> None:
        end = self.parameters[0][-32:]
        kept = end.clone()
        right(self, rate)
        if next(numbers) >= first:
            end.copy_(kept)

    monkeypatch.setattr(PagedAdamW, "step", wrong)
    found = _run("optimizer", CHECKS["optimizer"], CPU)
    assert not found.ok
    assert found.detail.startswith(f"{bits} bits, (2200, 1024)")


def test_broken_products_attention_and_text_are_found(scaled_down: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.attention_forward

    def wrong(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        o, lse = right(inputs)
        return o.flip(1), lse

    with monkeypatch.context() as patch:
        patch.setattr(ops, "attention_forward", wrong)
        assert not _run("attention", CHECKS["attention"], CPU).ok
    # macOS 14 loses products that are written into a view.
    with monkeypatch.context() as patch:
        patch.setattr(ops, "product_into", lambda out, x, w: None)
        assert "into columns" in _run("dense products", CHECKS["dense products"], CPU).detail
    # An M1 computes sums of many terms wrongly.
    with monkeypatch.context() as patch:
        patch.setattr(module.vocabulary, "input_gradient", lambda dlogits, head: dlogits @ head + 0.1 * head[:32])
        assert "40,000 terms" in _run("dense products", CHECKS["dense products"], CPU).detail
    with monkeypatch.context() as patch:
        texts = iter([[7, 8], [7, 9]])
        patch.setattr(module.Generator, "generate", lambda *_: iter(next(texts)))
        text = _run("greedy text", CHECKS["greedy text"], CPU)
        assert (text.ok, text.detail) == (False, "1 of 2 tokens match the CPU's")


@metal_shim.needs_a_compiler
def test_a_gpu_whose_kernels_or_memory_are_wrong_is_told(mac: Machine) -> None:
    mac.source_changes = lambda source: source.replace("byte & 15", "byte & 7")
    kernels, memory = (_run(name, CHECKS[name], MPS) for name in ("kernels", "memory"))
    assert not kernels.ok
    assert "wrong numbers" in kernels.detail
    assert not memory.ok
    assert "0 MB were counted" in memory.detail


def test_what_breaks_off_is_told_in_one_line_and_without_paths() -> None:
    def full(device: torch.device) -> str:
        raise RuntimeError("MPS backend out of memory\n  (allocated: 9 GB)\n" + "x" * 1000)

    def lost(device: torch.device) -> str:
        raise FileNotFoundError(2, "No such file or directory", "/Users/marra/notes")

    assert _run("memory", full, CPU).detail.startswith("RuntimeError: MPS backend out of memory (allocated: 9 GB) xxx")
    assert len(_run("memory", full, CPU).detail) < 330
    assert _run("file", lost, CPU) == Confirmation("file", False, "FileNotFoundError: No such file or directory")


def test_doctor_reports_what_the_device_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.cli.doctor import doctor_command
    from edgetune.machine import doctor

    monkeypatch.setattr(doctor, "pick_device", lambda name: CPU)
    plain = json.loads(CliRunner().invoke(doctor_command, ["--json"]).output)
    assert plain["confirmations"] == []
    assert plain["device"] == "cpu"
    tried = [
        Confirmation("kernels", True, "back end metal"),
        Confirmation("greedy text", False, "3 of 16 tokens match the CPU's"),
    ]
    monkeypatch.setattr(doctor, "pick_device", lambda name: MPS)
    monkeypatch.setattr(doctor, "backend_name", lambda device: "metal")
    monkeypatch.setattr(doctor, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(doctor, "confirm", lambda device, tell: tell("greedy text") or tried)
    monkeypatch.setattr(doctor, "kernels_missing", lambda: "cannot open /opt/lib/x.so")
    monkeypatch.setattr(doctor.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    run = CliRunner().invoke(doctor_command, ["--json"])
    assert run.stderr == "checking greedy text\n"
    report = json.loads(run.stdout)
    assert report["problems"][0].endswith("several times slower: cannot open …")
    assert report["confirmations"] == [
        {"name": "kernels", "ok": True, "detail": "back end metal"},
        {"name": "greedy text", "ok": False, "detail": "3 of 16 tokens match the CPU's"},
    ]
    assert report["system"].startswith("macOS 15.1 ")
    assert report["problems"][-1] == "On mps, greedy text: 3 of 16 tokens match the CPU's."
    shown = CliRunner().invoke(doctor_command, []).output
    assert "passed             kernels: back end metal\n" in shown
    assert "FAILED             greedy text: 3 of 16 tokens match the CPU's\n" in shown


def test_a_macs_chip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.runtime import device

    monkeypatch.setattr(device, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(device.os.path, "exists", lambda path: False)
    for printed, name in (("Apple M1 Pro\n", "Apple M1 Pro"), ("", "arm")):
        monkeypatch.setattr(device.subprocess, "run", lambda *_, own=printed, **__: SimpleNamespace(stdout=own))
        monkeypatch.setattr(device.platform, "processor", lambda: "arm")
        assert device.cpu_name() == name
