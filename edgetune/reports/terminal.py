"""Shows the events of a run on the terminal: as a live bar, as a few plain lines, or as JSON lines. It decides nothing.

Text that this program did not write itself (a model's words, the name of a file) is sanitized before it is shown.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import sys
import threading
from typing import TYPE_CHECKING, TextIO

from edgetune.events import (
    Converted,
    Evaluated,
    Event,
    Finished,
    Interrupted,
    Resumed,
    Skipped,
    Started,
    Stepped,
    Working,
    judges,
    line,
)
from edgetune.reports.repair import learning_lines, rough_figures
from edgetune.reports.text import BITS_PER_BYTE, counted, human_bytes, human_time, one_line, place_of_report
from edgetune.reports.verdicts import first_sentence, promise

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_EVERY_SECONDS = 5.0
"""Shortest time between two plain progress lines, in seconds, unless a tenth of the steps is done. Chosen by hand."""
TOLD_AFTER_SECONDS = 2.0
"""Seconds that a stage of long work may take without a plain line. Chosen by hand."""
PACE_STEPS = 40
"""Number of last steps from which the time left is estimated. Chosen by hand."""


class Progress:
    """The state of a run, gathered from its events: the figures that a progress line or the live bar shows."""

    def __init__(self) -> None:
        self.steps = 0
        self.documents: int | None = None
        self.before: float | None = None
        self.heldout: float | None = None
        self.last: Stepped | None = None
        self.working: Working | None = None
        self.skipped = 0
        self._pace: collections.deque[tuple[int, float]] = collections.deque(maxlen=PACE_STEPS)

    def take(self, event: Event) -> None:
        """Update the state with one event."""
        self.working = event if isinstance(event, Working) else None
        if isinstance(event, Started):
            steps = event.plan.get("steps")
            self.steps = steps if isinstance(steps, int) else 0
            self.documents = event.documents
            self._pace.clear()
        elif isinstance(event, Evaluated):
            self.before = event.bits_per_byte if self.before is None else self.before
            self.heldout = event.bits_per_byte
        elif isinstance(event, Skipped):
            self.skipped += 1
        elif isinstance(event, Stepped):
            self.last = event
            self._pace.append((event.step, event.seconds))

    @property
    def done(self) -> tuple[int, int]:
        """Return the steps (of other work, the parts of its stage) that are done and their total; 0 if that is not known."""
        if self.working is not None:
            return self.working.done, self.working.total
        return 0 if self.last is None else self.last.step, self.steps

    @property
    def seconds_left(self) -> float | None:
        """Return the time left, estimated from the last steps; None before there are two."""
        if len(self._pace) < 2 or not self.steps:
            return None
        (first, start), (last, end) = self._pace[0], self._pace[-1]
        return (self.steps - last) * (end - start) / max(last - first, 1)

    def figures(self) -> list[str]:
        """Return the figures that are known, of: tokens/s, loss, held-out bits per byte, memory, time left, steps skipped."""
        shown = []
        if self.working is not None:
            shown += [self.working.stage, human_time(self.working.seconds)]
        if self.last is not None:
            shown += [f"{self.last.tokens_per_second:,.0f} tokens/s", f"loss {self.last.loss:.3f}"]
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
    """Return the first line of a run: which model learns from what, and where."""
    held_out = f", {event.heldout_documents} held out to test it" if event.heldout_documents else ""
    wanted, rows = event.plan.get("settings", {}).get("data", {}).get("seq_len"), event.plan.get("seq_len")
    cut = f"; rows of {rows} tokens, as many as the model has positions" if rows != wanted else ""
    form, size = event.plan.get("weights"), event.plan.get("base_bytes")
    base = f" in {one_line(form)} ({human_bytes(size)})" if form is not None and size is not None else ""
    return (
        f"Base model {one_line(event.model)}{base} on {one_line(event.device)}: learning from {event.documents} "
        f"{'document' if event.documents == 1 else 'documents'}{held_out}; "
        f"{event.tokens:,} tokens per epoch{cut}; the adapter has {event.trainable_parameters:,} parameters, "
        f"the base model {event.parameters:,}{_anchored(event)}"
    )


def _anchored(event: Started) -> str:
    """Return the end of a run's first line: what keeps the model as it was; empty where nothing does."""
    anchor = event.plan.get("anchor")
    if not anchor:
        return ""
    texts = "of the base's own replies" if anchor["kind"] == "replies" else "built-in texts"
    return f"; anchor: {anchor['share']:.0%} of tokens, {anchor['documents']} {texts}"


_FORMS = {"bf16": "bfloat16", "fp32": "float32", "nf4": "NF4 (4 bits)"}
"""Words for the number formats that a GGUF model is converted to."""


def converted_lines(event: Converted) -> list[str]:
    """Return the lines for a GGUF model that was converted: time and sizes, and what was not taken over."""
    return [
        f"Converted {one_line(event.model)} (GGUF {one_line(event.quantisation)}, {human_bytes(event.source_bytes)}) to "
        f"{_FORMS.get(event.form, one_line(event.form))} in {human_time(event.seconds)}: {human_bytes(event.bytes)}, kept for "
        "next time",
        *(one_line(notice) for notice in event.notices),
    ]


def evaluated_line(event: Evaluated, first: bool) -> str:
    """Return the line for an evaluation on the held-out notes; the first one explains its figure, and says if it is rough."""
    few = "" if judges(event.tokens) else f"; a rough figure, from {counted(event.tokens, 'token')}"
    meaning = f" ({BITS_PER_BYTE}{few})" if first else ""
    return f"step {event.step}: held-out {event.bits_per_byte:.3f} bits/byte{meaning}"


def resumed_lines(event: Resumed) -> list[str]:
    """Return the lines for a resumed run: where it continues, and what has changed since it was interrupted."""
    place = [f"Resuming this run after step {event.step:,} (--fresh starts over)"] if event.step else []
    return [*place, *(one_line(notice) for notice in event.notices)]


def interrupted_line(event: Interrupted) -> str:
    """Return the last line of a run that was interrupted."""
    return (
        f"Stopped at step {event.step:,} of {event.steps:,}. Nothing is lost: run the same command again to continue. "
        "Your current adapter has not changed."
    )


def finished_lines(event: Finished, documents: int | None = None) -> list[str]:
    """Return the last lines of a run: what it learned, what became of the adapter and why, what it took, and where all is.

    documents: the number of notes that it learned from, if that is known.
    """
    sentence = first_sentence(documents, event)
    reason = (event.decision or {}).get("reason")
    lines = [] if sentence is None else [sentence, *([one_line(reason)] if isinstance(reason, str) else [])]
    if event.heldout_bits_per_byte_before is None or event.heldout_bits_per_byte_after is None:
        lines.append("Nothing was held out, so nothing shows whether the adapter learned or only memorised")
    else:
        lines.append(heldout_line(event, event.heldout_bits_per_byte_before, event.heldout_bits_per_byte_after))
        lines += learning_lines(event, unknown=False)
    if (private := promise(event.privacy)) is not None:
        lines.append(f"{private[0].upper()}{private[1:]}")
    lines.append(
        f"{counted(event.steps, 'step')}, {counted(event.tokens, 'token')} in {human_time(event.seconds)} "
        f"({event.tokens_per_second:,.0f} tokens/s), peak memory {human_bytes(event.peak_memory_bytes)}"
    )
    if event.skipped_steps:
        lines.append(f"Steps skipped because their loss or gradient was not finite: {event.skipped_steps:,}")
    if event.cut:
        lines.append(f"Stopped early: {one_line(event.cut)}. Run the same command again to continue.")
    to_try = "" if event.promoted else " (to try it all the same: --adapter and this folder)"
    lines.append(f"Adapter: {one_line(event.adapter)}{to_try}")
    if event.report:
        lines.append(f"Report: {place_of_report(event.report)}")
    return lines


def heldout_line(event: Finished, before: float, after: float) -> str:
    """Return the line with a finished run's scores: where it began, the new adapter's, and that of the adapter in use."""
    change = "no change"
    if before > 0 and after != before:
        change = f"{abs(1 - after / before):.1%} {'lower' if after < before else 'higher'}"
    rough = rough_figures(event)
    about = f"({change}), best at step {event.best_step}" if rough is None else f"({rough})"
    return f"Held-out notes: {before:.3f} to {after:.3f} bits per byte {about}{_rival_score(event, before, after)}"


def _rival_score(event: Finished, before: float, after: float) -> str:
    """Return the end of that line: the score of the adapter that the new one was compared with.

    It is empty where the run began with that adapter, or with the bare base since there was none, and where the comparison
    read less text than the scores beside it.
    """
    decision = event.decision or {}
    rival, new = decision.get("current_bits_per_byte"), decision.get("new_bits_per_byte")
    if decision.get("first") or rival is None or new is None or f"{new:.3f}" != f"{after:.3f}" or rival == before:
        return ""
    return f"; {rival:.3f} with {'the adapter before it' if event.promoted else 'your current adapter'}"


class Renderer(abc.ABC):
    """Base class of the three renderers: `show` each event, then `close`. Use it as a context manager."""

    @abc.abstractmethod
    def show(self, event: Event) -> None:
        """Render one event."""

    def close(self) -> None:  # noqa: B027 - printed lines need no clean-up, a live bar does
        """Restore the terminal."""

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines(Renderer):
    """Prints each event as a line of JSON, except those that hold text of notes or samples."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def show(self, event: Event) -> None:
        """Print the event as one line, unless it is private."""
        if not event.private:
            print(line(event), file=self.file, flush=True)


class Plain(Renderer):
    """Prints a few lines for a log or a pipe: at each tenth of the steps, and after LINE_EVERY_SECONDS or a tenth of the time
    so far, whichever is longer; in a stage of other work after TOLD_AFTER_SECONDS, and then as rarely."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.progress = Progress()
        self._last_line = (0, 0.0)  # step and seconds
        self._stage, self._last_word = "", 0.0  # of other work: the stage, and when its last line was written
        self._timer: threading.Timer | None = None

    def show(self, event: Event) -> None:
        """Print a line if the event deserves one."""
        self.close()  # what was to be said of the work so far
        first_evaluation = self.progress.before is None
        self.progress.take(event)
        if isinstance(event, Started):
            self._write(started_line(event))
            for text in event.notices:
                self._write(one_line(text))
        elif isinstance(event, Resumed):
            for text in resumed_lines(event):
                self._write(text)
        elif isinstance(event, Converted):
            for text in converted_lines(event):
                self._write(text)
        elif isinstance(event, Interrupted):
            self._write(interrupted_line(event))
        elif isinstance(event, Evaluated):
            self._write(evaluated_line(event, first_evaluation))
        elif isinstance(event, Skipped):
            self._write(f"step {event.step} skipped: {one_line(event.reason)}")
        elif isinstance(event, Stepped) and self._is_due(event):
            self._last_line = (event.step, event.seconds)
            self._write(", ".join([f"step {event.step}/{self.progress.steps or '?'}", *self.progress.figures()]))
        elif isinstance(event, Working):
            self._work(event)
        elif isinstance(event, Finished):
            for text in finished_lines(event, self.progress.documents):
                self._write(text)

    def _work(self, event: Working) -> None:
        """Print a line if the stage of `event` has taken long without one, or once it has."""
        if event.stage != self._stage or event.seconds < self._last_word:
            self._stage, self._last_word = event.stage, 0.0
        pause = max(LINE_EVERY_SECONDS, event.seconds / 10) if self._last_word else TOLD_AFTER_SECONDS
        if event.seconds - self._last_word >= pause:
            self._write_work(event)
        elif not self._last_word and event.done < event.total:
            # A stage of one part, such as an export's proof, has no further event before its end.
            later = dataclasses.replace(event, seconds=TOLD_AFTER_SECONDS)
            self._timer = threading.Timer(TOLD_AFTER_SECONDS - event.seconds, self._write_work, [later])
            self._timer.daemon = True
            self._timer.start()

    def _write_work(self, event: Working) -> None:
        self._last_word = event.seconds
        self._write(f"{event.stage}: {_percent(event.done, event.total)} after {human_time(event.seconds)}")

    def close(self) -> None:
        """Print nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _is_due(self, event: Stepped) -> bool:
        step, seconds = self._last_line
        steps = self.progress.steps
        tenth = bool(steps) and event.step * 10 // steps > step * 10 // steps
        return tenth or event.seconds - seconds >= max(LINE_EVERY_SECONDS, event.seconds / 10)

    def _write(self, text: str) -> None:
        print(text, file=self.file, flush=True)


class Live(Renderer):
    """Shows two lines that stay in place: a bar of the steps done, and the figures below it."""

    def __init__(self, file: TextIO, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.console = console or Console(file=file, highlight=False)
        self.progress = Progress()
        self._live = RichLive(console=self.console, refresh_per_second=8, transient=True, redirect_stdout=False)
        self._live.start()

    def show(self, event: Event) -> None:
        """Update the bar; print lines that should stay above it."""
        first_evaluation = self.progress.before is None
        self.progress.take(event)
        if isinstance(event, Started):
            self._print_above(started_line(event), "bold")
            for text in event.notices:
                self._print_above(one_line(text), "yellow")
        elif isinstance(event, Resumed):
            for text in resumed_lines(event):
                self._print_above(text, "yellow")
        elif isinstance(event, Converted):
            for text in converted_lines(event):
                self._print_above(text, "")
        elif isinstance(event, Skipped):
            self._print_above(f"step {event.step} skipped: {one_line(event.reason)}", "yellow")
        elif isinstance(event, Evaluated):
            self._print_above(evaluated_line(event, first_evaluation), "cyan")
        elif isinstance(event, Interrupted):
            self._live.stop()
            self._print_above(interrupted_line(event), "bold yellow")
            return
        elif isinstance(event, Finished):
            self._live.stop()
            first, *rest = finished_lines(event, self.progress.documents)
            self._print_above(first, "bold green" if event.promoted else "bold yellow")
            for text in rest:
                self._print_above(text, "")
            return
        self._live.update(self._bar_and_figures())

    def close(self) -> None:
        """Remove the bar, after an exception or Ctrl-C too."""
        self._live.stop()

    def _print_above(self, text: str, style: str) -> None:
        from rich.text import Text

        self.console.print(Text(text, style=style), soft_wrap=True)

    def _bar_and_figures(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step, steps = self.progress.done
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        count = f"{step:,}/{steps or '?'}" if self.progress.working is None else _percent(step, steps)
        row.add_row(ProgressBar(total=steps or None, completed=step, pulse=not steps), Text(count))
        return Group(row, Text(" · ".join(self.progress.figures()), style="dim", no_wrap=True, overflow="ellipsis"))


def _percent(done: int, total: int) -> str:
    """Return how much of a stage is done."""
    return f"{done * 100 // max(total, 1)} %"


def renderer(json: bool = False, file: TextIO | None = None) -> Renderer:
    """Return the renderer that suits `file` (default: standard output): JSON lines, a live bar, or plain lines."""
    file = file or sys.stdout
    if json:
        return JsonLines(file)
    return Live(file) if file.isatty() else Plain(file)
