"""Compare decode and prefill speed on a LLaMA of random weights: edgetune's NF4 and llama.cpp's Q4_0, IQ4_NL and BF16.

    python tests/benchmarks/decode.py [--llama-python PATH] [--repeats 3] [--json FILE]
    python tests/benchmarks/decode.py --shape demo --repeats 1                       to try the script out

llama.cpp runs through llama-cpp-python and `gguf` (`pip install edgetune[bench]`). If this Python lacks them,
--llama-python names one that has them. --llama-lib NAME=FOLDER, which may be repeated, adds another build of llama.cpp's
libraries to the comparison. The script writes the GGUF files once, with random blocks: speed does not depend on values.
llama.cpp counts with its better result of flash attention on and off, and of its builds, for prefill and decode separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import Contender, Result

PROMPT = 16
OURS = {
    "ours-nf4": "edgetune NF4, head bf16 (`--head stored`)",
    "ours-int8-head": "edgetune NF4, head int8 (as `generate` uses it)",
    "ours-nf4-head": "edgetune NF4, head NF4 (`--head nf4`)",
}
HEAD_KINDS = {"ours-nf4": None, "ours-int8-head": "int8", "ours-nf4-head": "nf4"}
LLAMA = {
    "llama-q4_0": "llama.cpp Q4_0 (output Q6_K, as llama-quantize writes it)",
    "llama-q4_0-pure": "llama.cpp Q4_0 (output Q4_0 too)",
    "llama-iq4_nl": "llama.cpp IQ4_NL (output Q6_K)",
    "llama-bf16": "llama.cpp BF16",
}
# For each contender, the GGUF types of a block's linears, of the output matrix and of the embedding.
TYPES = {
    "llama-q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "llama-q4_0-pure": ("Q4_0", "Q4_0", "Q4_0"),
    "llama-iq4_nl": ("IQ4_NL", "Q6_K", "IQ4_NL"),
    "llama-bf16": ("BF16", "BF16", "BF16"),
}
SPEEDS = ("decode_tokens_per_second", "prefill_tokens_per_second")


def main() -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--prefill", type=int, default=512, help="tokens of the prompt for prefill (default: %(default)s)")
    flags.add_argument("--tokens", type=int, default=96, help="tokens that decode generates (default: %(default)s)")
    flags.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python and gguf")
    flags.add_argument("--llama-lib", action="append", default=[], metavar="NAME=FOLDER",
                       help="another build of llama.cpp's libraries for the same llama-cpp-python; repeatable")  # fmt: skip
    common.start(flags, compare, contend)


# --- the parent -----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> None:
    common.random_folders(arguments.workdir, arguments.shape, dense=False)
    script = Path(__file__).resolve()
    passed = ["--shape", arguments.shape, "--threads", str(arguments.threads), "--workdir", str(arguments.workdir),
              "--prefill", str(arguments.prefill), "--tokens", str(arguments.tokens)]  # fmt: skip
    host = common.machine(arguments.threads)
    every = [Contender("bandwidth", "the machine's read bandwidth")]
    every += [Contender(key, label) for key, label in OURS.items()]
    lacking, llama = [], {}
    if can_run_llama(arguments.llama_python):
        every += llama_contenders(arguments)
        llama = common.run(script, replace(every[-1], key="llama-versions"), passed)
    else:
        lacking.append("llama.cpp: this Python lacks llama-cpp-python or gguf; name one that has them with --llama-python")
    contenders = common.chosen(every, arguments.only)
    for contender in contenders:
        kind = contender.key.split("+")[0]
        if kind in LLAMA and not gguf_path(arguments, kind).exists():
            common.say(f"writing {gguf_path(arguments, kind)}")
            common.say(f"    {common.brief(common.run(script, replace(contender, key=f'write-{kind}'), passed))}")
    results = common.run_rounds(script, contenders, passed, arguments.repeats)
    everything = {
        "benchmark": "decode",
        "machine": host,
        "versions": {**common.versions(), **llama.get("versions", {})},
        "llama_system": llama.get("system"),
        "lacking": lacking,
        "settings": {
            "shape": arguments.shape,
            "prefill": arguments.prefill,
            "tokens": arguments.tokens,
            "rounds": arguments.repeats,
        },
        "results": results,
    }
    everything["summary"] = summary = summarise(results)
    common.publish(arguments.json, render(everything, contenders, summary), everything)


def llama_contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Return a contender for each type of weights and each build, with the key `type+build`."""
    contenders = []
    for build in ["", *arguments.llama_lib]:
        name, _, folder = build.partition("=")
        environment = {"PYTHONPATH": "", **({"LLAMA_CPP_LIB_PATH": folder} if folder else {})}
        for key, label in LLAMA.items():
            full_key, full_label = (f"{key}+{name}", f"{label}, build {name}") if name else (key, label)
            contenders.append(Contender(full_key, full_label, arguments.llama_python, environment))
    return contenders


def can_run_llama(python: str) -> bool:
    return subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True).returncode == 0


def gguf_path(arguments: argparse.Namespace, key: str) -> Path:
    return arguments.workdir / f"{arguments.shape}-{key.removeprefix('llama-')}.gguf"


def summarise(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Return the ratios and shares that the summary lists: ratios within rounds, medians over them."""
    for rounds in results.values():
        for row, read in zip(rounds, results.get("bandwidth", []), strict=False):
            if row.get("read_bytes_a_token") and row.get(SPEEDS[0]) and read.get("read_gb_per_second"):
                row["bandwidth_share"] = row["read_bytes_a_token"] * row[SPEEDS[0]] / 1e9 / read["read_gb_per_second"]

    decode, prefill = SPEEDS
    ours_prefill = fastest(results, tuple(OURS), prefill) or "ours-nf4"
    peer = fastest(results, tuple(LLAMA), prefill)

    def ratio(key: str, kinds: tuple[str, ...], speed: str) -> float | None:
        return common.median_ratio(results.get(key, []), results.get(fastest(results, kinds, speed) or "", []), speed)

    return {
        "decode_ratio_head_bf16_to_q4_0": ratio("ours-nf4", ("llama-q4_0",), decode),
        "decode_ratio_head_int8_to_q4_0": ratio("ours-int8-head", ("llama-q4_0",), decode),
        "decode_ratio_head_nf4_to_q4_0": ratio("ours-nf4-head", ("llama-q4_0",), decode),
        "decode_ratio_head_nf4_to_q4_0_pure": ratio("ours-nf4-head", ("llama-q4_0-pure",), decode),
        "decode_bandwidth_share_head_bf16": common.median(results.get("ours-nf4", []), "bandwidth_share"),
        "decode_bandwidth_share_head_int8": common.median(results.get("ours-int8-head", []), "bandwidth_share"),
        "decode_bandwidth_share_head_nf4": common.median(results.get("ours-nf4-head", []), "bandwidth_share"),
        "prefill_ours": ours_prefill,
        "prefill_best_peer": peer,
        "prefill_ratio_to_best_peer": ratio(ours_prefill, tuple(LLAMA), prefill),
        "prefill_ratio_to_q4_0": ratio(ours_prefill, ("llama-q4_0", "llama-q4_0-pure"), prefill),
        "prefill_ratio_to_bf16": ratio(ours_prefill, ("llama-bf16",), prefill),
    }


def fastest(results: dict[str, list[Result]], kinds: tuple[str, ...], speed: str) -> str | None:
    """Return the contender of these kinds, in any build, with the highest median speed, or None."""
    speeds = {key: common.median(rounds, speed) or 0.0 for key, rounds in results.items() if key.split("+")[0] in kinds}
    best = max(speeds, key=speeds.__getitem__, default=None)
    return best if best is not None and speeds[best] else None


def render(everything: Result, contenders: list[Contender], summary: dict[str, Any]) -> str:
    results, settings = everything["results"], everything["settings"]
    peers = [results.get(fastest(results, ("llama-q4_0",), speed) or "", []) for speed in SPEEDS]
    rows = []
    for contender in contenders:
        if contender.key == "bandwidth":
            continue
        mine = results[contender.key]
        rows.append([
            contender.label,
            common.number(common.median(mine, SPEEDS[0])) if any("error" not in row for row in mine) else "failed",
            common.number(common.median_ratio(mine, peers[0], SPEEDS[0]), "{:.2f}×"),
            common.number(common.median(mine, "bandwidth_share"), "{:.0%}"),
            common.number(common.median(mine, SPEEDS[1])),
            common.number(common.median_ratio(mine, peers[1], SPEEDS[1]), "{:.2f}×"),
            common.megabytes(common.median(mine, "peak_memory_bytes")),
            common.megabytes(common.median(mine, "read_bytes_a_token")),
        ])  # fmt: skip
    heads = ["inference", "decode tokens/s", "to Q4_0", "of read bandwidth", f"prefill {settings['prefill']} tokens/s",
             "to Q4_0", "peak memory MB", "MB read a token"]  # fmt: skip
    read = common.number(common.median(results.get("bandwidth", []), "read_gb_per_second"))
    about = (
        f"{settings['shape']}, {settings['tokens']} tokens generated after a prompt of {PROMPT}, without sampling; medians of "
        f"{settings['rounds']} rounds. Read bandwidth {read} GB/s. llama.cpp: {everything['llama_system'] or 'not run'}\n"
    )
    return "\n".join([common.heading(everything), about, common.table(heads, rows), "", common.listed(summary)])


# --- the contenders -------------------------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> Result:
    key = arguments.contender
    if key == "llama-versions":
        import llama_cpp

        return {"versions": common.versions(), "system": llama_cpp.llama_print_system_info().decode().strip(" |")}
    if key.startswith("write-"):
        return write_gguf(arguments, key.removeprefix("write-"))
    if key.split("+")[0] in LLAMA:
        return llama(arguments)
    bare = common.bare_torch(arguments.threads)
    if key == "bandwidth":
        from edgetune.machine.bench import read_gb_per_second

        return {"read_gb_per_second": read_gb_per_second()}
    return ours(arguments, HEAD_KINDS[key], bare)


def ours(arguments: argparse.Namespace, head_kind: str | None, bare: int) -> Result:
    import torch

    from edgetune.machine.bench import decode_bytes
    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.device import compute_dtype
    from edgetune.runtime.generate import Generator
    from edgetune.runtime.loader import load_llama
    from edgetune.runtime.runner import Runner

    checkpoint = open_model(arguments.workdir / f"{arguments.shape}-nf4")
    model = load_llama(checkpoint, compute_dtype(torch.device("cpu")), head_kind=head_kind)
    generator = Generator(Runner(model), arguments.prefill + PROMPT + arguments.tokens)

    @torch.no_grad()
    def evaluate(ids: list[int], anew: bool) -> None:
        if anew:
            generator.cache.length = 0
            generator.tokens = []
            generator.prefill(ids)
        else:
            generator.step(ids[0])

    with common.measured(checkpoint.files, bare) as peaks:
        speeds = measure(arguments, evaluate, model.config.vocab_size)
    return {**speeds, "read_bytes_a_token": decode_bytes(model), **peaks}


def measure(arguments: argparse.Namespace, evaluate: Callable[[list[int], bool], None], vocabulary: int) -> Result:
    """Return the speeds of prefill and of decode; the first run of prefill and the first tokens do not count."""
    prompt = [1 + 7919 * place % (vocabulary - 1) for place in range(arguments.prefill)]
    seconds = common.seconds_of(lambda: evaluate(prompt, True), 3)
    evaluate(prompt[:PROMPT], True)
    steps = []
    for place in range(arguments.tokens):
        start = time.perf_counter()
        evaluate([prompt[place % len(prompt)]], False)
        steps.append(time.perf_counter() - start)
    return {
        SPEEDS[0]: 1 / statistics.median(steps[min(8, arguments.tokens // 2) :]),
        SPEEDS[1]: arguments.prefill / statistics.median(seconds),
    }


def llama(arguments: argparse.Namespace) -> Result:
    """Measure llama.cpp, in its own Python, which may have neither torch nor edgetune."""
    from llama_cpp import Llama

    path = gguf_path(arguments, arguments.contender.split("+")[0])
    found: Result = {}
    with common.PlainMeter([path]) as meter:
        for flash in (False, True):
            model = Llama(
                str(path), n_ctx=max(1024, arguments.prefill + PROMPT + arguments.tokens), n_batch=512, n_ubatch=512,
                n_threads=arguments.threads, n_threads_batch=arguments.threads, flash_attn=flash, verbose=False,
            )  # fmt: skip
            speeds = measure(arguments, partial(evaluate_llama, model), model.n_vocab())
            found["flash_on" if flash else "flash_off"] = speeds
            peak = meter.peak()
            model.close()
    best = {speed: max(found["flash_on"][speed], found["flash_off"][speed]) for speed in SPEEDS}
    return {**best, **found, "read_bytes_a_token": read_bytes(path), "peak_memory_bytes": peak}


def evaluate_llama(model: Any, ids: list[int], anew: bool) -> None:
    if anew:
        model.reset()
    model.eval(ids)
    model._ctx.get_logits()  # waits until they are computed


def read_bytes(path: Path) -> int:
    """Return the bytes of a GGUF that each token reads: all tensors but the embedding, unless it is also the output."""
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(str(path)).tensors}
    return sum(tensors.values()) - (tensors["token_embd.weight"] if "output.weight" in tensors else 0)


# --- GGUF files of random weights -------------------------------------------------------------------------------------


def write_gguf(arguments: argparse.Namespace, key: str) -> Result:
    """Write a llama GGUF of this shape without a tokenizer; runs in llama.cpp's Python."""
    import gguf
    import numpy as np

    config = json.loads((arguments.workdir / f"{arguments.shape}-nf4" / "config.json").read_text())
    path, random = gguf_path(arguments, key), np.random.default_rng(0)
    unfinished = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    linear, output, embedding = TYPES[key]
    for name, shape, kind in gguf_tensors(config, linear, output, embedding):
        if kind == "F32":
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            blocks, quant = random_blocks(shape, kind, random)
            writer.add_tensor(name, blocks, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return {"file_bytes": path.stat().st_size}


def gguf_tensors(config: Result, linear: str, output: str, embedding: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Return (name, shape, type) of every tensor."""
    d, f, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    tied = config["tie_word_embeddings"]
    vocabulary = (config["vocab_size"], d)
    tensors: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", vocabulary, output if tied else embedding)]
    for layer in range(config["num_hidden_layers"]):
        shapes = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
                  "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}  # fmt: skip
        tensors += [(f"blk.{layer}.{norm}.weight", (d,), "F32") for norm in ("attn_norm", "ffn_norm")]
        tensors += [(f"blk.{layer}.{name}.weight", shape, linear) for name, shape in shapes.items()]
    tensors.append(("output_norm.weight", (d,), "F32"))
    return tensors if tied else [*tensors, ("output.weight", vocabulary, output)]


def random_blocks(shape: tuple[int, ...], kind: str, random: Any) -> tuple[Any, Any]:
    """Return random weights of about 0.02 as bytes of a GGUF type, and the type used (Q4_0 if the rows do not fit `kind`)."""
    import gguf
    import numpy as np

    rows, columns = shape
    if kind == "BF16":  # random sign and mantissa at one exponent
        bits = random.integers(0, 1 << 16, (rows, columns), np.uint16)
        return ((bits & 0x807F) | 0x3C80).view(np.uint8), gguf.GGMLQuantizationType.BF16
    quant = gguf.GGMLQuantizationType[kind]
    if columns % gguf.GGML_QUANT_SIZES[quant][0]:
        quant = gguf.GGMLQuantizationType.Q4_0
    values, size = gguf.GGML_QUANT_SIZES[quant]
    blocks = random.integers(0, 256, (rows, columns // values, size), np.uint8)
    # The fp16 scale comes first in a block of Q4_0 and IQ4_NL, and last in one of Q6_K, whose codes reach 32 times 127.
    scale, at = {"Q4_0": (0.0027, 0), "IQ4_NL": (0.0002, 0), "Q6_K": (5e-6, size - 2)}[quant.name]
    blocks[:, :, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(rows, -1), quant


if __name__ == "__main__":
    main()
