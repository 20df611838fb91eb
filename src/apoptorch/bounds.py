"""Certificates: statistical limits on what a removal changes, and what floating point adds to an exact bound.

The closed-form bounds of single neurons are `neurons.reach`, `neurons.range_error` and the table's Lipschitz
constants; `redundancy.search_weights` adds them up.
"""

import math
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import ArgumentError
from .neurons import Neuron, product


def clopper_pearson_upper(changed: int, samples: int, confidence: float) -> float:
    """One-sided upper confidence limit on a probability, from `changed` successes in `samples` independent trials
    (Statement 17).

    Clopper and Pearson, Biometrika 26 (1934): the p at which P[Binomial(samples, p) <= changed] = 1 - confidence.
    Exact: whatever the true share, it lies above the limit with probability at most 1 - confidence.

    >>> round(clopper_pearson_upper(0, 300, 0.95), 4)  # the rule of three
    0.0099
    """
    _check_confidence(confidence)
    if not 0 <= changed <= samples or samples < 1:
        raise ArgumentError([f"`changed` must lie in 0 ... `samples`, got {changed} of {samples}."])
    if changed == samples:
        return 1.0
    low, high, target = changed / samples, 1.0, math.log1p(-confidence)
    while low < (middle := (low + high) / 2) < high:  # until neighbouring floats
        if _log_binomial_tail(changed, samples, middle) > target:
            low = middle
        else:
            high = middle
    return high


def _log_binomial_tail(k: int, n: int, p: float) -> float:
    """log P[Binomial(n, p) <= k] for 0 < p < 1."""
    i = torch.arange(k + 1, dtype=torch.float64)
    choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return float(torch.logsumexp(choose + i * math.log(p) + (n - i) * math.log1p(-p), 0))


def empirical_bernstein_upper(values: Float[Tensor, " m"], confidence: float, value_range: float) -> float:
    """Upper confidence limit on the mean of independent values that lie in an interval of length `value_range`
    (Statement 18).

    Maurer and Pontil, COLT 2009, theorem 4: with sample variance s^2 and d = 1 - confidence,
    mean + sqrt(2 s^2 ln(2/d) / m) + 7 range ln(2/d) / (3 (m - 1)). The range must be known beforehand (for
    instance by clipping the loss change of each sample), not read off these values.
    """
    _check_confidence(confidence)
    m = len(values)
    if m < 2 or not bool(torch.isfinite(values).all()):
        raise ArgumentError([f"`values` must be at least 2 finite numbers, got {m}. Use a larger batch."])
    values = values.double()
    if (spread := float(values.max() - values.min())) > value_range:
        raise ArgumentError([f"`value_range` must not be less than the values' own {spread}, got {value_range}."])
    log = math.log(2 / (1 - confidence))
    return float(values.mean() + (2 * values.var() * log / m).sqrt()) + 7 * value_range * log / (3 * (m - 1))


def mean_upper(changes: Float[Tensor, " m"], confidence: float, clip: float) -> float:
    """Upper confidence limit on a mean loss increase, from those of m independent inputs (Statement 18).

    The larger of the empirical Bernstein limit for the changes clipped at +-`clip`, which holds for any distribution,
    and the normal limit for the changes as they are, which holds for large m; inf for less than two inputs.
    """
    if len(changes) < 2:
        return math.inf
    exact = empirical_bernstein_upper(changes.clamp(-clip, clip), confidence, 2 * clip)
    return max(exact, float(changes.mean()) + NormalDist().inv_cdf(confidence) * standard_error(changes))


def standard_error(values: Float[Tensor, " m"]) -> float:
    """Of the mean of independent values (Statement 18); 0 for a single one, of which it is not known."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def may_flip(logits: Float[Tensor, "*batch c"], change: float) -> Bool[Tensor, "*batch"]:
    """Whether a change of the logits by at most `change` (Euclidean norm) can change the largest of them
    (Statement 16).

    It needs logit_top - logit_j <= sqrt(2) change for some j: (e_top - e_j).delta <= sqrt(2) |delta|, attained.
    (With the largest single change e in place of the norm the condition is margin <= 2 e.)
    """
    top = logits.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1] <= math.sqrt(2) * change


def dot_rounding(terms: int, dtype: torch.dtype) -> float:
    """g with |fl(x.y) - x.y| <= g |x|.|y| for a sum of `terms` products in any order (Statement 11).

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1: g = m u / (1 - m u), where u is
    the unit roundoff.
    """
    total = terms * torch.finfo(dtype).eps / 2
    return total / (1 - total) if total < 1 else math.inf


def activation_rounding(
    known: Neuron, reach: Float[Tensor, "*n"], inputs: int, dtype: torch.dtype
) -> Float[Tensor, "*n"]:
    """What floats may change of the activation f(w.x + b) of a neuron with |w.x| + |b| <= `reach` (Statement 11).

    L g reach for the dot product of `inputs` terms and a bias, and 8 units of roundoff of L reach + |f(0)| for f.
    """
    zero = 0.0 if known.function is None else abs(float(known.function(torch.zeros((), dtype=torch.float64))))
    steps = dot_rounding(inputs + 2, dtype) + 8 * torch.finfo(dtype).eps
    return product(known.lipschitz, steps * reach) + 8 * torch.finfo(dtype).eps * zero


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ArgumentError([f"`confidence` must lie between 0 and 1, got {confidence}."])
