"""A run as one self-contained HTML page: inline SVG, no script, nothing from the network."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from apoptorch.plan import Event

from .charts import line_chart
from .record import SECONDS, Curve, Record
from .terminal import HEADINGS, cells

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Neuron apoptosis</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8889 }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }}
td.words, th.words {{ text-align: left }}
figure {{ margin: 1.5rem 0 }} figcaption {{ font-weight: 600 }}
svg {{ width: 100%; height: auto; font-size: 12px }} svg text {{ fill: currentColor }}
.grid {{ stroke: var(--line) }} .mark {{ stroke: var(--soft); stroke-width: 2; stroke-dasharray: 3 3 }}
.curve {{ fill: none; stroke-width: 2 }}
</style></head><body>
<h1>Neuron apoptosis</h1>
<p>{headline}</p>
{charts}
<h2>Events</h2>
{events}
<p>predicted, measured: change of the loss (without a loss function: relative mean squared change of the output),
measured on data that the plan did not see. bound: largest change of the output that is proved. changed: upper limit of
the share of inputs whose prediction changes, at the event's confidence.</p>
<h2>Groups of channels</h2>
{groups}
<h2>Architecture</h2>
{layers}
</body></html>
"""


def write_html(record: Record, path: str | Path) -> None:
    """Write the run as one HTML file without links."""
    page = PAGE.format(
        headline=escape(_headline(record.events)),
        charts="\n".join(_charts(record)),
        events=_table(HEADINGS, (cells(event) for event in record.events), words=("widths", "outcome")),
        layers=_table(("layer", "type", "shapes"), _layers(record), words=("layer", "type", "shapes")),
        groups=_table(("group", "width", "what happened"), _groups(record), words=("group", "what happened")),
    )
    Path(path).write_text(page, encoding="utf-8")


def _headline(events: Sequence[Event]) -> str:
    if not events:
        return "Nothing was removed. Below is what stood in the way."
    first, last = events[0], events[-1]
    undone = sum(event.rolled_back for event in events)
    return (
        f"{first.parameters_before:,} parameters before, {last.parameters_after:,} after {len(events)} "
        f"event{'s' * (len(events) != 1)}, {undone} of them undone, in {sum(event.seconds for event in events):.1f} s."
    )


def _charts(record: Record) -> Iterable[str]:
    events, end = record.events, record.total_steps
    marks = {float(e.step): f"step {e.step}: " + cells(e)[-1] for e in events}
    yield line_chart("Width of every group that changed", _widths(events, end), log=True, steps=True, x_end=end)
    for name, curve in record.curves.items():
        if name != SECONDS:
            yield line_chart(name, {name: curve}, marks=marks, x_end=end)
    if len(certified := [e for e in events if e.certificate is not None]) > 1:
        pairs = [(e.step, e.certificate) for e in certified]
        before = [(step, c.loss_before) for step, c in pairs if c]
        after = [(step, c.loss_after) for step, c in pairs if c]
        title = "Loss on held-out data before and after each event"
        yield line_chart(title, {"before": before, "after": after}, marks=marks, x_end=end)
    seconds = step_seconds(record)
    if len(seconds) > 1:
        milliseconds = [(step, 1e3 * value) for step, value in seconds]
        yield line_chart("Milliseconds per training step", {"ms": milliseconds}, marks=marks, x_end=end)
        yield line_chart("Seconds saved so far", {"saved": saved(record)}, marks=marks, x_end=end)


def _widths(events: Sequence[Event], end: int | None) -> dict[str, Curve]:
    """Steps from the full width to the end of the run, of every group that changed."""
    found: dict[str, Curve] = {}
    for name, full in events[0].widths_before.items() if events else ():
        curve = [(0, float(full)), *((e.step, float(e.widths_after[name])) for e in events)]
        if len({width for _, width in curve}) > 1:
            found[name] = [*curve, (max(end or 0, events[-1].step), curve[-1][1])]
    return found


def step_seconds(record: Record) -> Curve:
    """Time per training step over the run: as recorded, else as it was found just before each event."""
    recorded = record.curves.get(SECONDS)
    return recorded or [(e.step, e.step_seconds) for e in record.events if e.step_seconds is not None]


def saved(record: Record) -> Curve:
    """Seconds saved up to each step against steps as slow as before the first event, less those of the events."""
    seconds = step_seconds(record)
    first = record.events[0].step if record.events else seconds[-1][0]
    dense = sorted(value for step, value in seconds if step <= first) or [seconds[0][1]]
    typical, gained, curve, since = dense[len(dense) // 2], 0.0, [], 0
    pending = list(record.events)
    for step, value in seconds:
        gained += (step - since) * (typical - value) if step > first else 0.0
        while pending and pending[0].step <= step:
            gained -= pending.pop(0).seconds
        curve.append((step, gained))
        since = step
    return curve


def _groups(record: Record) -> Iterable[tuple[str, str, str]]:
    widths = record.events[-1].widths_after if record.events else {}
    for name in dict.fromkeys([*widths, *record.explanations]):
        yield name, f"{widths[name]:,}" if name in widths else "", record.explanations.get(name, "")


def _layers(record: Record) -> Iterable[tuple[str, str, str]]:
    for name, layer in record.architecture.get("layers", {}).items():
        shapes = (f"{key} {' x '.join(map(str, shape))}" for key, shape in layer["shapes"].items() if shape)
        if layer["shapes"]:
            yield name, layer["type"], ", ".join(shapes)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str]) -> str:
    kinds = [' class="words"' if heading in words else "" for heading in headings]
    head = "".join(f"<th{kind}>{escape(heading)}</th>" for kind, heading in zip(kinds, headings, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}\n</table>"
