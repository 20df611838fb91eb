"""A history as one self-contained HTML file."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from apoptorch.plan import Event
from apoptorch.report.figures import plot_widths
from apoptorch.report.terminal import HEADINGS, cells

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>neuron apoptosis</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: right }}
svg {{ max-width: 100%; height: auto }}
</style>
<h1>Neuron apoptosis</h1>
<p>{headline}</p>
{picture}
<h2>Events</h2>
<table><tr>{headings}</tr>
{rows}
</table>
<h2>Groups</h2>
<pre>{explanation}</pre>
</html>
"""


def write_html(history: Sequence[dict[str, Any]], path: str | Path, explanation: str = "") -> None:
    """Write a run as one HTML file without links: the picture of the widths, every event, and `explanation`.

    history: events as `Event.to_json` gives them, as they stand in a saved history.json.
    """
    events = [Event.from_json(event) for event in history]
    rows = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(event))}</tr>" for event in events]
    page = PAGE.format(
        headline=_headline(events),
        picture=_picture(events),
        headings="".join(f"<th>{heading}</th>" for heading in HEADINGS),
        rows="\n".join(rows),
        explanation=escape(explanation),
    )
    Path(path).write_text(page, encoding="utf-8")


def _headline(events: Sequence[Event]) -> str:
    if not events:
        return "Nothing happened."
    first, last = events[0], events[-1]
    undone = sum(event.rolled_back for event in events)
    return (
        f"{first.parameters_before:,} parameters before, {last.parameters_after:,} after {len(events)} events, "
        f"{undone} of them undone, in {sum(event.seconds for event in events):.1f} s."
    )


def _picture(events: Sequence[Event]) -> str:
    figure = Figure(figsize=(9, 4), layout="constrained")
    plot_widths(figure.subplots(), events)
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]
