"""Writes the report of a run: one self-contained HTML page, made from the run's events alone.

The page loads nothing and runs nothing: its Content-Security-Policy allows its own style sheet, by digest, and nothing else.
It shows names of notes and text of the model, so the file is private (0600) and every word in it is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgetune.events import Evaluated, Event
from edgetune.privacy import kinds
from edgetune.reports.html_style import STYLE
from edgetune.reports.leaks import leak_lines
from edgetune.reports.plots import Curve, Point, chart, smooth
from edgetune.reports.repair import learning_lines, rough_figures
from edgetune.reports.run import Run
from edgetune.reports.text import BITS_PER_BYTE, counted, human_bytes, human_time, sanitize
from edgetune.reports.verdicts import first_sentence, promise
from edgetune.runtime.files import atomic_write

UNFOLDED = 12
"""Names or rows that are shown at once; a longer list is folded. Chosen by hand."""
SMOOTHED_FROM = 8
"""Number of steps beyond which the loss is also drawn smoothed. Chosen by hand."""


def write_report(path: Path | str, events: Iterable[Event]) -> None:
    """Write the report of one run: atomically, and readable by its owner alone."""
    atomic_write(path, render(events), mode=0o600)


def render(events: Iterable[Event]) -> str:
    """Return the page of a run, which may be unfinished or not even have taken a step."""
    run = Run.of(events)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    sections = [_head(run), _tiles(run), _plots(run), _samples(run), _facts(run), _evaluations(run), _heldout(run)]
    sections += [_notices(run), _plan(run)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="robots" content="noindex">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>edgetune: {_escaped(run.started.run if run.started else 'a run')}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n{chr(10).join(part for part in sections if part)}\n"
        "<footer>Made by edgetune from the events of this run. This page loads nothing and sends nothing. It names your "
        "notes and shows text that the model wrote after learning them, so think before you share this page.</footer>\n"
        "</body>\n</html>\n"
    )


def _head(run: Run) -> str:
    started, finished = run.started, run.finished
    sentence = first_sentence(started.documents if started else None, finished) if finished else None
    if sentence is not None:
        title = sentence
    elif run.before is None or run.after is None:
        title = "Nothing was held out, so learning cannot be shown" if finished else "Training"
    elif finished and not finished.judged:
        title = "Too few held-out notes were read to judge what was learned"
    elif run.after < run.before:
        title = f"{1 - _ratio(run.after, run.before):.1%} fewer bits per byte on notes the model has not seen"
    else:
        title = "No better on notes the model has not seen"
    marks = "".join(f'<span class="badge">{_escaped(badge)}</span>' for badge in _badges(run))
    name = f"<span>{_escaped(started.run)}</span>" if started else ""
    return (
        f'<header><p class="eyebrow">edgetune training report {name}{marks}</p><h1>{_escaped(title)}</h1>'
        f'<p class="about">{_escaped(_about(run))}</p></header>'
    )


def _about(run: Run) -> str:
    """Return the paragraph below the title: why it ended so, and what was trained."""
    started, decision = run.started, (run.finished.decision or {}) if run.finished else {}
    reason = decision.get("reason")
    about = [reason] if isinstance(reason, str) else []
    if started:
        held_out = f"; {counted(started.heldout_documents, 'note')} held out to test it" if started.heldout_documents else ""
        trained = f"The base model {started.model} learned from {counted(started.documents, 'note')} on {started.device}"
        about += [f"{trained}{held_out}."]
        about += ["The result is an adapter: a small file that is used together with the base model, which stays unchanged."]
    return " ".join(about)


def _badges(run: Run) -> list[str]:
    """Return what is unusual about the run, in a few words each."""
    finished, badges = run.finished, []
    if run.interrupted is not None:
        place = f"{run.interrupted.step:,} of {run.interrupted.steps:,}"
        badges.append(f"stopped at step {place}: run the same command again to continue")
    elif finished is None:
        badges.append("not finished")
    elif finished.cut:
        badges.append(f"stopped early: {finished.cut}")
    if finished is not None and not finished.promoted:
        badges.append("not in use")
    if run.skipped:
        badges.append(f"{counted(len(run.skipped), 'step')} skipped")
    return badges


def _tiles(run: Run) -> str:
    finished = run.finished
    tiles = []
    if run.before is not None and run.after is not None:
        tiles.append(("Held-out bits per byte", f"{run.before:.3f} → {run.after:.3f}", BITS_PER_BYTE))
    if finished:
        tiles += [
            ("Trained on", f"{finished.tokens:,}", f"tokens in {counted(finished.steps, 'step')} (updates of the adapter)"),
            ("Speed", f"{finished.tokens_per_second:,.0f}", "tokens per second"),
            ("Time", human_time(finished.seconds), "from start to adapter"),
            ("Peak memory", human_bytes(finished.peak_memory_bytes), "including the weights in use"),
        ]
    cells = "".join(
        f'<div class="{"score" if "→" in value else "fact"}"><dt>{_escaped(name)}</dt>'
        f'<dd>{_escaped(value)}</dd><dd class="note">{_escaped(note)}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if tiles else ""


def _plots(run: Run) -> str:
    skipped = [float(event.step) for event in run.skipped]
    speed, memory = _curve(run, "Tokens per second", "tokens_per_second"), _curve(run, "Memory", "memory_bytes")
    norm, rate = _curve(run, "Gradient norm", "gradient_norm"), _curve(run, "Learning rate", "learning_rate")
    figures = [
        _loss_figure(run, skipped),
        _heldout_figure(run),
        _figure(
            "speed",
            "Throughput",
            "trained tokens per second",
            chart("speed", "Throughput by step", [speed], "{:,.0f}".format, from_zero=True),
        ),
        _figure(
            "memory",
            "Memory",
            "in use, including the weights that are loaded",
            chart("memory", "Memory by step", [memory], human_bytes, from_zero=True),
        ),
        _figure(
            "gradient",
            "Gradient norm",
            "size of the gradient before clipping",
            chart("gradient", "Gradient norm by step", [norm], "{:.3g}".format, from_zero=True, crosses=skipped),
        ),
        _figure(
            "rate",
            "Learning rate",
            "size of each update, as planned",
            chart("rate", "Learning rate by step", [rate], "{:.2g}".format, from_zero=True),
        ),
    ]
    shown = "".join(figures)
    return f'<section class="plots" aria-label="Curves">{shown}</section>' if shown else ""


def _curve(run: Run, label: str, field: str, kind: str = "line") -> Curve:
    """Return the curve of one field of the run's Stepped events."""
    return Curve(label, [(event.step, getattr(event, field)) for event in run.stepped], kind)


def _loss_figure(run: Run, skipped: Sequence[float]) -> str:
    note = "the error on the notes the model learns from, in nats per token; lower is better"
    if len(run.stepped) > SMOOTHED_FROM:
        note += "; faint: each step, strong: smoothed"
        loss = _curve(run, "Loss", "loss", "faint")
        curves = [loss, Curve("Smoothed loss", smooth(loss.points))]
    else:
        curves = [_curve(run, "Loss", "loss", "dots")]
    return _figure("loss", "Loss", note, chart("loss", "Loss by step", curves, "{:.2f}".format, crosses=skipped))


def _heldout_figure(run: Run) -> str:
    points: list[Point] = [(event.step, event.bits_per_byte) for event in run.evaluated]
    kept = ((float(run.best.step), run.best.bits_per_byte), "kept") if run.best and len(points) > 1 else None
    curves = [Curve("Bits per byte", points, "dots")]
    return _figure(
        "heldout",
        "Held-out notes",
        "bits per byte on notes the model has not seen; lower is better; ringed: the adapter that was kept",
        chart("heldout", "Held-out notes", curves, "{:.3f}".format, marked=kept),
    )


def _figure(name: str, title: str, note: str, svg: str) -> str:
    if not svg:
        return ""
    return f'<figure class="{name}"><figcaption><b>{title}</b> {note}</figcaption>{svg}</figure>'


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    pairs = []
    for prompt, texts in run.samples.items():
        sides = "".join(
            f'<div class="{when}"><h4>{title}</h4>{_continuation(prompt, texts.get(when))}</div>'
            for when, title in (("before", "Before"), ("after", "After"))
        )
        pairs.append(f'<article><h3 dir="auto">{_escaped(prompt)}</h3><div class="pair">{sides}</div></article>')
    return (
        "<section><h2>Samples, before and after</h2>"
        '<p class="lead">How the model continued each prompt before training, and with the new adapter.</p>'
        f"{''.join(pairs)}</section>"
    )


def _continuation(prompt: str, text: str | None) -> str:
    if text is None:
        return '<p class="none">not sampled</p>'
    return f'<p class="written" dir="auto"><span class="prompt">{_escaped(prompt)}</span>{_escaped(text)}</p>'


def _facts(run: Run) -> str:
    started, finished = run.started, run.finished
    rows: list[tuple[str, str]] = []
    if started:
        rows += [
            ("Base model", started.model),
            ("Device", f"{started.device} ({started.backend})"),
            (
                "Documents",
                f"{started.documents:,} trained on, {started.heldout_documents:,} held out",
            ),
            *([("Masked before training", kinds.in_words(started.masked))] if started.masked else []),
            ("Tokens per epoch (one pass over the notes)", f"{started.tokens:,}"),
            ("Parameters of the adapter", f"{started.trainable_parameters:,}; the base model has {started.parameters:,}"),
        ]
    if finished:
        rows += [
            ("Adapter", finished.adapter),
            ("Steps", f"{finished.steps:,}; best: step {finished.best_step:,}; skipped: {finished.skipped_steps:,}"),
            ("Tokens trained", f"{finished.tokens:,} at {finished.tokens_per_second:,.0f} per second"),
            ("Time", human_time(finished.seconds)),
            ("Peak memory", human_bytes(finished.peak_memory_bytes)),
            *([("Privacy", private)] if (private := promise(finished.privacy)) else []),
        ]
        rows += [("Leaks", line) for line in leak_lines(finished.decision or {})]
    facts = "".join(f'<tr><th scope="row">{_escaped(name)}</th><td>{_escaped(value)}</td></tr>' for name, value in rows)
    table = f"<table><caption>The run</caption><tbody>{facts}</tbody></table>" if facts else ""
    return f'<section class="facts"><h2>Figures</h2>{table}{_score(run)}</section>'


def _score(run: Run) -> str:
    """Return a table of the scores in bits per byte, and in two figures that are easier to picture."""
    finished = run.finished
    scores = [("Before", run.before), ("After", run.after)]
    if finished is not None:
        scores.append(("Base as published", finished.heldout_bits_per_byte_published))
        scores.append(("Adapter over it", finished.heldout_bits_per_byte_on_published))
    shown = [(name, value) for name, value in scores if value is not None]
    if run.before is None or run.after is None:
        return ""
    rows = [
        ("Bits per byte", [f"{value:.3f}" for _, value in shown]),
        (
            "Perplexity per byte: number of bytes that seem equally likely to the model",
            [f"{2**value:.2f}" for _, value in shown],
        ),
        ("Size of the notes if the model were used to compress them", [f"{value / 8:.1%}" for _, value in shown]),
    ]
    body = ""
    for name, cells in rows:
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        body += f'<tr><th scope="row">{_escaped(name)}</th>{numbers}</tr>'
    heads = "".join(f'<th scope="col">{name}</th>' for name, _ in shown)
    rough = None if finished is None else rough_figures(finished)
    sentences = ([rough.capitalize()] if rough else []) + (learning_lines(finished, unknown=True) if finished else [])
    said = "".join(f"<p>{_escaped(text)}.</p>" for text in sentences)
    return (
        f"<table><caption>On the held-out notes; lower is better</caption><thead><tr><td></td>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table>{said}"
    )


def _evaluations(run: Run) -> str:
    if len(run.evaluated) < 2:
        return ""
    rows = "".join(_evaluation(event, run.evaluated[0], event is run.best) for event in run.evaluated)
    table = (
        "<table><caption>Every evaluation on the held-out notes; the adapter of the marked one was kept</caption><thead><tr>"
        '<th scope="col">Step</th><th scope="col">Bits per byte</th><th scope="col">Change</th>'
        f'<th scope="col">Perplexity per byte</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    return f"<section>{_folded(f'{len(run.evaluated)} evaluations', table, len(run.evaluated))}</section>"


def _evaluation(event: Evaluated, first: Evaluated, kept: bool) -> str:
    change = "–" if event is first else f"{_ratio(event.bits_per_byte, first.bits_per_byte) - 1:+.1%}"
    step = f"kept: {event.step:,}" if kept else f"{event.step:,}"
    cells = (step, f"{event.bits_per_byte:.4f}", change, f"{2**event.bits_per_byte:.3f}")
    row = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr class="kept">{row}</tr>' if kept else f"<tr>{row}</tr>"


def _ratio(new: float, old: float) -> float:
    return new / old if old else 1.0


def _heldout(run: Run) -> str:
    paths = run.started.heldout_paths if run.started else ()
    if not paths:
        return ""
    items = "".join(f"<li><bdi>{_escaped(path)}</bdi></li>" for path in paths)
    names = f'<ul class="names">{items}</ul>'
    return (
        "<section><h2>Held-out notes</h2>"
        '<p class="lead">Never trained on. The digest of a note decides whether it is held out, so the choice is the same in '
        "every run.</p>"
        f"{_folded(counted(len(paths), 'note'), names, len(paths))}</section>"
    )


def _notices(run: Run) -> str:
    """Return what was not read, or not as it is, and why."""
    notices = run.started.notices if run.started else ()
    if not notices:
        return ""
    items = "".join(f"<li>{_escaped(notice)}</li>" for notice in notices)
    return (
        "<section><h2>Skipped, and why</h2>"
        '<p class="lead">What was not read, or not as it is. <code>edgetune train --dry-run</code> names every file.</p>'
        f'<ul class="names">{items}</ul></section>'
    )


def _plan(run: Run) -> str:
    plan = _flat(run.started.plan) if run.started else {}
    rows = "".join(
        f'<tr><th scope="row"><code>{_escaped(str(key))}</code></th><td>{_escaped(_setting(value))}</td></tr>'
        for key, value in plan.items()
    )
    if not rows:
        return ""
    caption = "<caption>Fixed before step 1; the same plan on the same machine gives the same adapter, bit for bit</caption>"
    return f'<section><h2>The plan</h2><table class="plan">{caption}<tbody>{rows}</tbody></table></section>'


def _flat(plan: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the plan as one level, with the names of nested sections joined by dots."""
    rows: dict[str, Any] = {}
    for key, value in plan.items():
        name = f"{prefix}{key}"
        rows |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(item) for item in value)
    return str(value)


def _folded(summary: str, body: str, size: int) -> str:
    return body if size <= UNFOLDED else f"<details><summary>{_escaped(summary)}</summary>{body}</details>"


def _escaped(text: str) -> str:
    """Return `text` escaped for use between tags and in quoted attributes, its control characters made visible."""
    return html.escape(sanitize(text), quote=True)
