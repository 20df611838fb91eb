"""`spend` against every combination of widths."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptorch.budget import flops, spend
from apoptorch.plan import CostTerm


def curve_of(errors: list[float]) -> torch.Tensor:
    """Errors at widths 1 ... n-1, made a curve: inf at 0, falling, 0 at n."""
    return torch.tensor([math.inf, *sorted(errors, reverse=True), 0.0], dtype=torch.float64)


@st.composite
def networks(draw):
    error = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0).map(lambda e: e**4))
    curves = {
        f"layer{i}": curve_of(draw(st.lists(error, min_size=1, max_size=9))) for i in range(draw(st.integers(1, 3)))
    }
    chain = [None, *curves, None]
    costs = [CostTerm(draw(st.floats(0.1, 10.0)), out, into) for into, out in itertools.pairwise(chain)]
    return curves, costs, draw(st.sampled_from([1, 2, 4]))


def full(curves):
    return {name: len(curve) - 1 for name, curve in curves.items()}


def cheapest(curves, costs, budget, multiple):
    options = [[w for w in range(1, n + 1) if w % multiple == 0 or w == n] for n in full(curves).values()]
    affordable = (
        widths
        for combination in itertools.product(*options)
        if (widths := dict(zip(curves, combination, strict=True)))
        and sum(float(curves[name][w]) for name, w in widths.items()) <= budget
    )
    return min(flops(costs, widths) for widths in affordable)


@settings(max_examples=300)
@given(networks(), st.floats(0.0, 3.0))
def test_within_budget_and_near_the_optimum(network, budget):
    curves, costs, multiple = network
    widths = spend(curves, costs, budget=budget, multiple=multiple)
    assert math.fsum(float(curves[name][w]) for name, w in widths.items()) <= budget * (1 + 1e-12)
    assert all(w % multiple == 0 or w == len(curves[name]) - 1 for name, w in widths.items())
    before = flops(costs, full(curves))
    best = before - cheapest(curves, costs, budget, multiple)
    saved = before - flops(costs, widths)
    assert saved >= 0.5 * best - 1e-9  # greedy can't do worse on one large item; the mean is tested below


def test_mean_saving_is_close_to_the_optimum():
    generator = torch.Generator().manual_seed(0)
    share = []
    for _ in range(100):
        curves = {
            f"layer{i}": curve_of(torch.rand(8, generator=generator, dtype=torch.float64).pow(3).tolist())
            for i in range(3)
        }
        costs = [CostTerm(1.0, out, into) for into, out in itertools.pairwise([None, *curves, None])]
        before = flops(costs, full(curves))
        best = before - cheapest(curves, costs, 0.3, 1)
        share.append((before - flops(costs, spend(curves, costs, budget=0.3, multiple=1))) / best)
    assert sum(share) / len(share) > 0.98


@settings(max_examples=200)
@given(networks(), st.lists(st.floats(0.0, 3.0), min_size=2, max_size=6))
def test_more_budget_never_costs_more(network, budgets):
    curves, costs, multiple = network
    prices = [flops(costs, spend(curves, costs, budget=b, multiple=multiple)) for b in sorted(budgets)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(prices))


def test_free_channels_go_even_without_budget_or_cost():
    curve = torch.zeros(33, dtype=torch.float64)
    curve[:9] = torch.inf
    assert spend({"a": curve}, [], budget=0.0, multiple=8) == {"a": 16}


def test_a_locally_steep_curve_is_stepped_over():
    steep = torch.tensor([math.inf] + [1.0] * 15 + [0.0], dtype=torch.float64)  # the first channel costs it all
    gentle = torch.linspace(1.5, 0.0, 17, dtype=torch.float64)
    costs = [CostTerm(1.0, "steep", None), CostTerm(1.0, "gentle", None)]
    assert spend({"steep": steep, "gentle": gentle}, costs, budget=1.0, multiple=1) == {
        "steep": 1,
        "gentle": 16,
    }


@pytest.mark.parametrize("n", [10, 300])
def test_widths_that_are_no_multiple(n):
    curve = torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64)
    costs = [CostTerm(1.0, "a", None)]
    assert spend({"a": curve}, costs, budget=0.0) == {"a": n}
    assert spend({"a": curve}, costs, budget=1.0, floor={"a": 2}) == {"a": 8}
    assert spend({"a": curve}, costs, budget=math.inf, multiple={"a": 3}, floor=5) == {"a": 6}


def test_pinned_group_keeps_its_width():
    pinned = torch.full((9,), torch.inf, dtype=torch.float64)
    pinned[8] = 0.0
    free = torch.zeros(17, dtype=torch.float64)
    costs = [CostTerm(1.0, "free", "pinned")]
    assert spend({"pinned": pinned, "free": free}, costs, budget=1.0) == {"pinned": 8, "free": 8}


def test_cost_of_one_group_with_itself_and_constants():
    costs = [CostTerm(2.0, "a", "a"), CostTerm(3.0, "a", None), CostTerm(5.0, None, None)]
    assert flops(costs, {"a": 4}) == 2 * 16 + 3 * 4 + 5
