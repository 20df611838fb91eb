"""What is kept of a run for its report: events, groups, explanations, and curves of whatever the user measures."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from apoptorch.apoptosis import Apoptosis
from apoptorch.architecture import architecture
from apoptorch.errors import ArgumentError
from apoptorch.plan import Event

Curve = Sequence[tuple[int, float]]  # (step, value)
Sink = Callable[[dict[str, float]], object]
SECONDS = "seconds per step"


@dataclass(frozen=True)
class Record:
    """A run: its events; group name -> what `explain` says of it; curves by name; its length, where known;
    the final architecture."""

    events: list[Event]
    explanations: dict[str, str] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    total_steps: int | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(apoptosis: Apoptosis, curves: Mapping[str, Curve] | None = None) -> "Record":
        """The run so far."""
        explanations = dict(line.split(": ", 1) for line in apoptosis.explain().splitlines())
        layers = architecture(apoptosis.model)
        return Record(list(apoptosis.history), explanations, dict(curves or {}), apoptosis.total_steps, layers)

    @staticmethod
    def read(path: Path) -> "Record":
        """What `write` wrote, or a plain list of events.

        Raises:
            ArgumentError: the file is missing, or holds something else.
        """
        try:
            read: Any = json.loads(path.read_text(encoding="utf-8"))
            data: dict[str, Any] = {"events": read} if isinstance(read, list) else read
            events = [Event.from_json(event) for event in data["events"]]
            curves = {name: [(int(s), float(v)) for s, v in points] for name, points in data.get("curves", {}).items()}
            explanations, layers = dict(data.get("explanations", {})), dict(data.get("architecture", {}))
            return Record(events, explanations, curves, data.get("total_steps"), layers)
        except (OSError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
            raise ArgumentError(
                [f"`history` must be a history.json that apoptorch wrote, got {path}: {text}."]
            ) from error

    def write(self, path: Path) -> None:
        """As JSON."""
        data = {
            "events": [event.to_json() for event in self.events], "explanations": self.explanations,
            "curves": {name: list(points) for name, points in self.curves.items()}, "total_steps": self.total_steps,
            "architecture": self.architecture,
        }  # fmt: skip
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")


class Recorder:
    """Keeps curves for the report, and hands every step and event to `sinks` as a flat dict of numbers.

    Call `step` right after `apoptosis.step`. Nothing is read from a tensor, so that a GPU need not wait, but every
    `every` steps and at events. `wandb.log` is a sink as it is; so are `LiveView` and `TensorBoard`.

    Args:
        apoptosis: the run.
        sinks: functions of one dict: "step", what was passed to `Recorder.step`, "seconds per step", "parameters" and
            "width/<group>"; after an event also "event/predicted", "event/measured", "event/rolled back", ...
        every: steps between two points; None: about 500 points in a run of known length, else every tenth step.
    """

    def __init__(self, apoptosis: Apoptosis, *sinks: Sink, every: int | None = None):
        self.apoptosis, self.sinks = apoptosis, sinks
        self.every = every or max(1, (apoptosis.total_steps or 5000) // 500)
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._step, self._known = 0, len(apoptosis.history)
        self._since, self._steps_since = time.perf_counter(), 0

    def step(self, **values: float | Tensor) -> None:
        """Note one training step and its numbers: step(loss=loss, accuracy=accuracy)."""
        self._step += 1
        self._steps_since += 1
        events = self.apoptosis.history[self._known :]
        if self._step % self.every and not events:
            return
        self._known += len(events)
        numbers = {n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in values.items()}
        if not events:  # an event's own seconds are no training
            numbers[SECONDS] = (time.perf_counter() - self._since) / self._steps_since
        for name, number in numbers.items():
            if math.isfinite(number):
                self.curves.setdefault(name, []).append((self._step, number))
        widths = {f"width/{group.name}": float(group.width) for group in self.apoptosis.groups}
        row = {"step": float(self._step), **numbers, **widths}
        for event in events:
            row |= _numbers(event)
        for sink in self.sinks:
            sink(dict(row))
        self._since, self._steps_since = time.perf_counter(), 0

    def write(self, directory: str | Path) -> Path:
        """Write history.json and report.html into `directory`; returns the page."""
        from .html import write_html

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        record = Record.of(self.apoptosis, self.curves)
        record.write(directory / "history.json")
        write_html(record, directory / "report.html")
        return directory / "report.html"


def _numbers(event: Event) -> dict[str, float]:
    """An event as flat numbers."""
    certificate = event.certificate
    found = {
        "parameters": event.parameters_after, "event/parameters removed": event.parameters_before
        - event.parameters_after, "event/seconds": event.seconds, "event/budget": event.budget,
        "event/predicted": event.predicted, "event/measured": event.measured, "event/bound": event.bound,
        "event/changed predictions, upper limit": certificate and certificate.changed_upper,
        "event/rolled back": event.rolled_back,
    }  # fmt: skip
    return {name: float(value) for name, value in found.items() if value is not None}
