"""A Core ML package for iOS 18 and macOS 15, with its KV cache as state, and all that an app needs to call it.

The adapter is a set of inputs (a new night's adapter is a new small file, the package stays), a function of the package beside
the bare base (one file of weights for both), or merged. The saved package is proved by mil_eval.py, which is our own: it shows
that graph and weights are right, and nothing about Apple's kernels.

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
from edgetune.export.coreml import app_files as app
from edgetune.export.coreml import model as coreml_model
from edgetune.export.coreml import source as coreml_source
from edgetune.export.coreml import weights as coreml_weights
from edgetune.export.coreml.evaluator import quiet_coremltools
from edgetune.export.coreml.model import Plan
from edgetune.export.coreml.package import Package
from edgetune.export.coreml.proof import AdapterFile, EvaluatedPackage, FunctionsPackage, compare_constants, compare_weights
from edgetune.export.coreml.source import ADAPTER_ALONE, Source, bare, source_of, stored_model
from edgetune.export.job import Job, Written, work_folder
from edgetune.export.memory import LOGIT_BYTES, ExportMemory, StageMemory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.runtime import adapter as adapters
from edgetune.runtime.errors import ResourceError, UsageError
from edgetune.runtime.files import PRIVATE_FILE, atomic_write
from edgetune.runtime.model import Llama
from edgetune.runtime.model_folder import companions
from edgetune.runtime.tokenizer import Tokenizer

COREMLTOOLS_BYTES, LAYER_BYTES = 272_000_000, 4_000_000
"""Held by Python with torch and coremltools, and by the graph of a layer. Measured: 328 MB after writing 22 layers."""
STORED_BYTES, DENSE_BYTES = {"nf4": 5, "int4": 18, "fp16": 4}, 22
"""For each number of a linear, while it is stored and compared, and while the evaluator makes it dense."""
SUM_BYTES, VOCABULARY_BYTES = 8, 3
"""For each number, while it is stored and compared: what a merge adds for a linear, and all of the embedding's."""
TEXTS, TEXT_TOKENS = 16, 256
"""How many texts, and how much of each, what rounding does is measured on."""
LIMIT_OF_PROOF = (
    "What is proved here of a Core ML package, by edgetune's own evaluator, is its graph and its weights, not Apple's kernels: "
    "try it on a device."
)
"""What whoever gets the package has to know."""
NEXT_NIGHT = "A new night's adapter needs no new package: edgetune export coreml --weights none writes its file alone."


def write(job: Job, folder: Path) -> Written:
    """The package and what belongs to it; every weight in it is read again and compared with the engine's.

    Raises ResourceError where coremltools is not there, UsageError for an --adapter-as that is not known.
    """
    if job.weights == ADAPTER_ALONE and job.adapter_as is not None:
        raise UsageError(
            f"--weights none writes the adapter's file alone, of which --adapter-as {job.adapter_as} makes nothing; leave one "
            "out."
        )
    if job.weights == ADAPTER_ALONE:
        app.write_adapter(job.needed_adapter(), job.base.config, job.base.digest, folder / app.ADAPTER_FILE)
        told = (
            "This is the adapter alone, for a package of the same base and linears; its golden.json is for one of nf4 weights."
        )
        return Written(app.ADAPTER_FILE, (told,))
    _check_coremltools()
    source = source_of(job)
    plans = source.plans()
    plan = next(iter(plans.values()))
    if plan.input_ranks:
        app.write_adapter(job.needed_adapter(), job.base.config, job.base.digest, folder / app.ADAPTER_FILE)
    with job.stage("laying out"):
        _lay_out(plans, folder)
    _fill(folder / app.PACKAGE, source)
    functions = list(plans) if len(plans) > 1 else []
    app.write_call(app.how_to_call(plan, job.base.folder, job.base.digest, functions), folder)
    for file in companions(job.base.folder):
        atomic_write(folder / file.name, file.read_bytes())
    for file in folder.rglob("*"):
        file.chmod(0o700 if file.is_dir() else PRIVATE_FILE)
    compared = compare_weights(folder / app.PACKAGE, source) + compare_constants(folder / app.PACKAGE, plans)
    notices = [LIMIT_OF_PROOF, *([NEXT_NIGHT] if plan.input_ranks else [])]
    facts = [("stored_numbers_compared", float(compared))]
    if source.requantises:
        with job.stage("measuring"):
            loss = _loss(job, folder)
        _hold(source, loss)
        facts += loss.items()
        notices.append(_loss_notice(source, loss))
    return Written(app.PACKAGE, tuple(notices), tuple(facts))


def reference(job: Job, folder: Path) -> Llama:
    """What the package has to agree with."""
    return stored_model(job, folder)


def read(job: Job, folder: Path) -> EvaluatedPackage | AdapterFile:
    """What was written, opened by our evaluator."""
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
    """coremltools, its graph and a weight as it is stored and compared; a model or two; the evaluator and a dense weight."""
    source, config = source_of(job), job.base.config
    if job.weights == ADAPTER_ALONE:
        return ExportMemory([reference_memory(job)], [reference_memory(job)])
    process = COREMLTOOLS_BYTES + LAYER_BYTES * config.num_layers
    vocabulary, number = config.vocab_size * config.hidden_size, STORED_BYTES[job.weights] + SUM_BYTES * source.merges
    stored = StageMemory(process + 2 * job.adapter_bytes + max(VOCABULARY_BYTES * vocabulary, number * job.largest_linear))
    model = reference_memory(job, process)
    if source.requantises:
        model = StageMemory(model.fixed + job.head_bytes + job.embedding_bytes, models=2)
    made = StageMemory(
        process + job.adapter_bytes + DENSE_BYTES * job.largest_linear + LOGIT_BYTES * config.vocab_size, models=1
    )
    return ExportMemory([stored, model], [made, *([model] if source.adapter_as == "functions" else [])])


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[None]:
    """No progress bars, and coremltools' own copies of the weights inside `folder`: private, and on the result's disk."""
    before = tempfile.tempdir
    with work_folder(folder) as place:
        tempfile.tempdir = str(place)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what fails raises
                yield
        finally:
            tempfile.tempdir = before
            gc.collect()  # a program is full of cycles, and holds every weight; its files go with it


def _lay_out(plans: Mapping[str, Plan], folder: Path) -> None:
    """Write the package by coremltools, with zeros where the weights of the model will stand.

    Two default passes would rearrange a table and the scales behind it into a table for each block: 8 bits for 4. One would
    find that the zeros are all the same. The precision is called fp32 so that no pass casts anything: the program says itself
    what is fp16. Raises ResourceError where coremltools cannot write.
    """
    import coremltools as ct

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(
        {"common::canonicalize_quantized_lut_pattern", "common::reorder_lut_per_channel_scale", "common::const_deduplication"}
    )
    with _workplace(folder):
        try:
            ct.convert(
                coreml_model.build(plans),
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,
                compute_units=ct.ComputeUnit.CPU_AND_GPU,
                pass_pipeline=pipeline,
                skip_model_load=True,
                package_dir=str(folder / app.PACKAGE),
            )
        except RuntimeError as error:
            if "FileWriter" not in str(error):
                raise
            raise ResourceError(
                f"coremltools could not write the package to {folder.parent}; see that the disk has room for it, and run the "
                "same command again."
            ) from error


def _fill(path: Path, source: Source) -> None:
    """Put the weights in their places, one after the other; the functions of a package share them."""
    package = Package(path)
    places, names = coreml_weights.places(package, package.default), source.stored()
    done = source.job.counter("writing", len(names))
    for called, name in names.items():
        places[called].write(package, source.weight(name))
        source.job.base.release(name)
        done(name)


def _loss(job: Job, folder: Path) -> dict[str, float]:
    """KL in nats of the engine's model to the stored one, and to the bare base, over the job's texts or the golden prompt."""
    texts = [list(text[:TEXT_TOKENS]) for text in job.texts if len(text) > 1][:TEXTS]
    own = bare(job, folder)
    if job.adapter is not None:
        adapters.attach(own, job.adapter)
    found = effect.measure(own, stored_model(job, folder), texts or [_prompt(job)])
    return {"kl_of_rounding": found.kl_merged, **({} if job.adapter is None else {"kl_of_adapter": found.kl_base})}


def _hold(source: Source, loss: dict[str, float]) -> None:
    """Raise ModelError where rounding cost too much: what is stored is held to the model as it was trained, not to itself."""
    where = "the texts" if source.job.texts else "the golden prompt"
    if source.merges:
        lost = loss["kl_of_rounding"] / max(loss["kl_of_adapter"], 1e-12)
        effect.hold_kept(source.job, 1.0 - lost, where, "type --adapter-as inputs, which keeps it whole")
    else:
        effect.hold_rounding(source.job, loss["kl_of_rounding"], where, "type --weights nf4")


def _prompt(job: Job) -> list[int]:
    tokenizer = Tokenizer.load(job.base.folder)
    return [*tokenizer.start_ids, *tokenizer.encode(verify.PROMPT)]


def _loss_notice(source: Source, loss: dict[str, float]) -> str:
    """What rounding the weights anew did to the model, and to the adapter that was merged first."""
    form, rounding, whole = source.job.weights, loss["kl_of_rounding"], loss.get("kl_of_adapter")
    if not source.merges or whole is None:
        return f"The weights were rounded to {form} anew: KL {rounding:.2g} from the model as it was trained; nf4 keeps it."
    lost = "so the adapter's effect is lost" if rounding >= whole else "which may cost some of the adapter's effect"
    return (
        f"The adapter was merged into weights rounded to {form}: KL {rounding:.2g} by rounding where the whole adapter makes "
        f"{whole:.2g}, {lost}; --adapter-as inputs keeps it whole."
    )


SPEC = TargetSpec(
    name="coreml",
    weights=("nf4", "int4", "fp16", ADAPTER_ALONE),
    proved_by="edgetune's own evaluator",
    also_proved_by={ADAPTER_ALONE: "edgetune on the CPU"},
    packages=("coremltools",),
    extra="coreml",
    adapter_as=coreml_source.ADAPTER_AS,
    measured=coreml_source.MEASURED,
    peak_memory=peak_memory,
    write=write,
    read=read,
    reference=reference,
)
