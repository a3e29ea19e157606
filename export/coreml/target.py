"""Export to Core ML: a package for iOS 18 and macOS 15 with its KV cache as state, and all that an app needs to call it.

The adapter is a set of inputs (a new night's adapter is a new small file and the package stays), a second function beside the
bare base (one file of weights for both), or merged. The saved package is proved by evaluator.py, which is our own: that proves
the graph and the weights, and nothing about Apple's kernels.

    model.mlpackage  how-to-call.json  adapter.safetensors (as inputs)  the tokenizer's files
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgetune.export import effect, verify
from edgetune.export.coreml.adapter_file import ADAPTER_FILE, write_adapter
from edgetune.export.coreml.contents import ADAPTER_ALONE, ADAPTER_AS, MEASURED, Contents, contents_of
from edgetune.export.coreml.evaluator import quiet_coremltools
from edgetune.export.coreml.graph import build
from edgetune.export.coreml.how_to_call import PACKAGE, how_to_call, write_call
from edgetune.export.coreml.package import Package
from edgetune.export.coreml.plan import Plan
from edgetune.export.coreml.proof import AdapterFile, EvaluatedPackage, FunctionsPackage, compare_constants, compare_weights
from edgetune.export.coreml.reference import bare_model, stored_model
from edgetune.export.coreml.weight_locations import weight_locations
from edgetune.export.job import Job, Written, work_folder
from edgetune.export.memory import LOGIT_BYTES, ExportMemory, StageMemory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.runtime import adapter as adapters
from edgetune.runtime.errors import ResourceError, UsageError
from edgetune.runtime.files import PRIVATE_FILE, atomic_write
from edgetune.runtime.model_folder import companions
from edgetune.runtime.tokenizer import Tokenizer

COREMLTOOLS_BYTES, LAYER_BYTES = 272_000_000, 4_000_000
"""Bytes that Python holds with torch and coremltools, and that the graph of a layer takes. Measured: 328 MB after writing 22
layers."""
STORED_BYTES, DENSE_BYTES = {"nf4": 5, "int4": 18, "fp16": 4}, 22
"""Peak memory in bytes per number of a linear: while it is stored and compared, by form, and while the evaluator makes it
dense."""
SUM_BYTES, VOCABULARY_BYTES = 8, 3
"""Peak memory in bytes per number while it is stored and compared: what a merge adds for a linear, and the total for the
embedding."""
TEXTS, TEXT_TOKENS = 16, 256
"""Number of texts, and tokens of each, on which the effect of rounding is measured. Chosen by hand."""
LEAST_KL = 1e-12
"""Stands in for an adapter's effect of zero nats in a division. Chosen by hand, far below any effect."""
LIMIT_OF_PROOF = (
    "edgetune's own evaluator proves the graph and the weights of a Core ML package, but not Apple's kernels: try the package "
    "on a device."
)
"""A notice for whoever receives the package."""
NEXT_NIGHT = "A new night's adapter needs no new package: `edgetune export coreml --weights none` writes only its file."


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
    _check_coremltools()
    contents = contents_of(job)
    plans = contents.plans()
    plan = next(iter(plans.values()))
    if plan.input_ranks:
        write_adapter(job.needed_adapter(), job.base.config, job.base.digest, folder / ADAPTER_FILE)
    with job.stage("laying out"):
        _lay_out(plans, folder)
    _fill(folder / PACKAGE, contents)
    functions = list(plans) if len(plans) > 1 else []
    write_call(how_to_call(plan, job.base.folder, job.base.digest, functions), folder)
    for file in companions(job.base.folder):
        atomic_write(folder / file.name, file.read_bytes())
    for file in folder.rglob("*"):
        file.chmod(0o700 if file.is_dir() else PRIVATE_FILE)
    compared = compare_weights(folder / PACKAGE, contents) + compare_constants(folder / PACKAGE, plans)
    notices = [LIMIT_OF_PROOF, *([NEXT_NIGHT] if plan.input_ranks else [])]
    facts = [("stored_numbers_compared", float(compared))]
    if contents.requantises:
        with job.stage("measuring"):
            loss = _loss(job, folder)
        _hold(contents, loss)
        facts += loss.items()
        notices.append(_loss_notice(contents, loss))
    return Written(PACKAGE, tuple(notices), tuple(facts))


def read(job: Job, folder: Path) -> EvaluatedPackage | AdapterFile:
    """Open the export with our evaluator."""
    if job.weights == ADAPTER_ALONE:
        return AdapterFile(job, folder)
    if job.adapter_as == "functions":
        return FunctionsPackage(job, folder)
    return EvaluatedPackage(folder, job.layer_memory)


def _check_coremltools() -> None:
    if importlib.util.find_spec("coremltools") is None:
        raise ResourceError(
            "Writing a Core ML package needs coremltools, which is not installed; type pip install coremltools on macOS or "
            "Linux x86-64, the systems that it is made for."
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
    if contents.requantises:
        model = StageMemory(model.fixed + job.head_bytes + job.embedding_bytes, models=2)
    evaluator = StageMemory(
        process + job.adapter_bytes + DENSE_BYTES * job.largest_linear + LOGIT_BYTES * config.vocab_size, models=1
    )
    return ExportMemory([stored, model], [evaluator, *([model] if contents.adapter_as == "functions" else [])])


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[None]:
    """Silence coremltools' progress bars and keep its temporary copies of the weights inside `folder`, where they are private
    and on the disk of the export."""
    before = tempfile.tempdir
    with work_folder(folder) as work:
        tempfile.tempdir = str(work)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # nothing is lost: failures raise
                yield
        finally:
            tempfile.tempdir = before
            # A program is full of reference cycles and holds every weight; collecting it also removes its files.
            gc.collect()


def _lay_out(plans: Mapping[str, Plan], folder: Path) -> None:
    """Write the package with coremltools, with zeros in place of the model's weights.

    Raises ResourceError where coremltools cannot write.
    """
    import coremltools as ct

    # The first two passes would combine a table and the scales after it into a table for each block: 8 bits instead of 4.
    # The third would store all the zeros once, since they are equal.
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(
        {"common::canonicalize_quantized_lut_pattern", "common::reorder_lut_per_channel_scale", "common::const_deduplication"}
    )
    with _workplace(folder):
        try:
            ct.convert(
                build(plans),
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,  # so that no pass casts: the program itself says what is fp16
                compute_units=ct.ComputeUnit.CPU_AND_GPU,
                pass_pipeline=pipeline,
                skip_model_load=True,
                package_dir=str(folder / PACKAGE),
            )
        except RuntimeError as error:
            if "FileWriter" not in str(error):
                raise
            raise ResourceError(
                f"coremltools could not write the package to {folder.parent}; make sure that the disk has room for it, then "
                "run the same command again."
            ) from error


def _fill(path: Path, contents: Contents) -> None:
    """Write the weights over the zeros, one by one. All functions of a package share them."""
    package = Package(path)
    locations, names = weight_locations(package, package.default), contents.weight_names()
    done = contents.job.counter("writing", len(names))
    for called, name in names.items():
        locations[called].write(package, contents.weight(name))
        contents.job.base.release(name)
        done(name)


def _loss(job: Job, folder: Path) -> dict[str, float]:
    """Measure KL in nats of the engine's model to the stored one and to the bare base, on job.texts or the golden prompt."""
    texts = [list(text[:TEXT_TOKENS]) for text in job.texts if len(text) > 1][:TEXTS]
    trained = bare_model(job, folder)
    if job.adapter is not None:
        adapters.attach(trained, job.adapter)
    found = effect.measure(trained, stored_model(job, folder), texts or [_prompt(job)])
    return {"kl_of_rounding": found.kl_merged, **({} if job.adapter is None else {"kl_of_adapter": found.kl_base})}


def _hold(contents: Contents, loss: dict[str, float]) -> None:
    """Raise ModelError where rounding cost too much. The stored model is compared with the model as it was trained."""
    where = "the texts" if contents.job.texts else "the golden prompt"
    if contents.merges:
        lost = loss["kl_of_rounding"] / max(loss["kl_of_adapter"], LEAST_KL)
        effect.hold_kept(contents.job, 1.0 - lost, where, "type --adapter-as inputs, which keeps it whole")
    else:
        effect.hold_rounding(contents.job, loss["kl_of_rounding"], where, "type --weights nf4")


def _prompt(job: Job) -> list[int]:
    """Return the token ids of the golden prompt."""
    tokenizer = Tokenizer.load(job.base.folder)
    return [*tokenizer.start_ids, *tokenizer.encode(verify.PROMPT)]


def _loss_notice(contents: Contents, loss: dict[str, float]) -> str:
    """Say what rounding did to the model, and to the adapter if it was merged."""
    form, rounding, adapter_effect = contents.job.weights, loss["kl_of_rounding"], loss.get("kl_of_adapter")
    if not contents.merges or adapter_effect is None:
        return (
            f"Rounding the weights to {form} moved the model by KL {rounding:.2g} from the model as it was trained. "
            "--weights nf4 keeps it as it was."
        )
    lost = "so the adapter's effect is lost" if rounding >= adapter_effect else "so some of the adapter's effect may be lost"
    return (
        f"The adapter was merged into weights rounded to {form}. Rounding moves the model by KL {rounding:.2g}, the whole "
        f"adapter by {adapter_effect:.2g}, {lost}; --adapter-as inputs keeps it whole."
    )


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
