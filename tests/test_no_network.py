"""No command uses the internet: all of them work without a network, and the kernel's trace of them shows no attempt.

The trace is of commands without their guard, which would refuse an attempt (tests/test_network_guard.py).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import documents_in as made
import pytest
import torch
from safetensors.torch import load_file

from edgetune.config import NightlyConfig
from edgetune.nights.job import Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces and strace are Linux's"),
]

EVAL = "eval notes --model demo --json"
GENERATE = "generate beans --model demo --max-tokens 8 --seed 1 --json"
NIGHT = "nightly run --minutes 5 --json"
FLOW = (
    "train notes --model demo --me Marra --dry-run --json",
    "train notes --model demo --me Marra --steps 2 --json",
    EVAL,
    GENERATE,
    "export peft --model demo --out peft --json",
    "export hf --weights bf16 --model demo --out hf --json",
    "models --json",
    "plan notes --model demo --me Marra --json",
    "report --path",
    NIGHT,
    "nightly status --json",
)
"""The commands of a person who trains, looks at the result, exports it, and lets a night learn more."""
WITHOUT_GUARD = "import edgetune.cli.main as cli; cli.give_up_network = lambda words: None; cli.main()"
WITHOUT_NETWORK = ("unshare", "--user", "--map-root-user", "--net")
"""Starts a program where the kernel has no network interface that is up, not even loopback."""
LETTER = "Marra writes that the tarred shed by the harbour needs a new lock before the figs are ripe and the ferry stops."
CHAT = """12/03/24, 09:15 - Ines: Did you water the beans this morning?
12/03/24, 09:17 - Marra: Yes, with two full cans, before the ferry left the harbour.
12/03/24, 09:18 - Ines: Good. The tarred shed needs a new lock, the old one is rusty.
12/03/24, 09:21 - Marra: I will bring one from the village on Thursday, after the market.
"""
SOCKET_OF_PYTHON = "import socket; socket.socket().close()"
SOCKET_OF_C = "import ctypes; print(ctypes.CDLL(None).socket(10, 1, 0) >= 0)"
REFUSED_SOCKET = f"from edgetune.privacy.network_guard import forbid_network; forbid_network(); {SOCKET_OF_C}"
SOCKET_OF_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SOCKET_OF_C!r}], check=True)"
CONNECT_OF_C = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
address = struct.pack("=HH4s8x", 2, 0x0900, bytes([{address}]))
descriptor = libc.socket(2, {kind}, 0)
print(libc.connect(descriptor, address, len(address)), ctypes.get_errno())
"""
"""Connects to port 9 of an IPv4 address as a C extension would, past everything that Python could forbid."""


@dataclass(frozen=True)
class Done:
    """Holds what each command of the flow printed, and the folder that it ran in."""

    folder: Path
    printed: dict[str, str]

    def value(self, command: str) -> dict[str, object]:
        """Return the last line of JSON that a command printed."""
        found: dict[str, object] = json.loads(self.printed[command].splitlines()[-1])
        return found


def write_notes(folder: Path) -> None:
    """Write a folder of notes with a document and a chat, and one of what a night finds."""
    notes, evening = folder / "notes", folder / "evening"
    notes.mkdir()
    evening.mkdir()
    for number in range(8):
        text = f"Day {number}: the beans by the tarred shed want water, said Marra, and went to number {number * number}."
        (notes / f"{number}.md").write_text(text + " Nobody came by until the ferry was back from the islands.\n")
    (notes / "letter.docx").write_bytes(made.docx(made.paragraph(LETTER)))
    (notes / "WhatsApp Chat with Ines.txt").write_text(CHAT)
    for number in range(4):
        note = evening / f"{number}.md"
        note.write_text(f"Evening {number}: the lamp on the pier was lit {number + 3} times, and the nets are dry again.\n")
        os.utime(note, (time.time() - 86_400,) * 2)  # a night leaves notes alone that somebody may still be writing


def environment(folder: Path) -> dict[str, str]:
    """Return an environment whose home, data folder and caches of models lie in a folder of the test."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_CACHE", "OLLAMA_MODELS")}
    return {**kept, "HOME": str(folder), "HF_HOME": str(folder / "hf-home"), "EDGETUNE_HOME": str(folder / "edgetune")}


def flow(folder: Path, around: tuple[str, ...], program: tuple[str, ...] = ("-m", "edgetune")) -> Done:
    """Run every command of the flow within the program `around`, and assert that each succeeds."""
    write_notes(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_HOME", str(folder / "edgetune"))
        settings = {"model": "demo"}
        Job((str(folder / "evening"),), NightlyConfig(battery=1), "systemd", time.time(), settings).save()
    printed = {}
    for command in FLOW:
        words = [*around, sys.executable, *program, *command.split()]
        done = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        printed[command] = done.stdout
    return Done(folder, printed)


def tool(folder: Path, *words: str) -> None:
    """Skip the test where this tool is missing, or where the system forbids it."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed: install it with the system's own packages")
    tried = subprocess.run([*words, "true"], cwd=folder, capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this system forbids {words[0]}: {tried.stderr.strip()}")


def strace(file: Path) -> tuple[str, ...]:
    """Return the command that runs a program and adds the network calls of it and its children to a file."""
    return ("strace", "-f", "-A", "-s", "256", "-e", "trace=%network,execve", "-o", str(file))


def fast(words: tuple[str, ...]) -> tuple[str, ...]:
    """Let strace stop a program only at the calls that it shows. It then misses those which the program itself refuses."""
    return (words[0], "--seccomp-bpf", *words[1:])


def families(trace: str) -> set[str]:
    """Return the families of the sockets that a trace shows, whether or not they could be opened."""
    return set(re.findall(r"\b(?:socket|socketpair)\((\w+)", trace))


def traced(folder: Path, program: str) -> str:
    """Return the trace of a Python program, which is kept in a folder."""
    file = folder / f"trace-{len(list(folder.iterdir()))}"
    subprocess.run([*strace(file), sys.executable, "-c", program], check=True, capture_output=True)
    return file.read_text()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, str]:
    """Return the flow as it runs anywhere, and its trace."""
    folder = tmp_path_factory.mktemp("traced")
    tool(folder, *strace(folder / "tried"))
    return flow(folder, fast(strace(folder / "trace")), ("-c", WITHOUT_GUARD)), (folder / "trace").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Return the flow as it runs without a network."""
    folder = tmp_path_factory.mktemp("alone")
    tool(folder, *WITHOUT_NETWORK)
    return flow(folder, WITHOUT_NETWORK)


def test_the_whole_flow_opens_no_internet_socket(seen: tuple[Done, str]) -> None:
    done, trace = seen
    lines = trace.splitlines()
    assert any("execve(" in line and '"edgetune.documents.parser_child"' in line for line in lines), "no parser was followed"
    assert done.value(NIGHT)["steps"], "the night learnt nothing"
    sockets = [line for line in lines if "AF_" in line]
    # Users' names are asked of nscd, and the state of the night's timer of systemd, through AF_UNIX.
    assert families(trace) <= {"AF_UNIX"}, "\n".join(sockets)
    assert "AF_INET" not in trace


def test_a_guarded_command_and_its_parser_try_no_socket(tmp_path: Path) -> None:
    tool(tmp_path, *strace(tmp_path / "tried"))
    write_notes(tmp_path)
    words = [*strace(tmp_path / "trace"), sys.executable, "-m", "edgetune", *FLOW[0].split()]
    subprocess.run(words, cwd=tmp_path, env=environment(tmp_path), check=True, capture_output=True, timeout=600)
    trace = (tmp_path / "trace").read_text()
    assert '"edgetune.documents.parser_child"' in trace, "no parser was followed"
    assert families(trace) <= {"AF_UNIX"}


def test_the_whole_flow_comes_to_the_same_without_a_network(seen: tuple[Done, str], alone: Done) -> None:
    done, _ = seen
    for command, names in ((EVAL, ("bits_per_byte", "tokens")), (GENERATE, ("text",)), (NIGHT, ("outcome", "steps", "after"))):
        assert [done.value(command)[name] for name in names] == [alone.value(command)[name] for name in names], command
    for export in ("peft/adapter_model.safetensors", "hf/model.safetensors"):
        outside, inside = load_file(done.folder / export), load_file(alone.folder / export)
        assert outside.keys() == inside.keys()
        assert all(torch.equal(outside[name], inside[name]) for name in outside)


@pytest.mark.parametrize(
    ("program", "family"),
    [(SOCKET_OF_PYTHON, "AF_INET"), (SOCKET_OF_C, "AF_INET6"), (SOCKET_OF_A_CHILD, "AF_INET6"), (REFUSED_SOCKET, "AF_INET6")],
    ids=["python", "c", "a child", "refused"],
)
def test_a_program_that_opens_an_internet_socket_is_caught(tmp_path: Path, program: str, family: str) -> None:
    tool(tmp_path, *strace(tmp_path / "tried"))
    assert family in families(traced(tmp_path, program))
    assert families(traced(tmp_path, "pass")) <= {"AF_UNIX"}


@pytest.mark.parametrize("kind", [1, 2], ids=["tcp", "udp"])
@pytest.mark.parametrize("address", ["127, 0, 0, 1", "192, 0, 2, 1"], ids=["loopback", "elsewhere"])
def test_code_in_c_reaches_nobody_without_a_network(tmp_path: Path, kind: int, address: str) -> None:
    tool(tmp_path, *WITHOUT_NETWORK)
    program = CONNECT_OF_C.format(kind=kind, address=address)
    tried = subprocess.run([*WITHOUT_NETWORK, sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert tried.stdout.split() == ["-1", str(errno.ENETUNREACH)]
