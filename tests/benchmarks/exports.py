"""One adapter to every target in each of its forms: seconds, peak memory, size, and how far its own reader is from edgetune.

    python tests/benchmarks/exports.py --model BASE --adapter A          # the table of README's exports
    python tests/benchmarks/exports.py --only peft,gguf-f16              # a 1.1B of random weights, a random adapter
    python tests/benchmarks/exports.py --no-verify --least               # within the least memory that each asks for

Each row is an `edgetune export` of its own. With --least its --memory is what a first one, given next to none, says would do.
Random weights are for seconds and bytes: they are exported with --force, and not called proved where they are out of bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import common
from common import Result

from edgetune.export.targets import TARGETS, load_target

sys.path.append(str(common.ROOT / "tests"))  # its adapters.py

RANK, SIZE = 16, 0.002
"""Of the random adapter, and of the numbers of its B: a hundredth of the weights' size, as training makes it."""
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Form:
    """A row of the table: a target, and what is typed after it."""

    target: str
    weights: str = ""
    adapter_as: str = ""

    @property
    def key(self) -> str:
        """As --only names it."""
        return "-".join(filter(None, (self.target, self.weights, self.adapter_as)))

    @property
    def options(self) -> list[str]:
        typed = (("--weights", self.weights), ("--adapter-as", self.adapter_as))
        return [part for option, value in typed if value for part in (option, value)]


def forms() -> list[Form]:
    """All that can be typed, a target's default weights in each form of its adapter."""
    found = []
    for target in TARGETS:
        spec = load_target(target)
        found += [Form(target, weights) for weights in spec.weights]
        found += [Form(target, spec.weights[0], form) for form in spec.adapter_as[1:]]
    return found


def main() -> None:
    flags = common.parser(__doc__, contenders=False)
    flags.add_argument("--model", help="a model's folder or name; without it the shape's random weights")
    flags.add_argument("--adapter", help="its adapter; without it a random one of the shape")
    flags.add_argument("--only", help="rows to run, by key, separated by commas: peft, gguf-f16, coreml-nf4-functions")
    flags.add_argument("--no-verify", action="store_true", help="write alone")
    flags.add_argument("--least", action="store_true", help="within the least memory that each asks for")
    arguments = flags.parse_args()
    if (arguments.model is None) != (arguments.adapter is None):
        flags.error("--model and --adapter go together: name both, or neither for random ones.")
    chosen = forms()
    if arguments.only is not None:
        wanted, keys = arguments.only.split(","), [form.key for form in chosen]
        if unknown := sorted(set(wanted) - set(keys)):
            flags.error(f"--only names {', '.join(unknown)}; the rows are {', '.join(keys)}.")
        chosen = [form for form in chosen if form.key in wanted]
    model, adapter = (arguments.model, arguments.adapter) if arguments.model else random_pair(arguments)
    host, results, run = common.machine(arguments.threads), {}, least if arguments.least else export
    for form in chosen:
        common.say(form.key)
        results[form.key] = run(arguments, form, model, adapter)
        common.say(f"    {common.brief(results[form.key])}")
    publish(arguments, host, results)


def random_pair(arguments: argparse.Namespace) -> tuple[str, str]:
    """The shape's NF4 folder, with the built-in model's tokenizer, and an adapter of seeded random numbers for it."""
    from adapters import random_adapter

    from edgetune.runtime.adapter import save
    from edgetune.runtime.checkpoint import open_model

    model, _ = common.random_folders(arguments.workdir, arguments.shape, dense=False)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(common.ROOT / "edgetune" / "demo" / name, model / name)
    folder = arguments.workdir / f"{arguments.shape}-adapter"
    if not folder.exists():
        save(random_adapter(open_model(model).config, RANK, RANK, size=SIZE), folder, str(model))
    return str(model), str(folder)


def export(arguments: argparse.Namespace, form: Form, model: str, adapter: str, *more: str) -> Result:
    """One export, which is deleted again -> what its --json says, or {"error": its last words}."""
    out = arguments.workdir / f"export-{os.getpid()}"
    command = [sys.executable, "-m", "edgetune", "export", form.target, *form.options, "--model", model, "--adapter", adapter]
    command += ["--out", str(out), "--json", *more, *(["--no-verify"] if arguments.no_verify else [])]
    command += ["--force"] if arguments.model is None else []  # what rounding leaves of a random adapter is no measure
    environment = {**os.environ, **common.OFFLINE, "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT:.0f} s"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    told: Result = json.loads(done.stdout.splitlines()[-1])
    return {key: value for key, value in told.items() if key not in ("path", "model", "adapter", "notices")}


def least(arguments: argparse.Namespace, form: Form, model: str, adapter: str) -> Result:
    """The same within the --memory that a refusal names."""
    refused = export(arguments, form, model, adapter, "--memory", "1MB")
    amount = re.search(r"type --memory (\d+)MB or more", refused.get("error", ""))
    if amount is None:
        return {"error": refused.get("error", "was not refused with --memory 1MB")}
    allowed = int(amount[1])
    return {"allowed_bytes": allowed * 1_000_000, **export(arguments, form, model, adapter, "--memory", f"{allowed}MB")}


def publish(arguments: argparse.Namespace, host: Result, results: dict[str, Result]) -> None:
    """The table, a row a form."""
    named = arguments.model or f"{arguments.shape} of random weights"
    everything = {
        "benchmark": "exports",
        "machine": host,
        "versions": common.versions(),
        "lacking": [],
        "settings": {"model": Path(named).name, "verify": not arguments.no_verify, "least": arguments.least},
        "results": results,
    }
    heads = ["export", "MB", "seconds", "peak MB", "allowed MB", "largest difference", "greedy text", "kept", "proved by"]
    text = common.table(heads, [row(key, result) for key, result in results.items()])
    about = f"{Path(named).name}, one run each.\n"
    common.publish(arguments.json, "\n".join([common.heading(everything), about, text]), everything)


def row(key: str, result: Result) -> list[str]:
    """A form's cells."""
    if "error" in result:
        return [key, *["–"] * 7, result["error"]]
    match = result["greedy_match"]
    return [
        key,
        common.number(result["bytes"] / 1e6),
        common.number(result["seconds"]),
        common.megabytes(result["peak_memory_bytes"]),
        common.megabytes(result.get("allowed_bytes")),
        common.number(result["max_logit_difference"], "{:.2g}"),
        "–" if match is None else "same" if match else "another",
        common.number(kept(result["facts"]), "{:.0%}"),
        result["proved_by"] if result["verified"] else "–",
    ]


def kept(facts: Result) -> float | None:
    """The share of the adapter that is left where the export measured it, or both divergences that make it."""
    if "kl_of_adapter" in facts:
        return 1.0 - facts["kl_of_rounding"] / facts["kl_of_adapter"]
    return next((share for name, share in facts.items() if "_kept" in name), None)


if __name__ == "__main__":
    main()
