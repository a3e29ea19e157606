"""Memory does not creep: after 2,000 steps of varying lengths a run holds what it held after 50, and its peaks do not grow.

What is asserted is what a user's process shows: nothing is given back but by the product's own step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEPS, EARLY = 2000, 50
WINDOW = (
    32  # steps: the heap is trimmed twice in them, and what a single step leaves free depends on its length (217 to 224 MB)
)
TRAIN = """
import json, random, statistics, sys
import torch
from edgetune.bench import random_llama
from edgetune.meter import anonymous_memory
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import steady_heap
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Recompute, Row, Runner
from edgetune.stepper import give_back

steps, early, window = (int(given) for given in sys.argv[1:])
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
windows = held[early - window : early], held[-window:]
print(json.dumps({"held": [statistics.median(each) for each in windows], "peaks": [max(held[:early]), max(held[-early:])]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's anonymous memory")
def test_2000_steps_hold_what_50_held() -> None:
    given = [str(number) for number in (STEPS, EARLY, WINDOW)]
    done = subprocess.run([sys.executable, "-c", TRAIN, *given], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for early, late in (found["held"], found["peaks"]):
        assert late <= 1.02 * early, found
