"""Closed-form bounds are never violated and attained; statistical limits against scipy and by coverage."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptorch.bounds import (
    clopper_pearson_upper,
    dot_rounding,
    empirical_bernstein_upper,
    may_flip,
    mean_upper,
)
from apoptorch.errors import ArgumentError
from apoptorch.neurons import NEURONS, activation, neuron, range_error, reach
from apoptorch.redundancy import fold_from_weights, search_weights
from benchmarks import fuzz

SMOOTH = [name for name, known in NEURONS.items() if known.function]
# Input at which each function is as steep as its Lipschitz constant (or as good as).
STEEP = {
    "gelu": 2**0.5, "gelu(tanh)": 1.41850401, "silu": 2.39935728, "mish": 1.49057118, "hardswish": 2.999,
    "selu": -1e-4, "elu": 1e-4, "celu": 1e-4, "log_sigmoid": -12.0, "softplus": 12.0, "tanhshrink": 12.0,
    "softshrink": 3.0, "relu": 1.0, "leaky_relu": 1.0, "rrelu": 1.0, "relu6": 3.0, "cos": 1.5707963,
    "abs": 1.0, "clamp_min(0.5)": 2.0,
}  # fmt: skip


def layer(seed: int, n: int, d: int, dtype=torch.float64):
    """Weights with planted near-duplicates, parallels, opposites, dead and constant neurons; outgoing columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d + 1, generator=generator, dtype=torch.float64) / d**0.5
    kinds = torch.randint(0, 7, (n,), generator=generator)
    noise = 10.0 ** -torch.randint(1, 14, (n, 1), generator=generator).double()
    factor = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 3
    parent = rows[torch.randint(0, n, (n,), generator=generator)]
    jitter = noise * torch.randn(n, d + 1, generator=generator, dtype=torch.float64)
    for kind, planted in [
        (1, parent + jitter),
        (2, factor * parent + jitter),
        (3, -parent + jitter),
        (4, 0 * rows),
    ]:
        rows = torch.where((kinds == kind)[:, None], planted, rows)
    rows[kinds == 5, :-1] = 0.0
    rows[kinds == 6, -1] -= 30.0
    return rows.to(dtype), torch.randn(3, n, generator=generator, dtype=torch.float64).to(dtype)


def inputs(rows, input_norm: float, seed: int):
    """Random and adversarial inputs of norm input_norm: along weights and differences of weights, both signs."""
    generator = torch.Generator().manual_seed(seed)
    w = rows[:, :-1].double()
    x = torch.cat(
        [
            w,
            -w,
            w - w.roll(1, 0),
            w + w.roll(1, 0),
            torch.randn(20, w.shape[1], generator=generator, dtype=w.dtype),
        ]
    )
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.cat([input_norm * x, 0.3 * input_norm * x]).to(rows.dtype)


def consumer_change(rows, columns, x, function, found):
    """|V (a - coeffs a_keep - shift)| for each input, in the dtype of x."""
    a = function(x @ rows[:, :-1].T + rows[:, -1])
    rest = a - a[:, found.keep] @ found.coeffs.to(x.dtype).T - found.shift.to(x.dtype)
    return (rest @ columns.T).norm(dim=1)


def rounding_allowance(rows, columns, input_norm, found, lipschitz):
    """What floating point may add: gamma_m of every dot product's absolute sum, passed on by L."""
    size = (rows.double().norm(dim=1) * math.hypot(input_norm, 1)).max()
    value = 2 + max(1, lipschitz) * size
    growth = 1 + found.coeffs.abs().sum(1).max()
    gamma = dot_rounding(rows.shape[0] + rows.shape[1] + 8, rows.dtype)
    return float(4 * gamma * growth * value * columns.double().norm(dim=0).sum())


@pytest.mark.parametrize("spec", SMOOTH)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(2, 24), st.integers(1, 12)),
    log_norm=st.floats(-2, 2),
    log_bound=st.floats(-8, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    options=st.tuples(st.booleans(), st.booleans()),
)
def test_bound_is_never_violated(spec, seed, size, log_norm, log_bound, dtype, options):
    known, input_norm, (constant, max_pooled) = neuron(spec), 10**log_norm, options
    rows, columns = layer(seed, *size, dtype)
    found = fold_from_weights(
        rows, known, columns.double().norm(dim=0), input_norm=input_norm, bound=10**log_bound,
        constant=constant, max_pooled=max_pooled,
    )  # fmt: skip
    assert found.bound <= 10**log_bound
    assert constant or not found.shift.any()
    x = inputs(rows, input_norm, seed)
    if max_pooled:  # windows of two positions
        assert known.reflection is None or known.reflection[0] > 0 or bool((found.coeffs >= 0).all())
    change = consumer_change(rows, columns, x, activation(spec), found)
    lipschitz = known.lipschitz if math.isfinite(known.lipschitz) else 1.0
    allowance = rounding_allowance(rows, columns, input_norm, found, lipschitz)
    jump = 2.1e-9 * float(columns.norm(dim=0).sum()) if spec == "softplus" else 0.0
    if math.isfinite(known.lipschitz):  # a jump makes rounding count, and hardshrink has one
        assert float(change.max()) <= found.bound * (1 + 1e-12) + allowance + jump


STEPLESS = [*sorted(set(SMOOTH) - {"hardshrink"}), "gelu(tanh)", "clamp_min(0.5)"]


@pytest.mark.parametrize(
    ("spec", "reflected"),
    [(spec, r) for spec in STEPLESS for r in ([False, True] if neuron(spec).reflection else [False])],
)
def test_pair_bound_is_attained(spec, reflected):
    """Statements 4 and 5, and 6 with the second neuron reflected."""
    known, function = neuron(spec), activation(spec)
    at, gap = STEEP.get(spec, 0.0), 1e-3 if spec not in ("selu", "elu", "celu") else 1e-5
    if known.homogeneous:
        # At right angles to w_j only w_i answers; its part along w_j (t = 1) keeps the angle small.
        rows = torch.tensor([[1.0, 0.01, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        x = torch.tensor([[0.0, 100.0], [0.0, -100.0]], dtype=torch.float64)
    else:
        # w.x = 0 +- gap/2 about the steep point, which the bias sets.
        rows = torch.tensor([[0.5 * gap, 10.0, at], [-0.5 * gap, 10.0, at]], dtype=torch.float64)
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    rows[1] *= -1 if reflected else 1
    search = search_weights(
        rows, known, torch.ones(2, dtype=torch.float64), input_norm=float(x.norm(dim=1).max()), constant=reflected
    )
    found = search.fold(1)
    assert search.onto.tolist() == [1 - search.removed.item()]
    change = consumer_change(rows, torch.ones(1, 2, dtype=torch.float64), x, function, found)
    assert 0.99 * found.bound <= float(change.max()) <= found.bound * (1 + 1e-9)


def test_bound_of_several_removals_is_attained():
    """Statement 7: two pairs whose columns are parallel and whose differences have one worst input."""
    rows = torch.tensor([[1, 0.01, 0, 0], [1, 0, 0, 0], [0, 0.01, 1, 0], [0, 0, 1, 0]], dtype=torch.float64)
    columns, x = torch.ones(1, 4, dtype=torch.float64), torch.tensor([[0.0, 100.0, 0.0]], dtype=torch.float64)
    search = search_weights(rows, neuron("relu"), columns[0], input_norm=100.0, constant=False)
    found = search.fold(2)
    change = float(consumer_change(rows, columns, torch.cat([x, -x]), torch.relu, found).max())
    assert 0.99 * found.bound <= change <= found.bound * (1 + 1e-9)


@pytest.mark.parametrize("spec", [spec for spec in [*STEPLESS, "leaky_relu(-3.0)"] if not neuron(spec).monotone])
def test_range_error_of_what_is_not_monotone_is_attained(spec):
    """Statement 3: a small ball of inputs where the function is steepest."""
    known, at, gap = neuron(spec), {**STEEP, "leaky_relu(-3.0)": -1.0}.get(spec, 0.0), 1e-4
    rows, x = torch.tensor([[gap, at]], dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    for constant in (True, False):
        error, value = range_error(known, rows, 1.0, constant)
        actual = (activation(spec)(x @ rows[:, :-1].T + rows[:, -1]) - value).abs().max()
        assert 0.99 * float(error) <= float(actual) <= float(error) * (1 + 1e-9)


@pytest.mark.parametrize("spec", SMOOTH)
def test_range_error_is_never_violated_and_attained_if_monotone(spec):
    known, function = neuron(spec), activation(spec)
    rows, _ = layer(7, 200, 5)
    x = inputs(rows, 3.0, 1)
    for constant in (True, False):
        error, value = range_error(known, rows, 3.0, constant)
        actual = (function(x @ rows[:, :-1].T + rows[:, -1]) - value).abs().amax(0)
        assert bool((actual <= error + 1e-13).all())
        if known.monotone:
            assert bool((actual >= 0.99 * error - 1e-13).all())


def test_twenty_thousand_cases():
    """Statements 3 to 7 and 11, every neuron type and precision, by inputs as bad as the weights suggest."""
    table = fuzz.summary(fuzz.cases(fuzz.SPECS, 3, 80, seed=0))
    assert sum(row["cases"] for row in table.values()) >= 20_000
    for spec, row in table.items():
        assert max(row["worst"].values()) <= 1, (spec, row)
        jumps = math.isinf(neuron(spec).lipschitz)
        assert jumps or max(row["worst"].values()) >= 0.5, f"{spec}: the cases are too kind"


def test_dead_within_the_input_ball_is_exact():
    rows = torch.tensor([[3.0, 4.0, -50.0], [3.0, 4.0, -49.0]], dtype=torch.float64)
    error, value = range_error(neuron("relu"), rows, 10.0, True)
    assert error.tolist() == [0.0, 0.5]
    assert value.tolist() == [0.0, 0.5]


@settings(max_examples=300)
@given(st.integers(0, 2**31), st.floats(0, 1e3))
def test_reach_is_attained_and_below_cauchy_schwarz(seed, input_norm):
    row = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = row[:-1] / row[:-1].norm() * input_norm * row[-1].sign()
    assert float(reach(row, input_norm)) == pytest.approx(abs(float(row[:-1] @ x + row[-1])), rel=1e-12)
    assert float(reach(row, input_norm)) <= float(row.norm()) * math.hypot(input_norm, 1) * (1 + 1e-12)


@pytest.mark.parametrize("spec", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_planted_redundancy_is_found(spec, dtype):
    known, function = neuron(spec), activation(spec)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator, dtype=dtype)
    constant = torch.cat([torch.zeros(2, 5, dtype=dtype), torch.tensor([[0.7], [-0.7]], dtype=dtype)], 1)
    planted = [base, base[:2], torch.zeros(1, 6, dtype=dtype), constant]
    if known.homogeneous:
        planted.append(0.3 * base[2:4])
    if known.reflection:
        planted.append(-base[4:6])
    rows = torch.cat(planted)
    columns = torch.randn(3, len(rows), generator=generator, dtype=dtype)
    norms = columns.double().norm(dim=0)
    found = fold_from_weights(rows, known, norms, input_norm=5.0, bound=1e-4 if dtype == torch.float32 else 1e-12)
    assert len(found.keep) == 8
    x = inputs(rows, 5.0, 3)
    change = consumer_change(rows, columns, x, function, found)
    assert float(change.max()) <= (1e-4 if dtype == torch.float32 else 1e-12)


def test_every_prefix_is_a_fold_onto_survivors_and_the_curve_is_its_bound():
    rows, columns = layer(3, 40, 4)
    search = search_weights(rows, neuron("tanh"), columns.norm(dim=0), input_norm=2.0, floor=3)
    assert len(search.removed) == 37
    curve = search.curve()
    x = inputs(rows, 2.0, 0)
    for width in range(3, 41):
        found = search.fold(width)
        assert len(found.keep) == width
        assert found.bound == float(curve[width])
        assert torch.equal(found.coeffs[found.keep], torch.eye(width, dtype=torch.float64))
        assert float(consumer_change(rows, columns, x, torch.tanh, found).max()) <= found.bound + 1e-12
    assert bool((curve[3:].diff() <= 0).all())
    assert bool(curve[:3].isinf().all())


def test_multiple_floor_and_unknown_types():
    rows = torch.zeros(20, 4, dtype=torch.float64)
    ones = torch.ones(20, dtype=torch.float64)
    assert len(fold_from_weights(rows, neuron("relu"), ones, input_norm=1.0, bound=0.0).keep) == 1
    assert len(fold_from_weights(rows, neuron("relu"), ones, input_norm=1.0, bound=0.0, multiple=8).keep) == 8
    assert len(fold_from_weights(rows, neuron("relu"), ones, input_norm=1.0, bound=0.0, floor=5).keep) == 5
    rows = torch.randn(5, 4, dtype=torch.float64)
    for spec in ("general", "prelu"):
        kept = fold_from_weights(rows, neuron(spec), ones[:5], input_norm=1.0, bound=1e9).keep
        assert len(kept) == 5
    with pytest.raises(ArgumentError, match="finite"):
        search_weights(rows / 0, neuron("relu"), ones[:5], input_norm=1.0)


@settings(max_examples=300)
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0.5, 0.9999))
def test_clopper_pearson_is_that_of_the_beta_distribution(samples, share, confidence):
    beta = pytest.importorskip("scipy.stats").beta
    changed = min(samples, int(share * samples))
    expected = 1.0 if changed == samples else beta.ppf(confidence, changed + 1, samples - changed)
    assert clopper_pearson_upper(changed, samples, confidence) == pytest.approx(expected, rel=1e-8)


def test_clopper_pearson_covers():
    generator = torch.Generator().manual_seed(0)
    for p in (0.003, 0.05, 0.4):
        counts = (torch.rand(4000, 200, generator=generator) < p).sum(1).tolist()
        limits = {count: clopper_pearson_upper(count, 200, 0.95) for count in set(counts)}
        covered = sum(limits[count] >= p for count in counts) / len(counts)
        assert covered >= 0.95 - 3 * (0.05 * 0.95 / 4000) ** 0.5


def test_limit_on_the_mean_covers_heavy_tails():
    """Few inputs lose much: the clipped mean is covered at any size; unclipped, the normal limit counts too."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(1000, 200, generator=generator, dtype=torch.float64) * 1.2).exp() * 0.05
    clip, mean = 0.5, 0.05 * math.exp(0.72)
    clipped = (
        (torch.randn(10**6, generator=generator, dtype=torch.float64) * 1.2).exp().mul(0.05).clamp(max=clip).mean()
    )
    limits = torch.tensor([mean_upper(row, 0.95, clip) for row in values])
    assert float((limits >= clipped).double().mean()) >= 0.95
    assert float((limits >= mean).double().mean()) >= 0.93
    normal = values.mean(1) + 1.6449 * values.std(1) / 200**0.5
    assert bool((limits >= normal * (1 - 1e-4)).all())
    assert mean_upper(values[0, :1], 0.95, clip) == math.inf
    assert mean_upper(torch.full((50,), 0.1), 0.95, 0.0) == pytest.approx(0.1)  # clipped at 0: the normal limit


def test_empirical_bernstein_covers_and_narrows():
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(2000, 100, generator=generator, dtype=torch.float64) < 0.1).double()
    covered = sum(empirical_bernstein_upper(row, 0.95, 1.0) >= 0.1 for row in values) / len(values)
    assert covered >= 0.95
    limit = [empirical_bernstein_upper(values.flatten()[:m], 0.95, 1.0) for m in (100, 1000, 100000)]
    assert limit[0] > limit[1] > limit[2] > 0.1
    constant = empirical_bernstein_upper(torch.full((101,), 2.0), 0.95, 1.0)
    assert constant == pytest.approx(2.0 + 7 * math.log(40) / 300)


@settings(max_examples=300)
@given(st.integers(0, 2**31), st.integers(2, 10), st.floats(0, 2))
def test_only_what_may_flip_flips(seed, classes, change):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, classes, generator=generator, dtype=torch.float64)
    top = logits.topk(2, dim=1).indices
    worst = torch.zeros_like(logits).scatter_(1, top, torch.tensor([[-1.0, 1.0]], dtype=torch.float64).expand(200, 2))
    random = torch.randn(200, classes, generator=generator, dtype=torch.float64)
    flips = may_flip(logits, change)
    for delta in (worst, random):
        moved = logits + change * delta / delta.norm(dim=1, keepdim=True)
        assert not bool(((moved.argmax(1) != logits.argmax(1)) & ~flips).any())
    moved = logits + 1.001 * change * worst / 2**0.5  # a hair more attains the bound
    assert bool((moved.argmax(1) != logits.argmax(1))[flips & (change > 1e-6)].all())


@settings(max_examples=200)
@given(st.integers(0, 2**31), st.integers(1, 2000))
def test_dot_rounding(seed, terms):
    x, y = torch.randn(2, terms, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    error = abs(float(x @ y) - float(x.double() @ y.double()))
    assert error <= dot_rounding(terms, torch.float32) * float(x.double().abs() @ y.double().abs())


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_wrong_arguments(confidence):
    with pytest.raises(ArgumentError, match="`confidence`"):
        clopper_pearson_upper(1, 10, confidence)
    with pytest.raises(ArgumentError, match="`changed`"):
        clopper_pearson_upper(11, 10, 0.95)
    with pytest.raises(ArgumentError, match="`values`"):
        empirical_bernstein_upper(torch.ones(1), 0.95, 1.0)
    with pytest.raises(ArgumentError, match="`value_range`"):
        empirical_bernstein_upper(torch.tensor([0.0, 2.0]), 0.95, 1.0)
