"""A machine, a training and a scheduler that play weeks of nights in seconds: no clock is real, and nothing is computed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

from edgetune.config import TrainConfig
from edgetune.events import Event, Finished, Interrupted, Started, Stepped, Working
from edgetune.nights.conditions import Level
from edgetune.progress import Show
from edgetune.runtime.errors import ResourceError
from edgetune.training.unfinished_run import run_key


class Killed(BaseException):
    """The end of a process by SIGKILL or a loss of power: nothing of the program runs after it."""


class SimulatedSystem:
    """A machine whose time passes only when it is told to.

    `true` is the time that truly passes, in seconds since 1970. The wall clock shows it plus `wall_offset`. The machine's own
    clock stands still while it sleeps. `happenings` are called when their true time has come.
    """

    def __init__(self, true: float) -> None:
        self.true, self.awake, self.slept, self.wall_offset = true, 0.0, 0.0, 0.0
        self.mains: bool | None = True
        self.charge: float | None = 80.0
        self.hot: Level | None = Level.LOW
        self.short_of_memory: Level | None = Level.LOW
        self.last_input: float | None = true - 7200
        self.free: int | None = 100 << 30
        self.sleeps: list[tuple[float, float]] = []
        self.happenings: list[tuple[float, Callable[[], None]]] = []

    def at(self, true: float, happening: Callable[[], None]) -> None:
        """Call `happening` when this true time has come."""
        self.happenings.append((true, happening))
        self.happenings.sort(key=lambda item: item[0])

    def advance(self, seconds: float) -> None:
        """Let the machine be awake for so many seconds."""
        left = seconds
        while self.happenings and self.happenings[0][0] <= self.true + left:
            moment, happening = self.happenings.pop(0)
            step = max(moment - self.true, 0.0)
            self.true, self.awake, left = self.true + step, self.awake + step, left - step
            happening()
        self.true, self.awake = self.true + left, self.awake + left

    def sleep(self, seconds: float) -> None:
        """Let the machine sleep for so many seconds, in which nothing runs."""
        self.sleeps.append((self.true, self.true + seconds))
        self.true, self.slept = self.true + seconds, self.slept + seconds

    def awake_since(self, true: float) -> float:
        """Return the seconds since a true time in which the machine was awake; negative if that time is still to come."""
        asleep = sum(max(min(end, self.true) - max(start, true), 0.0) for start, end in self.sleeps)
        return self.true - true - asleep

    def now(self) -> float:
        return self.true + self.wall_offset

    def monotonic(self) -> float:
        return self.awake

    def suspended_seconds(self) -> float | None:
        return self.slept

    def on_mains(self) -> bool | None:
        return self.mains

    def battery(self) -> float | None:
        return self.charge

    def heat(self) -> Level | None:
        return self.hot

    def memory_pressure(self) -> Level | None:
        return self.short_of_memory

    def idle_seconds(self) -> float | None:
        return None if self.last_input is None else self.true - self.last_input

    def free_disk(self) -> int | None:
        return self.free

    def wait(self, seconds: float, stop: threading.Event) -> None:
        self.advance(seconds)


@dataclasses.dataclass
class SimulatedTrainer:
    """Trains nothing, but takes time, stops, resumes, is killed and ends by a deadline as training/train.py does.

    An adapter is a name and its score on the held-out notes (lower is better). As the real one, it compares a new adapter with
    the one that it was trained from, and makes it the current one if it is better.
    """

    system: SimulatedSystem
    next_gain: Callable[[], float] = lambda: 0.01
    """Returns how much lower the score of the next adapter is than that of its parent."""
    load_seconds: float = 20.0
    step_seconds: float = 30.0
    finish_seconds: float = 20.0
    steps: int = 100
    before_anything: Callable[[str], None] = lambda where: None
    """Called with a name wherever the process may be killed or fail."""

    def __post_init__(self) -> None:
        self.scores: dict[str, float] = {}
        self.now_current: str | None = None
        self.runs: dict[str, int] = {}
        self.promotions: list[tuple[float | None, float]] = []
        self.trained: list[TrainConfig] = []
        self.running = False

    def current(self, config: TrainConfig, show: Show) -> str | None:
        return self.now_current

    def discard(self, config: TrainConfig) -> None:
        assert not self.running, "the run's lock is held by the training that is still running"
        self.runs.pop(run_key(config, "base"), None)

    def train(self, config: TrainConfig, stop: threading.Event, fresh: bool, show: Show) -> Iterator[Event]:
        assert not self.running, "two nights train at once"
        self.running = True
        try:
            yield from self._train(config, stop, fresh, show)
        finally:
            self.running = False

    def _train(self, config: TrainConfig, stop: threading.Event, fresh: bool, show: Show) -> Iterator[Event]:
        self.trained.append(config)
        assert config.minutes is not None
        deadline = self.system.monotonic() + config.minutes * 60
        key, steps = run_key(config, "base"), config.steps or self.steps
        done = 0 if fresh else self.runs.get(key, 0)
        for part in range(4):
            self.system.advance(self.load_seconds / 4)
            self.before_anything("loading")
            show(Working("loading", part + 1, 4, self.load_seconds))
        self.runs[key] = done
        plan = {"steps": steps}
        yield Started(f"adapter-{len(self.scores)}", "demo", "cpu", "cpu", plan, 1, 0, (), 1, 1, 1)
        first = done
        while done < steps and not (done > first and self.system.monotonic() >= deadline):
            if stop.is_set():
                yield Interrupted(done, steps, done, 0.0)
                return
            if not self._works(self.step_seconds, stop, show):
                continue
            self.before_anything("step")
            done += 1
            self.runs[key] = done
            yield Stepped(done, 1.0, 1e-3, 1.0, 100, 10.0, 1000, 0.0)
        for part in range(4):
            self.system.advance(self.finish_seconds / 4)
            self.before_anything("finishing")
            show(Working("evaluating", part + 1, 4, self.finish_seconds))
            if stop.is_set():
                yield Interrupted(done, steps, done, 0.0)
                return
        yield self._finished(config, key, done, cut=done < steps)

    def _works(self, seconds: float, stop: threading.Event, show: Show) -> bool:
        """Let a step take its time; return False if it was broken off, as the real one is between two blocks."""
        while seconds > 0 and not stop.is_set():
            self.system.advance(min(seconds, 10.0))
            seconds -= 10.0
            show(Working("step", 0, 1, 0.0))
        return not stop.is_set()

    def _finished(self, config: TrainConfig, key: str, done: int, cut: bool) -> Finished:
        before = None if config.from_adapter is None else self.scores[config.from_adapter]
        after = (2.0 if before is None else before) - self.next_gain()
        name = f"adapter-{len(self.scores)}"
        self.scores[name] = after
        promoted = before is None or after < before
        if promoted:
            # What the user has is the current adapter, whatever this one was trained from.
            self.promotions.append((None if self.now_current is None else self.scores[self.now_current], after))
            self.now_current = name
            self.before_anything("promoted")
        if not cut:
            self.runs.pop(key, None)
        ends = "deadline" if cut else None
        decision = {"verdict": "better" if promoted else "not better", "reason": "It was simulated."}
        return Finished(name, done, done, 1.0, before, after, 1, "cpu", 1.0, promoted=promoted, cut=ends, decision=decision)


def full_disk() -> ResourceError:
    """Return the error of a disk that is full."""
    return ResourceError("The disk is full: could not write a file.")
