"""How boldly neurons are removed, as plain data."""

import math
from dataclasses import dataclass

from .errors import ArgumentError


@dataclass(frozen=True)
class Policy:
    """How boldly neurons are removed. The three names "conservative", "normal", "aggressive" are `POLICIES`.

    Attributes:
        price: what the network's whole cost (half FLOPs, half parameters, at full width) is worth, as a share of what
            has been learned, the fall of the loss since the first step: channels that are 1 % of the cost go if that
            is predicted to lose less than price / 100 of it.
        rise: the price at share p of the run is price * p ** rise: early, the network has more to learn.
        full_run: a run of fewer steps pays less, by the square of their ratio: it has less time to learn again.
        start, first_step: the first event comes after this share of the run, but not before this step.
        gap: the step of each event is that of the one before, times this at most.
        stop: the last event comes after this share of the run, where its length is known.
        payback: an event happens if it is expected to save this many times the seconds that it costs; 0: always. A
            smaller network is worth something too, hence less than 1.
        samples: inputs, or tokens where layers are linear in each, on which a removal is planned: four for each channel
            of the widest group, but at most this number and at least half of it; half as many again are held out to
            judge it. With one of the hard limits below only inputs count.
        damping: see `calibrate.measure`.
        steepest: no look narrows a group by more than this factor: what has no use yet may get one.
        room: a look leaves linear layers so many channels to read for each direction in which training moves them
            (docs/theory.md, Statement 22), but for what goes at no cost: a network that has only begun to learn seems
            to need few.
        multiple, floor: widths are multiples of `multiple`, and at least `floor`. None: of what the hardware takes at a
            time, 8, but 16 in convolutions of 64 channels or more on a CPU with AVX-512.
        rebalance: under plain SGD, survivors are rescaled to keep their pace of learning.
        guard, tolerance: a removal is undone if the loss on held-out data rises by more than `guard` times what was
            predicted, `tolerance` times the loss (or a quarter of what has been learned, if that is more) and three
            standard errors together. No event may be predicted to cost more than that `tolerance` allows.
        confidence: of the certificate's limit on changed predictions.
        max_loss_increase, max_changed_predictions: hard limits; a removal that can't show them is undone.
        cost: what removals should save: "flops", or measured "milliseconds".
    """

    price: float = 0.016
    rise: float = 0.75
    full_run: int = 2000
    start: float = 0.04
    first_step: int = 100
    gap: float = 2.2
    stop: float = 0.65
    payback: float = 0.5
    samples: int = 2048
    damping: float = 1.0
    steepest: float = 8.0
    room: float = 4.0
    multiple: int | None = None
    floor: int = 8
    rebalance: bool = True
    guard: float = 3.0
    tolerance: float = 0.02
    confidence: float = 0.95
    max_loss_increase: float | None = None
    max_changed_predictions: float | None = None
    cost: str = "flops"

    def __post_init__(self) -> None:
        rules = {
            "price": self.price > 0, "rise": self.rise >= 0, "full_run": self.full_run >= 1,
            "start": 0 <= self.start < 1, "first_step": self.first_step >= 1,
            "gap": self.gap > 1, "stop": 0 < self.stop <= 1, "payback": self.payback >= 0, "samples": self.samples >= 2,
            "damping": self.damping >= 0, "steepest": self.steepest > 1, "room": self.room >= 0,
            "multiple": self.multiple is None or self.multiple >= 1, "floor": self.floor >= 1, "guard": self.guard > 0,
            "tolerance": self.tolerance >= 0, "confidence": 0 < self.confidence < 1,
            "cost": self.cost in ("flops", "milliseconds"),
        }  # fmt: skip
        problems = [
            f"`{name}` must be in its range, got {getattr(self, name)!r}. See help(apoptorch.Policy)."
            for name, holds in rules.items()
            if not holds
        ]
        if problems:
            raise ArgumentError(problems)

    def last_look(self, total_steps: int | None) -> float:
        """The step after which no look comes; infinite where the run's length is unknown."""
        return math.floor(self.stop * total_steps) if total_steps else math.inf

    def next_look(self, step: int, total_steps: int | None) -> int:
        """The step of the look after one at `step`: they come ever later by the same factor, at most `gap`, so that the
        last one is at `last_look`."""
        last, gap = self.last_look(total_steps), self.gap
        if step < last < math.inf:
            gap = (last / step) ** (1 / math.ceil(math.log(last / step, gap)))
        return math.ceil(round(step * gap, 6))

    def price_at(self, step: int, total_steps: int | None) -> float:
        """The price at this step; a run of unknown length is a full one in its middle."""
        progress = min(1.0, step / total_steps) if total_steps else 0.5
        length = min(1.0, (total_steps or math.inf) / self.full_run)
        return self.price * length**2 * progress**self.rise


POLICIES = {
    "conservative": Policy(price=0.006, room=8.0),
    "normal": Policy(),
    "aggressive": Policy(price=0.064, room=2.0),
}
