"""Compare edgetune and peft over one epoch of real notes with the 16M base: wall clock and held-out bits per byte.

    python tests/benchmarks/til_epoch.py [--data ../shared/data] [--repeats 1] [--json FILE]
    python tests/benchmarks/til_epoch.py --shape smollm2 --limit 100                 with a real model of 135M
    python tests/benchmarks/til_epoch.py --limit 60                                  to try the script out

All train the same documents (read and split by edgetune from --notes) with rank 16, alpha 16, dropout 0.05, AdamW at --lr
with 10 warm-up steps and linear decay to a tenth, and clipping at 1.0. One scorer judges all of them: transformers in
fp32, with the weights that each was trained on (bf16, or NF4 dequantised) and its adapter, attached by peft.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import common
import real_model
from common import Contender, Result
from epoch_contenders import ALPHA, DROPOUT, OURS, PEERS, RANK, RATE, REAL_RATE, base_of, contend


def main() -> None:
    flags = common.parser(__doc__)
    flags.set_defaults(repeats=1)
    flags.add_argument("--data", type=Path, default=common.ROOT.parent / "shared" / "data", help="folder with base-16m and til")
    flags.add_argument("--base", type=Path, help="the base model's folder (DATA/base-16m, or SmolLM2's)")
    flags.add_argument("--notes", type=Path, help="the notes' folder (DATA/til)")
    flags.add_argument("--limit", type=int, help="use only this many of the notes, spread evenly over all")
    flags.add_argument("--batch-tokens", type=int, default=2048,
                       help="edgetune's batches, filled with whole documents (default: %(default)s, the peers')")  # fmt: skip
    flags.add_argument("--lr", type=float, help=f"peak learning rate (default: {RATE:g}; of SmolLM2, {REAL_RATE:g})")
    arguments = flags.parse_args()
    real = arguments.shape == real_model.SHAPE
    arguments.lr = arguments.lr or (REAL_RATE if real else RATE)
    if arguments.base is None:
        arguments.base = real_model.folder(arguments.model, arguments.workdir) if real else arguments.data / "base-16m"
    arguments.notes = arguments.notes or arguments.data / "til"
    if arguments.contender:
        common.serve(arguments, contend)
    else:
        compare(arguments)


# --- the parent -----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> None:
    script = Path(__file__).resolve()
    work = arguments.workdir / "-".join([arguments.notes.name, arguments.base.name, str(arguments.limit or "all")])
    passed = ["--threads", str(arguments.threads), "--workdir", str(work), "--base", str(arguments.base.resolve()),
              "--notes", str(arguments.notes.resolve()), "--lr", str(arguments.lr),
              "--batch-tokens", str(arguments.batch_tokens)]  # fmt: skip
    if arguments.limit is not None:
        passed += ["--limit", str(arguments.limit)]
    host = common.machine(arguments.threads)
    every = [Contender(key, peer.label) for key, peer in PEERS.items()] + [Contender(key, label) for key, label in OURS.items()]
    contenders = common.chosen(every, arguments.only)
    common.say("reading the notes, quantising the base")
    texts = common.run(script, Contender("prepare", "prepare"), passed)
    if "error" in texts:
        raise SystemExit(f"Preparing failed: {texts['error']}")
    results = common.run_rounds(script, contenders, passed, arguments.repeats)
    scores = {base: score(script, passed, base, None) for base in ("bf16", "nf4")}
    for contender in contenders:
        base = base_of(contender.key)
        if "error" not in results[contender.key][-1]:
            scores[contender.key] = score(script, passed, base, contender.key)
    everything = {
        "benchmark": "til_epoch",
        "machine": host,
        "versions": common.versions(),
        "lacking": [*common.lacking(), "trl, whose defaults are reproduced by hand, without its logging and saving"],
        "settings": {
            "rank": RANK,
            "alpha": ALPHA,
            "dropout": DROPOUT,
            "rate": arguments.lr,
            "rounds": arguments.repeats,
            **texts,
        },
        "results": results,
        "scores": scores,
    }
    everything["summary"] = summary = summarise(results, scores)
    common.publish(arguments.json, render(everything, contenders, summary), everything)


def score(script: Path, passed: list[str], base: str, adapter: str | None) -> Result:
    common.say(f"scoring {adapter or 'no adapter'} on the {base} base")
    key = f"score-{base}" + (f"-{adapter}" if adapter else "")
    return common.run(script, Contender(key, key), passed)


def summarise(results: dict[str, list[Result]], scores: dict[str, Result]) -> dict[str, Any]:
    nf4, bf16, time_key = results.get("ours", []), results.get("ours-bf16", []), "epoch_seconds"
    ours = nf4 or bf16

    def fastest(keys: list[str]) -> str | None:
        present = [key for key in keys if common.median(results.get(key, []), time_key)]
        return min(present, key=lambda key: common.median(results[key], time_key) or math.inf) if present else None

    best, defaults = fastest(list(PEERS)), fastest([key for key in PEERS if key.startswith("peft-defaults")])

    def faster(peer: str | None, key: str, mine: list[Result] = ours) -> float | None:
        return common.median_ratio(results.get(peer or "", []), mine, key)

    yardstick, mine = (scores.get(key, {}).get("bits_per_byte") for key in ("peft-fp32", "ours"))
    dense = fastest([key for key in PEERS if base_of(key) == "bf16" and not PEERS[key].padded])
    return {
        "peer_fastest": best,
        "times_faster_than_fastest_peer": faster(best, time_key),
        "times_faster_than_fastest_nf4_peer": faster(fastest(["peft-nf4", "peft-nf4-adapters"]), time_key),
        "times_faster_bf16_than_fastest_bf16_peer": faster(dense, time_key, bf16),
        "times_faster_than_yardstick": faster("peft-fp32", time_key),
        "times_faster_than_defaults": faster(defaults, time_key),
        "times_faster_whole_run_than_fastest_peer": faster(best, "whole_seconds"),
        "bits_per_byte_to_yardstick": mine / yardstick if mine and yardstick else None,
    }


def render(everything: Result, contenders: list[Contender], summary: dict[str, Any]) -> str:
    results, scores, settings = everything["results"], everything["scores"], everything["settings"]
    rows, ours = [], results.get("ours") or results.get("ours-bf16", [])
    for contender in contenders:
        mine, base = results[contender.key], base_of(contender.key)
        rows.append([
            contender.label,
            common.number(common.median(mine, "epoch_seconds")),
            common.number(common.median_ratio(mine, ours, "epoch_seconds"), "{:.2f}×"),
            common.number(common.median(mine, "whole_seconds")),
            common.number(common.median(mine, "tokens_per_second"), "{:,.0f}"),
            common.number(common.median(mine, "steps"), "{:.0f}"),
            common.megabytes(common.median(mine, "peak_memory_bytes")),
            common.number(scores[base].get("bits_per_byte"), "{:.4f}"),
            common.number(scores.get(contender.key, {}).get("bits_per_byte"), "{:.4f}"),
            common.number(common.median(mine, "own_bits_per_byte"), "{:.4f}"),
        ])  # fmt: skip
    heads = ["one epoch", "epoch s", "times ours", "whole run s", "text tokens/s", "steps", "peak memory MB",
             "bits/byte before", "after", "by its own count"]  # fmt: skip
    about = (
        f"{settings['documents']} notes, {settings['tokens']:,} tokens including start and end tokens; "
        f"{settings['held_out']} held out, {settings['held_out_bytes']:,} bytes; "
        f"medians of {settings['rounds']} rounds. Epoch: only the optimizer steps. "
        "Whole run: from after the imports to the saved adapter, with reading, tokenising and loading (ours also with both "
        "evaluations, the samples and the report). text tokens/s: tokens of the notes a second of epoch, padding not counted.\n"
    )
    return "\n".join([common.heading(everything), about, common.table(heads, rows), "", common.listed(summary)])


if __name__ == "__main__":
    main()
