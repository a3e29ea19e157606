"""Asks the real machine for its clocks, power, heat, memory, user and disk, on Linux, macOS and Windows.

psutil knows the battery and, on Linux, the temperatures. What it does not know is read from Linux's own files or printed by a
tool that comes with the system. An answer that cannot be had is None.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from edgetune.home import home
from edgetune.nights.conditions import Level, System

ASKED_EVERY = 5.0
"""Shortest time between two questions to a tool of the system, in seconds; chosen by hand."""
TOOL_SECONDS = 10.0
"""Longest time that such a tool may take, in seconds; chosen by hand."""
STALLED_HIGH, STALLED_RAISED = 10.0, 2.0
"""Percent of the last minute in which all programs waited for memory (Linux's "full avg60"), from which memory is very or
rather short; chosen by hand."""
USED_HIGH, USED_RAISED = 97.0, 92.0
"""Percent of memory in use on Windows from which memory is very or rather short; chosen by hand."""
BELOW_LIMIT = 10.0
"""Degrees Celsius below a sensor's limit from which the machine counts as warm; chosen by hand."""


class ThisSystem:
    """The machine that this process runs on; every method is one of `System`."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, Any]] = {}

    def now(self) -> float:
        """Return the wall clock's time in seconds since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds on a clock that nobody can set; on Linux and macOS it stands still during sleep."""
        return time.monotonic()

    def suspended_seconds(self) -> float | None:
        """Return the seconds slept since the machine was started; None on Windows, whose monotonic clock counts them."""
        if sys.platform == "linux":
            return max(time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC), 0.0)
        if sys.platform == "darwin":
            return max(time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_UPTIME_RAW), 0.0)
        return None

    def on_mains(self) -> bool | None:
        """Return True on mains power or without a battery."""
        battery = self._once("battery", _battery)
        return True if battery is None else battery.power_plugged

    def battery(self) -> float | None:
        """Return the battery's charge in percent; None without a battery."""
        battery = self._once("battery", _battery)
        return None if battery is None else float(battery.percent)

    def heat(self) -> Level | None:
        """Return how hot the machine is by its sensors (Linux) or by the speed that it allows itself (macOS)."""
        return self._once("heat", {"linux": _heat_of_sensors, "darwin": _heat_of_macos}.get(sys.platform, _unknown))

    def memory_pressure(self) -> Level | None:
        """Return how short of memory the machine is, as its kernel sees it."""
        known = {"linux": _stalls_of_linux, "darwin": _pressure_of_macos, "win32": _memory_of_windows}
        return self._once("memory", known.get(sys.platform, _unknown))

    def idle_seconds(self) -> float | None:
        """Return the seconds since the last input, by logind (Linux), IOKit (macOS) or Windows."""
        known = {"linux": _idle_by_logind, "darwin": _idle_of_macos, "win32": _idle_of_windows}
        return self._once("idle", known.get(sys.platform, _unknown))

    def free_disk(self) -> int | None:
        """Return the free bytes of the disk that holds edgetune's data folder."""
        try:
            return shutil.disk_usage(home()).free
        except OSError:
            return None

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Return after this many seconds, or as soon as `stop` is set."""
        stop.wait(seconds)

    def _once(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return the answer of `ask`, or the last one if that is younger than ASKED_EVERY seconds."""
        asked, answer = self._answers.get(name, (float("-inf"), None))
        if time.monotonic() - asked >= ASKED_EVERY:
            try:
                answer = ask()
            except (OSError, ValueError, subprocess.SubprocessError):
                answer = None
            self._answers[name] = time.monotonic(), answer
        return answer


def unknown_conditions(system: System) -> list[str]:
    """Return words for the conditions that a machine does not tell, so that a night cannot heed them."""
    asked = {
        "power": system.on_mains(),
        "heat": system.heat(),
        "memory": system.memory_pressure(),
        "whether somebody is using the machine": system.idle_seconds(),
    }
    return [name for name, answer in asked.items() if answer is None]


def lowest_priority() -> None:
    """Give this process the lowest priority for the CPU and the disk, as far as the system allows."""
    process = psutil.Process()
    try:
        if sys.platform == "win32":
            process.nice(psutil.IDLE_PRIORITY_CLASS)
            process.ionice(psutil.IOPRIO_VERYLOW)
        else:
            process.nice(19)
            if sys.platform == "linux":
                process.ionice(psutil.IOPRIO_CLASS_IDLE)
    except (psutil.Error, OSError):  # a container may forbid it
        pass


def _unknown() -> None:
    return None


def _battery() -> Any:
    return psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None


def _tool(*command: str) -> str:
    """Return what a tool of the system prints. Raises OSError or SubprocessError."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS, check=True
    )
    return done.stdout


def _heat_of_sensors() -> Level | None:
    """Return the level of the hottest sensor that names a limit; None without any."""
    left = []
    for sensors in psutil.sensors_temperatures().values():
        for sensor in sensors:
            limit = sensor.high or (sensor.critical and sensor.critical - BELOW_LIMIT)
            if limit and sensor.current:
                left.append(limit - sensor.current)
    if not left:
        return None
    return Level.HIGH if min(left) <= 0 else Level.RAISED if min(left) < BELOW_LIMIT else Level.LOW


def _heat_of_macos() -> Level | None:
    return macos_heat(_tool("/usr/bin/pmset", "-g", "therm"))


def macos_heat(printed: str) -> Level | None:
    """Return the level that the output of `pmset -g therm` stands for: HIGH where the processor may not run at full speed."""
    found = re.search(r"CPU_Speed_Limit\s*=\s*(\d{1,3})", printed)
    if found is None:
        return Level.LOW if "No thermal warning level has been recorded" in printed else None
    return Level.HIGH if int(found[1]) < 100 else Level.LOW


def _stalls_of_linux() -> Level | None:
    return linux_stalls(Path("/proc/pressure/memory").read_text(encoding="ascii"))


def linux_stalls(pressure: str) -> Level | None:
    """Return the level that the content of /proc/pressure/memory stands for."""
    found = re.search(r"^full .*\bavg60=([0-9.]{1,9})", pressure, re.M)
    return None if found is None else _level(float(found[1]), STALLED_RAISED, STALLED_HIGH)


def _pressure_of_macos() -> Level | None:
    levels = {"1": Level.LOW, "2": Level.RAISED, "4": Level.HIGH}
    return levels.get(_tool("/usr/sbin/sysctl", "-n", "kern.memorystatus_vm_pressure_level").strip())


def _memory_of_windows() -> Level:
    return _level(psutil.virtual_memory().percent, USED_RAISED, USED_HIGH)


def _level(value: float, raised: float, high: float) -> Level:
    return Level.HIGH if value >= high else Level.RAISED if value >= raised else Level.LOW


def _idle_by_logind() -> float | None:
    properties = [f"--property={name}" for name in ("IdleHint", "IdleSinceHint", "IdleSinceHintMonotonic")]
    return logind_idle(_tool("loginctl", "show-session", *properties), time.monotonic())


def logind_idle(printed: str, monotonic: float) -> float | None:
    """Return the idle seconds that logind's properties stand for, at this time of CLOCK_MONOTONIC.

    A desktop that never tells logind anything leaves the hint as it was at the start, and its time at 0: nothing is known then.
    """
    values = dict(line.partition("=")[::2] for line in printed.splitlines())
    since = values.get("IdleSinceHintMonotonic", "0")
    if values.get("IdleHint") not in ("yes", "no") or not since.isdigit() or int(since) == 0:
        return None
    return max(monotonic - int(since) / 1e6, 0.0) if values["IdleHint"] == "yes" else 0.0


def _idle_of_macos() -> float | None:
    return macos_idle(_tool("/usr/sbin/ioreg", "-c", "IOHIDSystem", "-d", "4"))


def macos_idle(printed: str) -> float | None:
    """Return the idle seconds in the output of `ioreg -c IOHIDSystem`, which counts nanoseconds."""
    found = re.search(r'"HIDIdleTime"\s*=\s*(\d{1,20})', printed)
    return None if found is None else int(found[1]) / 1e9


class _LastInput(ctypes.Structure):
    """LASTINPUTINFO of the Windows API; its time is in milliseconds since the start, modulo 2**32."""

    _fields_ = (("cbSize", ctypes.c_uint), ("dwTime", ctypes.c_uint))


def _idle_of_windows() -> float | None:
    windows: Any = ctypes.windll  # type: ignore[attr-defined, unused-ignore]
    last = _LastInput(cbSize=ctypes.sizeof(_LastInput))
    if not windows.user32.GetLastInputInfo(ctypes.byref(last)):
        return None
    return float((windows.kernel32.GetTickCount() - last.dwTime) % 2**32) / 1000
