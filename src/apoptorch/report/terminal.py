"""A history as a table in the terminal."""

from collections.abc import Sequence

from rich.table import Table

from apoptorch.plan import Event

HEADINGS = ("step", "widths", "parameters", "predicted", "measured", "bound", "changed", "s", "outcome")


def history_table(history: Sequence[Event]) -> Table:
    """One row per event: step, widths and parameters after it, predicted and measured loss increase, proved bound of

    the output's change, upper limit of the share of predictions that change, seconds; columns without a number are
    left out.
    """
    rows = [cells(event) for event in history]
    told = [i for i in range(len(HEADINGS)) if not rows or any(row[i] != "-" for row in rows)]
    table = Table(title="neuron apoptosis")
    for i in told:
        words = HEADINGS[i] in ("widths", "outcome")
        justify, least = ("left", 12) if words else ("right", None)
        table.add_column(HEADINGS[i], justify=justify, no_wrap=not words, min_width=least)
    for row in rows:
        table.add_row(*(row[i] for i in told))
    return table


def cells(event: Event) -> tuple[str, ...]:
    """What the table says of one event, in the order of `HEADINGS`."""
    return (
        f"{event.step:,}",
        " ".join(map(str, event.widths_after.values())),
        f"{event.parameters_after:,}",
        _loss(event.predicted),
        _loss(event.measured),
        _loss(event.bound),
        _changed(event),
        f"{event.seconds:.2f}",
        _outcome(event),
    )


def _changed(event: Event) -> str:
    upper = None if event.certificate is None else event.certificate.changed_upper
    return "-" if upper is None else f"< {upper:.1%}"


def _outcome(event: Event) -> str:
    if event.rolled_back:
        return f"undone: {event.reason}"
    removed = sum(event.widths_before.values()) - sum(event.widths_after.values())
    return f"removed {removed}" if removed else event.reason or "nothing removed"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1e}"
