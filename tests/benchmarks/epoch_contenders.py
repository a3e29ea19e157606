"""The contenders of til_epoch.py: edgetune and peft over one epoch of the same documents, and the scorer of their adapters."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import Result

RANK, ALPHA, DROPOUT = 16, 16, 0.05
WARMUP, FINAL, CLIP = 10, 0.1, 1.0
RATE, REAL_RATE = 1e-3, 2e-4  # of the 16M base; of SmolLM2, as `edgetune train` has it
ROW, ROWS = 512, 4  # the yardstick's batches
CUT, DOCUMENTS = 1024, 4  # trl's max_length; documents a padded batch
SCORED = 1024  # the base's context
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Peer(NamedTuple):
    """The way a peer trains. `base` ("bf16" or "nf4") selects the model folder; the weights are loaded in `dtype`."""

    label: str
    base: str = "bf16"
    dtype: str = "bfloat16"
    autocast: bool = True
    bf16_adapters: bool = False
    padded: bool = False
    recompute: bool = False


PEERS = {
    "peft-fp32": Peer("peft, fp32 base, bf16 autocast, packed 4×512 (the yardstick)", dtype="float32"),
    "peft-bf16": Peer("peft, bf16 base, bf16 autocast, packed 4×512"),
    "peft-bf16-adapters": Peer("peft, bf16 base and adapters, packed 4×512", autocast=False, bf16_adapters=True),
    "peft-nf4": Peer("peft+bitsandbytes NF4, bf16 autocast, packed 4×512", "nf4"),
    "peft-nf4-adapters": Peer("peft+bitsandbytes NF4, bf16 adapters, packed 4×512", "nf4", autocast=False, bf16_adapters=True),
    "peft-defaults": Peer("peft as trl's defaults: 4 padded notes, cut at 1,024, recompute", padded=True, recompute=True),
    "peft-defaults-nf4": Peer(
        "peft+bitsandbytes NF4 as trl's defaults: 4 padded notes, cut at 1,024, recompute", "nf4", padded=True, recompute=True
    ),
}
OURS = {
    "ours": "edgetune NF4, packed, documents isolated",
    "ours-bf16": "edgetune bf16, packed, documents isolated",
}


def base_of(key: str) -> str:
    """Return the form of the base that a contender trains on: "bf16" or "nf4"."""
    return PEERS[key].base if key in PEERS else "bf16" if key == "ours-bf16" else "nf4"


def contend(arguments: argparse.Namespace) -> Result:
    key = arguments.contender
    if key == "prepare":
        return prepare(arguments)
    if key.startswith("score-"):
        _, base, *adapter = key.split("-", 2)
        common.bare_torch(arguments.threads)
        return scored(arguments, base, adapter[0] if adapter else None)
    bare = common.bare_torch(arguments.threads)
    return ours(arguments, key, bare) if key in OURS else peer(arguments, key, bare)


def notes_folder(arguments: argparse.Namespace) -> Path:
    return arguments.notes if arguments.limit is None else arguments.workdir / "notes"


def prepare(arguments: argparse.Namespace) -> Result:
    """Write the training and held-out texts as texts.json, and the base in NF4 and dequantised from NF4."""
    from edgetune.config import DataConfig, TrainConfig
    from edgetune.runtime.quantize import quantize_folder
    from edgetune.runtime.tokenizer import Tokenizer
    from edgetune.training.run_notes import read_and_split

    arguments.workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if arguments.limit is not None and not notes_folder(arguments).exists():
        every = sorted(arguments.notes.rglob("*.md"))
        for path in every[:: max(1, len(every) // arguments.limit)][: arguments.limit]:
            copied = notes_folder(arguments) / path.relative_to(arguments.notes)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
    _, parted = read_and_split(TrainConfig(data=DataConfig(notes=(str(notes_folder(arguments)),))))
    if not any(document.text for document in parted.held_out):
        raise SystemExit(
            f"None of the {len(parted.train)} notes is held out; a score needs one: name more notes or a larger --limit."
        )
    tokenizer = Tokenizer.load(arguments.base)
    sides = {"train": [document.text for document in parted.train], "held_out": [document.text for document in parted.held_out]}
    ends = {"start": list(tokenizer.start_ids), "end": list(tokenizer.eos_ids[:1])}
    (arguments.workdir / "texts.json").write_text(json.dumps({**sides, **ends}))
    nf4, dense = arguments.workdir / "base-nf4", arguments.workdir / "base-nf4-dense"
    if not nf4.exists():
        quantize_folder(arguments.base, nf4)
    if not (dense / "config.json").exists():
        dense.mkdir(exist_ok=True)
        common.write_dense(nf4, dense / "model.safetensors")
        shutil.copyfile(arguments.base / "config.json", dense / "config.json")
    return {
        "documents": len(parted.train),
        "held_out": len(parted.held_out),
        "tokens": sum(len(tokenizer.encode(text)) + len(ends["start"]) + 1 for text in sides["train"]),
        "held_out_bytes": sum(len(text.encode()) for text in sides["held_out"]),
    }


def texts(arguments: argparse.Namespace, side: str) -> list[Any]:
    """Return the texts of one side ("train", "held_out"), or the ids with which every text begins and ends ("start", "end")."""
    return json.loads((arguments.workdir / "texts.json").read_text())[side]


def learning_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up, then linear decay to a tenth, as `edgetune train` and the yardstick have it."""
    warmup = min(WARMUP, steps // 4)
    if step < warmup:
        return rate * (step + 1) / warmup
    return rate * (1 - (1 - FINAL) * (step - warmup) / max(steps - warmup, 1))


def packed(documents: list[list[int]]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (ids, labels, attention mask) of 4 rows of 512 from all documents end to end, not isolated; pad the last batch."""
    import torch

    stream = [token for document in documents for token in document]
    for start in range(0, len(stream), ROW * ROWS):
        piece = stream[start : start + ROW * ROWS]
        rows = -(-len(piece) // ROW)
        ids = torch.tensor(piece + [0] * (rows * ROW - len(piece))).view(rows, ROW)
        labels = torch.tensor(piece + [-100] * (rows * ROW - len(piece))).view(rows, ROW)
        yield ids, labels, None


def padded(documents: list[list[int]]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield batches of 4 documents, each cut at 1,024 tokens and padded to the longest; nobody trains on what is cut off."""
    import torch

    for start in range(0, len(documents), DOCUMENTS):
        cut = [document[:CUT] for document in documents[start : start + DOCUMENTS]]
        longest = max(map(len, cut))
        ids = torch.tensor([document + [0] * (longest - len(document)) for document in cut])
        labels = torch.tensor([document + [-100] * (longest - len(document)) for document in cut])
        mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in cut])
        yield ids, labels, mask


def peer(arguments: argparse.Namespace, key: str, bare: int) -> Result:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = PEERS[key]
    torch.manual_seed(0)
    beginning = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    start, end = texts(arguments, "start"), texts(arguments, "end")
    documents = [start + tokenizer.encode(text, add_special_tokens=False) + end for text in texts(arguments, "train")]
    random.Random(0).shuffle(documents)
    folder = arguments.base if how.base == "bf16" else arguments.workdir / "base-nf4"
    options: dict[str, Any] = {"dtype": getattr(torch, how.dtype), "attn_implementation": "sdpa", "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    if how.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=not how.bf16_adapters)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=0.0, fused=True)
    batches = list((padded if how.padded else packed)(documents))
    losses = []
    with common.measured(common.weight_files(folder), bare) as peaks:
        began = time.perf_counter()
        for step, (ids, labels, mask) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(arguments.lr, step, len(batches))
            with torch.autocast("cpu", torch.bfloat16, enabled=how.autocast):
                loss = model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        epoch = time.perf_counter() - began
    model.save_pretrained(arguments.workdir / "adapters" / key)
    tokens = sum(int((labels != -100).sum()) for _, labels, _ in batches)
    return {
        "epoch_seconds": epoch,
        "whole_seconds": time.perf_counter() - beginning,
        "tokens_per_second": tokens / epoch,
        "tokens": tokens,
        "steps": len(batches),
        "last_loss": statistics.mean(losses[-20:]),
        **peaks,
    }


def ours(arguments: argparse.Namespace, key: str, bare: int) -> Result:
    """Train as `edgetune train` does, but for one epoch, at the peers' rate, with one evaluation at the end."""
    os.environ["EDGETUNE_HOME"] = str(arguments.workdir / "home")
    from edgetune.config import DataConfig, TrainConfig
    from edgetune.events import Evaluated, Finished, Started
    from edgetune.runtime.memory_meter import MemoryMeter
    from edgetune.training.train import train

    adapter, form = arguments.workdir / "adapters" / key, base_of(key)
    base = arguments.base if form == "bf16" else arguments.workdir / "base-nf4"
    config = TrainConfig(
        data=DataConfig(notes=(str(notes_folder(arguments)),), batch_tokens=arguments.batch_tokens), model=str(base),
        out=str(adapter), weights=form,
        epochs=1, rank=RANK, alpha=ALPHA, dropout=DROPOUT, lr=arguments.lr, warmup_steps=WARMUP, final_lr=FINAL, clip=CLIP,
        evaluations=1, anchor=0,  # the peers have none
    )  # fmt: skip
    beginning, plan, evaluated = time.perf_counter(), {}, 0.0
    with MemoryMeter() as anonymous:
        for event in train(config):
            if isinstance(event, Started):
                plan = event.plan
            if isinstance(event, Evaluated):
                evaluated += event.seconds
            if isinstance(event, Finished):
                last = event
        peak = anonymous.peak()
    return {
        "epoch_seconds": last.tokens / last.tokens_per_second,
        "whole_seconds": time.perf_counter() - beginning,
        "evaluation_seconds": evaluated,
        "tokens_per_second": last.tokens_per_second,
        "tokens": last.tokens,
        "steps": last.steps,
        "own_bits_per_byte": last.heldout_bits_per_byte_after,
        "own_bits_per_byte_before": last.heldout_bits_per_byte_before,
        "peak_memory_bytes": last.peak_memory_bytes,
        "anonymous_bytes": peak,
        "anonymous_beyond_torch": peak - bare,
        "backend": plan.get("backend"),
        "recompute": plan.get("setting", {}).get("recompute"),
    }


def scored(arguments: argparse.Namespace, base: str, adapter: str | None) -> Result:
    """Return the bits per byte of the held-out notes: every token counts once, after the start ids, without the end.

    A note longer than the context is read in windows; each but the first begins with half a window of context.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = arguments.base if base == "bf16" else arguments.workdir / "base-nf4-dense"
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.workdir / "adapters" / adapter)
    model.eval()
    nats, size, tokens = 0.0, 0, 0
    for text in texts(arguments, "held_out"):
        ids = torch.tensor([*texts(arguments, "start"), *tokenizer.encode(text, add_special_tokens=False)])
        size += len(text.encode())
        done = 0  # targets ids[1 : done + 1] have been scored
        while done < len(ids) - 1:
            start = max(0, done - SCORED // 2) if done else 0
            window = ids[start : start + SCORED + 1]
            with torch.no_grad():
                logits = model(input_ids=window[:-1].unsqueeze(0), use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none")
            nats += float(losses[done - start :].double().sum())
            tokens += len(losses) - (done - start)
            done = start + len(losses)
    return {"bits_per_byte": nats / math.log(2) / size, "tokens": tokens, "bytes": size}
