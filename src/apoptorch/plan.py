"""The data that the parts of apoptorch exchange: frozen, without behaviour beyond JSON.

Shapes: n channels in a group, k survivors.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a group's channels lie in a parameter or buffer.

    Attributes:
        tensor: the qualified name in the model ("0.weight"), the first one if it is tied.
        dim: the dimension that is cut.
        inner: entries of that dimension for each channel.
        positions: channel c owns positions[c * inner : (c + 1) * inner]; None stands for 0, 1, 2, ...
        split: (dimension, blocks): positions count through (blocks, `dim`), where `blocks` equal parts of that other
            dimension (experts, groups of a convolution) each have their own entries of `dim`. The same number of
            entries stays in each.
    """

    tensor: str
    dim: int
    inner: int = 1
    positions: tuple[int, ...] | None = None
    split: tuple[int, int] | None = None

    def index(self, width: int) -> Int64[Tensor, "n inner"]:
        """The positions of all channels of a group that is `width` wide."""
        count = width * self.inner
        flat = torch.arange(count) if self.positions is None else torch.tensor(self.positions, dtype=torch.int64)
        return flat[:count].view(width, -1)

    def opened(self, tensor: Tensor) -> Tensor:
        """The tensor with all positions along `dim`."""
        if self.split is None:
            return tensor
        dim, blocks = self.split
        return tensor.unflatten(dim, (blocks, -1)).movedim(dim, self.dim).flatten(self.dim, self.dim + 1)

    def closed(self, tensor: Tensor) -> Tensor:
        """What `opened` made, as it was."""
        if self.split is None:
            return tensor
        dim, blocks = self.split
        return tensor.unflatten(self.dim, (blocks, -1)).movedim(self.dim, dim).flatten(dim, dim + 1)

    def moved(self, place: Int64[Tensor, " p"], width: int, kept: Int64[Tensor, " k"]) -> "Slot":
        """The slot of the channels `kept` of `width`, once each position p has become place[p]."""
        positions = place[self.index(width)[kept].flatten()]
        plain = torch.equal(positions, torch.arange(len(positions)))
        return replace(self, positions=None if plain else tuple(positions.tolist()))


@dataclass(frozen=True)
class Consumer:
    """A weight whose columns read the group's channels.

    `bias` takes the constant part of a fold; None if there is none, or if the constant would not be exact
    (no bias parameter, or a zero-padded convolution). `weight.tensor` may name a parametrized attribute
    (weight_norm): the fold then acts on the effective weight.

    `paired`: what reads the channels are the channels that the *rows* of this tensor make: their products are summed up
    (queries and keys). The channels are seen where the group's first producer makes them.
    """

    weight: Slot
    bias: str | None = None
    paired: bool = False


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a user's module, read by forward(), that must be width x `times` / `over` of a group.

    `module` is the path in the model ("layers.0.attention"), `name` that of the attribute ("head_dim").
    """

    module: str
    name: str
    times: int
    over: int

    def value(self, width: int) -> int:
        return width * self.times // self.over


@dataclass(frozen=True)
class ChannelGroup:
    """n interchangeable channels: what makes them, what passes them on, what reads them.

    Attributes:
        name: module path of the first producer ("features.3").
        width: number of channels now.
        full_width: number of channels before any removal.
        neuron: neuron type, a name in `neurons.NEURONS` with the op's constants, if any ("relu", "elu(0.5)"),
            or "general" where no closed form applies.
        producers: weights and biases whose rows make the channels.
        max_pooled: a max pooling lies before a consumer, so that neurons can't be folded with a negative sign.
        passthrough: per-channel parameters and buffers between producer and consumer (batch norm, PReLU).
        consumers: weights that read the channels.
        prunable: False if the group must keep its width; `reason` then says why.
        blocks: heads, experts or parts of a norm, `width / blocks` channels each, one block after the other. The same
            number must stay in every block, and a channel can be folded only into others of its block.
        entries: numbers that make one channel where a consumer reads it: those of a whole head. They go together, and
            each is folded into all entries of the survivors.
        multiple: what a kernel asks the width to be a multiple of, in every block.
        gate: None: its channels are no experts. Else they are whole experts, weighed by a softmax of what the first
            producer makes; each token takes so many of the largest, or all (0).
        sizes: attributes of modules that follow its width, as no tensor's shape tells them.
        lines: the lines of code ("file.py:12") that its channels pass.
    """

    name: str
    width: int
    full_width: int
    neuron: str
    producers: tuple[Slot, ...]
    passthrough: tuple[Slot, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    max_pooled: bool = False
    prunable: bool = True
    reason: str | None = None
    blocks: int = 1
    entries: int = 1
    multiple: int = 1
    gate: int | None = None
    sizes: tuple[SizeAttribute, ...] = ()
    lines: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every place of its channels in a tensor: made, passed through, read."""
        return (*self.producers, *self.passthrough, *(consumer.weight for consumer in self.consumers))

    @property
    def paired(self) -> bool:
        """Are its channels read by those of another layer, in products of two?"""
        return any(consumer.paired for consumer in self.consumers)

    @property
    def makers(self) -> tuple[Slot, ...]:
        """All rows of layers that hold its channels: also those of what they are multiplied with, in pairs."""
        return (*self.producers, *(consumer.weight for consumer in self.consumers if consumer.paired))

    @property
    def experts(self) -> int:
        """How many blocks are experts: each lies in its own part of every tensor, and no sample is read by two."""
        return self.blocks if all(slot.split for slot in self.slots) else 1

    @property
    def least_step(self) -> int:
        """How many channels go at least."""
        return self.blocks * self.multiple

    @property
    def shrinks(self) -> bool:
        """Is it wide enough to lose channels?"""
        return self.width > max(self.least_step, self.gate or 0)

    def leading(self, count: int) -> Int64[Tensor, " count"]:
        """The first channels of every block, `count` in all."""
        return torch.arange(self.width).view(self.blocks, -1)[:, : count // self.blocks].flatten()

    def by_entry(self) -> "ChannelGroup":
        """The group as its consumers read it: every entry is a channel."""
        consumers = (replace(c, weight=replace(c.weight, inner=c.weight.inner // self.entries)) for c in self.consumers)
        return replace(self, width=self.width * self.entries, consumers=tuple(consumers), entries=1)

    def entries_of(self, channels: Int64[Tensor, " k"]) -> Int64[Tensor, " e"]:
        """Where the entries of these channels are among all entries of the group."""
        return (channels[:, None] * self.entries + torch.arange(self.entries, device=channels.device)).flatten()

    def least(self, floor: int) -> int:
        """The least width that holds `floor` entries, or as many channels where each is one; of experts, a token's."""
        return -(-floor // self.entries) if self.gate is None else max(1, self.gate)

    def with_experts(self, count: int) -> "ChannelGroup":
        """The group once its blocks are the first `count` of its experts; of one, no block is left."""
        experts = self.experts

        def shortened(slot: Slot) -> Slot:
            number = self.width // experts * count * slot.inner
            positions = None if slot.positions is None else slot.positions[:number]
            plain = positions is None or positions == tuple(range(number))
            split = None if slot.split is None or count == 1 else (slot.split[0], count)
            return replace(slot, positions=None if plain else positions, split=split)

        return self if experts == count else replace(
            self, width=self.width // experts * count, full_width=self.full_width // experts * count, blocks=count,
            producers=tuple(shortened(slot) for slot in self.producers),
            consumers=tuple(replace(each, weight=shortened(each.weight)) for each in self.consumers),
            sizes=tuple(replace(size, over=count) if size.over == experts else size for size in self.sizes),
        )  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """How one consumer replaces all n channels by the k survivors: a ~ coeffs @ a[keep] + shift.

    Of a group whose channels have several entries, n and k count entries.
    """

    coeffs: Float64[Tensor, "n k"]
    shift: Float64[Tensor, " n"] | None = None


@dataclass(frozen=True)
class FoldPlan:
    """One removal in one group.

    Attributes:
        group: name of the group.
        keep: sorted indices of the survivors.
        folds: one `Fold` for each consumer of the group, in their order; () lets channels go without a substitute.
        scale: what survivors are multiplied by, in the tensors named by `scaled`, to keep their pace of learning
            (docs/theory.md); `folds` then reads the scaled survivors. None: survivors stay as they are.
        predicted: predicted increase of the loss (the loss's own units); NaN without data.
        first_order: the part of `predicted` that the gradient gives (docs/theory.md, statement 13).
        bound: worst-case change of the consumers' output (Euclidean norm) for inputs of the asked norm, or None.
        cautious: the same increase with damping and the gradient's part in full: what price and guard go by.
    """

    group: str
    keep: Int64[Tensor, " k"]
    folds: tuple[Fold, ...]
    scale: Float64[Tensor, " k"] | None = None
    scaled: tuple[str, ...] = ()
    predicted: float = math.nan
    bound: float | None = None
    first_order: float = 0.0
    cautious: float = 0.0


@dataclass(frozen=True)
class CostTerm:
    """What one op costs: `flops` x width(out_group) x width(in_group) forward FLOPs a batch; a None group counts 1.

    `parameters` counts those of the op's weight in the same way. `routed`: each row meets the weight of one expert, so
    that FLOPs don't fall with their number.
    """

    flops: float
    out_group: str | None
    in_group: str | None
    parameters: float = 0.0
    routed: bool = False


@dataclass(frozen=True)
class Certificate:
    """What is known of one removal, measured on `samples` calibration inputs that its plan did not see.

    Attributes:
        samples: number of held-out inputs.
        loss_before, loss_after: mean loss (or 0 and the relative mean squared change of the output, without loss_fn).
        changed_predictions: how many predictions changed; None where the output has no classes.
        changed_upper: one-sided upper confidence limit (Clopper-Pearson) on the share of inputs that change.
        confidence: of each limit (what it means exactly: docs/theory.md, statements 17 and 18).
        bound: worst-case change of the model's output (Euclidean norm), where a closed form exists.
        loss_upper: one-sided upper confidence limit on the mean loss increase: the empirical Bernstein limit, of the
            changes of single inputs clipped at +-`clip`, or the normal limit without clipping if that is more. None if
            the loss is not finite.
        clip: loss units.
        error: standard error of `loss_after - loss_before` (loss units).
    """

    samples: int
    loss_before: float
    loss_after: float
    changed_predictions: int | None
    changed_upper: float | None
    confidence: float
    bound: float | None = None
    loss_upper: float | None = None
    clip: float | None = None
    error: float = 0.0


@dataclass(frozen=True)
class GroupChange:
    """One group's part in an event.

    Attributes:
        before, after: width.
        predicted: predicted increase of the loss (the loss's own units); None without data.
        bound: worst-case change of the model's output (Euclidean norm); None with data, as the fold's coefficients then
            come from no closed form.
        error: measured on the calibration data: the share of the energy of the consumers' output that the fold left
            unexplained; None without data, and of whole experts.
        first_order: the part of `predicted` that the gradient gives: what was learned last and is undone.
    """

    group: str
    before: int
    after: int
    predicted: float | None
    bound: float | None
    error: float | None
    first_order: float | None = None


@dataclass(frozen=True)
class Event:
    """One removal, done or undone. Plain data: `to_json` and `from_json` are each other's inverse.

    Attributes:
        step: optimizer steps done before the event.
        changes: the groups that changed (or were to change), in the model's order.
        widths_before, widths_after: width of every group.
        parameters_before, parameters_after: number of parameters of the model.
        flops_before, flops_after: forward FLOPs of the example inputs.
        seconds: wall time of the event, search and guard included.
        budget: the loss increase that the event was allowed (loss units).
        predicted: predicted loss increase, all groups together (loss units).
        measured: loss change on held-out calibration data (loss units), or None.
        bound: worst-case change of the output (Euclidean norm), or None.
        certificate: what was shown on held-out data, or None without data.
        rolled_back: True if the guard undid the event.
        reason: why it was rolled back, or why nothing was removed.
        notes: further remarks, by what they are about; by a group's name, why none of its channels could go.
        step_seconds: wall time of a training step just before the event (the least of several), where it was timed.
        foreseen: the share of the FLOPs left that twice the price would have taken as well (half of each group that was
            narrowed as far as one look goes).
    """

    step: int
    changes: tuple[GroupChange, ...]
    widths_before: dict[str, int]
    widths_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    flops_before: float
    flops_after: float
    seconds: float
    budget: float | None
    predicted: float | None
    measured: float | None
    bound: float | None
    certificate: Certificate | None
    rolled_back: bool = False
    reason: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    step_seconds: float | None = None
    foreseen: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; floats that are not finite become None."""
        return _plain(dataclasses.asdict(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Event":
        """The event that `to_json` wrote."""
        data = dict(data)
        data["changes"] = tuple(GroupChange(**change) for change in data["changes"])
        if data["certificate"] is not None:
            data["certificate"] = Certificate(**data["certificate"])
        return Event(**data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
