"""Measure how soon a quantised model answers: from after `import torch` to the first logits, files in the page cache.

    python tests/benchmarks/open_time.py [--repeats 5] [--json FILE]
    python tests/benchmarks/open_time.py --shape demo                                to try the script out

Each run is a new process. It imports edgetune's modules (timed separately), opens and checks the folder, maps the
weights, loads the tokenizer (if --tokenizer has one) and runs one token. The first run only warms the page cache.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import common
from common import Contender, Result

PARTS = {
    "imports": "importing edgetune's modules",
    "open": "opening and checking the folder",
    "load": "building the model over the mapped weights",
    "tokenizer": "loading the tokenizer",
    "first_logits": "first logits of a prompt of one token",
    "ready": "from after `import torch` to the first logits, imports included",
    "ready_without_imports": "from after `import torch` to the first logits, without imports",
}
CONTENDERS = {
    "step": "by the decoder's own step",
    "prefill": "by prefill, as generate does",
}


def main() -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--tokenizer", type=Path, default=common.ROOT.parent / "shared" / "data" / "llama2_tokenizer",
                       help="a folder with a tokenizer for this kind of model")  # fmt: skip
    common.start(flags, compare, contend)


def compare(arguments: argparse.Namespace) -> None:
    common.random_folders(arguments.workdir, arguments.shape, dense=False)
    script = Path(__file__).resolve()
    passed = ["--shape", arguments.shape, "--threads", str(arguments.threads), "--workdir", str(arguments.workdir),
              "--tokenizer", str(arguments.tokenizer)]  # fmt: skip
    host = common.machine(arguments.threads)
    contenders = common.chosen([Contender(key, label) for key, label in CONTENDERS.items()], arguments.only)
    for contender in contenders:
        common.say(f"warming up: {common.brief(common.run(script, contender, passed))}")
    results = common.run_rounds(script, contenders, passed, arguments.repeats)
    everything = {
        "benchmark": "open_time",
        "machine": host,
        "versions": common.versions(),
        "lacking": [] if has_tokenizer(arguments) else [f"a tokenizer: none in {arguments.tokenizer.name}"],
        "settings": {"shape": arguments.shape, "rounds": arguments.repeats},
        "results": results,
        "summary": {key: {part: common.median(results[key], part) for part in PARTS} for key in results},
    }
    rows = []
    for part, label in PARTS.items():
        rows.append([label, *(common.number(common.median(results[c.key], part), "{:.3f}") for c in contenders)])
    memory = [common.megabytes(common.median(results[c.key], "anonymous_beyond_torch")) for c in contenders]
    rows.append(["anonymous beyond torch, MB", *memory])
    text = common.table(["seconds", *(contender.label for contender in contenders)], rows)
    about = f"{arguments.shape} in NF4, warm cache; medians of {arguments.repeats} fresh processes.\n"
    common.publish(arguments.json, "\n".join([common.heading(everything), about, text]), everything)


def has_tokenizer(arguments: argparse.Namespace) -> bool:
    return any((arguments.tokenizer / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def contend(arguments: argparse.Namespace) -> Result:
    bare = common.bare_torch(arguments.threads)
    import torch

    clock = [time.perf_counter()]
    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.device import compute_dtype
    from edgetune.runtime.generate import Generator
    from edgetune.runtime.loader import load_llama
    from edgetune.runtime.runner import Runner
    from edgetune.runtime.tokenizer import Tokenizer

    clock.append(time.perf_counter())
    checkpoint = open_model(arguments.workdir / f"{arguments.shape}-nf4")
    clock.append(time.perf_counter())
    model = load_llama(checkpoint, compute_dtype(torch.device("cpu")))
    clock.append(time.perf_counter())
    if has_tokenizer(arguments):
        Tokenizer.load(arguments.tokenizer)
    clock.append(time.perf_counter())
    generator = Generator(Runner(model), min(4096, model.config.max_positions))
    with torch.no_grad():
        logits = generator.step(1) if arguments.contender == "step" else generator.prefill([1])
    assert bool(logits.isfinite().all())
    clock.append(time.perf_counter())
    parts = dict(zip(PARTS, (after - before for before, after in itertools.pairwise(clock)), strict=False))
    return {
        **parts,
        "ready": clock[-1] - clock[0],
        "ready_without_imports": clock[-1] - clock[1],
        "anonymous_beyond_torch": common.anonymous_memory() - bare,
    }


if __name__ == "__main__":
    main()
