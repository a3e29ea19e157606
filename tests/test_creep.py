"""Memory does not creep: after 2,000 steps of varying lengths a run holds what it held after 50, and its peaks do not grow.

Free heap memory is returned to the system only by edgetune's own trim, every 16 steps. Right after a trim, the memory in use is
what the run needs. Between trims, the memory that a step leaves free depends on its length and on the heap's layout (212 to
227 MB here, back and forth), so the test compares medians of many peaks.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.training.step import TRIM_STEPS

STEPS, WINDOW, WINDOWS = 2000, 3 * TRIM_STEPS, 10
TRAIN = """
import json, random, sys
import torch
from edgetune.machine.bench import random_llama
from edgetune.runtime.memory import anonymous_memory
from edgetune.machine.synthetic import random_llama
from edgetune.runtime.memory_meter import anonymous_memory
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.heap import steady_heap
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.batch import Batch
from edgetune.runtime.runner import Recompute, Runner
from edgetune.training.step import trim_after_step

steps = int(sys.argv[1])
steady_heap()
config = LlamaConfig("llama", 128, 256, 2, 4, 2, 32, 512, 4096, 1e-5, windows=(None,) * 2)
model = random_llama(config, torch.bfloat16)
adapters.attach_new(model, LoraConfig(8, 16.0, 0.05), 0)
optimizer, runner = PagedAdamW(adapters.parameters(model)), Runner(model, Recompute.NONE)
lengths, held = random.Random(0), [0] * steps
for step in range(steps):
    n = 2048 if (step + 1) % 10 == 0 or step == steps - 1 else lengths.randrange(16, 2048)
    cut = lengths.randrange(1, n)
    ids = torch.randint(0, 512, (n + 1,))
    halves = (Segment.packed(0, cut), Segment.packed(cut, n))
    runner.train(Batch(ids[:-1], ids[1:], torch.full((n,), 1 / n), torch.arange(n), halves), dropout_key=step)
    optimizer.step(1e-4)
    optimizer.zero_grad()
    trim_after_step(step)
    held[step] = anonymous_memory()
print(json.dumps(held))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's anonymous memory")
def test_2000_steps_hold_what_50_held() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(STEPS)], capture_output=True, text=True, check=True)
    held = json.loads(done.stdout)
    given_back = held[TRIM_STEPS - 1 :: TRIM_STEPS]
    early, late = given_back[WINDOW // TRIM_STEPS - 1], given_back[-1]
    assert late <= 1.02 * early, (early, late)
    peaks = [max(held[start : start + WINDOW]) for start in range(WINDOW, STEPS - WINDOW + 1, WINDOW)]
    early, late = statistics.median(peaks[:WINDOWS]), statistics.median(peaks[-WINDOWS:])
    assert late <= 1.02 * early, (early, late)
