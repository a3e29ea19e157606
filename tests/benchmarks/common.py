"""Run the contenders of a benchmark in processes of their own, in rounds, and compute medians, ratios and peak memory.

A contender is a function in a script. The script starts itself once for each contender and round, so that each has its
own memory, caches and threads. Contenders take turns (A B C A B C), because a machine's speed drifts.
At its top this file imports only the standard library: the Python of llama.cpp, which may lack torch, runs it too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("edgetune") is None:  # a clone that nobody installed
    sys.path.insert(0, str(ROOT))

Result = dict[str, Any]
OUTSIDE = dict(os.environ)
"""The environment before edgetune changes it for itself."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PEERS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "llama-cpp-python", "gguf", "numpy")
LONGEST = 7200.0
"""The most seconds that a contender may take. Chosen by hand."""


@dataclass(frozen=True)
class Contender:
    """One row of a table. `key` names the function in the script; `python` runs it, with `environment` added to ours."""

    key: str
    label: str
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def parser(description: str | None, contenders: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags of every benchmark; `contenders` adds those for rounds and contenders."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--shape",
        default="tinyllama-1.1b",
        help="a shape in edgetune.machine.shapes.SHAPES (default: tinyllama-1.1b); `demo` tries the script out; "
        "in train_1b and til_epoch, `smollm2` is the real model",
    )
    flags.add_argument(
        "--model",
        type=Path,
        help="a model's folder or GGUF file: SmolLM2's for --shape smollm2 (default: EDGETUNE_TEST_SMOLLM2), or another's",
    )
    flags.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: one for each core)")
    flags.add_argument(
        "--workdir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "edgetune-benchmarks",
        help="folder for the random models, which are written once and used again",
    )
    flags.add_argument("--json", type=Path, help="write all measurements to this file")
    if contenders:
        flags.add_argument(
            "--repeats", type=int, default=3, help="rounds; each runs every contender once (default: %(default)s)"
        )
        flags.add_argument("--only", help="run only these contenders, named by their keys, separated by commas")
        flags.add_argument("--contender", help=argparse.SUPPRESS)
        flags.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return flags


def say(text: str) -> None:
    """Print progress on standard error, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def start(
    flags: argparse.ArgumentParser,
    compare: Callable[[argparse.Namespace], None],
    contend: Callable[[argparse.Namespace], Result],
) -> None:
    """Read the command line and compare the contenders or, in the child process of one of them, be that contender."""
    arguments = flags.parse_args()
    if arguments.contender:
        serve(arguments, contend)
    else:
        compare(arguments)


def serve(arguments: argparse.Namespace, work: Callable[[argparse.Namespace], Result]) -> None:
    """Run the contender in the child process and write its result to the file that the parent reads."""
    arguments.result.write_text(json.dumps(work(arguments)))


def run(script: Path, contender: Contender, arguments: Sequence[str], timeout: float = LONGEST) -> Result:
    """Run one contender once in a child process and return its result; {"error": its last line} if it fails."""
    with tempfile.TemporaryDirectory(prefix="edgetune-benchmark-") as folder:
        result = Path(folder) / "result.json"
        command = [contender.python, str(script), *arguments, *contender.arguments]
        command += ["--contender", contender.key, "--result", str(result)]
        environment = {**OUTSIDE, **OFFLINE, **_waiting(contender.key), **contender.environment}
        start = time.perf_counter()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {timeout:.0f} s"}
        if done.returncode != 0 or not result.exists():
            words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
            say("\n".join(words[-12:]))
            return {"error": words[-1]}
        return {**json.loads(result.read_text()), "process_seconds": time.perf_counter() - start}


def _waiting(key: str) -> dict[str, str]:
    """Return the environment that edgetune's command has set when torch is loaded. The peers wait as torch does by default."""
    import edgetune

    return edgetune.OPENMP_WAITING if key.startswith("ours") else {}


def run_rounds(
    script: Path,
    contenders: Sequence[Contender],
    arguments: Sequence[str],
    repeats: int,
    until: float = math.inf,
    keep: Callable[[dict[str, list[Result]]], object] = lambda results: None,
) -> dict[str, list[Result]]:
    """Run all contenders in turn, `repeats` times; return the results of each contender, one for each round.

    until: the time of time.monotonic() at which the running contender is ended and no other starts. keep: called with
    all results so far after each contender.
    """
    results: dict[str, list[Result]] = {contender.key: [] for contender in contenders}
    for number in range(repeats):
        for contender in contenders:
            left = until - time.monotonic()
            if left <= 0:
                say(f"round {number + 1} of {repeats}: no time left for {contender.label}")
                continue
            say(f"round {number + 1} of {repeats}: {contender.label}")
            results[contender.key].append(run(script, contender, arguments, min(left, LONGEST)))
            say(f"    {brief(results[contender.key][-1])}")
            keep(results)
    return results


def brief(result: Result) -> str:
    """Return the numbers of a result on one line."""
    if "error" in result:
        return f"failed: {result['error']}"
    shown = {key: value for key, value in result.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return ", ".join(f"{key} {value / 1e6:.0f}M" if abs(value) >= 1e6 else f"{key} {value:.4g}" for key, value in shown.items())


def chosen(contenders: Iterable[Contender], only: str | None) -> list[Contender]:
    """Return the contenders that --only names, or all of them."""
    contenders = list(contenders)
    if only is None:
        return contenders
    wanted = only.split(",")
    unknown = sorted(set(wanted) - {contender.key for contender in contenders})
    if unknown:
        sys.exit(
            f"--only has unknown contenders: {', '.join(unknown)}. The contenders are {', '.join(c.key for c in contenders)}."
        )
    return [contender for contender in contenders if contender.key in wanted]


def median(results: Sequence[Result], key: str) -> float | None:
    """Return the median over rounds, or None if nothing was measured."""
    values = [result[key] for result in results if result.get(key) is not None]
    return statistics.median(values) if values else None


def median_ratio(ours: Sequence[Result], theirs: Sequence[Result], key: str) -> float | None:
    """Return the median of the ratios of each round, which compare runs within the same minutes."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=False) if a.get(key) and b.get(key)]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def number(value: float | None, form: str = "{:.1f}") -> str:
    """Return a number as a cell of a table."""
    return "–" if value is None else form.format(value)


def megabytes(value: float | None) -> str:
    """Return bytes as a cell of a table, in MB (10^6 bytes)."""
    return "–" if value is None else f"{value / 1e6:,.0f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine(threads: int) -> Result:
    """Return the machine's CPU, memory, system and load. The name of the host is left out for privacy."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": load,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages in PEERS that are installed for this Python."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def lacking() -> list[str]:
    """Return the optional parts that the peers ran without, to be printed with their figures."""
    if importlib.util.find_spec("bitsandbytes") is not None and importlib.util.find_spec("kernels") is None:
        return ["bitsandbytes ran without the CPU kernel (kernels-community) that it downloads from a hub"]
    return ["everything ran offline: a kernel that bitsandbytes would download from a hub was used only if already cached"]


def heading(about: Result) -> str:
    """Return the lines above a table: the machine, the versions and what the peers lacked."""
    host = about["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = "" if host["load_before"] is None else f", load {host['load_before']:.1f} before the run"
    size = f"{host['cores']} cores ({host['threads']} threads), {host['memory_bytes'] / 1e9:.0f} GB"
    return "\n".join([
        f"{host['cpu']}, {size}, {host['system']}{load}.",
        f"Python {host['python']}, {packages}.",
        *(f"Missing: {lack}." for lack in about["lacking"]),
        "",
    ])  # fmt: skip


def listed(summary: Result) -> str:
    """Return the summary as a Markdown list."""
    cells = {key: value if isinstance(value, str) else number(value, "{:.4g}") for key, value in summary.items()}
    return "\n".join(f"- {key}: {cell}" for key, cell in cells.items())


def publish(path: Path | None, text: str, everything: Result) -> None:
    """Print the table on standard output and write all measurements to the file of --json."""
    print(text)
    write_json(path, everything)


def write_json(path: Path | None, everything: Result) -> None:
    """Write all measurements to the file of --json, if there is one."""
    if path is not None:
        path.write_text(json.dumps(everything, indent=2, ensure_ascii=False) + "\n")


# --- memory ---------------------------------------------------------------------------------------------------------


def anonymous_memory() -> int:
    """Return the bytes of this process that belong to no file (Linux; 0 elsewhere). Works in a Python without edgetune."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def bare_torch(threads: int) -> int:
    """Import torch and nothing else; return the anonymous memory then, which is subtracted from every contender's."""
    import torch

    torch.set_num_threads(threads)
    return anonymous_memory()


@contextmanager
def measured(files: Sequence[Path], bare: int) -> Iterator[Result]:
    """Measure the peak memory of the block, by edgetune.runtime.memory_meter; yield a dict that is filled at its end.

    peak_memory_bytes: anonymous memory plus resident pages of the weight files. anonymous_beyond_torch: the anonymous
    part minus `bare`. Freed heap is returned to the system first, so that the way of loading the weights costs nobody.
    """
    import gc

    from edgetune.runtime.heap import trim_memory
    from edgetune.runtime.memory_meter import MemoryMeter

    gc.collect()
    trim_memory()
    peaks: Result = {}
    with MemoryMeter(files) as whole, MemoryMeter() as anonymous:
        yield peaks
        peaks["peak_memory_bytes"] = whole.peak()
        peaks["anonymous_bytes"] = anonymous.peak()
        peaks["anonymous_beyond_torch"] = peaks["anonymous_bytes"] - bare


class PlainMeter:
    """Measures peak memory as `measured` does, with the standard library alone, for a Python without edgetune."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._names = {str(file.resolve()) for file in files}
        self._peak = self._pages = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PlainMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._peak = max(self._peak, anonymous_memory())

    def peak(self) -> int:
        """Return the highest anonymous memory so far, plus the most resident weight pages that any call has found."""
        self._peak = max(self._peak, anonymous_memory())
        if sys.platform != "linux":
            return 0
        resident, inside = 0, False
        for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
            if line.startswith("Rss:"):
                resident += int(line.split()[1]) * 1024 if inside else 0
            elif "-" in line.split(" ", 1)[0]:
                inside = line.split(maxsplit=5)[-1] in self._names
        self._pages = max(self._pages, resident)
        return self._peak + self._pages


# --- time -----------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], repeats: int, warmups: int = 1) -> list[float]:
    """Return the seconds of each of `repeats` runs, after warm-up runs that do not count."""
    for _ in range(warmups):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


# --- models of random weights ---------------------------------------------------------------------------------------


def hf_config(shape: str) -> Result:
    """Return the config.json for random weights of a shape in edgetune.machine.shapes.SHAPES."""
    from edgetune.machine.shapes import SHAPES

    config = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


NF4_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}


def random_folders(workdir: Path, shape: str, dense: bool) -> tuple[Path, Path | None]:
    """Write folders of seeded random weights, unless they exist: NF4 in bitsandbytes' layout, and the same weights in bf16."""
    nf4_folder, dense_folder = workdir / f"{shape}-nf4", workdir / f"{shape}-bf16"
    if not nf4_folder.exists():
        say(f"writing {nf4_folder}")
        _write_folder(nf4_folder, shape, NF4_CONFIG, _write_random_nf4)
    if dense and not dense_folder.exists():
        say(f"writing {dense_folder}")
        _write_folder(dense_folder, shape, None, lambda path, _: write_dense(nf4_folder, path))
    return nf4_folder, dense_folder if dense else None


def _write_folder(folder: Path, shape: str, quantization: Result | None, write: Callable[[Path, str], None]) -> None:
    """Write a model folder, which gets its name only when it is complete."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True, mode=0o700)
    try:
        config = hf_config(shape)
        if quantization is not None:
            config["quantization_config"] = quantization
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write(partial / "model.safetensors", shape)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_random_nf4(path: Path, shape: str) -> None:
    import torch

    from edgetune.machine.shapes import SHAPES
    from edgetune.machine.synthetic import random_nf4
    from edgetune.runtime.bnb_layout import weight_specs, weight_tensors
    from edgetune.runtime.checkpoint import model_shapes
    from edgetune.runtime.names import is_linear
    from edgetune.runtime.safetensors_file import SafetensorsWriter, TensorSpec, aligned_order

    generator = torch.Generator().manual_seed(0)
    specs, tensors = [], {}
    for name, size in model_shapes(SHAPES[shape]).items():
        if is_linear(name):
            specs += weight_specs(name, size, 64, True)
            tensors |= weight_tensors(name, random_nf4((size[0], size[1]), generator))
        else:
            specs.append(TensorSpec(name, torch.bfloat16, size))
            random = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=generator)
            tensors[name] = random.to(torch.bfloat16)
    ordered = aligned_order(specs)
    with SafetensorsWriter(path, ordered, {"format": "pt"}) as writer:
        for spec in ordered:
            writer.write(spec.name, tensors.pop(spec.name))


def write_dense(source: Path, path: Path) -> None:
    """Write the weights of a 4-bit folder, dequantised to bf16, as one file."""
    import torch

    from edgetune.runtime.checkpoint import model_shapes, open_model
    from edgetune.runtime.safetensors_file import SafetensorsWriter, TensorSpec

    checkpoint = open_model(source)
    shapes = model_shapes(checkpoint.config)
    specs = [TensorSpec(name, torch.bfloat16, size) for name, size in shapes.items()]
    with SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for name in shapes:
            writer.write(name, checkpoint.dense(name))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, whose resident pages count as memory."""
    return sorted(folder.glob("*.safetensors"))
