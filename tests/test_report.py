"""The report is one page that loads nothing, runs no scripts, escapes all text and shows the run's figures."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import math
import os
import re
import stat
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.events import Evaluated, Event, EventLog, Finished, Sampled, Skipped, Started, Stepped, read_events
from edgetune.reports import plots
from edgetune.reports.html import render, write_report

HOSTILE = "</p></title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'\x1b[2J\u202e"
VOID = {"meta", "br"}


def started(**changes: object) -> Started:
    fields: dict = {
        "run": "r1", "model": "demo", "device": "cpu", "backend": "cpu", "plan": {"steps": 20, "targets": ["q_proj"]},
        "documents": 48, "heldout_documents": 2, "heldout_paths": ("garden/leeks.md", "boat/oars.md"), "tokens": 30_000,
        "trainable_parameters": 500_000, "parameters": 16_000_000,
    }  # fmt: skip
    return Started(**{**fields, **changes})


def finished(after: float | None = 1.558, **changes: object) -> Finished:
    fields: dict = {
        "adapter": "notes-1", "steps": 20, "tokens": 10_240, "tokens_per_second": 2310.0,
        "heldout_bits_per_byte_before": None if after is None else 1.732, "heldout_bits_per_byte_after": after,
        "peak_memory_bytes": 412_000_000, "device": "cpu", "seconds": 61.0, "best_step": 10,
    }  # fmt: skip
    return Finished(**{**fields, **changes})


def stepped(step: int, loss: float = 3.0) -> Stepped:
    return Stepped(
        step=step, loss=loss, learning_rate=1e-3, gradient_norm=0.5, tokens=512, tokens_per_second=2310.0,
        memory_bytes=312_000_000, seconds=0.2 * step,
    )  # fmt: skip


def whole_run() -> list[Event]:
    steps: list[Event] = [stepped(step, 4 - step / 20) for step in range(1, 21)]
    return [
        started(),
        Evaluated(0, 1.732, 900, 0.1),
        Sampled("before", "The boat", " is an option of the server."),
        *steps[:10],
        Evaluated(10, 1.558, 900, 2.0),
        *steps[10:],
        Skipped(20, "gradient not finite"),
        Evaluated(20, 1.601, 900, 4.0),
        Sampled("after", "The boat", " is up on the hard for the winter."),
        finished(),
    ]


class Page(html.parser.HTMLParser):
    """Parses a page into its tags with attributes and its text, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_the_page_is_private_and_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, whole_run())
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_policy_allows_this_style_sheet_and_nothing_else() -> None:
    text = render(whole_run())
    policies = [tag["content"] for name, tag in Page(text).tags if tag.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policies == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_nothing_outside_the_page_is_referred_to() -> None:
    text = render(whole_run())
    page = Page(text)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "a",
        "form",
        "base",
    }
    for _, attributes in page.tags:
        assert not {"src", "href", "style", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_names_plans_and_outputs_stay_text() -> None:
    tags = {tag for tag, _ in Page(render(whole_run())).tags}
    events = [
        started(run=HOSTILE, model=HOSTILE, device=HOSTILE, backend=HOSTILE, heldout_paths=(HOSTILE, "x"),
                plan={HOSTILE: HOSTILE, "b": [HOSTILE], "c": {HOSTILE: HOSTILE}}),
        Evaluated(0, 1.7, 9, 0.1),
        stepped(1),
        Skipped(1, HOSTILE),
        Evaluated(1, 1.6, 9, 0.1),
        Sampled("before", HOSTILE, HOSTILE),
        Sampled("after", HOSTILE, HOSTILE),
        finished(adapter=HOSTILE, cut=HOSTILE, report=HOSTILE),
    ]  # fmt: skip
    text = render(events)
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= tags
    assert not page.open
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert page.text.count("<script>alert(1)</script>") >= 10


def test_before_and_after_stand_side_by_side_under_their_prompt() -> None:
    words = Page(render(whole_run())).text
    before, after = words.index("is an option of the server"), words.index("is up on the hard")
    assert words.index("The boat") < before < after


def test_the_summary_tells_what_was_learned_in_three_ways() -> None:
    words = Page(render(whole_run())).text
    for figure in (
        "10.0% fewer bits",
        "1.732 → 1.558",
        "3.32",
        "2.94",
        "21.6%",
        "412 MB",
        "garden/leeks.md",
        "q_proj",
    ):
        assert figure in words


def test_a_run_that_learned_nothing_does_not_say_it_did() -> None:
    assert "No better on notes the model has not seen" in render([started(), finished(after=1.732)])
    unproved = render([started(heldout_documents=0, heldout_paths=()), finished(after=None)])
    assert "Nothing was held out" in unproved
    assert "fewer" not in unproved


@pytest.mark.parametrize(
    "events",
    [[], [started()], whole_run()[:-1], [started(), stepped(1)], [started(), stepped(1, math.nan), finished()]],
    ids=["nothing", "only started", "killed before its end", "one step", "a loss of nan"],
)
def test_a_run_cut_anywhere_still_has_a_report(events: list[Event]) -> None:
    assert not Page(render(events)).open


def test_the_report_of_a_log_is_the_report_of_its_events(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        for event in whole_run():
            log.append(event)
    assert render(read_events(tmp_path / "events.jsonl")) == render(whole_run())


def svg_of(curve: plots.Curve) -> ElementTree.Element:
    return ElementTree.fromstring(plots.chart("c", "A <title>", [curve], "{:.3g}".format))


def test_a_chart_is_well_formed_and_can_be_listened_to() -> None:
    svg = svg_of(plots.Curve("Loss & more", [(1, 4.0), (2, 2.0), (3, 3.0)]))
    names = svg.attrib["aria-labelledby"].split()
    spoken = {child.attrib["id"]: child.text for child in svg if "id" in child.attrib}
    assert svg.attrib["role"] == "img"
    assert [spoken[name] for name in names] == [
        "A <title>",
        "Loss & more: 4 at step 1, 3 at step 3; lowest 2 at step 2, highest 4 at step 1.",
    ]


@given(st.lists(st.floats(width=32), max_size=40))
def test_any_values_make_a_chart_that_stays_in_its_frame(values: list[float]) -> None:
    text = plots.chart("c", "t", [plots.Curve("v", list(enumerate(values)), "dots")], "{:.3g}".format)
    if not any(math.isfinite(value) for value in values):
        assert text == ""
        return
    for circle in ElementTree.fromstring(text).iter("circle"):
        assert plots.LEFT - 0.1 <= float(circle.attrib["cx"]) <= plots.WIDTH - plots.RIGHT + 0.1
        assert plots.TOP - 0.1 <= float(circle.attrib["cy"]) <= plots.HEIGHT - plots.BOTTOM + 0.1


def test_a_gap_in_the_values_is_a_gap_in_the_line() -> None:
    paths = list(svg_of(plots.Curve("v", [(1, 1.0), (2, math.nan), (3, 2.0), (4, 3.0)])).iter("path"))
    assert [path.attrib["d"].count("M") for path in paths if path.attrib["class"] == "line"] == [2]


def test_thinning_a_long_curve_loses_no_spike() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[54_400] = (54_400.0, -99.0)
    kept = plots.thin(points)
    assert len(kept) < 2 * plots.MAX_POINTS
    assert {points[0], points[54_321], points[54_400], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_smoothing_keeps_a_constant_and_calms_noise() -> None:
    assert [y for _, y in plots.smooth([(step, 2.5) for step in range(50)])] == pytest.approx([2.5] * 50)
    noisy = [(step, 1.0 + (-1) ** step) for step in range(400)]
    assert all(abs(y - 1) < 0.05 for _, y in plots.smooth(noisy)[100:])
