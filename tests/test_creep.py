"""Memory does not creep: after 2,000 steps of varying lengths a run holds what it held after 50, and its peaks do not grow.

What is asserted is what a user's process shows: nothing is given back but by the product's own step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEPS, EARLY = 2002, 50  # as long after the heap was last trimmed, 2 steps
TRAIN = """
import json, random, sys
import torch
from edgetune.bench import random_llama
from edgetune.meter import anonymous_memory
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import steady_heap
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Recompute, Row, Runner
from edgetune.stepper import give_back

steps, early = int(sys.argv[1]), int(sys.argv[2])
steady_heap()
config = LlamaConfig("llama", 128, 256, 2, 4, 2, 32, 512, 4096, 1e-5, windows=(None,) * 2)
model = random_llama(config, torch.bfloat16)
adapters.attach_new(model, LoraConfig(8, 16.0, 0.05), 0)
optimizer, runner = PagedAdamW(adapters.parameters(model)), Runner(model, Recompute.NONE)
lengths, held = random.Random(0), []
for step in range(steps):
    n = 2048 if (step + 1) % 10 == 0 or step == steps - 1 else lengths.randrange(16, 2048)
    cut = lengths.randrange(1, n)
    ids = torch.randint(0, 512, (n + 1,))
    runner.train(Row(ids[:-1], ids[1:], torch.full((n,), 1 / n), torch.arange(n), [(0, cut), (cut, n)]), dropout_key=step)
    optimizer.step(1e-4)
    optimizer.zero_grad()
    give_back(step)
    held.append(anonymous_memory())
print(json.dumps({"early": held[early - 1], "late": held[-1], "peaks": [max(held[:early]), max(held[-early:])]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's anonymous memory")
def test_2000_steps_hold_what_50_held() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(STEPS), str(EARLY)], capture_output=True, text=True, check=True)
    held = json.loads(done.stdout)
    assert held["late"] <= 1.02 * held["early"]
    assert held["peaks"][1] <= 1.02 * held["peaks"][0]
