"""Where the numbers of a `Recorder` go while the network trains: a terminal, TensorBoard."""

import time
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table


class LiveView:
    """A sink that shows the run in the terminal: a table that stays in place, or a line now and then without one.

    Use it as a context manager: `with LiveView(total_steps) as view: recorder = Recorder(apoptosis, view)`.
    """

    def __init__(self, total_steps: int | None = None, console: Console | None = None):
        self.console = console or Console()
        self.total_steps = total_steps
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._pause, self._shown, self._events = (0.25 if self._live else 5.0), -1e9, 0

    def __call__(self, numbers: dict[str, float]) -> None:
        """Show these numbers, unless others were shown a moment ago; events are always shown."""
        event = "event/seconds" in numbers
        self._events += event
        if not event and time.perf_counter() - self._shown < self._pause:
            return
        self._shown = time.perf_counter()
        if self._live:
            self._live.update(self._table(numbers), refresh=True)
        else:
            self.console.print("  ".join(f"{name} {words}" for name, words in self._cells(numbers)), markup=False)

    def _cells(self, numbers: dict[str, float]) -> list[tuple[str, str]]:
        step = f"{numbers['step']:,.0f}" + (f" / {self.total_steps:,}" if self.total_steps else "")
        widths = " ".join(f"{value:.0f}" for name, value in numbers.items() if name.startswith("width/"))
        others = [(n, f"{v:.4g}") for n, v in numbers.items() if "/" not in n and n not in ("step", "parameters")]
        return [("step", step), *others, ("widths", widths), ("events", str(self._events))]

    def _table(self, numbers: dict[str, float]) -> Table:
        cells = self._cells(numbers)
        table = Table(*(name for name, _ in cells), title="neuron apoptosis")
        table.add_row(*(words for _, words in cells))
        return table

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


class TensorBoard:
    """A sink that writes scalars, and at every event a histogram of the widths (needs the package tensorboard)."""

    def __init__(self, log_dir: str | Path):
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(log_dir))

    def __call__(self, numbers: dict[str, float]) -> None:
        """Write these numbers at their step."""
        step = int(numbers["step"])
        for name, value in numbers.items():
            if name != "step":
                self.writer.add_scalar(f"apoptosis/{name}", value, step)
        widths = [value for name, value in numbers.items() if name.startswith("width/")]
        if "event/seconds" in numbers and widths:
            self.writer.add_histogram("apoptosis/widths", torch.tensor(widths), step)
        self.writer.flush()
