"""edgetune.train: begins a training run or resumes an interrupted one, and yields its events.

    for event in edgetune.train(TrainConfig(data=DataConfig(notes=("notes/",)))): ...

From the command line to a training step: cli/train.py -> this module -> loop.py (steps, evaluations, checkpoints) -> step.py.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

from edgetune.config import TrainConfig
from edgetune.events import Event, EventLog, Finished, Interrupted, Resumed, read_events
from edgetune.home import expand, private_folder
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import Base, open_base
from edgetune.progress import Show, Stages
from edgetune.reports.html import write_report
from edgetune.reports.latest import LOG_FILE, REPORT_FILE
from edgetune.runtime import budget, peft_folder
from edgetune.runtime.device import explain_card_memory, pick_device
from edgetune.runtime.errors import DataError, EdgetuneError, TrainingError
from edgetune.runtime.files import check_place, mend
from edgetune.runtime.memory_meter import meter_for
from edgetune.training.anchor import packed_files, unpack_files
from edgetune.training.checkpoints import CheckpointWriter, RestoredCheckpoint, restore_checkpoint
from edgetune.training.deadline import Deadline
from edgetune.training.distributed import World, join_processes
from edgetune.training.loop import TrainingLoop
from edgetune.training.plan import RunRecord
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.recorded import Recorded
from edgetune.training.sealed_files import DamagedError
from edgetune.training.setup import changes_since_start, prepare_follower, prepare_new, prepare_resumed
from edgetune.training.step import TrainStep
from edgetune.training.unfinished_run import OtherVersionError, UnfinishedRun, follower_folder, lock_run


def train(
    config: TrainConfig,
    stop: threading.Event | None = None,
    fresh: bool = False,
    private_link: bool = False,
    show: Show = lambda event: None,
) -> Iterator[Event]:
    """Train an adapter, or resume the interrupted run of the same settings, and yield the run's events.

    The last event is Finished or, once `stop` is set, Interrupted; the next call then resumes the run. At a deadline the run
    finishes with the best adapter so far, and the next call resumes it too. `fresh` starts over instead of resuming.
    `show` receives the Working events of everything that takes seconds, between the events that are yielded.
    Under torchrun only process 0 yields events; `private_link` confirms that the link between several machines is private.
    Raises subclasses of EdgetuneError, each a sentence for the user. Nothing that existed before is lost.
    """
    deadline, stop = Deadline.of(config), stop or threading.Event()
    # Check the output folder first: an unusable --out must not cost a night of training.
    if config.out is not None:
        peft_folder.refuse_foreign(expand(config.out))
        check_place(expand(config.out))
    base = open_base(config.model, show)
    device = pick_device(config.device)
    with explain_card_memory("type --memory {less:.2f}GB"), join_processes(device, private_link) as world:
        if world.rank > 0:
            _follow(config, base, world)
            return
        with lock_run(config, base[1].digest) as unfinished:
            run, restored, resumed = _begin_or_resume(config, base, unfinished, fresh, world, show)
            yield from _lead(run, restored, resumed, unfinished, world, stop, deadline, show)


def repeat(
    config: TrainConfig, base: Base, recorded: Recorded, stop: threading.Event, show: Show = lambda event: None
) -> Iterator[Event]:
    """Train as a recorded run did, but on the notes that `recorded` has, or resume that; yield events as `train` does.

    config: the settings of the run, with the adapter to start from. Its adapter replaces that of the run, and nothing is
    promoted. Raises NothingNew where the run would have had nothing to learn.
    """
    with (
        explain_card_memory("free some memory"),
        join_processes(pick_device(config.device), private_link=False) as world,
        lock_run(config, base[1].digest, recorded.key) as unfinished,
    ):
        run, restored, resumed = _begin_or_resume(config, base, unfinished, False, world, show, recorded)
        run = dataclasses.replace(run, recorded=recorded)
        yield from _lead(run, restored, resumed, unfinished, world, stop, Deadline(), show)


def _lead(
    run: PreparedRun,
    restored: RestoredCheckpoint,
    resumed: Resumed | None,
    unfinished: UnfinishedRun,
    world: World,
    stop: threading.Event,
    deadline: Deadline,
    show: Show,
) -> Iterator[Event]:
    """Run the training loop in process 0: log and yield its events, and write the report at the end."""
    folder = private_folder(registry.run_folder(run.record.run))
    for path in (run.adapter_folder, folder / REPORT_FILE):
        mend(path)
    followed = {"record": run.record.for_followers().as_dict(), "has_steps": restored.has_steps}
    world.send({**followed, "anchor": packed_files(run.folder) if world.size > 1 else {}})
    world.check_all_ready()
    with (
        EventLog(folder / LOG_FILE, restored.state.log_bytes) as log,
        meter_for(run.loaded.model.device, run.loaded.checkpoint.files) as meter,
    ):
        writer = CheckpointWriter(unfinished.folder, log, _checkpoint_bytes(run))
        loop = TrainingLoop(run, restored, world, writer, stop, deadline, meter, show)
        try:
            for event in loop.events(resumed):
                log.append(event)
                if isinstance(event, Finished | Interrupted):
                    write_report(folder / REPORT_FILE, read_events(folder / LOG_FILE))
                # The user's words, as tokens, are kept no longer than the run needs them.
                if isinstance(event, Finished) and event.cut is None:
                    unfinished.discard()
                yield event
        except TrainingError:
            unfinished.discard()
            raise


def _follow(config: TrainConfig, base: Base, world: World) -> None:
    """Compute this process's share of every step that the leader announces, until it announces the end."""
    message = world.receive()
    with follower_folder(config, base[1].digest, world.rank) as folder:
        try:
            unpack_files(message["anchor"], folder)
            run = prepare_follower(config, base, folder, RunRecord.from_dict(message["record"]))
        except EdgetuneError as error:
            world.check_all_ready(error)
        world.check_all_ready()
        train_step = TrainStep(run, world)
        train_step.sync_with_leader(optimizer_state=message["has_steps"])
        while (step := world.receive_step()) is not None:
            train_step.run(step)


def _begin_or_resume(
    config: TrainConfig,
    base: Base,
    unfinished: UnfinishedRun,
    fresh: bool,
    world: World,
    show: Show,
    recorded: Recorded | None = None,
) -> tuple[PreparedRun, RestoredCheckpoint, Resumed | None]:
    """Set up the interrupted run of this command if there is one, else a new run.

    The Resumed event is None unless there was an earlier run, even one that could not be used.
    """
    resumed, stages = None, Stages(show)
    if unfinished.exists and not fresh:
        try:
            record, restored = RunRecord.from_dict(unfinished.record()), restore_checkpoint(unfinished.folder)
            run = prepare_resumed(config, base, unfinished.folder, record, restored.has_steps, stages)
            changes = [] if recorded is not None else changes_since_start(run, stages.of("reading"))
            return run, restored, Resumed(restored.state.step, (*restored.notices, *changes))
        except OtherVersionError:
            notice = "An interrupted run of this command was begun by another version of edgetune, so training starts over."
            resumed = Resumed(0, (notice,))
        except (DamagedError, DataError):
            resumed = Resumed(0, ("The files of this command's interrupted run are damaged, so training starts over.",))
    unfinished.discard()
    private_folder(unfinished.folder)
    name = registry.new_run(base[1].digest) if recorded is None else recorded.run
    try:
        run = prepare_new(config, base, unfinished.folder, name, world.size, world.local_size, stages, recorded=recorded)
        unfinished.begin(run.record.as_dict())
    except BaseException:
        unfinished.discard()
        if recorded is None:
            registry.run_folder(name).rmdir()
        raise
    return run, RestoredCheckpoint(), resumed


def _checkpoint_bytes(run: PreparedRun) -> int:
    """Return the size of a checkpoint: fp32 values of the adapter and of the best one, and the optimizer's two moments."""
    optimizer_bytes = 2 * run.plan.setting.optimizer_bits // 8
    return (4 + 4 + optimizer_bytes) * budget.adapter_parameters(run.loaded.model.config, run.lora)
