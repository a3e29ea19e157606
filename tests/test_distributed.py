"""Under torchrun, two processes give one process's result, a death loses nothing, and no data leaves the machine unasked."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from tiny import save_trainable

from edgetune.config import DataConfig, TrainConfig
from edgetune.events import Event, Interrupted, Saved, Stepped
from edgetune.library.loading import open_base
from edgetune.runtime.errors import LinkError, UsageError
from edgetune.training.checkpoints import restore_checkpoint
from edgetune.training.distributed import BUCKET_VALUES, SingleProcess, _buckets, join_processes
from edgetune.training.setup import prepare_follower, prepare_new

training = importlib.import_module("edgetune.training.train")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no Gloo")
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*LAUNCH, "--nproc-per-node", "2", "-m", "edgetune"]
TEXT = "the tide turned at noon and we walked back along the wet sand with our shoes in our hands"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a folder with a tiny model and some notes, where runs also have their home."""
    save_trainable(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    words = TEXT.split()
    for number in range(12):
        text = " ".join(words[(number * 5 + i * (number + 2)) % len(words)] for i in range(90))
        (tmp_path / "notes" / f"{number}.md").write_text(f"# Note {number}\n\n{text}\n")
    return tmp_path


def arguments(place: Path, *own: str) -> list[str]:
    exact = ["--dropout", "0", "--compute", "fp32", "--seq-len", "64", "--batch-tokens", "512"]
    return ["train", str(place / "notes"), "--model", str(place / "model"), *exact, *own, "--json"]


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "EDGETUNE_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}


def events(output: str) -> list[dict[str, Any]]:
    """Return the events in torchrun's output."""
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"event"')]


def run(command: list[str], place: Path, **own: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(place), cwd=place, **own)


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between two adapters, divided by the first one's largest value."""
    a, b = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a) / max(float(tensor.abs().max()) for tensor in a.values())


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(place: Path) -> None:
    both = run([*TWO, *arguments(place, "--steps", "12", "--out", "two")], place)
    assert both.returncode == 0, both.stderr
    alone = run([sys.executable, "-m", "edgetune", *arguments(place, "--steps", "12", "--out", "one")], place)
    assert alone.returncode == 0, alone.stderr
    found, expected = events(both.stdout), events(alone.stdout)
    assert [event["event"] for event in found].count("finished") == 1  # only the leader prints events
    steps = [(e["step"], e["loss"], e["tokens"]) for e in found if e["event"] == "stepped"]
    wanted = [(e["step"], e["loss"], e["tokens"]) for e in expected if e["event"] == "stepped"]
    assert [(step, tokens) for step, _, tokens in steps] == [(step, tokens) for step, _, tokens in wanted]
    assert [loss for _, loss, _ in steps] == pytest.approx([loss for _, loss, _ in wanted], rel=1e-4)
    setting = next(e for e in found if e["event"] == "started")["plan"]["setting"]
    assert setting["row_tokens"] <= 256  # there must be a row for each process
    # Adam turns even the rounding of the smallest gradients into whole steps.
    assert difference(place / "two", place / "one") < 2e-2
    assert [path for path in (place / "home" / "unfinished").iterdir() if path.is_dir()] == []


def follower(agent: subprocess.Popen[str]) -> psutil.Process:
    """Return torchrun's child process of rank 1."""
    return next(child for child in psutil.Process(agent.pid).children() if child.environ().get("RANK") == "1")


@pytest.fixture
def started(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a run of two processes and wait until it has reached step 10."""
    command = [*TWO, *arguments(place, "--steps", "300", "--out", "out")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(place), cwd=place, **pipes) as agent:
        try:
            assert agent.stdout is not None
            for line in agent.stdout:
                if '"stepped", "step": 10,' in line:
                    break
            yield agent
        finally:
            agent.kill()
            for child in psutil.process_iter(["cmdline"]):
                if str(place) in " ".join(child.info["cmdline"] or []):
                    child.kill()


@pytest.mark.slow
def test_a_workers_death_ends_the_run_at_its_last_step_and_it_goes_on(place: Path, started: subprocess.Popen[str]) -> None:
    follower(started).send_signal(signal.SIGKILL)
    output, errors = started.communicate(timeout=60)
    assert started.returncode != 0
    assert "Another process of this run ended" in errors
    assert "Traceback" not in errors.split("ChildFailedError")[0].split("torch/distributed")[0]
    kept = [event for event in events(output) if event["event"] == "saved"][-1]
    assert kept["step"] >= 10
    again = run([sys.executable, "-m", "edgetune", *arguments(place, "--steps", "300", "--out", "out")], place)
    assert again.returncode == 0, again.stderr
    steps = events(again.stdout)
    assert next(event for event in steps if event["event"] == "resumed")["step"] == kept["step"]
    assert steps[-1]["steps"] == 300


def test_workers_of_one_machine_listen_on_loopback_alone(started: subprocess.Popen[str]) -> None:
    sockets = follower(started).net_connections(kind="inet")
    assert sockets
    assert {connection.laddr.ip for connection in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_a_stop_is_kept_and_two_go_on_with_it(place: Path, started: subprocess.Popen[str]) -> None:
    started.terminate()
    output, _ = started.communicate(timeout=60)
    stopped = events(output)[-1]
    assert stopped["event"] == "interrupted"
    assert stopped["step"] < 300
    again = run([*TWO, *arguments(place, "--steps", "300", "--out", "out")], place)
    assert again.returncode == 0, again.stderr
    assert next(event for event in events(again.stdout) if event["event"] == "resumed")["step"] == stopped["step"]


@pytest.mark.slow
def test_other_notes_on_another_machine_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "notes", place / "others")
    (place / "others" / "3.md").write_text("We wrote something else here, and nobody copied it to the other machine.\n")
    script = place / "each.py"
    script.write_text(
        "import os, sys\n"
        "from edgetune.cli.main import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[2] = os.environ['OTHERS']\n"
        "main()\n"
    )
    monkeypatch.setenv("OTHERS", str(place / "others"))
    tried = run([*LAUNCH, "--nproc-per-node", "2", str(script), *arguments(place, "--steps", "3")], place)
    assert tried.returncode != 0
    assert "The notes on this machine are not the notes of this run" in tried.stderr
    assert "Another process of this run could not begin" in tried.stderr
    assert "wrote" not in tried.stderr
    assert "tide" not in tried.stderr


def test_a_machine_that_cannot_multiply_as_the_leader_does_is_refused(place: Path) -> None:
    data = DataConfig(notes=(str(place / "notes"),), seq_len=64, batch_tokens=512)
    config = TrainConfig(model=str(place / "model"), data=data, device="cpu", compute="fp32")
    base = open_base(config.model)
    for folder in ("leader", "follower"):
        (place / folder).mkdir()
    record = prepare_new(config, base, place / "leader").record.for_followers()
    assert prepare_follower(config, base, place / "follower", record).plan.int8 is False
    # The run computes in fp32, for which no machine has int8 kernels.
    leader = dataclasses.replace(record, plan=dataclasses.replace(record.plan, int8=True))
    with pytest.raises(UsageError, match="Type --compute bf16 or fp32, the same for all processes"):
        prepare_follower(config, base, place / "follower", leader)


def launched(monkeypatch: pytest.MonkeyPatch, here: int) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(here), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def test_several_machines_are_refused_until_the_link_is_said_to_be_private(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, here=1)
    with pytest.raises(UsageError, match="--private-link"), join_processes(torch.device("cpu"), private_link=False):
        raise AssertionError("it was not refused")


def test_without_torchrun_nobody_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with join_processes(torch.device("cpu"), private_link=False) as world:
        assert isinstance(world, SingleProcess)
        assert world.size == 1


class Dying(SingleProcess):
    """A world of two whose other process dies at copy `dies_at_copy` or, if that is 0, before the end is announced."""

    size = 2

    def __init__(self, dies_at_copy: int) -> None:
        self.copies, self.dies_at_copy = 0, dies_at_copy

    def copy_from_leader(self, tensors: Sequence[torch.Tensor]) -> None:
        self.copies += 1
        if self.copies == self.dies_at_copy:
            raise LinkError("gone")

    def announce_step(self, step: int | None) -> None:
        if step is None and self.dies_at_copy == 0:
            raise LinkError("gone")


def one_run(place: Path, world: SingleProcess, stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    monkeypatch.setenv("EDGETUNE_HOME", str(place / "home"))
    monkeypatch.setattr(training, "join_processes", lambda device, private_link: contextlib.nullcontext(world))
    data = DataConfig(notes=(str(place / "notes"),), seq_len=64, batch_tokens=512)
    settings = {"steps": 12, "dropout": 0.0, "compute": "fp32", "evaluation_share": 1.0}
    yield from training.train(TrainConfig(data=data, model=str(place / "model"), **settings), stop)  # type: ignore[arg-type]


def test_a_death_between_steps_keeps_a_checkpoint_of_one_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LinkError):
        list(one_run(place, Dying(dies_at_copy=3), threading.Event(), monkeypatch))
    folder = next(path for path in (place / "home" / "unfinished").iterdir() if path.is_dir())
    kept = restore_checkpoint(folder)
    assert kept.state.step > 0
    assert int(kept.tensors["optimizer.step"]) == kept.state.step


def test_a_stop_because_of_a_death_keeps_a_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, seen = threading.Event(), []
    for event in one_run(place, Dying(dies_at_copy=0), stop, monkeypatch):
        seen.append(event)
        if isinstance(event, Stepped) and event.step == 4:
            stop.set()
    assert isinstance(seen[-2], Saved)
    assert seen[-2].step == 4
    assert isinstance(seen[-1], Interrupted)


def test_a_stop_that_reaches_a_follower_first_is_a_stop(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    class Stopped(Dying):
        def announce_step(self, step: int | None) -> None:
            if step is None:
                raise LinkError("gone")
            if step == 4:
                stop.set()
                raise LinkError("gone")

    *_, saved, last = one_run(place, Stopped(dies_at_copy=0), stop, monkeypatch)
    assert isinstance(saved, Saved)
    assert isinstance(last, Interrupted)
    assert saved.step == last.step == 4


def test_a_private_link_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, here=1)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(UsageError, match="GLOO_SOCKET_IFNAME"), join_processes(torch.device("cpu"), private_link=True):
        raise AssertionError("it was not refused")


def test_gradients_travel_in_buckets_and_each_once() -> None:
    tensors = [torch.zeros(size) for size in (3, BUCKET_VALUES - 1, 7, BUCKET_VALUES, 1)]
    buckets = list(_buckets(tensors))
    assert [tensor for bucket in buckets for tensor in bucket] == tensors
    assert [len(bucket) for bucket in buckets] == [2, 2, 1]


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Create two network namespaces joined by a virtual cable, with the addresses 10.77.0.1 and 10.77.0.2."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip")
    names = "edgetune-a", "edgetune-b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "et-a", "netns", names[0], "type", "veth", "peer", "name", "et-b", "netns", names[1])
        for number, (name, link) in enumerate(zip(names, ("et-a", "et-b"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_machines_over_a_private_link_give_the_result_of_one(place: Path, namespaces: tuple[str, str]) -> None:
    def machines(*own: str) -> list[tuple[int, str, str]]:
        running = []
        for number, name in enumerate(namespaces):
            launch = [*LAUNCH, "--nnodes", "2", "--node-rank", str(number), "--master-addr", "10.77.0.1", "--master-port"]
            command = [
                "ip",
                "netns",
                "exec",
                name,
                *launch,
                "29511",
                "-m",
                "edgetune",
                *arguments(place, "--steps", "12", *own),
            ]
            home = place / f"machine-{number}"
            home.mkdir(exist_ok=True)
            own_link = {"EDGETUNE_HOME": str(home / "home"), "GLOO_SOCKET_IFNAME": f"et-{'ab'[number]}"}
            env = {**environment(place), **own_link}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(command, text=True, cwd=home, env=env, **pipes))
            time.sleep(0.2)
        ended = [process.communicate(timeout=180) for process in running]
        return [(process.returncode, *said) for process, said in zip(running, ended, strict=True)]

    for code, _, errors in machines("--out", "two"):
        assert code != 0
        assert "--private-link" in errors
    for code, _, errors in machines("--out", "two", "--private-link"):
        assert code == 0, errors
    alone = run([sys.executable, "-m", "edgetune", *arguments(place, "--steps", "12", "--out", "one")], place)
    assert alone.returncode == 0, alone.stderr
    assert difference(place / "machine-0" / "two", place / "one") < 2e-2
    assert not (place / "machine-1" / "two").exists()
