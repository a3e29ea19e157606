"""Ctrl-C waits for one small piece of work at most: a product of a block, a chunk of the loss, a piece of a large matrix."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgetune.__main__ import main
from edgetune.cli import signals
from edgetune.runtime import adapter as adapters
from edgetune.runtime import error_feedback, ops
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.error_feedback import Feedback
from edgetune.runtime.loader import load_llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.runner import Recompute, Runner

PRODUCTS, LAYERS, TOKENS, CHUNK = 4, 2, 96, 32
CHUNKS = TOKENS // CHUNK


class _Interrupt(Exception):
    """Stands for the stop of a run."""


@pytest.fixture
def runner(tmp_path: Path) -> Callable[[Recompute], Runner]:
    def make(recompute: Recompute) -> Runner:
        tiny.save_model(tmp_path / "model", num_hidden_layers=LAYERS)
        model = load_llama(open_model(tmp_path / "model"), torch.float32)
        adapters.attach_new(model, LoraConfig(rank=2, alpha=4), 0)
        return Runner(model, recompute, loss_rows=CHUNK)

    return make


def batch() -> Batch:
    ids = torch.arange(TOKENS + 1) % 50
    return Batch(ids[:-1], ids[1:], torch.ones(TOKENS), torch.arange(TOKENS), (Segment.packed(0, TOKENS),))


@pytest.mark.parametrize(
    ("recompute", "passes"),
    [(Recompute.NONE, 2), (Recompute.SELECTIVE, 2), (Recompute.FULL, 3)],  # forward and backward; forward again
)
def test_a_step_can_be_left_before_each_product_and_each_chunk_of_the_loss(
    runner: Callable[[Recompute], Runner], recompute: Recompute, passes: int
) -> None:
    found, checks = runner(recompute), 0

    def count() -> None:
        nonlocal checks
        checks += 1
        if checks == left_at:
            raise _Interrupt

    found.check, left_at = count, 0
    found.train(batch())
    assert checks == passes * LAYERS * PRODUCTS + CHUNKS
    for left_at in range(1, checks + 1):
        checks = 0
        with pytest.raises(_Interrupt):
            found.train(batch())
        assert checks == left_at


def test_an_evaluation_can_be_left_there_too(runner: Callable[[Recompute], Runner]) -> None:
    found, checks = runner(Recompute.FULL), []
    found.check = lambda: checks.append(1)
    found.score(batch())
    assert len(checks) == LAYERS * PRODUCTS + CHUNKS


class _Largest(FlopCounterMode):
    """Remembers the floating-point operations of the largest single call."""

    largest = 0

    def _count_flops(self, func_packet: object, out: object, args: object, kwargs: object) -> object:
        before = self.get_total_flops()
        result = super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[misc]
        self.largest = max(self.largest, self.get_total_flops() - before)
        return result


def test_the_moments_of_many_inputs_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(900, 40)
    whole = Feedback.of(x)
    monkeypatch.setattr(error_feedback, "_PIECE", 16)
    monkeypatch.setattr(error_feedback, "_PIECE_FLOPS", 2 * 16 * 40 * 100)
    with _Largest(display=False) as flops:
        pieces = Feedback.of(x)
    assert 0 < flops.largest <= 2 * 16 * 40 * 100
    assert torch.equal(pieces.order, whole.order)
    assert torch.allclose(pieces.factor, whole.factor, rtol=1e-4, atol=1e-6)


def test_a_large_product_in_fp32_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, out = torch.randn(100, 8), torch.randn(8, 5), torch.empty(100, 7)
    monkeypatch.setattr(ops, "PIECE_FLOPS", 2 * 8 * 5 * 30)
    with _Largest(display=False) as flops:
        ops.product_into(out[:, 1:6], x, w)
    assert flops.largest == 2 * 8 * 5 * 30
    assert torch.allclose(out[:, 1:6], x @ w, atol=1e-5)


def test_a_ctrl_c_that_a_library_swallowed_stops_the_run_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_interrupts", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *signals._ending_signals())}
    try:
        signals.exit_on_signals()
        with contextlib.suppress(BaseException):  # as a library does while it is imported
            signal.raise_signal(signal.SIGINT)
        stop, caught = threading.Event(), list[int]()
        signals.stop_on_signals(stop, caught)
        assert (stop.is_set(), caught) == (True, [signal.SIGINT])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_without_a_ctrl_c_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_interrupts", [])
    stop, caught = threading.Event(), list[int]()
    for number, handler in signals.stop_on_signals(stop, caught).items():
        signal.signal(number, handler)
    assert (stop.is_set(), caught) == (False, [])


def test_ctrl_c_while_the_command_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "edgetune.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "edgetune.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "edgetune: interrupted.\n")
