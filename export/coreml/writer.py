"""Write a package in two steps: coremltools lays it out around zeros, then the weights are written over them one by one.

So the whole model is never in memory at once.
"""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgetune.export.coreml.contents import Contents
from edgetune.export.coreml.graph import build
from edgetune.export.coreml.how_to_call import PACKAGE
from edgetune.export.coreml.package import Package
from edgetune.export.coreml.plan import Plan
from edgetune.export.coreml.weight_locations import weight_locations
from edgetune.export.job import work_folder
from edgetune.runtime.errors import ResourceError


@contextlib.contextmanager
def _quiet_and_private(folder: Path) -> Iterator[None]:
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


def lay_out(plans: Mapping[str, Plan], folder: Path) -> None:
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
    with _quiet_and_private(folder):
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


def fill(path: Path, contents: Contents) -> None:
    """Write the weights over the zeros, one by one. All functions of a package share them."""
    package = Package(path)
    locations, names = weight_locations(package, package.default), contents.weight_names()
    done = contents.job.counter("writing", len(names))
    for called, name in names.items():
        locations[called].write(package, contents.weight(name))
        contents.job.base.release(name)
        done(name)
