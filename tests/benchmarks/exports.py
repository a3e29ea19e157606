"""Export one adapter to every target in each form; measure seconds, peak memory, size, and the difference to edgetune.

    python tests/benchmarks/exports.py --model BASE --adapter A          # the table of exports in the documentation
    python tests/benchmarks/exports.py --only peft,gguf-f16              # a 1.1B of random weights and a random adapter
    python tests/benchmarks/exports.py --no-verify --least               # within the least memory that each export needs

Each row is an `edgetune export` of its own. With --least, a first export with almost no memory fails and names the least
--memory that would do, and a second one gets exactly that. Random weights serve to measure seconds and bytes only: they
are exported with --force, and count as unproved if the difference is out of bounds.
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

sys.path.append(str(common.ROOT / "tests"))  # for tests/adapters.py

RANK, SIZE = 16, 0.002
"""The rank of the random adapter, and the size of the values of its B: a hundredth of the weights', as after training."""
TIMEOUT = 3600.0
"""The most seconds that an export may take. Chosen by hand."""


@dataclass(frozen=True)
class Form:
    """A row of the table: a target and its options on the command line."""

    target: str
    weights: str = ""
    adapter_as: str = ""

    @property
    def key(self) -> str:
        """Return the name of the row for --only."""
        return "-".join(filter(None, (self.target, self.weights, self.adapter_as)))

    @property
    def options(self) -> list[str]:
        """Return the options on the command line."""
        options = (("--weights", self.weights), ("--adapter-as", self.adapter_as))
        return [part for option, value in options if value for part in (option, value)]


def forms() -> list[Form]:
    """Return every form: each target with each kind of weights, and its default weights in each form of the adapter."""
    found = []
    for target in TARGETS:
        spec = load_target(target)
        found += [Form(target, weights) for weights in spec.weights if not spec.needs_user_file(weights)]
        found += [Form(target, spec.weights[0], form) for form in spec.adapter_as[1:]]
    return found


def main() -> None:
    flags = common.parser(__doc__, contenders=False)
    flags.add_argument("--adapter", help="a trained adapter for --model; without both, random ones of --shape are exported")
    flags.add_argument("--only", help="run only these rows, separated by commas, such as peft,gguf-f16,coreml-nf4-functions")
    flags.add_argument("--no-verify", action="store_true", help="write the exports without proving them")
    flags.add_argument("--least", action="store_true", help="give each export the least memory that it says it needs")
    arguments = flags.parse_args()
    if (arguments.model is None) != (arguments.adapter is None):
        flags.error("--model and --adapter go together: name both, or neither for random ones.")
    chosen = forms()
    if arguments.only is not None:
        wanted, keys = arguments.only.split(","), [form.key for form in chosen]
        if unknown := sorted(set(wanted) - set(keys)):
            flags.error(f"--only has unknown rows: {', '.join(unknown)}; the rows are {', '.join(keys)}.")
        chosen = [form for form in chosen if form.key in wanted]
    pair = (str(arguments.model), arguments.adapter) if arguments.model else random_pair(arguments)
    host, results, run = common.machine(arguments.threads), {}, least if arguments.least else export
    for form in chosen:
        common.say(form.key)
        results[form.key] = run(arguments, form, *pair)
        common.say(f"    {common.brief(results[form.key])}")
    publish(arguments, host, results)


def random_pair(arguments: argparse.Namespace) -> tuple[str, str]:
    """Write the shape's NF4 folder, with the built-in model's tokenizer, and a random adapter for it; return both paths."""
    from adapters import random_adapter

    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.peft_folder import save

    model, _ = common.random_folders(arguments.workdir, arguments.shape, dense=False)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(common.ROOT / "edgetune" / "demo" / name, model / name)
    folder = arguments.workdir / f"{arguments.shape}-adapter"
    if not folder.exists():
        save(random_adapter(open_model(model).config, RANK, RANK, size=SIZE), folder, str(model))
    return str(model), str(folder)


def export(arguments: argparse.Namespace, form: Form, model: str, adapter: str, *more: str) -> Result:
    """Run one export, delete its output, and return the content of its --json, or {"error": its last line}."""
    out = arguments.workdir / f"export-{os.getpid()}"
    command = [sys.executable, "-m", "edgetune", "export", form.target, *form.options, "--model", model, "--adapter", adapter]
    command += ["--out", str(out), "--json", *more, *(["--no-verify"] if arguments.no_verify else [])]
    command += (
        ["--force"] if arguments.model is None else []
    )  # rounding may remove most of a random adapter, which says nothing here
    environment = {**os.environ, **common.OFFLINE, "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT:.0f} s"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    answer: Result = json.loads(done.stdout.splitlines()[-1])
    return {key: value for key, value in answer.items() if key not in ("path", "model", "adapter", "notices")}


def least(arguments: argparse.Namespace, form: Form, model: str, adapter: str) -> Result:
    """Run one export with the least --memory, which the refusal of a first export names."""
    refused = export(arguments, form, model, adapter, "--memory", "1MB")
    amount = re.search(r"type --memory (\d+)MB or more", refused.get("error", ""))
    if amount is None:
        return {"error": refused.get("error", "was not refused with --memory 1MB")}
    allowed = int(amount[1])
    return {"allowed_bytes": allowed * 1_000_000, **export(arguments, form, model, adapter, "--memory", f"{allowed}MB")}


def publish(arguments: argparse.Namespace, host: Result, results: dict[str, Result]) -> None:
    """Print the table, with a row for each form."""
    named = str(arguments.model or f"{arguments.shape} of random weights")
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
    """Return the cells of one form."""
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
    """Return the share of the adapter's effect that the export keeps, if the export measured it."""
    if "kl_of_adapter" in facts:
        return 1.0 - facts["kl_of_rounding"] / facts["kl_of_adapter"]
    return next((share for name, share in facts.items() if "_kept" in name), None)


if __name__ == "__main__":
    main()
