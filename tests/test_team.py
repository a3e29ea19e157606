"""The kernels' own threads: results keep their bits whichever thread is late, and nothing waits for ever."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import threads
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Segment

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="no C++ kernels were built")
attention = pytest.importorskip("edgetune.runtime.backends.cpu.attention", exc_type=ImportError)
library = pytest.importorskip("edgetune.runtime.backends.cpu.library", exc_type=ImportError)

ROOT = Path(__file__).resolve().parent.parent
LATE = 2000
"""Longest sleep of a thread before a piece in microseconds: many times what a piece takes."""
SETUP = """
import os, threading, time
import torch
from edgetune.runtime.backends import cpu
from edgetune.runtime.backends.cpu import library
x = torch.linspace(-3, 3, 512 * 512).reshape(512, 512).bfloat16()
team = library.load().et_team_size
"""


@contextmanager
def late_threads() -> Iterator[None]:
    """Make threads sleep at random before pieces within a block."""
    library.load().et_delay(LATE)
    try:
        yield
    finally:
        library.load().et_delay(0)


def run(code: str) -> list[str]:
    """Run the code in a new Python process and return the lines that it prints."""
    command = [sys.executable, "-c", SETUP + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


def results() -> list[Tensor]:
    """Compute with every kind of job: elementwise, dequantisation, and attention, whose phases read each other's results."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    h, quantized = normal(70, 130), nf4.quantize(normal(130, 333).float())
    q, k, v, do = normal(150, 6, 40), normal(150, 3, 40), normal(150, 3, 40), normal(150, 6, 40)
    inputs = AttentionInputs(q, k, v, [Segment(0, 33, 0, 33), Segment(33, 150, 33, 150)], None, 0.2)
    o, lse = attention.attention_forward(inputs)
    gradients = AttentionGradients(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    attention.attention_backward(inputs, o, lse, do, gradients)
    elements = cpu.rms_norm(h, normal(130).float(), 1e-5), cpu.swiglu(h, h), cpu.dropout(h, 0.3, 1)
    return [*elements, cpu.dequantize(quantized, torch.bfloat16), o, lse, gradients.dq, gradients.dk, gradients.dv]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_results_have_the_same_bits_whichever_thread_is_late(count: int) -> None:
    with threads(1):
        expected = results()
    with threads(count):
        assert same(results(), expected)
        with late_threads():
            for _ in range(3):
                assert same(results(), expected)


def test_a_thread_that_is_late_holds_up_only_the_piece_that_it_has_taken() -> None:
    share_out, others_done = library.load().et_share_out, threading.Event()
    taken: dict[int, int] = {}

    def piece(_: object, index: int, slot: int) -> None:
        taken[index] = slot
        if index == 0:
            others_done.wait(60)
        elif len(taken) == 16:
            others_done.set()

    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    share_out.argtypes = [ctypes.c_int, ctypes.c_int64, kind]
    share_out(2, 16, kind(piece))
    assert others_done.is_set()
    assert sorted(taken) == list(range(16))
    assert {slot for index, slot in taken.items() if index > 0} == {1 - taken[0]}


def test_a_thread_that_is_late_for_a_job_takes_no_piece_of_the_next_one() -> None:
    """Else a piece would be run twice, or the caller would wait for ever."""
    code = """
import collections, ctypes
kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
share_out, wrong = library.load().et_share_out, 0
share_out.argtypes = [ctypes.c_int, ctypes.c_int64, kind]
library.load().et_delay(200)
for number in range(400):
    taken, pieces = collections.Counter(), 2 if number % 2 else 9
    share_out(3, pieces, kind(lambda _, index, slot: taken.update([index])))
    wrong += taken != dict.fromkeys(range(pieces), 1)
print(wrong)
"""
    assert run(code) == ["0"]


def test_the_team_has_as_many_threads_as_the_largest_call_asked_for() -> None:
    code = """
sizes = [team()]
for count in (1, 3, 2, 4, 1):
    torch.set_num_threads(count)
    cpu.swiglu(x, x)
    sizes.append(team())
print(*sizes)
"""
    assert run(code) == ["1 1 3 3 4 4"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_starts_a_team_of_its_own() -> None:
    code = """
torch.set_num_threads(3)
expected = cpu.swiglu(x, x)
child = os.fork()
if child == 0:
    before, found = team(), cpu.swiglu(x, x)
    same = torch.equal(found[-8:], expected[-8:])  # a few rows: torch's own threads do not survive a fork
    os._exit(0 if (before, team(), same) == (1, 3, True) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(cpu.swiglu(x, x), expected), team())
"""
    assert run(code) == ["0 True 3"]


def test_calls_from_several_python_threads_at_once_are_all_right() -> None:
    with threads(2):
        expected, wrong = results(), []

        def work() -> None:
            torch.set_num_threads(2)
            wrong.extend(number for number in range(20) if not same(results(), expected))

        callers = [threading.Thread(target=work) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []


@pytest.mark.parametrize("late", [0, 50])
def test_thousands_of_jobs_and_meetings_come_to_an_end(late: int) -> None:
    code = f"""
import sys
sys.path.insert(0, "tests")
from test_decode_kernels import decode, make_config, make_model, KVCache
library.load().et_delay({late})
model = make_model(make_config(), rank=4)
small = x[:9]
torch.set_num_threads(3)
expected = cpu.swiglu(small, small)
step = decode.Decoder(model, KVCache(model.config, 16, torch.float32, torch.device("cpu")))
first = step.run(model.embed(torch.tensor([3])), 0).clone()
wrong = 0
for number in range(400):
    torch.set_num_threads(2 + number % 2)
    wrong += not torch.equal(cpu.swiglu(small, small), expected)
    wrong += not torch.equal(step.run(model.embed(torch.tensor([3])), 0), first)
print(wrong)
"""
    assert run(code) == ["0"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_reaches_a_program_that_computes_within_a_second() -> None:
    code = """
torch.set_num_threads(2)
cpu.swiglu(x, x)
try:
    print("ready", flush=True)
    while True:
        cpu.swiglu(x, x)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", SETUP + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == b"stopped\n"
        assert time.monotonic() - start < 1.0
        assert child.wait(60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_that_have_nothing_to_do_use_no_processor_time() -> None:
    code = """
torch.set_num_threads(3)
cpu.swiglu(x, x)
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    assert float(run(code)[0]) < 0.05


def test_torch_waits_without_polling_unless_the_user_has_decided() -> None:
    code = "import os, edgetune; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}

    def found(**changes: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env={**clean, **changes}, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert found() == "2000 0"
    assert found(GOMP_SPINCOUNT="7") == "7 0"
    assert found(OMP_WAIT_POLICY="active") == "None None"
