"""The contenders of the full benchmark, each a `comparison.Contender`, made from the seed's run with apoptosis."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comparison import Apoptosis, Contender

from .channels import Narrow, final_widths
from .dead_neurons import DeadNeurons
from .group_lasso import GroupLasso
from .merging import Merging
from .torch_pruning_loop import TorchPruning
from .weights_only import WeightsOnly

REFERENCE = "apoptosis"  # policy "normal": what the peers are given the size, the steps or the time of
SEARCH = "random-width"
SAME_TIME = "apoptosis-same-time"


@dataclass(frozen=True)
class Entry:
    """make(record of the seed's run with apoptosis) -> a contender; `about`: one line for the page; `follows`: it needs
    that record."""

    about: str
    make: Callable[[Mapping[str, Any]], Contender]
    follows: bool = False


CONTENDERS = {
    "dense": Entry("the network as it is", lambda _: Contender()),
    REFERENCE: Entry("apoptorch, policy normal", lambda _: Apoptosis()),
    "apoptosis-conservative": Entry("apoptorch, policy conservative", lambda _: Apoptosis("conservative")),
    "apoptosis-aggressive": Entry("apoptorch, policy aggressive", lambda _: Apoptosis("aggressive")),
    SAME_TIME: Entry(
        "policy normal, given as many epochs as should end in the dense run's time", lambda _: Apoptosis(), follows=True
    ),
    "weights-only": Entry(
        "the paper's kind of apoptosis: closed forms of the weights, no data", lambda _: WeightsOnly()
    ),
    "hindsight": Entry(
        "the final architecture of apoptosis, from scratch", lambda run: Narrow(final_widths(run)), follows=True
    ),
    SEARCH: Entry(
        "networks of random widths with about its parameters, in the same total time; best on validation data",
        lambda run: Narrow(final_widths(run)),
        follows=True,
    ),
    "torch-pruning-magnitude": Entry(
        "Torch-Pruning 1.6.1 at its steps, to its number of parameters, by magnitude",
        lambda run: TorchPruning(run, "magnitude"),
        follows=True,
    ),
    "torch-pruning-taylor": Entry(
        "the same by Taylor importance", lambda run: TorchPruning(run, "taylor"), follows=True
    ),
    "merging": Entry(
        "neuron merging without data (Kim et al. 2020) at its steps, to its widths",
        lambda run: Merging(run),
        follows=True,
    ),
    "group-lasso": Entry("group lasso after PruneTrain (Lym et al. 2019), penalty ratio 0.25", lambda _: GroupLasso()),
    "group-lasso-strong": Entry("the same, penalty ratio 0.75", lambda _: GroupLasso(0.75)),
    "dead-neurons": Entry("dead-neuron pruning after DemP (Dufort-Labbe et al. 2024)", lambda _: DeadNeurons()),
}

OURS = ("dense", REFERENCE, "apoptosis-conservative", "apoptosis-aggressive", SAME_TIME, "hindsight")
PEERS = tuple(name for name in CONTENDERS if name not in OURS)
