"""The command line gives up the network, by the kernel where it can, and the parser of documents all that it does not need."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_format import native
from tiny import save_trainable

from edgetune.cli import main as cli
from edgetune.documents.parser_process import ParserProcess
from edgetune.documents.parser_rules import refused_calls
from edgetune.privacy import landlock, seccomp
from edgetune.privacy.network_guard import FORBIDDEN, Guard, NetworkForbidden
from edgetune.privacy.seccomp import MACHINES, Machine
from edgetune.privacy.system_calls import NUMBERS

HERE = Path(__file__).parent
INTERNET, INTERNET_6, NETLINK, PACKET, UNIX = 2, 10, 16, 17, 1
SET_OWNER = 8
"""Linux's F_SETOWN, by which a file that is ready sends a process a signal."""
by_seccomp = pytest.mark.skipif(not seccomp.is_offered(), reason="this system has no seccomp filters for this processor")
by_landlock = pytest.mark.skipif(landlock.version() < 1, reason="this system has no Landlock, or it is off")
by_landlock_tcp = pytest.mark.skipif(landlock.version() < 4, reason="Landlock refuses TCP from Linux 6.7 on")
PRELUDE = f"""
import ctypes, errno, json, subprocess, sys, threading
sys.path.insert(0, {str(HERE)!r})
from hostile_format import native
def sockets(*families):
    return [native(f"socket {{family}} 3 0" if family == {PACKET} else f"socket {{family}} 1 0") for family in families]
"""
GUARD = "from edgetune.privacy.network_guard import forbid_network\nheld = str(forbid_network())\n"
TRAINED = """
import edgetune.cli.main as cli
cli.give_up_network = lambda words: None
cli.main()
"""
"""The command without its guard."""


def said(program: str) -> object:
    """Run a Python program in a process of its own, and return the JSON that it prints."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the network ------------------------------------------------------------------------------------------------------


def test_without_the_guard_native_code_opens_sockets() -> None:
    assert said(f"print(json.dumps(sockets({INTERNET}, {UNIX})))") == ["done", "done"]


@by_seccomp
def test_the_kernel_refuses_native_code_every_socket_but_unix_ones() -> None:
    program = f"{GUARD}print(json.dumps([held, *sockets({INTERNET}, {INTERNET_6}, {NETLINK}, {PACKET}, {UNIX})]))"
    assert said(program) == ["seccomp", "EACCES", "EACCES", "EACCES", "EACCES", "done"]


@by_seccomp
def test_no_other_number_of_a_call_and_no_ring_leads_past_the_kernel() -> None:
    """Tries the same calls with bits that the kernel ignores, by x32's numbers, and through io_uring."""
    here = seccomp.machine()
    assert here is not None
    number, ring = NUMBERS["socket"][here.column], NUMBERS["io_uring_setup"][here.column]
    program = f"""
{GUARD}
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    done = libc.syscall(*map(ctypes.c_long, arguments))
    return errno.errorcode[ctypes.get_errno()] if done < 0 else "done"
print(json.dumps([
    call({number}, {INTERNET} | 1 << 40, 1, 0),
    call({number}, {UNIX} | 1 << 40, 1, 0),
    call({number} | 0x40000000, {INTERNET}, 1, 0),
    call({ring}, 4, 0),
]))
"""
    assert said(program) == ["EACCES", "done", "EACCES", "EACCES"]


@by_seccomp
def test_threads_that_run_already_and_programs_that_are_started_are_refused_too() -> None:
    child = f"{PRELUDE}\nprint(sockets({INTERNET})[0])"
    program = f"""
go, found = threading.Event(), []
thread = threading.Thread(target=lambda: (go.wait(), found.extend(sockets({INTERNET}))))
thread.start()
{GUARD}
go.set()
thread.join()
done = subprocess.run([sys.executable, "-c", {child!r}], capture_output=True, text=True)
print(json.dumps([*found, done.stdout.strip()]))
"""
    assert said(program) == ["EACCES", "EACCES"]


@by_seccomp
def test_what_commands_need_goes_on_under_the_guard() -> None:
    program = f"""
{GUARD}
import multiprocessing, os, pwd, socket
left, right = socket.socketpair()
left.send(b"x")
with multiprocessing.get_context("forkserver").Pool(1) as pool:
    squared = pool.map(abs, [-3])
print(json.dumps([right.recv(1).decode(), squared, pwd.getpwuid(os.getuid()).pw_uid == os.getuid()]))
"""
    assert said(program) == ["x", [3], True]


def test_python_code_gets_a_sentence_wherever_it_reaches_for_the_network() -> None:
    program = f"""
{GUARD}
import socket
found = []
for reach in (
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    lambda: socket.getaddrinfo("example.org", 443),
    lambda: socket.gethostbyname("example.org"),
):
    try:
        reach()
    except OSError as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""
    found = said(program)
    assert isinstance(found, list)
    assert len(found) == 4
    for name, sentence in found:
        assert name == NetworkForbidden.__name__
        assert re.fullmatch(r"Something asked for the network \(socket\.\w+\), which edgetune forbids itself: .*\.", sentence)


def test_a_command_that_reaches_for_the_network_ends_with_one_sentence() -> None:
    program = """
import socket, sys
from edgetune.cli import doctor, main
doctor.doctor_command.callback = lambda **options: socket.create_connection(("127.0.0.1", 9))
sys.argv = ["edgetune", "doctor"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("edgetune: Something asked for the network")
    assert done.stderr.count("\n") == 1


@by_landlock_tcp
def test_where_there_is_landlock_alone_it_refuses_tcp() -> None:
    program = f"""
import socket
from edgetune.privacy import landlock, network_guard
network_guard.seccomp.install = lambda *rules, **settings: False
server = socket.create_server(("127.0.0.1", 0))
address = ctypes.create_string_buffer(__import__("struct").pack("=H", 2) + server.getsockname()[1].to_bytes(2, "big")
    + bytes([127, 0, 0, 1]) + bytes(8))
libc = ctypes.CDLL(None, use_errno=True)
def connect():
    done = libc.connect(libc.socket({INTERNET}, 1, 0), address, 16)
    return errno.errorcode[ctypes.get_errno()] if done < 0 else "done"
before = connect()
print(json.dumps([before, str(network_guard.forbid_network()), connect(), *sockets({INTERNET})]))
"""
    assert said(program) == ["done", "Landlock, TCP alone", "EACCES", "done"]


def test_a_command_that_starts_a_browser_leaves_it_the_network() -> None:
    program = """
from edgetune.privacy.network_guard import forbid_network, guard
held = str(forbid_network(kernel=False))
import socket
try:
    socket.socket()
except PermissionError:
    held += ", refused"
done = subprocess.run([sys.executable, "-c", "import socket; socket.socket().close()"])
print(json.dumps([held, str(guard()), done.returncode]))
"""
    assert said(program) == ["audit hook, refused", "audit hook", 0]


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("train notes --steps 2", True),
        ("--version", True),
        ("nightly run --minutes 5", True),
        ("nightly install notes", False),
        ("nightly status", False),
        ("report --open", False),
        ("purge --yes", False),
    ],
)
def test_each_command_gives_up_what_it_can(words: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(cli, "forbid_network", lambda kernel: asked.append(kernel))
    cli.give_up_network(words.split())
    assert asked == [kernel]


def test_processes_of_torchrun_keep_the_network_and_other_commands_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(cli, "forbid_network", lambda kernel: asked.append(kernel))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.give_up_network(["train", "notes"])
    assert asked == []
    cli.give_up_network(["eval", "notes"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.give_up_network(["train", "notes"])
    assert asked == [True, True]


@pytest.mark.slow
@by_seccomp
def test_training_under_the_guard_gives_the_same_bits(tmp_path: Path) -> None:
    save_trainable(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    for number in range(4):
        (tmp_path / "notes" / f"{number}.md").write_text(f"Day {number}: the beans by the shed want water again.\n" * 3)
    words = ["train", str(tmp_path / "notes"), "--model", str(tmp_path / "model"), "--steps", "2", "--json"]
    digests = {}
    for name, start in {"guarded": ["-m", "edgetune"], "free": ["-c", TRAINED]}.items():
        out = tmp_path / name
        environment = {**os.environ, "EDGETUNE_HOME": str(tmp_path / f"{name}-home")}
        done = subprocess.run(
            [sys.executable, *start, *words, "--out", str(out)], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        digests[name] = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digests["guarded"] == digests["free"]


@pytest.mark.slow
def test_doctor_says_what_enforces_both() -> None:
    done = subprocess.run([sys.executable, "-m", "edgetune", "doctor", "--json"], capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    offered = {"seccomp": seccomp.is_offered(), "Landlock": landlock.version() > 0, "audit hook": True}
    assert found["parser_guard"] == [name for name, is_offered in offered.items() if is_offered]
    assert found["network_guard"] in [str(guard) for guard in Guard if guard is not Guard.NONE]
    if seccomp.is_offered():
        assert found["network_guard"] == "seccomp"


# --- the parser -------------------------------------------------------------------------------------------------------


def deeds(folder: Path) -> dict[str, str]:
    """Return what native code does that no parser needs, and the error with which the kernel refuses it."""
    note = folder / "note"
    note.write_text("a private key")
    (folder / "folder").mkdir()
    return {
        f"socket {INTERNET} 1 0": "EACCES",
        f"socket {UNIX} 1 0": "EACCES",
        f"open {note} {os.O_WRONLY}": "EACCES",
        f"open {folder / 'new'} {os.O_RDWR | os.O_CREAT} 384": "EACCES",
        f"truncate {note} 0": "EACCES",
        f"chmod {note} 0": "EACCES",
        f"rename {note} {folder / 'moved'}": "EACCES",
        f"unlink {note}": "EACCES",
        f"rmdir {folder / 'folder'}": "EACCES",
        "fork": "EACCES",
        "execlp true true 0": "EACCES",
        f"kill {os.getpid()} 0": "EACCES",
        f"tgkill {os.getpid()} {os.getpid()} 0": "EACCES",
        f"fcntl 0 {SET_OWNER} {os.getpid()}": "EACCES",
    }


@by_seccomp
def test_the_kernel_refuses_native_code_in_the_parser_what_no_parser_needs(tmp_path: Path) -> None:
    expected = deeds(tmp_path)
    with ParserProcess() as parser:
        found = {words: parser.parse("hostile_format", f"native {words}".encode()).texts[0] for words in expected}
        assert parser.parse("hostile_format", b"thread hello").texts == ["hello"]
    assert found == expected
    assert (tmp_path / "note").read_text() == "a private key"


@by_seccomp
def test_outside_of_the_parser_the_same_native_code_succeeds(tmp_path: Path) -> None:
    tried = [words for words in deeds(tmp_path) if words.split()[0] not in ("fork", "execlp")]
    assert {words: native(words) for words in tried} == {
        words: "ENOENT" if words.startswith("unlink") else "done"
        for words in tried  # it was renamed before
    }


@by_landlock
def test_the_kernel_lets_native_code_in_the_parser_read_nothing_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("a private key")
    read = os.O_RDONLY
    places = {
        f"open {tmp_path / 'note'} {read}": "EACCES",
        f"open {tmp_path} {read | os.O_DIRECTORY}": "EACCES",
        f"open /etc/passwd {read}": "EACCES",
        f"open /proc/self/environ {read}": "EACCES",
        f"open {json.__file__} {read}": "done",
    }
    with ParserProcess() as parser:
        assert {words: parser.parse("hostile_format", f"native {words}".encode()).texts[0] for words in places} == places
    assert {words: native(words) for words in places} == dict.fromkeys(places, "done")


# --- the filter -------------------------------------------------------------------------------------------------------


def decision(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """Return the decision of a BPF program about a system call."""
    data = struct.pack("<iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    place, word = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, 8 * place)
        if code == 0x06:
            return value
        if code == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
            place += 1
        else:
            holds = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[code]
            place += 1 + (if_true if holds else if_false)


ALLOWED, KILLED, REFUSED, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x50000 | errno.EACCES, 0x50000 | errno.ENOSYS


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_filters_decide_alike_on_every_processor(machine: Machine) -> None:
    def decided(program: bytes, call: str, *arguments: int) -> int:
        number = NUMBERS[call][machine.column]
        assert number is not None
        return decision(program, machine.audit, number, *arguments)

    network, parser = seccomp.program(FORBIDDEN, machine), seccomp.program(refused_calls(), machine)
    assert decided(network, "socket", INTERNET) == REFUSED
    assert decided(network, "socket", UNIX) == ALLOWED
    assert decided(network, "openat", 0, 0, os.O_WRONLY) == ALLOWED
    assert decision(network, 0x40000003, NUMBERS["socket"][machine.column] or 0, UNIX) == KILLED  # i386
    assert decision(network, machine.audit, 0x40000000, UNIX) == REFUSED
    assert decided(parser, "socket", UNIX) == REFUSED
    assert decided(parser, "openat", 0, 0, os.O_RDONLY) == ALLOWED
    assert decided(parser, "openat", 0, 0, os.O_RDWR) == REFUSED
    assert decided(parser, "clone", 0x10000) == ALLOWED
    assert decided(parser, "clone", 17) == REFUSED
    assert decided(parser, "clone3") == NO_SUCH_CALL
    assert decided(parser, "tgkill", os.getpid()) == ALLOWED
    assert decided(parser, "tgkill", os.getpid() + 1) == REFUSED
    assert decided(parser, "execve") == REFUSED
    assert [decided(parser, "fcntl", 0, command) for command in (SET_OWNER, 15, 1)] == [REFUSED, REFUSED, ALLOWED]  # 1: F_GETFD
    requests = (0x5412, 0x541C, 0x5401)  # TIOCSTI, TIOCLINUX and TCGETS
    assert [decided(parser, "ioctl", 0, request) for request in requests] == [REFUSED, REFUSED, ALLOWED]
    for call in ("shmat", "semop", "msgrcv", "mq_unlink"):
        assert decided(parser, call) == REFUSED


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize("column", [0, 1], ids=MACHINES)
def test_the_numbers_are_those_of_the_kernels_headers(column: int) -> None:
    header = Path(HEADERS[column])
    if not header.exists():
        pytest.skip(f"{header} is not on this machine: install linux-libc-dev")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text())
    known = {name: int(number) for name, number in reversed(defined)}
    ours = {name: numbers[column] for name, numbers in NUMBERS.items() if numbers[column] is not None}
    newer = {"fchmodat2", "setxattrat", "removexattrat", "file_setattr"} - known.keys()  # than the headers of Linux 6.1
    assert {name: known[name] for name in ours.keys() - newer} == {name: ours[name] for name in ours.keys() - newer}
