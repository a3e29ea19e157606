"""A run cannot be lost: whatever interrupts it, the same command then gives the adapter of an uninterrupted run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import CRASHED, Driver, Ended, wait_for
from tiny import save_trainable

from edgetune.config import DataConfig, TrainConfig
from edgetune.events import Evaluated, Event, Finished, Interrupted, Resumed, Stepped, read_events
from edgetune.library import adapter_registry as registry
from edgetune.lock import Lock
from edgetune.runtime import ops, peft_folder
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import BusyError, ResourceError, TrainingError
from edgetune.runtime.files import exchange
from edgetune.runtime.model import Block
from edgetune.runtime.peft_folder import WEIGHTS_FILE
from edgetune.runtime.runner import Runner
from edgetune.training import unfinished_run
from edgetune.training.best_adapter import BestAdapter
from edgetune.training.checkpoints import CheckpointWriter
from edgetune.training.train import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks of one process")


def write_notes(folder: Path) -> None:
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.md").write_text(
            f"Day {number}: the beans by the tarred shed want water, said Marra, and went to number {number * number} "
            "with two full cans.\n"  # a text must be of 100 bytes and more to be held out
        )


@dataclass
class World:
    """Holds a model, notes, an earlier run's adapter, the bytes of an uninterrupted run's adapter, and the drivers."""

    folder: Path
    drivers: list[Driver]
    arguments: list[str]
    reference: bytes = b""
    earlier: bytes = b""
    exchanges: bool = False
    """True if this file system can exchange two folders in one step, so that the output is never missing."""
    points: int = 0
    seconds: float = 0.0
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def place(self) -> Place:
        """Return a new place with its own home and with an output folder that holds an earlier adapter."""
        number = next(self.numbers)
        place = Place(self, self.folder / f"home-{number}", self.folder / f"out-{number}")
        shutil.copytree(self.folder / "earlier", place.out)
        return place

    def each(self, task: object, items: list[object]) -> None:
        """Call `task(item, driver)` for every item; each driver works on one item at a time."""
        free = list(self.drivers)

        def run(item: object) -> None:
            driver = free.pop()
            try:
                task(item, driver)  # type: ignore[operator]
            finally:
                free.append(driver)

        with ThreadPoolExecutor(len(self.drivers)) as pool:
            list(pool.map(run, items))


@dataclass
class Place:
    """The home and the output folder of one run."""

    world: World
    home: Path
    out: Path

    def run(self, driver: Driver | None = None, **fault: float) -> Ended:
        """Run the training command, with or without a fault."""
        driver = driver or self.world.drivers[0]
        return driver.run(self.home, [*self.world.arguments, "--out", str(self.out)], **fault)

    def check_readers(self) -> None:
        """Check that a reader now finds a whole adapter, old or new, and a whole current.json."""
        asides = self.out.parent.glob(f".{self.out.name}.old.*/{self.out.name}")
        found = self.out if self.world.exchanges or self.out.exists() else next(asides)
        assert (found / WEIGHTS_FILE).read_bytes() in (self.world.earlier, self.world.reference)
        assert json.loads((found / peft_folder.CONFIG_FILE).read_text())["r"] == 2
        for current in self.home.glob(f"adapters/*/{registry.CURRENT}"):
            assert json.loads(current.read_text())["adapter"] == str(self.out)
        if (self.home / registry.CURRENT).exists():
            assert len(json.loads((self.home / registry.CURRENT).read_text())["base"]) == 64

    def check_finished(self) -> None:
        """Check that the adapter is the uninterrupted run's and that no temporary files of the run are left."""
        assert (self.out / WEIGHTS_FILE).read_bytes() == self.world.reference
        self.check_readers()
        assert [path.name for path in (self.home / "unfinished").iterdir() if path.is_dir()] == []
        left = [path for path in [*self.home.rglob("*.tmp"), *self.out.parent.glob(f".{self.out.name}.*")] if path.exists()]
        assert [path.name for path in left if not path.name.startswith(f".{registry.CURRENT}")] == []
        shutil.rmtree(self.home)
        shutil.rmtree(self.out)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    save_trainable(folder / "model")
    write_notes(folder / "notes")
    shape = ["--seq-len", "32", "--batch-tokens", "64", "--rank", "2", "--targets", "q_proj"]
    common = ["train", str(folder / "notes"), "--model", str(folder / "model"), "--steps", "2", *shape, "--json"]
    earlier = [*common, "--seed", "1", "--out", str(folder / "earlier")]
    drivers = [Driver(folder / f"warm-{number}", earlier) for number in range(2)]
    made = World(folder, drivers, common)
    made.earlier = (folder / "earlier" / WEIGHTS_FILE).read_bytes()
    place = made.place()
    made.exchanges = exchange(place.out, folder / "earlier")  # both folders hold the earlier adapter
    undisturbed = place.run(count=1)
    assert undisturbed.code == 0, undisturbed.err
    made.reference, made.seconds = (place.out / WEIGHTS_FILE).read_bytes(), undisturbed.seconds
    made.points = undisturbed.out[-1]["points"]
    assert made.reference != made.earlier
    assert made.points > 300
    yield made
    for driver in drivers:
        driver.close()


def crash_and_run_again(world: World, points: list[int]) -> None:
    def crash(point: object, driver: Driver) -> None:
        place = world.place()
        crashed = place.run(driver, crash=point)  # type: ignore[arg-type]
        assert crashed.code == CRASHED, (point, crashed.err)
        place.check_readers()
        again = place.run(driver)
        assert (again.code, again.err) == (0, ""), point
        place.check_finished()

    world.each(crash, list(points))


def fill_and_run_again(world: World, points: list[int]) -> None:
    def fill(point: object, driver: Driver) -> None:
        place = world.place()
        full = place.run(driver, full=point)  # type: ignore[arg-type]
        place.check_readers()
        if full.code == 0:  # only deletions were left, which a full disk allows
            assert (place.out / WEIGHTS_FILE).read_bytes() == world.reference
            return
        assert full.code == 1, (point, full.err)
        assert full.err.startswith("edgetune: The disk is full: could not write "), (point, full.err)
        assert full.err.count("\n") == 1, (point, full.err)
        again = place.run(driver)
        assert (again.code, again.err) == (0, ""), point
        place.check_finished()

    world.each(fill, list(points))


def kill_at_random(world: World, kills: int) -> None:
    """Kill runs at random moments and run them again, until `kills` kills are done; some runs are killed many times."""
    done = itertools.count()

    def lifetimes(seed: object, driver: Driver) -> None:
        chance = random.Random(seed)
        while next(done) < kills:
            place = world.place()
            while place.run(driver, kill=chance.uniform(0.0, world.seconds)).code == -signal.SIGKILL:
                place.check_readers()
                if next(done) >= kills:
                    break
            again = place.run(driver)
            assert (again.code, again.err) == (0, "")
            place.check_finished()

    world.each(lifetimes, [1, 2])


def test_a_crash_at_a_change_of_the_disk_loses_nothing(world: World) -> None:
    crash_and_run_again(world, list(range(5, world.points, world.points // 8)))


@pytest.mark.slow
def test_a_crash_at_each_change_of_the_disk_loses_nothing(world: World) -> None:
    crash_and_run_again(world, list(range(1, world.points + 1)))


def test_a_full_disk_is_one_sentence_and_loses_nothing(world: World) -> None:
    fill_and_run_again(world, [1, *range(11, world.points, world.points // 4)])


@pytest.mark.slow
def test_a_disk_that_is_full_from_each_change_on_loses_nothing(world: World) -> None:
    fill_and_run_again(world, list(range(1, world.points + 1)))


def test_kills_at_random_moments_lose_nothing(world: World) -> None:
    kill_at_random(world, 6)


@pytest.mark.slow
def test_kills_by_the_hundred_at_random_moments_lose_nothing(world: World) -> None:
    kill_at_random(world, int(os.environ.get("EDGETUNE_TEST_KILLS", "200")))


def test_a_stopped_run_goes_on_and_a_second_one_is_refused_meanwhile(world: World) -> None:
    place = world.place()
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(place.run, stop=world.points // 2)
        wait_for(place.home.with_suffix(".stopped"))
        refused = place.run(world.drivers[1], beside=1)
        place.home.with_suffix(".go").touch()
        assert (refused.code, refused.out) == (1, [])
        assert refused.err.startswith("edgetune: Process ")
        assert refused.err.endswith("is already using this run. Wait until it ends, or end it.\n")
        assert stopped.result().code == 0
    place.check_finished()


# These tests run in this process: they look at the checkpoints that are kept and at the messages.


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    save_trainable(tmp_path / "model")
    write_notes(tmp_path / "notes")
    data = DataConfig(notes=(str(tmp_path / "notes"),), seq_len=32, batch_tokens=64)
    shape = {"steps": 6, "rank": 2, "targets": ("q_proj", "v_proj"), "evaluation_share": 1.0}
    return TrainConfig(data, str(tmp_path / "model"), out=str(tmp_path / "out"), **shape)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def checkpoints_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.training.checkpoints.KEEP_SECONDS", 0.0)


def run_until(config: TrainConfig, step: int) -> list[Event]:
    """Start a run, stop it after the given step and return its events."""
    stop, events = threading.Event(), []
    for event in train(config, stop):
        events.append(event)
        if isinstance(event, Stepped) and event.step == step:
            stop.set()
    return events


def weights(config: TrainConfig) -> bytes:
    assert config.out is not None
    return (Path(config.out) / WEIGHTS_FILE).read_bytes()


def undisturbed(config: TrainConfig) -> tuple[bytes, list[Event]]:
    """Run the same training without interruption into another folder; return the adapter's bytes and the events."""
    elsewhere = dataclasses.replace(config, out=f"{config.out}-undisturbed")
    events = list(train(elsewhere))
    return weights(elsewhere), events


def resumed(events: list[Event]) -> Resumed:
    assert isinstance(events[1], Resumed)
    return events[1]


def unfinished(home: Path) -> Path:
    (folder,) = (path for path in (home / "unfinished").iterdir() if path.is_dir())
    return folder


def test_a_stopped_run_goes_on_and_ends_as_if_in_one_piece(config: TrainConfig, private_home: Path) -> None:
    reference, in_one_piece = undisturbed(config)
    first = run_until(config, 2)
    end = first[-1]
    assert isinstance(end, Interrupted)
    assert (end.step, end.steps) == (2, 6)
    assert not Path(str(config.out)).exists()
    second = run_until(config, 4)
    third = list(train(config))
    assert (resumed(second).step, resumed(third).step) == (2, 4)
    assert resumed(third).notices == ()
    assert weights(config) == reference
    # The figures and the log are those of the whole run: each step appears once, with the same losses.
    last, whole = third[-1], in_one_piece[-1]
    assert isinstance(last, Finished)
    assert isinstance(whole, Finished)
    for name in ("steps", "tokens", "heldout_bits_per_byte_before", "heldout_bits_per_byte_after", "best_step", "cut"):
        assert getattr(last, name) == getattr(whole, name), name
    assert last.seconds >= sum(event.seconds for event in [end, *third] if isinstance(event, Interrupted))
    logged = list(read_events(Path(str(last.report)).parent / "events.jsonl"))
    assert [(e.step, e.loss) for e in logged if isinstance(e, Stepped)] == [
        (e.step, e.loss) for e in in_one_piece if isinstance(e, Stepped)
    ]
    assert [(e.step, e.bits_per_byte) for e in logged if isinstance(e, Evaluated)] == [
        (e.step, e.bits_per_byte) for e in in_one_piece if isinstance(e, Evaluated)
    ]
    assert not any(isinstance(event, Interrupted) for event in logged)
    assert [path.name for path in (private_home / "unfinished").iterdir() if path.is_dir()] == []


def test_how_often_checkpoints_are_taken_does_not_change_the_adapter(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    often, _ = undisturbed(config)
    monkeypatch.setattr("edgetune.training.checkpoints.KEEP_SECONDS", 1e9)
    list(train(config))
    assert weights(config) == often


def test_a_stop_before_the_first_step_is_kept_too(config: TrainConfig) -> None:
    stop = threading.Event()
    stop.set()
    end = list(train(config, stop))[-1]
    assert isinstance(end, Interrupted)
    assert end.step == 0
    list(train(config))
    assert weights(config) == undisturbed(config)[0]


def test_a_stop_is_heard_before_the_next_block(config: TrainConfig) -> None:
    reference, _ = undisturbed(config)
    stop, blocks, original = threading.Event(), [], Runner._forward

    def noted(self: Runner, block: Block, *arguments: Any) -> Any:
        blocks.append(block.layer)
        if len(blocks) == 3:
            stop.set()
        return original(self, block, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runner, "_forward", noted)
        end = list(train(config, stop))[-1]
    assert isinstance(end, Interrupted)
    assert blocks == [0, 1, 0]  # in the middle of the second row
    list(train(config))
    assert weights(config) == reference


def test_a_deadline_gives_an_adapter_and_the_same_command_goes_on(config: TrainConfig, private_home: Path) -> None:
    reference, _ = undisturbed(config)
    hurried = dataclasses.replace(config, minutes=1e-9)
    for step in (1, 2):
        end = list(train(hurried))[-1]
        assert isinstance(end, Finished)
        assert (end.steps, end.cut) == (step, "deadline")
        assert Path(end.adapter, "adapter_model.safetensors").is_file()
    assert unfinished(private_home).is_dir()
    end = list(train(config))[-1]
    assert isinstance(end, Finished)
    assert (end.steps, end.cut) == (6, None)
    assert weights(config) == reference


def test_a_run_that_is_gone_on_with_writes_one_adapter(config: TrainConfig, private_home: Path) -> None:
    run_until(dataclasses.replace(config, out=None), 3)
    end = list(train(dataclasses.replace(config, out=None)))[-1]
    assert isinstance(end, Finished)
    (run,) = (private_home / "runs").iterdir()
    adapters = [path.name for path in private_home.glob("adapters/*/*") if path.is_dir()]
    assert adapters == [run.name] == [Path(end.adapter).name]


BYTES: dict[str, Callable[[int], int]] = {
    "header's length": lambda size: 1,
    "state": lambda size: 40,
    "middle": lambda size: size * 3 // 4,
    "checksum": lambda size: size - 8,
    "end": lambda size: size - 1,
}
"""For each kind of damage, the position of the flipped bit's byte in a file of the given size in bytes."""


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[BYTES[how](len(data))] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", *BYTES])
def test_of_a_damaged_checkpoint_the_one_before_is_used(config: TrainConfig, private_home: Path, how: str) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 4)
    last = max(unfinished(private_home).glob("checkpoint-*"))
    damage(last, how)
    events = list(train(config))
    assert resumed(events) == Resumed(3, ("The last checkpoint is damaged. The run resumes from the one before it (step 3).",))
    assert weights(config) == reference


def test_without_a_whole_checkpoint_the_same_plan_starts_again(config: TrainConfig, private_home: Path) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 3)
    for checkpoint in unfinished(private_home).glob("checkpoint-*"):
        damage(checkpoint, "cut")
    (Path(config.data.notes[0]) / "00.md").write_text("Other words, which this run has not begun with.\n")
    events = list(train(config))
    assert resumed(events).step == 0
    assert resumed(events).notices[0] == "Every checkpoint is damaged. The run starts again at step 0 with the same plan."
    assert weights(config) == reference


@pytest.mark.parametrize("file", ["run.json", "tokens/ids.bin", "held-out/documents.json"])
def test_a_run_whose_plan_or_tokens_are_damaged_starts_over(config: TrainConfig, private_home: Path, file: str) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 3)
    damage(unfinished(private_home) / file, "middle")
    events = list(train(config))
    assert resumed(events) == Resumed(0, ("The files of this command's interrupted run are damaged, so training starts over.",))
    assert weights(config) == reference


def test_a_run_of_another_version_starts_over_and_says_so(config: TrainConfig, private_home: Path) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 3)
    record = unfinished(private_home) / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": unfinished_run.FORMAT - 1}))
    events = list(train(config))
    assert resumed(events).notices == (
        "An interrupted run of this command was begun by another version of edgetune, so training starts over.",
    )
    assert weights(config) == reference


def test_a_best_adapter_newer_than_the_checkpoint_or_half_written_changes_nothing(
    config: TrainConfig, private_home: Path
) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 3)
    left = unfinished(private_home) / ".best.safetensors.1"
    for path in (left, unfinished(private_home) / "best.safetensors"):
        path.write_bytes(b"not what was written")
    for event in train(config):
        assert not isinstance(event, Stepped) or not left.exists()
    assert weights(config) == reference


def test_a_best_adapter_that_the_disk_changed_is_not_taken(tmp_path: Path) -> None:
    best = BestAdapter(tmp_path, LoraConfig(2, 2.0))
    best.save({"0.q_proj.lora_A": torch.ones(2, 8)})
    assert torch.equal(best.tensors()["0.q_proj.lora_A"], torch.ones(2, 8))
    damage(tmp_path / "best.safetensors", "middle")
    with pytest.raises(ResourceError, match=r"Run the same command again: it resumes from the last checkpoint"):
        best.tensors()


@pytest.mark.skipif(not ops.fuses(torch.device("cpu"), torch.bfloat16), reason="this machine has no fused kernels")
def test_a_run_in_8_bits_that_goes_on_without_kernels_for_them_says_so(config: TrainConfig) -> None:
    config = dataclasses.replace(config, weights="nf4")
    run_until(config, 3)
    with ops.use_backend("reference"):
        notices = resumed(list(train(config))).notices
    assert any("began with products in 8 bits" in notice for notice in notices)


def test_changed_notes_wait_for_fresh(config: TrainConfig) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 2)
    note = Path(config.data.notes[0]) / "03.md"
    note.write_text("Marra has sold the shed and all that was in it, and the beans go unwatered.\n")
    stop = threading.Event()
    events = []
    for event in train(config, stop):
        events.append(event)
        stop.set()
    assert "The notes have changed" in resumed(events).notices[0]
    assert "--fresh" in resumed(events).notices[0]
    list(train(config))
    assert weights(config) == reference
    run_until(config, 2)
    events = list(train(config, fresh=True))
    assert not any(isinstance(event, Resumed) for event in events)
    assert weights(config) != reference


def test_notes_that_vanished_do_not_stop_a_run(config: TrainConfig) -> None:
    reference, _ = undisturbed(config)
    run_until(config, 2)
    shutil.rmtree(config.data.notes[0])
    events = list(train(config))
    assert "can no longer be read" in resumed(events).notices[0]
    assert weights(config) == reference


def test_another_command_is_another_run(config: TrainConfig, private_home: Path) -> None:
    run_until(config, 2)
    events = run_until(dataclasses.replace(config, lr=1e-3), 1)
    assert not any(isinstance(event, Resumed) for event in events)
    assert len([path for path in (private_home / "unfinished").iterdir() if path.is_dir()]) == 2


def test_what_is_kept_is_private_and_no_pickle(config: TrainConfig, private_home: Path) -> None:
    run_until(config, 3)
    kept = [private_home, *private_home.rglob("*")]
    assert [path for path in kept if path.stat().st_mode & 0o077] == []
    assert {path.suffix for path in unfinished(private_home).rglob("*") if path.is_file()} == {".json", ".bin", ".safetensors"}
    assert len(list(unfinished(private_home).glob("checkpoint-*"))) == 2


def test_a_run_that_cannot_converge_is_not_gone_on_with(
    config: TrainConfig, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from edgetune.runtime.runner import Runner

    monkeypatch.setattr(Runner, "train", lambda self, *arguments: torch.tensor(float("nan")))
    with pytest.raises(TrainingError):
        list(train(config))
    assert [path.name for path in (private_home / "unfinished").iterdir() if path.is_dir()] == []


def test_a_run_left_alone_for_a_month_is_forgotten_unless_it_is_this_one(
    config: TrainConfig, private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(config, 2)
    other = dataclasses.replace(config, lr=1e-3, out=None)
    run_until(other, 1)
    assert len(list(private_home.glob("unfinished/*/run.json"))) == 2
    now = time.time()
    monkeypatch.setattr(unfinished_run.time, "time", lambda: now + 31 * 86400)
    assert resumed(run_until(other, 2)).step == 1
    assert len(list(private_home.glob("unfinished/*/run.json"))) == 1


def test_tokens_of_a_run_that_never_began_are_deleted_by_the_next(config: TrainConfig, private_home: Path) -> None:
    run_until(config, 2)
    left = unfinished(private_home)
    (left / "run.json").unlink()
    list(train(dataclasses.replace(config, lr=1e-3, out=None)))
    assert not left.exists()


def test_a_lock_is_exclusive_says_who_holds_it_and_ends_with_its_block(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock", "this run"):
        with pytest.raises(BusyError, match=rf"^Process {os.getpid()} \(since 20.*\) is already using this run"):
            Lock(tmp_path / "lock", "this run").__enter__()
        assert (tmp_path / "lock").stat().st_mode & 0o077 == 0
    with Lock(tmp_path / "lock", "this run"):
        pass


def test_two_runs_at_once_need_two_outputs(config: TrainConfig) -> None:
    running = train(config)
    next(running)
    other = dataclasses.replace(config, lr=1e-3)
    with pytest.raises(BusyError, match=r"is already using the output folder .*out\. Wait"):
        list(train(other))
    elsewhere = list(train(dataclasses.replace(other, out=f"{config.out}-2")))
    assert isinstance(elsewhere[-1], Finished)
    assert isinstance(list(running)[-1], Finished)


def test_a_checkpoint_is_due_before_two_minutes_could_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("edgetune.training.checkpoints.time.monotonic", lambda: now[0])
    monkeypatch.setattr("edgetune.training.checkpoints.KEEP_SECONDS", 100.0)
    writer = CheckpointWriter(None, None, expected_bytes=150_000_000)  # type: ignore[arg-type]
    assert not writer.is_cheap()  # no checkpoint's cost was measured yet
    assert not writer.is_due(ahead=5.0)
    now[0] += 94
    assert not writer.is_due(ahead=5.0)
    assert writer.is_due(ahead=20.0)
    now[0] += 1
    assert writer.is_due(ahead=5.0)
    assert not writer.is_cheap()  # its cost is guessed at 0.3 s in 95 s
    now[0] += 10
    assert writer.is_cheap()
    writer.write_seconds = 0.5
    assert not writer.is_cheap()
    now[0] += 100
    assert writer.is_cheap()
