"""Neuron merging without data: Kim, Kim, Kim, Park 2020, "Neuron Merging: Compensating for Pruned Neurons".

Of each group the neurons with the largest weights (Euclidean norm) stay. A pruned one is merged into the survivor
whose weights are most alike in direction, if their cosine exceeds a threshold: its outgoing weights are added there,
times the ratio of the norms. Theirs is one step on a trained network; here it is taken at the steps, and to the
widths, of the run with apoptosis.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .channels import Channels, removals, rows

COSINE = 0.45  # theirs for LeNet-300-100


class Merging(Channels):
    """cosine: merge above it; 1 never merges, which is pruning by magnitude."""

    def __init__(self, apoptosis: Mapping[str, Any], cosine: float = COSINE):
        self.cosine = cosine
        self.widths = {event["step"]: event["widths_after"] for event in removals(apoptosis)}

    def step(self, x: Tensor, y: Tensor) -> Any:
        self.steps += 1
        if self.steps not in self.widths:
            return None
        keep, coeffs = {}, {}
        for name, group in self.groups.items():
            keep[name], coeffs[name] = merged(
                rows(self.run.model, group), self.widths[self.steps].get(name, group.width), self.cosine
            )
        return self.remove_(keep, coeffs)


def merged(weights: Tensor, width: int, cosine: float) -> tuple[Tensor, Tensor]:
    """The neurons (rows [n, d]) that stay, sorted [width], and how they stand in for all of them [n, width]."""
    norms = weights.norm(dim=1)
    keep = norms.topk(min(width, len(norms))).indices.sort().values
    alike = normalize(weights) @ normalize(weights[keep]).T
    best, onto = alike.max(1)
    scale = torch.where(best > cosine, norms / norms[keep][onto].clamp(min=1e-12), 0.0)
    coeffs = torch.zeros_like(alike).scatter_(1, onto[:, None], scale[:, None])
    coeffs[keep] = torch.eye(len(keep))
    return keep, coeffs
