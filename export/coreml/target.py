"""Export to Core ML: a package for iOS 18 and macOS 15 with its KV cache as state, and all that an app needs to call it.

The adapter is a set of inputs (a new night's adapter is a new small file and the package stays), a second function beside the
bare base (one file of weights for both), or merged. The saved package is proved by evaluator.py, which is our own: that proves
the graph and the weights, and nothing about Apple's kernels.

    model.mlpackage  how-to-call.json  adapter.safetensors (as inputs)  the tokenizer's files
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgetune.export.coreml.adapter_file import ADAPTER_FILE, write_adapter
from edgetune.export.coreml.contents import ADAPTER_ALONE, ADAPTER_AS, MEASURED, contents_of
from edgetune.export.coreml.evaluator import quiet_coremltools
from edgetune.export.coreml.how_to_call import PACKAGE, how_to_call, write_call
from edgetune.export.coreml.proof import AdapterFile, EvaluatedPackage, FunctionsPackage, compare_constants, compare_weights
from edgetune.export.coreml.reference import stored_model
from edgetune.export.coreml.rounding_loss import check_loss, loss_notice, measure_loss
from edgetune.export.coreml.writer import fill, lay_out
from edgetune.export.job import Job, Written
from edgetune.export.memory import LOGIT_BYTES, ExportMemory, StageMemory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError, ResourceError, UsageError
from edgetune.runtime.files import PRIVATE_FILE
from edgetune.runtime.model_folder import companions, copy_companions

COREMLTOOLS_BYTES, LAYER_BYTES = 272_000_000, 4_000_000
"""Bytes that Python holds with torch and coremltools, and that the graph of a layer takes. Measured: 328 MB after writing 22
layers."""
STORED_BYTES, DENSE_BYTES = {"nf4": 5, "int4": 18, "fp16": 4}, 22
"""Peak memory in bytes per number of a linear: while it is stored and compared, by form, and while the evaluator makes it
dense."""
SUM_BYTES, VOCABULARY_BYTES = 8, 3
"""Peak memory in bytes per number while it is stored and compared: what a merge adds for a linear, and the total for the
embedding."""
LIMIT_OF_PROOF = (
    "edgetune's own evaluator proves the graph and the weights of a Core ML package, but not Apple's kernels: try the package "
    "on a device."
)
"""A notice for whoever receives the package."""
STATE_WIDTH = 32
"""Number that a state's last dimension must be a multiple of for the Neural Engine (reported as coremltools issue 2631)."""
NEXT_NIGHT = "A new adapter needs no new package: `edgetune export coreml --weights none` writes its file alone."


def write(job: Job, folder: Path) -> Written:
    """Write the package and the files beside it, then read every weight again and compare it with the engine's.

    Raises ResourceError where coremltools is not installed, UsageError for an unknown --adapter-as.
    """
    if job.weights == ADAPTER_ALONE and job.adapter_as is not None:
        raise UsageError(
            f"--weights none writes only the adapter's file, so --adapter-as {job.adapter_as} has no effect; leave out one of "
            "the two."
        )
    if job.weights == ADAPTER_ALONE:
        write_adapter(job.needed_adapter(), job.base.config, job.base.digest, folder / ADAPTER_FILE)
        notice = (
            "This is only the adapter's file, for a package of the same base and linears. Its golden.json is for a package "
            "with nf4 weights."
        )
        return Written(ADAPTER_FILE, (notice,))
    _check_family(job.base.config)
    _check_coremltools()
    companions(job.base.folder)  # raises before any work is done
    contents = contents_of(job)
    plans = contents.plans()
    plan = next(iter(plans.values()))
    if plan.input_ranks:
        write_adapter(job.needed_adapter(), job.base.config, job.base.digest, folder / ADAPTER_FILE)
    with job.stage("laying out"):
        lay_out(plans, folder)
    fill(folder / PACKAGE, contents)
    functions = list(plans) if len(plans) > 1 else []
    write_call(how_to_call(plan, job.base.folder, job.base.digest, functions), folder)
    copy_companions(job.base.folder, folder)
    for file in folder.rglob("*"):
        file.chmod(0o700 if file.is_dir() else PRIVATE_FILE)
    compared = compare_weights(folder / PACKAGE, contents) + compare_constants(folder / PACKAGE, plans)
    notices = [LIMIT_OF_PROOF, *([NEXT_NIGHT] if plan.input_ranks else [])]
    if (width := job.base.config.head_dim) % STATE_WIDTH:
        notices.append(
            f"This model's heads have {width} numbers, and the Neural Engine may fail where that is no multiple of "
            f"{STATE_WIDTH}: set computeUnits to cpuAndGPU, as how-to-call.json says."
        )
    facts = [("stored_numbers_compared", float(compared))]
    if contents.requantizes:
        with job.stage("measuring"):
            loss = measure_loss(job, folder)
        check_loss(contents, loss)
        facts += loss.items()
        notices.append(loss_notice(contents, loss))
    return Written(PACKAGE, tuple(notices), tuple(facts))


def read(job: Job, folder: Path) -> EvaluatedPackage | AdapterFile:
    """Open the export with our evaluator."""
    if job.weights == ADAPTER_ALONE:
        return AdapterFile(job, folder)
    if job.adapter_as == "functions":
        return FunctionsPackage(job, folder)
    return EvaluatedPackage(folder, job.layer_memory)


def _check_family(config: LlamaConfig) -> None:
    """Raise ModelError for a model whose layers are not Llama's or Qwen's, the only ones that the program has."""
    scaled = config.attention_scale is not None or config.embedding_scale != 1 or config.rope.attention_factor != 1
    if scaled or not config.has_llama_layers:
        raise ModelError(f"export coreml has no layers of {config.model_type} models; type `edgetune export hf`.")


def _check_coremltools() -> None:
    """Raise ResourceError if coremltools is not installed."""
    if importlib.util.find_spec("coremltools") is None:
        raise ResourceError(
            "Writing a Core ML package needs coremltools, which is not installed; type pip install coremltools on macOS or "
            "Linux x86-64, the only systems that it supports."
        )
    quiet_coremltools()


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the memory of writing (coremltools with its graph and the weight that is stored and compared, then the models
    that are measured) and of the proof (the evaluator with a dense weight, then the base where it is proved too)."""
    contents, config = contents_of(job), job.base.config
    if job.weights == ADAPTER_ALONE:
        return ExportMemory([reference_memory(job)], [reference_memory(job)])
    process = COREMLTOOLS_BYTES + LAYER_BYTES * config.num_layers
    vocabulary, number = config.vocab_size * config.hidden_size, STORED_BYTES[job.weights] + SUM_BYTES * contents.merges
    stored = StageMemory(process + 2 * job.adapter_bytes + max(VOCABULARY_BYTES * vocabulary, number * job.largest_linear))
    model = reference_memory(job, process)
    if contents.requantizes:
        model = StageMemory(model.fixed + job.head_bytes + job.embedding_bytes, models=2)
    evaluator = StageMemory(
        process + job.adapter_bytes + DENSE_BYTES * job.largest_linear + LOGIT_BYTES * config.vocab_size, models=1
    )
    return ExportMemory([stored, model], [evaluator, *([model] if contents.adapter_as == "functions" else [])])


SPEC = TargetSpec(
    name="coreml",
    weights=("nf4", "int4", "fp16", ADAPTER_ALONE),
    proved_by="edgetune's own evaluator",
    also_proved_by={ADAPTER_ALONE: "edgetune on the CPU"},
    packages=("coremltools",),
    extra="coreml",
    adapter_as=ADAPTER_AS,
    measured=MEASURED,
    peak_memory=peak_memory,
    write=write,
    read=read,
    reference=stored_model,
)
