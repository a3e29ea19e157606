"""A run on the terminal: its events as a live bar, as a few plain lines or as JSON lines. Nothing is decided here.

Text that did not come from this program (a model's words, a file's name) passes through `sanitize` on its way out.
"""

from __future__ import annotations

import abc
import collections
import sys
from typing import TYPE_CHECKING, TextIO

from edgetune.events import Evaluated, Event, Exporting, Finished, Interrupted, Resumed, Skipped, Started, Stepped, line
from edgetune.reports.text import human_bytes, human_time, one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_EVERY_SECONDS = 5.0


class Progress:
    """What a run has come to, kept from its events: the figures a line or a bar shows."""

    def __init__(self) -> None:
        self.steps = 0
        self.before: float | None = None
        self.heldout: float | None = None
        self.last: Stepped | None = None
        self.export: Exporting | None = None
        self.skipped = 0
        self._pace: collections.deque[tuple[int, float]] = collections.deque(maxlen=40)

    def take(self, event: Event) -> None:
        """Count one event in."""
        if isinstance(event, Started):
            steps = event.plan.get("steps")
            self.steps = steps if isinstance(steps, int) else 0
            self._pace.clear()
        elif isinstance(event, Evaluated):
            self.before = event.bits_per_byte if self.before is None else self.before
            self.heldout = event.bits_per_byte
        elif isinstance(event, Skipped):
            self.skipped += 1
        elif isinstance(event, Exporting):
            self.export = event
        elif isinstance(event, Stepped):
            self.last = event
            self._pace.append((event.step, event.seconds))

    @property
    def done(self) -> tuple[int, int]:
        """Steps or pieces done, and all there are; 0 where that is not known."""
        if self.export is not None:
            return self.export.done, self.export.total
        return 0 if self.last is None else self.last.step, self.steps

    @property
    def seconds_left(self) -> float | None:
        """From the pace of the last steps; None before there are two."""
        if len(self._pace) < 2 or not self.steps:
            return None
        (first, start), (last, end) = self._pace[0], self._pace[-1]
        return (self.steps - last) * (end - start) / max(last - first, 1)

    def figures(self) -> list[str]:
        """Tokens/s, loss, held-out bits per byte, memory, time left: those that are known."""
        shown = []
        if self.export is not None:
            shown += [self.export.stage, human_time(self.export.seconds)]
        if self.last is not None:
            shown += [f"{self.last.tokens_per_second:,.0f} tok/s", f"loss {self.last.loss:.3f}"]
        if self.heldout is not None:
            shown.append(f"held-out {self.heldout:.3f} bits/byte")
        if self.last is not None:
            shown.append(human_bytes(self.last.memory_bytes))
        if self.seconds_left is not None:
            shown.append(f"{human_time(self.seconds_left)} left")
        if self.skipped:
            shown.append(f"{self.skipped} skipped")
        return shown


def started_line(event: Started) -> str:
    """The first line of a run: what learns what, and where."""
    kept = f" and {event.heldout_documents} held out" if event.heldout_documents else ""
    return (
        f"{one_line(event.model)} on {one_line(event.device)}: {event.documents} documents{kept}, "
        f"{event.tokens:,} tokens an epoch; training {event.trainable_parameters:,} of {event.parameters:,} parameters"
    )


def resumed_lines(event: Resumed) -> list[str]:
    """Where a run goes on, and what is no longer as it was."""
    where = [f"Going on after step {event.step:,} (--fresh starts over)"] if event.step else []
    return [*where, *(one_line(notice) for notice in event.notices)]


def interrupted_line(event: Interrupted) -> str:
    """The last line of a run that was told to stop."""
    return (
        f"Stopped after step {event.step:,} of {event.steps:,}: all of it is kept, and the same command goes on from there; "
        "the current adapter is as it was"
    )


def finished_lines(event: Finished) -> list[str]:
    """The last lines of a run: did it learn, what it took, where the result is."""
    before, after = event.heldout_bits_per_byte_before, event.heldout_bits_per_byte_after
    lines = []
    if before is not None and after is not None:
        change = f"{abs(1 - after / before):.1%} {'fewer' if after <= before else 'more'}" if before > 0 else "no change"
        lines.append(f"Held-out notes: {before:.3f} to {after:.3f} bits per byte ({change}), best at step {event.best_step}")
    else:
        lines.append("Nothing was held out, so nothing tells whether the adapter learned or only memorised")
    lines.append(
        f"{event.steps:,} steps, {event.tokens:,} tokens in {human_time(event.seconds)} "
        f"({event.tokens_per_second:,.0f} tok/s), {human_bytes(event.peak_memory_bytes)} at most"
    )
    if event.skipped_steps:
        lines.append(f"Steps skipped, their loss or gradient not being finite: {event.skipped_steps:,}")
    if event.cut:
        lines.append(f"Cut short: {one_line(event.cut)}; the same command goes on from there")
    aside = "" if event.promoted else " (kept aside: it does not become the current one)"
    lines.append(f"Adapter: {one_line(event.adapter)}{aside}")
    if event.report:
        lines.append(f"Report: {one_line(event.report)}")
    return lines


class Renderer(abc.ABC):
    """Base of the three: `show` each event, `close` at the end; a context manager."""

    @abc.abstractmethod
    def show(self, event: Event) -> None:
        """Render one event."""

    def close(self) -> None:  # noqa: B027 - printed lines stay; a live bar goes
        """Leave the terminal as it was found."""

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines(Renderer):
    """Each event a line of JSON, flushed; those that hold text of notes or samples are left out."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def show(self, event: Event) -> None:
        """Write one line."""
        if not event.private:
            print(line(event), file=self.file, flush=True)


class Plain(Renderer):
    """A few lines for a log or a pipe: at each tenth of the steps, and after 5 s or a tenth of the time so far; of an export,
    each 5 s."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.progress = Progress()
        self._spoke = (0, 0.0)  # step, seconds

    def show(self, event: Event) -> None:
        """Write a line if the event is worth one."""
        self.progress.take(event)
        if isinstance(event, Started):
            self._write(started_line(event))
        elif isinstance(event, Resumed):
            for text in resumed_lines(event):
                self._write(text)
        elif isinstance(event, Interrupted):
            self._write(interrupted_line(event))
        elif isinstance(event, Evaluated):
            self._write(f"step {event.step}: held-out {event.bits_per_byte:.3f} bits/byte")
        elif isinstance(event, Skipped):
            self._write(f"step {event.step} skipped: {one_line(event.reason)}")
        elif isinstance(event, Stepped) and self._is_due(event):
            self._spoke = (event.step, event.seconds)
            self._write(", ".join([f"step {event.step}/{self.progress.steps or '?'}", *self.progress.figures()]))
        elif isinstance(event, Exporting) and event.seconds - self._spoke[1] >= LINE_EVERY_SECONDS:
            self._spoke = (event.done, event.seconds)
            self._write(f"{event.stage}: {event.done * 100 // max(event.total, 1)} % after {human_time(event.seconds)}")
        elif isinstance(event, Finished):
            for text in finished_lines(event):
                self._write(text)

    def _is_due(self, event: Stepped) -> bool:
        step, seconds = self._spoke
        steps = self.progress.steps
        tenth = bool(steps) and event.step * 10 // steps > step * 10 // steps
        return tenth or event.seconds - seconds >= max(LINE_EVERY_SECONDS, event.seconds / 10)

    def _write(self, text: str) -> None:
        print(text, file=self.file, flush=True)


class Live(Renderer):
    """Two lines that stay in place: a bar over the steps, and the figures under it."""

    def __init__(self, file: TextIO, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.console = console or Console(file=file, highlight=False)
        self.progress = Progress()
        self._live = RichLive(console=self.console, refresh_per_second=8, transient=True, redirect_stdout=False)
        self._live.start()

    def show(self, event: Event) -> None:
        """Move the bar; lines worth keeping are printed above it."""
        self.progress.take(event)
        if isinstance(event, Started):
            self._keep(started_line(event), "bold")
        elif isinstance(event, Resumed):
            for text in resumed_lines(event):
                self._keep(text, "yellow")
        elif isinstance(event, Skipped):
            self._keep(f"step {event.step} skipped: {one_line(event.reason)}", "yellow")
        elif isinstance(event, Evaluated):
            self._keep(f"step {event.step:>6,}  held-out {event.bits_per_byte:.3f} bits/byte", "cyan")
        elif isinstance(event, Interrupted):
            self._live.stop()
            self._keep(interrupted_line(event), "bold yellow")
            return
        elif isinstance(event, Finished):
            self._live.stop()
            first, *rest = finished_lines(event)
            self._keep(first, "bold green" if _learned(event) else "bold yellow")
            for text in rest:
                self._keep(text, "")
            return
        self._live.update(self._picture())

    def close(self) -> None:
        """Take the bar away, also after an exception or Ctrl-C."""
        self._live.stop()

    def _keep(self, text: str, style: str) -> None:
        from rich.text import Text

        self.console.print(Text(text, style=style), soft_wrap=True)

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step, steps = self.progress.done
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(ProgressBar(total=steps or None, completed=step, pulse=not steps), Text(f"{step:,}/{steps or '?'}"))
        return Group(row, Text(" · ".join(self.progress.figures()), style="dim", no_wrap=True, overflow="ellipsis"))


def _learned(event: Finished) -> bool:
    before, after = event.heldout_bits_per_byte_before, event.heldout_bits_per_byte_after
    return before is not None and after is not None and after < before


def renderer(json: bool = False, file: TextIO | None = None) -> Renderer:
    """The right one of the three for `file` (standard output unless given). Use it as a context manager."""
    file = file or sys.stdout
    if json:
        return JsonLines(file)
    return Live(file) if file.isatty() else Plain(file)
