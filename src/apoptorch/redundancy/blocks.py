"""Groups made of blocks (heads, experts): as many survivors in each, folds within each. m = n / blocks channels."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ..plan import Fold
from .moments import Selection, directions, fold, others, select

MOST_USED = 0.9  # survivors for each sample, from where a regression tells nothing of new data


def select_blocks(
    second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None, metric: Float[Tensor, "n n"], blocks: int, *,
    stop: float, floor: int = 1, multiple: int = 1, samples: Sequence[int] = (),
) -> Selection:  # fmt: skip
    """`select` in every block; widths that are multiples of `blocks` keep as many in each.

    `multiple` and `floor` are of the whole group. `samples` of each block, where they are its own: the errors are then
    those expected on others.
    """
    if blocks == 1:
        return select(second, mean, metric, stop=stop, floor=floor, multiple=multiple)
    found = []
    for part in _parts(len(second), blocks):
        own = mean if mean is None else mean[part]
        found.append(
            select(second[part][:, part], own, metric[part][:, part], stop=stop / blocks, floor=-(-floor // blocks),
                   multiple=max(1, multiple // blocks))
        )  # fmt: skip
    size, longest = len(second) // blocks, max(len(each.order) for each in found)
    orders = [torch.cat([each.order, others(each.order, size)])[:longest] for each in found]
    errors = [torch.cat([each.error, each.error[-1:].expand(longest + 1 - len(each.error))]) for each in found]
    if samples:
        ratios = [overfit(longest, own).to(error.device) for own, error in zip(samples, errors, strict=True)]
        errors = [error * ratio for error, ratio in zip(errors, ratios, strict=True)]
    if longest == size:
        errors = [error.index_fill(0, torch.tensor([size], device=error.device), 0.0) for error in errors]
    order = torch.stack([order + i * size for i, order in enumerate(orders)]).T.flatten()
    error = torch.stack(errors).sum(0).repeat_interleave(blocks)[: len(order) + 1]
    return Selection(order, error)


def fold_blocks(
    second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None, keep: Int64[Tensor, " k"], blocks: int
) -> Fold:
    """`fold` in every block: coefficients between blocks are 0."""
    if blocks == 1:
        return fold(second, mean, keep)
    count, kept = len(second) // blocks, len(keep) // blocks
    coeffs, shift = second.new_zeros(len(second), len(keep), dtype=torch.float64), []
    for i, part in enumerate(_parts(len(second), blocks)):
        own = keep[i * kept : (i + 1) * kept] - i * count
        block = fold(second[part][:, part], mean if mean is None else mean[part], own)
        coeffs[part, i * kept : (i + 1) * kept] = block.coeffs
        shift += [] if block.shift is None else [block.shift]
    return Fold(coeffs, torch.cat(shift) if shift else None)


def directions_blocks(
    second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None, metric: Float[Tensor, "n n"], blocks: int
) -> float:
    """`directions` of all blocks, where each is multiplied by a matrix of its own."""
    parts = [(part, mean if mean is None else mean[part]) for part in _parts(len(second), blocks)]
    return sum(directions(second[part, part], own, metric[part, part]) for part, own in parts)


def overfit(most: int, samples: int) -> Float64[Tensor, " most+1"]:
    """How much more a regression on 0 ... `most` survivors leaves unexplained on new data (generalised
    cross-validation)."""
    used = torch.arange(most + 1, dtype=torch.float64) / max(samples, 1)
    return (1 - used.clamp(max=MOST_USED)) ** -2


def _parts(n: int, blocks: int) -> Iterator[slice]:
    size = n // blocks
    return (slice(i * size, (i + 1) * size) for i in range(blocks))
