"""The cost of data-parallel training as a formula: compute, all-reduce by ring or tree, events. No measuring here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BACKWARD = 2 / 3  # of a training step's FLOPs
BYTES = 4  # of a gradient, and of an entry of a moment


@dataclass(frozen=True)
class Link:
    """A network: seconds of a message before its first byte, and seconds for each byte."""

    latency: float
    byte: float

    def ring(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes: 2 (n - 1) messages of size / n (Patarasuk, Yuan 2009)."""
        return 2 * (ranks - 1) * (self.latency + size / ranks * self.byte)

    def tree(self, size: float, ranks: int) -> float:
        """Seconds of a pipelined reduction and broadcast along a double binary tree (Sanders, Speck, Traeff 2009)."""
        return 2 * (math.ceil(math.log2(ranks)) * self.latency + size * self.byte) if ranks > 1 else 0.0

    def all_reduce(self, size: float, ranks: int, algorithm: str) -> float:
        return self.tree(size, ranks) if algorithm == "tree" else self.ring(size, ranks)


def link(latency_s: float, large_s: float, size: float, ranks: int) -> Link:
    """The link on which a ring of so many ranks takes `latency_s` for nearly no bytes and `large_s` for `size`."""
    return Link(latency_s / (2 * (ranks - 1)), max(0.0, large_s - latency_s) * ranks / (2 * (ranks - 1) * size))


@dataclass(frozen=True)
class Rank:
    """What one rank computes: a step takes fixed + flops * flop + parameters * parameter seconds.

    Attributes:
        overlap: share of the backward pass behind which the all-reduce hides.
        cores: that ranks share, one each; inf: every rank has its own.
    """

    fixed: float
    flop: float
    parameter: float
    overlap: float = 0.0
    cores: float = math.inf

    def compute(self, flops: float, parameters: float, ranks: int) -> float:
        """Seconds of a step without the network; `flops` are one rank's."""
        crowded = max(1.0, ranks / self.cores)
        return crowded * (self.fixed + flops * self.flop + parameters * self.parameter)

    def step(self, flops: float, parameters: float, ranks: int, network: Link, algorithm: str) -> float:
        """Seconds of a step."""
        crowded = max(1.0, ranks / self.cores)
        hidden = self.overlap * BACKWARD * flops * self.flop * crowded
        exposed = max(0.0, network.all_reduce(BYTES * parameters, ranks, algorithm) - hidden)
        return self.compute(flops, parameters, ranks) + exposed


@dataclass(frozen=True)
class Stage:
    """A part of the run, from `begin` (share of its steps) on: shares of the dense network's FLOPs and parameters."""

    begin: float
    flops: float
    parameters: float


DENSE = (Stage(0.0, 1.0, 1.0),)


@dataclass(frozen=True)
class Events:
    """All events of a run: their seconds on one rank for a network of sum `cubes` of widths cubed, and their number."""

    seconds: float
    cubes: float
    number: int

    def cost(self, widths: Sequence[int], ranks: int, network: Link, algorithm: str) -> float:
        """Seconds on so many ranks: groups are shared out, moments are summed over ranks, plans sent to all."""
        cubes = [width**3 for width in widths]
        share = max(1 / ranks, max(cubes) / sum(cubes))  # no group is divided
        sent = 3 * BYTES * sum(width**2 for width in widths)  # two moments, and a plan of up to that size
        return self.seconds * sum(cubes) / self.cubes * share + self.number * network.all_reduce(sent, ranks, algorithm)


def run_seconds(
    rank: Rank, stages: Sequence[Stage], steps: int, flops: float, parameters: float, ranks: int, network: Link,
    algorithm: str = "ring",
) -> float:  # fmt: skip
    """Seconds of all steps; `flops` are one rank's of a dense step."""
    ends = [stage.begin for stage in stages[1:]] + [1.0]
    return steps * math.fsum(
        (end - stage.begin) * rank.step(stage.flops * flops, stage.parameters * parameters, ranks, network, algorithm)
        for stage, end in zip(stages, ends, strict=True)
    )
