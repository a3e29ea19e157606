"""Measure edgetune on SmolLM2-135M-Instruct, a real model: what it learns, what it forgets, what each approximation costs.

    python tests/benchmarks/smollm2.py [--only learn,forget,chat,int8,merge,resume,memory] [--json FILE]
    python tests/benchmarks/smollm2.py --only forget,chat --adapter DIR              with an adapter that is there already

Each piece prints a table. The model is --model, or the file that EDGETUNE_TEST_SMOLLM2 names. Without --adapter, one is trained
on --notes with edgetune's defaults first, for --steps steps where that is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import real_model
from common import Result

QUESTIONS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Write one sentence about the sea.",
    "What is the opposite of hot?",
)
"""Questions that the chat must still answer after training."""
FACTS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "How many days are there in a week?": "7|seven",
    "What is the opposite of hot?": "cold",
    "What is 2 plus 2?": "4|four",
    "Which planet is the largest in the solar system?": "Jupiter",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "What is the chemical formula of water?": "H2O",
    "At how many degrees Celsius does water boil?": "100",
    "What colour is the sky on a clear day?": "blue",
    "What animal says meow?": "cat",
}
"""Questions that have one right answer, and the words of which it holds one."""
FACT_TOKENS = 14
"""Tokens of an answer to one of FACTS."""
FORMS = ("published", "nf4")
"""Forms of the base: bf16 as published, which training takes by default, and NF4."""
EPOCH_BATCH = 2112
"""Tokens of edgetune's batches in `learn`: packed without cutting into notes, they make as many steps as the peers' 2,048."""
RESUME_STEPS, STOP_AFTER = 10, 3
"""Steps of the run that is broken off twice, and the steps that it takes each time before that."""
OUTLIER_LIMIT = 0.03
"""Largest relative error of rounding x to 8 bits for which the kernels use them (INT8_ERROR_LIMIT in constants.h)."""
LOSS_LIMIT = 0.002
"""Largest relative change of the loss that 8-bit products may cause: the 0.2% that is promised."""


def main() -> None:
    flags = common.parser(__doc__, contenders=False)
    flags.add_argument("--only", help=f"run only these pieces, separated by commas: {', '.join(PIECES)}")
    flags.add_argument("--notes", type=Path, default=common.ROOT / "examples" / "notes", help="notes to train on")
    flags.add_argument("--texts", type=Path, nargs="+", default=[], help="more texts for int8 to score")
    flags.add_argument("--limit", type=int, help="notes of --notes that `learn` uses (default: all)")
    flags.add_argument("--steps", type=int, help="steps of training (default: edgetune's own)")
    flags.add_argument("--lr", type=float, help="peak learning rate (default: edgetune's own)")
    flags.add_argument("--adapter", type=Path, help="a trained adapter, instead of training one")
    flags.add_argument("--forms", default=",".join(FORMS), help="forms of the base that are read (default: %(default)s)")
    flags.add_argument("--general", type=Path, nargs="+", default=[common.ROOT / "docs", common.ROOT / "README.md"],
                       help="texts that have nothing to do with the notes (default: edgetune's own documentation)")  # fmt: skip
    flags.add_argument("--prompts", type=Path, help="a .jsonl of questions, each under `text` or `prompt`")
    flags.add_argument("--questions", type=int, default=8, help="questions of --prompts that are asked (default: %(default)s)")
    flags.add_argument("--tokens", type=int, default=8000, help="tokens of --general that are scored (default: %(default)s)")
    arguments = flags.parse_args()
    os.environ.update(common.OFFLINE)
    os.environ["EDGETUNE_HOME"] = str(arguments.workdir / "home")
    wanted = list(PIECES) if arguments.only is None else arguments.only.split(",")
    if unknown := sorted(set(wanted) - set(PIECES)):
        sys.exit(f"--only has unknown pieces: {', '.join(unknown)}. The pieces are {', '.join(PIECES)}.")
    if unknown := sorted(set(arguments.forms.split(",")) - set(FORMS)):
        sys.exit(f"--forms has unknown forms: {', '.join(unknown)}. The forms are {', '.join(FORMS)}.")
    arguments.base = real_model.folder(arguments.model, arguments.workdir).resolve()
    about = {"machine": common.machine(arguments.threads), "versions": common.versions(), "lacking": common.lacking()}
    everything: Result = {"benchmark": "smollm2", **about}
    print(common.heading(everything))
    for name in wanted:
        common.say(f"measuring: {name}")
        everything[name], text = PIECES[name](arguments)
        print(f"\n## {name}\n\n{text}", flush=True)
        common.write_json(arguments.json, everything)


Piece = Callable[[argparse.Namespace], tuple[Result, str]]
"""Measures one thing; returns its figures and a table of them."""


# --- models and texts -------------------------------------------------------------------------------------------------


def opened(arguments: argparse.Namespace, form: str) -> Any:
    """Return the base in one of FORMS, as library.loading.Loaded."""
    from edgetune.library.loading import load_base, open_base
    from edgetune.runtime.budget import WeightForm

    weights = WeightForm.NF4 if form == "nf4" else WeightForm.BF16
    return load_base(open_base(str(arguments.base)), "cpu", form=weights)


def trained(arguments: argparse.Namespace) -> Path:
    """Return the folder of the adapter that --adapter names, or of one that is trained now."""
    if arguments.adapter is None:
        arguments.adapter = arguments.workdir / "smollm2-adapter"
        shutil.rmtree(arguments.adapter, ignore_errors=True)
        command = train_command(arguments, arguments.adapter, arguments.steps)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return arguments.adapter


def train_command(arguments: argparse.Namespace, out: Path, steps: int | None, *more: str) -> list[str]:
    """Return a command that trains on --notes and prints JSON lines."""
    limit = [] if steps is None else ["--steps", str(steps)]
    limit += [] if arguments.lr is None else ["--lr", str(arguments.lr)]
    command = [sys.executable, "-m", "edgetune", "train", str(arguments.notes.resolve()), "--model", str(arguments.base)]
    return [*command, "--out", str(out), "--fresh", "--json", *limit, *more]


def events_of(command: Sequence[str]) -> list[Result]:
    """Run a training command and return its events."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def bits_per_byte(loaded: Any, paths: Sequence[Path], tokens: int) -> float:
    """Score texts and chats with the adapter that is on the model now: the same `tokens` tokens for every model."""
    from edgetune.dataset.evaluation_set import EvaluationSet
    from edgetune.dataset.token_store import tokenize
    from edgetune.documents.reading import read_notes
    from edgetune.runtime.runner import Runner
    from edgetune.training.evaluation import score

    documents = read_notes([str(path) for path in paths]).documents
    with tempfile.TemporaryDirectory() as folder:
        store = tokenize(documents, loaded.tokenizer, Path(folder) / "tokens")
        return score(Runner(loaded.model), EvaluationSet.of(store, 512).limited(tokens), 2048).bits_per_byte


def answers(loaded: Any, questions: Sequence[str], tokens: int) -> list[str]:
    """Return the greedy answers of the model with the adapter that is on it now."""
    from edgetune.runtime.generate import Generator, Sampling
    from edgetune.runtime.runner import Runner

    found, tokenizer = [], loaded.tokenizer
    for question in questions:
        ids = tokenizer.chat_ids([{"role": "user", "content": question}])
        generator = Generator(Runner(loaded.model), len(ids) + tokens)
        written = list(generator.generate(ids, tokens, Sampling(temperature=0.0), tokenizer.eos_ids))
        found.append(tokenizer.decode(written, continuing=True).strip())
    return found


def prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the questions that are asked: QUESTIONS, or the first of --prompts."""
    if arguments.prompts is None:
        return list(QUESTIONS)
    records = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [record.get("text") or record["prompt"] for record in records[: arguments.questions]]


def versions(arguments: argparse.Namespace) -> Any:
    """Yield (label, Loaded) of each form of the base, without and then with the adapter."""
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime import peft_folder

    adapter = peft_folder.load(trained(arguments))
    for form in arguments.forms.split(","):
        loaded = opened(arguments, form)
        yield f"{form}, base", loaded
        adapters.attach(loaded.model, adapter)
        yield f"{form}, adapter", loaded


# --- the pieces -------------------------------------------------------------------------------------------------------


def learn(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Train one epoch beside peft on the same split of the notes, and let one scorer judge all."""
    script, result = Path(__file__).with_name("til_epoch.py"), arguments.workdir / "learn.json"
    command = [sys.executable, str(script), "--shape", real_model.SHAPE, "--base", str(arguments.base)]
    command += ["--notes", str(arguments.notes), "--workdir", str(arguments.workdir), "--threads", str(arguments.threads)]
    command += ["--only", "ours-bf16,peft-bf16,ours,peft-nf4", "--json", str(result)]
    command += ["--batch-tokens", str(EPOCH_BATCH)]
    command += [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    command += [] if arguments.lr is None else ["--lr", str(arguments.lr)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.read_text()), done.stdout


def forget(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Score texts that the notes have nothing to do with, and the answers that the published base gives itself."""
    from edgetune.runtime.files import atomic_write

    figures: Result = {}
    chats = arguments.workdir / "answers.jsonl"
    for label, loaded in versions(arguments):
        if label == "published, base":
            asked = prompts(arguments)
            said = zip(asked, answers(loaded, asked, 60), strict=True)
            turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
            atomic_write(chats, "".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
        figures[label] = {
            "general": bits_per_byte(loaded, arguments.general, arguments.tokens),
            "answers": bits_per_byte(loaded, [chats], arguments.tokens),
        }
        common.say(f"    {label}: {figures[label]}")
    rows = [[label, f"{row['general']:.4f}", f"{row['answers']:.4f}"] for label, row in figures.items()]
    return figures, common.table(["bits per byte", "general text", "the published base's own answers"], rows)


def chat(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Ask the same questions before and after training, greedily, and count the right answers to FACTS."""
    figures: Result = {}
    for label, loaded in versions(arguments):
        short = answers(loaded, list(FACTS), FACT_TOKENS)
        right = sum(is_right(said, words) for said, words in zip(short, FACTS.values(), strict=True))
        figures[label] = {"right": right, "facts": short, "answers": answers(loaded, QUESTIONS, 40)}
        common.say(f"    {label}: {right} of {len(FACTS)} right")
    rows = [
        [label, f"{row['right']} of {len(FACTS)}", *(answer.replace("\n", " ") for answer in row["answers"])]
        for label, row in figures.items()
    ]
    return figures, common.table(["", "right", *QUESTIONS], rows)


def is_right(answer: str, words: str) -> bool:
    """Return True if the answer holds one of the `words`, which | separates."""
    return any(word.lower() in answer.lower() for word in words.split("|"))


def int8(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Round both factors of every product to 8 bits, as the kernels do on a CPU with AMX, on real activations.

    The rounding is done here in plain torch, so that the figure does not depend on the machine. The kernels take 8 bits only in
    training, whose loss this is the change of, and only over a base in NF4.
    """
    from edgetune.runtime import ops

    loaded = opened(arguments, "nf4")
    products: dict[str, list[float]] = {}
    texts = [arguments.notes, *arguments.texts]
    plain = bits_per_byte(loaded, texts, arguments.tokens)
    original = ops.project
    ops.project = lambda x, linears, y, int8=False: rounded_product(x, linears, y, products)  # type: ignore[assignment]
    try:
        rounded = bits_per_byte(loaded, texts, arguments.tokens)
    finally:
        ops.project = original  # type: ignore[assignment]
    change = abs(rounded / plain - 1)
    figures = {
        "bits_per_byte_bf16": plain,
        "bits_per_byte_int8": rounded,
        "relative_change": change,
        "products": {kind: len(errors) for kind, errors in products.items()},
        "left_to_bf16": {kind: sum(error > OUTLIER_LIMIT for error in errors) for kind, errors in products.items()},
        "largest_error_of_x": {kind: max(errors) for kind, errors in products.items()},
        "within_limit": change <= LOSS_LIMIT,
    }
    kinds = [
        [kind, f"{figures['left_to_bf16'][kind]} of {len(errors)}", f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"]
        for kind, errors in products.items()
    ]
    heads = ["products", "left to bf16", "error of x, median", "largest"]
    table = common.table(heads, kinds)
    return figures, f"{plain:.5f} bits per byte with products in bf16, {rounded:.5f} in 8 bits: {change:.3%}.\n\n{table}"


def rounded_product(x: Any, linears: Sequence[Any], y: Any, products: dict[str, list[float]]) -> Any:
    """Write the products y (N, sum of O) of x (N, I) in 8-bit steps, or in bf16 where gemm_int8.inl finds outliers in x."""
    from edgetune.runtime import nf4

    kind = " ".join(str(tuple(linear.weight.shape)) for linear in linears)
    exact = x.float()
    squares = exact.square().mean(1)
    errors = ((exact.abs().amax(1) / 127).square() / 12 / squares)[squares > 0]
    error = float(errors.mean().sqrt())
    products.setdefault(kind, []).append(error)
    column = 0
    for linear in linears:
        weight = nf4.dequantize(linear.weight).float()
        part = y[:, column : column + len(weight)]
        part.copy_(exact @ weight.T if error > OUTLIER_LIMIT else row_steps(exact) @ row_steps(weight).T)
        column += len(weight)
    return x.new_empty(len(x), 0)


def row_steps(rows: Any) -> Any:
    """Round each row to 255 steps of its largest magnitude / 127."""
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (rows / scale).round() * scale


def merge(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Merge the adapter into 4-bit targets and report how much of its effect on text is left after rounding."""
    from edgetune.export.targets import load_target
    from edgetune.exporting import export_adapter

    figures: Result = {}
    for target, weights in (("hf", "nf4"), ("gguf", "q8_0"), ("mlx", "int4")):
        out = arguments.workdir / f"merged-{target}-{weights}"
        shutil.rmtree(out, ignore_errors=True)
        measured = any(form.covers(weights, None) for form in load_target(target).measured)
        texts = (str(arguments.notes),) if measured else ()
        try:
            exported = export_adapter(target, str(arguments.base), str(trained(arguments)), out, weights, texts=texts)
            figures[f"{target} {weights}"] = {**exported.facts, "proved_by": exported.proved_by, "kl": exported.kl}
        except Exception as error:  # an extra that is not installed; the sentence says which
            figures[f"{target} {weights}"] = {"error": str(error)}
    rows = [[name, "; ".join(f"{key} {value}" for key, value in row.items())] for name, row in figures.items()]
    return figures, common.table(["export", "facts"], rows)


def resume(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Stop a run, resume it and kill it, resume it again, and compare the adapter with an uninterrupted run's."""
    whole, broken = arguments.workdir / "resume-whole", arguments.workdir / "resume-broken"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    short = ("--batch-tokens", "512")
    events_of(train_command(arguments, whole, RESUME_STEPS, *short))
    first = train_command(arguments, broken, RESUME_STEPS, *short)
    again = [word for word in first if word != "--fresh"]
    ended(first, STOP_AFTER, signal.SIGTERM)  # which leaves a checkpoint of the last whole step
    ended(again, STOP_AFTER, signal.SIGKILL)  # which loses every step since
    resumed = next(event["step"] for event in events_of(again) if event["event"] == "resumed")
    same = (whole / "adapter_model.safetensors").read_bytes() == (broken / "adapter_model.safetensors").read_bytes()
    figures = {"steps": RESUME_STEPS, "resumed_at": resumed, "same_bytes": same}
    if not 0 < resumed < 2 * STOP_AFTER:
        raise SystemExit(
            f"The killed run went on at step {resumed}; its checkpoint was written at step {STOP_AFTER} or soon after."
        )
    return figures, common.table(list(figures), [[str(value) for value in figures.values()]])


def ended(command: Sequence[str], steps: int, by: signal.Signals) -> None:
    """Run a training command, and send it a signal after so many steps."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "stepped":
                steps -= 1
                if steps == 0:
                    process.send_signal(by)


def memory(arguments: argparse.Namespace) -> tuple[Result, str]:
    """Compare the planner's peak with the measured one, with all the memory there is and with little."""
    figures: Result = {}
    for limit in (None, "900MB", "600MB"):
        out = arguments.workdir / "memory-adapter"
        shutil.rmtree(out, ignore_errors=True)
        events = events_of(train_command(arguments, out, 2, *([] if limit is None else ["--memory", limit])))
        plan, end = next(event for event in events if event["event"] == "started")["plan"], events[-1]
        figures[limit or "no limit"] = {
            "predicted": plan["predicted_peak_bytes"], "measured": end["peak_memory_bytes"], "setting": plan["setting"],
            "published": end["published"],
        }  # fmt: skip
    rows = [
        [name, common.megabytes(row["predicted"]), common.megabytes(row["measured"]),
         f"{row['predicted'] / row['measured']:.2f}", row["setting"]["recompute"], row["published"]]
        for name, row in figures.items()
    ]  # fmt: skip
    return figures, common.table(["--memory", "planned MB", "measured MB", "ratio", "recompute", "published base"], rows)


PIECES: dict[str, Piece] = {
    "learn": learn,
    "forget": forget,
    "chat": chat,
    "int8": int8,
    "merge": merge,
    "resume": resume,
    "memory": memory,
}


if __name__ == "__main__":
    main()
