"""A Core ML package for iOS 18 and macOS 15, with its KV cache as state, and all that an app needs to call it.

The adapter is a set of inputs (a new night's adapter is a new small file, the package stays), a function of the package beside
the bare base (one file of weights for both), or merged. The saved package is proved by mil_eval.py, which is our own: it shows
that graph and weights are right, and nothing about Apple's kernels.

    model.mlpackage  how-to-call.json  adapter.safetensors (as inputs)  the tokenizer's files
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgetune.export import coreml_app as app
from edgetune.export import coreml_model, coreml_weights, effect, verify
from edgetune.export.coreml_model import Plan, linear_name
from edgetune.export.coreml_package import Array, Package
from edgetune.export.coreml_weights import EMBEDDING_NAME, Stored
from edgetune.export.merge import Merged
from edgetune.export.mil_eval import MilProgram, quiet_coremltools
from edgetune.export.target import LOGITS, Held, Job, Measured, Written, held_by_reference, work_folder
from edgetune.runtime import adapter as adapters
from edgetune.runtime.checkpoint import EMBEDDING, HEAD, is_linear, open_model
from edgetune.runtime.config import LINEARS, QuantConfig
from edgetune.runtime.errors import ModelError, ResourceError, UsageError
from edgetune.runtime.files import PRIVATE_FILE, atomic_write
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama, hf_linear_name
from edgetune.runtime.model_folder import companions, write_model
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import TensorSpec
from edgetune.runtime.tokenizer import Tokenizer

PROVED_BY = "edgetune's own evaluator"
ALSO_PROVED_BY = {"none": "edgetune on the CPU"}
ADAPTER_AS = ("inputs", "functions", "merged")
WEIGHTS = ("nf4", "int4", "fp16", "none")
MEASURED = (Measured("int4"), Measured("nf4", "merged"))
"""The forms whose stored weights are others than the engine's."""
NEEDS = (("coremltools",), "coreml")
ADAPTER_ALONE = "none"
"""--weights none: adapter.safetensors alone, for a package that is there already."""
CONTEXT_TOKENS = 2048
PREFILL_TOKENS = 128
"""Logits of a whole chunk come out, 2 bytes for each word of the vocabulary: this keeps them near 30 MB."""
COREMLTOOLS_BYTES, LAYER_BYTES = 272_000_000, 4_000_000
"""Held by Python with torch and coremltools, and by the graph of a layer. Measured: 328 MB after writing 22 layers."""
STORED_BYTES, DENSE_BYTES = {"nf4": 5, "int4": 18, "fp16": 4}, 22
"""For each number of a linear, while it is stored and compared, and while the evaluator makes it dense."""
SUM_BYTES, VOCABULARY_BYTES = 8, 3
"""For each number, while it is stored and compared: what a merge adds for a linear, and all of the embedding's."""
TEXTS, TEXT_TOKENS = 16, 256
"""How many texts, and how much of each, what rounding does is measured on."""
SINGLE = 4
"""Tokens that a proof reads one by one; the others come in chunks."""
BASE, ADAPTED = "base", "adapted"
LIMIT_OF_PROOF = (
    "What is proved here of a Core ML package, by edgetune's own evaluator, is its graph and its weights, not Apple's kernels: "
    "try it on a device."
)
"""What whoever gets the package has to know."""
NEXT_NIGHT = "A new night's adapter needs no new package: edgetune export coreml --weights none writes its file alone."


@dataclass(frozen=True)
class _Source:
    """Where the weights of a job come from, and in which form they go."""

    job: Job
    adapter_as: str | None

    @property
    def merges(self) -> bool:
        return self.adapter_as == "merged"

    @property
    def requantises(self) -> bool:
        """Whether the stored weights are others than the engine's."""
        return any(form.covers(self.job.weights, self.adapter_as) for form in MEASURED)

    @functools.cached_property
    def merged(self) -> Merged:
        return Merged(self.job.base, self.job.adapter if self.merges else None)

    def weight(self, name: str) -> Stored:
        """A weight as it is to be stored, by its Hugging Face name; embedding and head are fp16."""
        if not is_linear(name):
            return coreml_weights.store(name, self.job.base.tensor(name), "fp16")
        weight = self.merged.tensor(name) if self.merges else self.job.base.tensor(name)
        return coreml_weights.store(name, weight, self.job.weights)

    def blank(self, name: str, shape: tuple[int, int]) -> Stored:
        """What holds its place while the package is laid out."""
        quant = (None if self.merges else self.job.base.quant) or QuantConfig()  # a sum is dense, and quantised anew
        return coreml_weights.blank(name, shape, self.job.weights if is_linear(name) else "fp16", quant.block_size)

    def plans(self) -> dict[str, Plan]:
        """What the package's functions are made of, by name, the default one first."""
        base, adapter = self.job.base, self.job.adapter
        context = min(CONTEXT_TOKENS, base.config.max_positions)
        plan = Plan(base.config, context, min(PREFILL_TOKENS, context), base.dense, self.blank)
        if adapter is not None and self.adapter_as == "inputs":
            targets = adapter.config.targets
            return {"main": replace(plan, input_ranks={name: adapter.config.rank for name in LINEARS if name in targets})}
        if adapter is not None and self.adapter_as == "functions":
            return {ADAPTED: replace(plan, constants=_constants(self.job)), BASE: plan}
        return {"main": plan}

    def stored(self) -> dict[str, str]:
        """Hugging Face names of all weights, layer by layer, by the name that coreml_weights.places has for each."""
        config = self.job.base.config
        head = {} if config.tie_embeddings else {"logits": HEAD}
        layers = {
            linear_name(layer, name): f"model.layers.{layer}.{hf_linear_name(name)}.weight"
            for layer in range(config.num_layers)
            for name in LINEARS
        }
        return {EMBEDDING_NAME: EMBEDDING, **layers, **head}


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
    source = _source(job)
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
    compared = _compare_weights(folder / app.PACKAGE, source) + _compare_constants(folder / app.PACKAGE, plans)
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


def stored_model(job: Job, folder: Path) -> Llama:
    """The engine's model, with the weights as stored where they were quantised anew. Not read from the package: made a second
    time from the base. `folder`: where its files may stand until it is open."""
    source = _source(job)
    if source.requantises:
        config = {key: value for key, value in job.base.hf_config.items() if key != "quantization_config"}
        model = _through_files(job, folder, lambda made: write_model(job.base.folder, made, config, _StoredRecipe(source)))
    else:
        model = _bare(job, folder)
    if job.adapter is not None and not (source.merges and source.requantises):
        adapters.attach(model, job.adapter)
    return model


@dataclass(frozen=True)
class _StoredRecipe:
    """A model folder of the weights as a package has them, fp16, beside the base's own other tensors; a Recipe of
    model_folder.py."""

    source: _Source

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.source.merged.shapes

    def specs(self, name: str) -> list[TensorSpec]:
        dtype = torch.float16 if is_linear(name) else self.source.job.base.dense(name).dtype
        return [TensorSpec(name, dtype, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        if not is_linear(name):
            return {name: self.source.job.base.dense(name)}
        return {name: torch.from_numpy(self.source.weight(name).values())}

    def release(self, name: str) -> None:
        self.source.job.base.release(name)


def _bare(job: Job, folder: Path) -> Llama:
    """The base in fp32; a dense one in NF4 where it is exported so, as it was while the adapter was trained, or where the
    adapter goes alone to such a package."""
    quant = QuantConfig() if job.weights in ("nf4", ADAPTER_ALONE) and job.base.quant is None else None
    if quant is not None and job.layer_memory is not None:
        return _through_files(job, folder, lambda made: quantize_folder(job.base.folder, made))
    return load_llama(job.base, torch.float32, quant=quant, layer_memory=None if quant is not None else job.layer_memory)


def _through_files(job: Job, folder: Path, write: Callable[[Path], object]) -> Llama:
    """A model in fp32 out of files that `write` makes, streamed from them where memory is short. They have no name any more
    once it is open, and go with it."""
    with work_folder(folder) as place:
        made = place / "model"
        made.mkdir(mode=0o700)
        write(made)
        return load_llama(open_model(made), torch.float32, layer_memory=job.layer_memory)


class EvaluatedPackage:
    """A written package, called as how-to-call.json says."""

    def __init__(self, folder: Path, room: int | None = None) -> None:
        """room: bytes of weights that may be kept in memory, None for all."""
        self.call = app.read_call(folder)
        self.program = MilProgram(folder / app.PACKAGE, room)
        self._folder = folder
        self._adapter = {} if self.call["adapter"] is None else app.read_adapter(folder / app.ADAPTER_FILE, self.call)

    def use_adapter(self, file: Path) -> None:
        """Feed another adapter to the same package. Raises AdapterError for one that does not fit."""
        self._adapter = app.read_adapter(file, self.call)

    def logits(self, ids: Sequence[int], function: str | None = None) -> Tensor:
        """(N,) -> (N, V) f32 through the same states: half of them in chunks, others in chunks on top of that, and the last
        SINGLE token by token."""
        states, rows, at = self.program.states(function), [], 0
        half, singles = -(-len(ids) // 2), max(len(ids) - SINGLE, 1)
        while at < len(ids):
            stop = half if at < half else max(singles, at + 1)
            end = min(at + self.call["prefill_tokens"], stop)
            chunk = np.array([ids[at:end]], np.int32)
            inputs = {"input_ids": chunk, **app.masks(self.call, end - at, end), **self._adapter}
            rows.append(self.program.run(inputs, states, function)["logits"][0])
            at = end
        return torch.from_numpy(np.concatenate(rows)).float()


class _Functions(EvaluatedPackage):
    """A package with the bare base as a second function, which is to agree with the engine's base as the adapted one does with
    the adapted model."""

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(folder, job.layer_memory)
        self._job = replace(job, adapter=None, adapter_as=None)

    def logits(self, ids: Sequence[int], function: str | None = None) -> Tensor:
        """The default function's, once the base's were found to agree. Raises ModelError where they do not."""
        if function is None:
            self._hold_base(ids)
        return super().logits(ids, function)

    def _hold_base(self, ids: Sequence[int]) -> None:
        expected = verify.reference_logits(stored_model(self._job, self._folder), ids)
        found = EvaluatedPackage(self._folder, self._job.layer_memory).logits(ids, BASE)  # and its weights are let go of again
        difference = float((found - expected).abs().max())
        most = verify.BOUNDS["coreml", self._job.weights].max_logit
        if not difference <= most:
            raise ModelError(
                f"The package's function {BASE} is not the base: logits differ by up to {difference:.3g} (at most {most:g}); "
                "type --adapter-as inputs."
            )


class _AdapterFile:
    """adapter.safetensors alone, put on the engine's own base."""

    def __init__(self, job: Job, folder: Path) -> None:
        adapter = job.needed_adapter()
        shapes = {name: list(values.shape) for name, values in app.stacked(adapter, job.base.config).items()}
        call = {"base": job.base.digest, "adapter": {"rank": adapter.config.rank, "inputs": shapes}}
        found = app.read_adapter(folder / app.ADAPTER_FILE, call)
        tensors = {
            (layer, name, part): torch.from_numpy(found[f"{name}_{part.lower()}"][layer]).float()
            for layer, name, part in adapter.tensors
        }
        scaled = replace(adapter.config, alpha=float(adapter.config.rank), rslora=False)  # the file's b is scaled already
        self._model = _bare(job, folder)
        adapters.attach(self._model, adapters.Adapter(scaled, tensors))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        return verify.reference_logits(self._model, ids)


def read(job: Job, folder: Path) -> EvaluatedPackage | _AdapterFile:
    """What was written, opened by our evaluator."""
    if job.weights == ADAPTER_ALONE:
        return _AdapterFile(job, folder)
    if job.adapter_as == "functions":
        return _Functions(job, folder)
    return EvaluatedPackage(folder, job.layer_memory)


def _check_coremltools() -> None:
    if importlib.util.find_spec("coremltools") is None:
        raise ResourceError(
            "Writing a Core ML package needs coremltools, which is not installed; type pip install coremltools on macOS or "
            "Linux x86-64, the systems that it is made for."
        )
    quiet_coremltools()


def held(job: Job) -> dict[str, list[Held]]:
    """coremltools, its graph and a weight as it is stored and compared; a model or two; the evaluator and a dense weight."""
    source, config = _source(job), job.base.config
    if job.weights == ADAPTER_ALONE:
        return {"write": [held_by_reference(job)], "read": [held_by_reference(job)]}
    process = COREMLTOOLS_BYTES + LAYER_BYTES * config.num_layers
    vocabulary, number = config.vocab_size * config.hidden_size, STORED_BYTES[job.weights] + SUM_BYTES * source.merges
    stored = Held(process + 2 * job.adapter_bytes + max(VOCABULARY_BYTES * vocabulary, number * job.largest_linear))
    model = held_by_reference(job, process)
    if source.requantises:
        model = Held(model.fixed + job.head_bytes + job.embedding_bytes, models=2)
    made = Held(process + job.adapter_bytes + DENSE_BYTES * job.largest_linear + LOGITS * config.vocab_size, models=1)
    return {"write": [stored, model], "read": [made, *([model] if source.adapter_as == "functions" else [])]}


def _source(job: Job) -> _Source:
    how = job.adapter_as
    if how not in (None, *ADAPTER_AS):
        raise UsageError(f"--adapter-as {how} is not known; expected inputs, functions or merged.")
    if how is not None:
        job.needed_adapter()
    return _Source(job, how or ("inputs" if job.adapter is not None else None))


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


def _constants(job: Job) -> dict[tuple[int, str], tuple[Array, Array]]:
    """lora_A and lora_B f16 of each linear that has them, the scale in B."""
    adapter = job.needed_adapter()
    stacked = app.stacked(adapter, job.base.config)
    return {
        (layer, name): (stacked[f"{name}_a"][layer], stacked[f"{name}_b"][layer])
        for layer in range(job.base.config.num_layers)
        for name in adapter.config.targets
        if (layer, name, "A") in adapter.tensors
    }


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


def _fill(path: Path, source: _Source) -> None:
    """Put the weights in their places, one after the other; the functions of a package share them."""
    package = Package(path)
    places, names = coreml_weights.places(package, package.default), source.stored()
    done = source.job.counter("writing", len(names))
    for called, name in names.items():
        places[called].write(package, source.weight(name))
        source.job.base.release(name)
        done(name)


def _compare_weights(path: Path, source: _Source) -> int:
    """Hold every weight's stored codes and scales, in every function, to what was to be stored; returns how many numbers.

    Raises ModelError where one differs.
    """
    package, compared = Package(path), 0
    functions, names = [coreml_weights.places(package, function) for function in package.functions], source.stored()
    done = source.job.counter("comparing", len(names))
    for called, name in names.items():
        expected = source.weight(name)
        for places in functions:
            if called not in places:
                raise ModelError(f"The package has no weight {called}; export it again.")
            stored = places[called].read(package)
            if stored.form != expected.form or stored.differences(expected):
                raise ModelError(f"The package's {called} differs from the engine's weight; export it again.")
            compared += stored.codes.size + (0 if stored.scale is None else stored.scale.size)
        source.job.base.release(name)
        done(name)
    return compared


def _compare_constants(path: Path, plans: Mapping[str, Plan]) -> int:
    """The same for what each function has beside its weights: a proof's few tokens see neither the angles of late positions nor
    a norm that is a little off."""
    package, compared = Package(path), 0
    for function, plan in plans.items():
        made = {each.outputs[0].name: each for each in package.functions[function].operations if each.type == "const"}
        for name, expected in coreml_model.constants(plan).items():
            if name not in made and coreml_model.does_nothing(name, expected):
                continue
            stored = None if name not in made else package.constant(made[name].attributes["val"])
            if stored is None or Stored("fp16", stored).differences(Stored("fp16", expected)):
                raise ModelError(f"The package's {name} differs from the engine's; export it again.")
            compared += expected.size
    return compared


def _loss(job: Job, folder: Path) -> dict[str, float]:
    """KL in nats of the engine's model to the stored one, and to the bare base, over the job's texts or the golden prompt."""
    texts = [list(text[:TEXT_TOKENS]) for text in job.texts if len(text) > 1][:TEXTS]
    own = _bare(job, folder)
    if job.adapter is not None:
        adapters.attach(own, job.adapter)
    found = effect.measure(own, stored_model(job, folder), texts or [_prompt(job)])
    return {"kl_of_rounding": found.kl_merged, **({} if job.adapter is None else {"kl_of_adapter": found.kl_base})}


def _hold(source: _Source, loss: dict[str, float]) -> None:
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


def _loss_notice(source: _Source, loss: dict[str, float]) -> str:
    """What rounding the weights anew did to the model, and to the adapter that was merged first."""
    form, rounding, whole = source.job.weights, loss["kl_of_rounding"], loss.get("kl_of_adapter")
    if not source.merges or whole is None:
        return f"The weights were rounded to {form} anew: KL {rounding:.2g} from the model as it was trained; nf4 keeps it."
    lost = "so the adapter's effect is lost" if rounding >= whole else "which may cost some of the adapter's effect"
    return (
        f"The adapter was merged into weights rounded to {form}: KL {rounding:.2g} by rounding where the whole adapter makes "
        f"{whole:.2g}, {lost}; --adapter-as inputs keeps it whole."
    )
