"""edgetune.train: begins a run or goes on with one, leads or follows, yields events, prints nothing.

for event in edgetune.train(TrainConfig(data=DataConfig(notes=("notes/",)))): ...

The module has another name, since importing it would put itself in the function's place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from edgetune.config import TrainConfig, seconds_until
from edgetune.events import Event, EventLog, Finished, Interrupted, Resumed, read_events
from edgetune.home import expand, private_folder
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import Base, open_base
from edgetune.reports.html import write_report
from edgetune.runtime import budget, peft_folder
from edgetune.runtime.device import explain_card_memory, pick_device
from edgetune.runtime.errors import DataError, EdgetuneError, TrainingError
from edgetune.runtime.files import check_place, mend
from edgetune.runtime.memory_meter import meter_for
from edgetune.training import checkpoints as runstate
from edgetune.training.checkpoints import Damaged, OtherVersion, Restored, Unfinished
from edgetune.training.distributed import World, joined
from edgetune.training.loop import REPORT_FILE, Keeper, Run, adapter_folder
from edgetune.training.setup import Prepared, Record, changes_since, prepare, prepare_again, prepare_beside
from edgetune.training.step import Stepper

LOG_FILE = "events.jsonl"


def train(
    config: TrainConfig, stop: threading.Event | None = None, fresh: bool = False, private_link: bool = False
) -> Iterator[Event]:
    """Run a training, or go on with the unfinished one of the same settings, yielding its events.

    The last event is Finished; or, once `stop` is set, Interrupted, and the next call goes on from there. A deadline
    finishes the run with the best adapter so far, and the next call goes on from there too. `fresh` starts over.
    Under torchrun only process 0 yields events; `private_link` says that the link between several machines is private.
    Raises EdgetuneError's children, each a sentence for the user; nothing that was there before is lost.
    """
    deadline = _deadline(config)
    if config.out is not None:
        peft_folder.refuse_foreign(expand(config.out))
        check_place(expand(config.out))
    base = open_base(config.model)
    digest = base[1].digest
    with explain_card_memory("type --memory {less:.2f}GB"), joined(pick_device(config.device), private_link) as world:
        if world.rank > 0:
            _follow(config, base, world)
            return
        with runstate.hold(config, digest) as place:
            prepared, restored, resumed = _begin(config, base, place, fresh, world)
            folder = private_folder(registry.run_folder(prepared.record.run))
            for path in (adapter_folder(prepared), folder / REPORT_FILE):
                mend(path)
            world.tell({"record": prepared.record.shared().as_dict(), "begun": bool(restored.tensors)})
            world.agree()
            with (
                EventLog(folder / LOG_FILE, restored.state.log_bytes) as log,
                meter_for(prepared.loaded.model.device, prepared.loaded.checkpoint.files) as meter,
            ):
                numbers = budget.adapter_parameters(prepared.loaded.model.config, prepared.lora)
                nbytes = (8 + prepared.plan.setting.optimizer_bits // 4) * numbers  # values, the best of them, two moments
                keeper = Keeper(place, log, nbytes)
                run = Run(prepared, restored, world, keeper, stop or threading.Event(), deadline, meter)
                try:
                    for event in run.events(resumed):
                        log.append(event)
                        if isinstance(event, Finished | Interrupted):
                            write_report(folder / REPORT_FILE, read_events(folder / LOG_FILE))
                        if isinstance(event, Finished) and event.cut is None:
                            place.discard()  # a person's words are kept no longer than the run
                        yield event
                except TrainingError:
                    place.discard()
                    raise


def _follow(config: TrainConfig, base: Base, world: World) -> None:
    """Do the leader's steps until it announces that there are no more, with this process's own notes and model."""
    told = world.hear()
    with runstate.hold_beside(config, base[1].digest, world.rank) as folder:
        try:
            prepared = prepare_beside(config, base, folder, Record.of(told["record"]))
        except EdgetuneError as error:
            world.agree(error)
        world.agree()
        stepper = Stepper(prepared, world)
        stepper.align(told["begun"])
        while (step := world.announced()) is not None:
            stepper.step(step)


def _begin(
    config: TrainConfig, base: Base, place: Unfinished, fresh: bool, world: World
) -> tuple[Prepared, Restored, Resumed | None]:
    """The unfinished run of this command where there is one, else a new one; Resumed where an earlier run matters."""
    resumed = None
    if place.exists and not fresh:
        try:
            record, restored = Record.of(place.record()), place.restore()
            prepared = prepare_again(config, base, place.folder, record, begun=bool(restored.tensors))
            return prepared, restored, Resumed(restored.state.step, (*restored.notices, *changes_since(prepared)))
        except OtherVersion:
            notice = "This command's unfinished run was begun by another version of edgetune, so it starts over."
            resumed = Resumed(0, (notice,))
        except (Damaged, DataError):
            resumed = Resumed(0, ("What was kept of this command's unfinished run is damaged, so it starts over.",))
    place.discard()
    private_folder(place.folder)
    name = registry.new_run(base[1].digest)
    try:
        prepared = prepare(config, base, place.folder, name, world.size, world.here)
        place.begin(prepared.record.as_dict())
    except BaseException:
        place.discard()
        registry.run_folder(name).rmdir()
        raise
    return prepared, Restored(), resumed


def _deadline(config: TrainConfig) -> float | None:
    """When the run must stop, on time.monotonic's clock."""
    limits = [config.minutes * 60] if config.minutes is not None else []
    limits += [seconds_until(config.until)] if config.until is not None else []
    return time.monotonic() + min(limits) if limits else None
