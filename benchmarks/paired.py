"""What a paired comparison over seeds shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Of paired metrics, contender - dense: the mean and its lower one-sided 95 % limit (None: one seed)."""

    mean: float
    lower: float | None
    seeds: int

    def non_inferior(self, margin: float) -> bool | None:
        """Is the contender worse by less than `margin`, at that confidence? None: one seed can't show it."""
        return None if self.lower is None else self.lower > -margin


def paired(ours: Sequence[float], dense: Sequence[float]) -> Difference:
    """Student's t on the differences of each seed."""
    differences = [a - b for a, b in zip(ours, dense, strict=True)]
    mean, n = fmean(differences), len(differences)
    if n < 2:
        return Difference(mean, None, n)
    return Difference(mean, mean - float(t.ppf(CONFIDENCE, n - 1)) * stdev(differences) / math.sqrt(n), n)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(fmean(math.log(ratio) for ratio in ratios))
