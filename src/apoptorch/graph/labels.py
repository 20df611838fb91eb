"""Channels as labels: every entry of an activation's dimensions that hold channels names its channel.

A field of labels has the activation's dimensions, of size 1 where the channel doesn't depend on the position. Shape
ops act on a field as they act on the activation. -1 stands for what is no channel (a part of the model's input).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

Array = Int64[Tensor, "..."]


@dataclass(frozen=True, eq=False)
class Field:
    """Channels that lie along some dimensions of an activation.

    `neuron` is the non-linearity met since the producer ("linear" before any, "general" after two). `padded`: zeros
    stand beside the channels at the border, so that a consumer can't take a constant exactly.
    """

    labels: Array
    neuron: str = "linear"
    max_pooled: bool = False
    padded: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dim for dim, size in enumerate(self.labels.shape) if size > 1)


class Channels:
    """All labels; those that are `unite`d are one channel."""

    def __init__(self) -> None:
        self.parent = torch.zeros(0, dtype=torch.int64)

    def new(self, count: int) -> Array:
        labels = torch.arange(len(self.parent), len(self.parent) + count)
        self.parent = torch.cat([self.parent, labels])
        return labels

    def find(self, labels: Array) -> Array:
        """The least label of each one's channel."""
        if not len(self.parent):
            return labels
        while True:
            found = torch.where(labels >= 0, self.parent[labels.clamp(min=0)], labels)
            if torch.equal(found, labels):
                return found
            labels = found

    def unite(self, a: Array, b: Array) -> None:
        """a[i] and b[i] are one channel from now on, where both are channels."""
        a, b = (x.flatten() for x in torch.broadcast_tensors(a, b))
        both = (a >= 0) & (b >= 0)
        a, b = a[both], b[both]
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not bool(differ.any()):
                return
            a, b = a[differ], b[differ]
            self.parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")


def compact(labels: Array) -> Array:
    """Dimensions along which nothing changes get size 1."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and (labels.stride(dim) == 0 or bool((labels == labels.narrow(dim, 0, 1)).all())):
            labels = labels.narrow(dim, 0, 1)
    return labels


def widened(labels: Array, shape: tuple[int, ...], dims: range | tuple[int, ...]) -> Array:
    """The labels at their full size along `dims`; nothing is copied."""
    return labels.expand([shape[d] if d in dims else size for d, size in enumerate(labels.shape)])


def segments(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """Least runs of dimensions of equal size that a view turns into each other."""
    found, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        first, start, p, q = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p, i = p * old[i], i + 1
            else:
                q, j = q * new[j], j + 1
        found.append((range(first, i), range(start, j)))
    return [*found, (range(i, len(old)), range(j, len(new)))]  # what is left has size 1


def reshaped(labels: Array, old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Array, list[Array]]:
    """Labels after a view from sizes `old` to `new`; and for each channel dimension that it splits, the labels as
    [rows, entries]: the view works only while every row has as many."""
    if 0 in old or 0 in new:
        return labels.new_full([1] * len(new), -1), []
    wide, sizes, splits = [], [], list[tuple[range, range]]()
    for before, after in segments(old, new):
        carries = any(labels.shape[d] > 1 for d in before)
        wide += [old[d] if carries else 1 for d in before]
        sizes += [new[d] if carries else 1 for d in after]
        splits += [(before, after)] if carries else []
    result = compact(labels.expand(wide).reshape(sizes))
    rows = []
    for before, after in splits:
        varying = [d for d in after if result.shape[d] > 1]
        if len(varying) > sum(labels.shape[d] > 1 for d in before):
            last = varying[-1]
            rows.append(result.movedim(last, -1).reshape(-1, result.shape[last]))
    return result, rows


def line(labels: Array, dim: int) -> Int64[Tensor, "others size"]:
    """The labels along `dim`, one row for each place in the other dimensions."""
    return labels.movedim(dim, -1).reshape(-1, labels.shape[dim])


def along(labels: Int64[Tensor, " size"], dim: int, ndim: int) -> Array:
    shape = [1] * ndim
    shape[dim] = -1
    return labels.view(shape)
