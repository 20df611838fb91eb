"""Whole heads as channels.

Queries and keys meet in pairs, so that no channel of a head can go alone. But all channels of a head can: the rows of
its queries, keys and values, and the columns that read it. A tracer notes what is multiplied in pairs; here all of a
head's entries become one channel, and the graph is walked once more with that. What follows needs no rule of its own:
whatever lies along a head's entries (rotary embeddings, norms of queries) then touches no channel dimension, scores
carry one channel for each head, and values are united with them. Where fewer heads of keys serve more of queries
(grouped queries), that makes one channel of a key head and its queries.
"""

from collections.abc import Collection

import torch

from .labels import Channels
from .tracer import Array, Key, Tracer

_ROUNDS = 4


def with_whole_heads(tracer: Tracer, tensors: Collection[str] | None) -> Tracer:
    """The graph of a tracer that has run, walked with whole heads as channels: of these tensors, or all (None)."""
    for _ in range(_ROUNDS):
        if not tracer.heads:
            break
        merged = _merged(tracer, tensors)
        tracer = Tracer(tracer.model, tracer.program, {**tracer.merged, **merged}).run() if merged else tracer
    return tracer


def _merged(tracer: Tracer, tensors: Collection[str] | None) -> dict[Key, Array]:
    """For each dimension that holds heads: the number of each position's channel."""
    heads = Channels()
    heads.parent = torch.arange(len(tracer.channels.parent))
    for rows in tracer.heads:
        heads.unite(rows[:, :1], rows[:, 1:])
    found = {}
    for key, record in tracer.records.items():
        labels = heads.find(record.labels)
        if (tensors is None or key[0] in tensors) and bool((labels >= 0).all()):
            distinct, channel = torch.unique(labels, return_inverse=True)
            if len(distinct) < len(labels):
                found[key] = channel
    return found
