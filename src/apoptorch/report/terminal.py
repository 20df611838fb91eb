"""A history as a table in the terminal."""

from collections.abc import Sequence

from rich.table import Table

from apoptorch.plan import Event

HEADINGS = ("step", "widths", "parameters", "predicted", "measured", "s", "outcome")


def history_table(history: Sequence[Event]) -> Table:
    """One row per event: step, widths and parameters after it, predicted and measured loss increase, seconds."""
    table = Table(title="neuron apoptosis")
    for heading in HEADINGS:
        words = heading in ("widths", "outcome")
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    for event in history:
        table.add_row(*cells(event))
    return table


def cells(event: Event) -> tuple[str, ...]:
    """What the table says of one event, in the order of `HEADINGS`."""
    return (
        f"{event.step:,}",
        " ".join(map(str, event.widths_after.values())),
        f"{event.parameters_after:,}",
        _loss(event.predicted),
        _loss(event.measured),
        f"{event.seconds:.2f}",
        _outcome(event),
    )


def _outcome(event: Event) -> str:
    if event.rolled_back:
        return f"undone: {event.reason}"
    removed = sum(event.widths_before.values()) - sum(event.widths_after.values())
    return f"removed {removed}" if removed else event.reason or "nothing removed"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1e}"
