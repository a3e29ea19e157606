"""The kernels and torch share one OpenMP runtime, and torch's number of threads applies to both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="no C++ kernels were built")

ROOT = Path(__file__).resolve().parent.parent
SETUP = """
import ctypes
import os
import torch
from edgetune.runtime.backends import cpu
from edgetune.runtime.backends.cpu import library

def tasks():
    return len(os.listdir("/proc/self/task"))

def watch_teams():
    # a set that gets the size of every team that a kernel runs with from now on
    runtime, sizes = library._openmp(), set()
    def told():
        sizes.add(runtime.omp_get_num_threads())
        return runtime.omp_get_num_threads()
    kept.append(ctypes.CFUNCTYPE(ctypes.c_int)(told))
    entries = (runtime.GOMP_parallel, runtime.GOMP_barrier, runtime.omp_get_thread_num, kept[-1])
    library.load().et_set_openmp(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))
    return sizes

kept = []

x = torch.ones(512, 512, dtype=torch.bfloat16)
"""


def run(code: str) -> list[str]:
    """Run the code in a new Python process and return the lines that it prints."""
    command = [sys.executable, "-c", SETUP + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_mapped_after_torch_and_kernels_ran() -> None:
    code = """
torch.set_num_threads(2)
x @ x
cpu.swiglu(x, x)
print(*sorted(set(library._mapped())), sep="\\n")
"""
    assert len(run(code)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kernels_use_the_threads_that_torch_has_and_start_none() -> None:
    code = """
torch.set_num_threads(3)
x.float() @ x.float()
torch.exp(torch.ones(1 << 20))
before, teams = tasks(), watch_teams()
cpu.swiglu(x, x)
print(before, tasks(), *teams or "-")
"""
    before, after, team = run(code)[0].split()
    assert before == after
    assert team == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_set_num_threads_of_one_is_obeyed() -> None:
    code = """
torch.set_num_threads(1)
before, teams = tasks(), watch_teams()
cpu.swiglu(x, x)
print(before, tasks(), *teams or "-")
"""
    before, after, team = run(code)[0].split()
    assert before == after
    assert team == "-"  # the kernel asks for no team of threads


def test_kernels_need_no_openmp_runtime() -> None:
    code = """
torch.set_num_threads(2)
whole = cpu.swiglu(x, x)
library.load().et_set_openmp(None, None, None, None)
print(torch.equal(cpu.swiglu(x, x), whole))
"""
    assert run(code) == ["True"]
