"""Selection and fold against naive pivoted Cholesky, least squares on samples, and planted redundancy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptorch.errors import ArgumentError
from apoptorch.redundancy import (
    directions,
    first_order,
    first_order_curve,
    fold,
    fold_blocks,
    others,
    select,
    select_blocks,
    unexplained,
)  # fmt: skip

CASES = st.tuples(st.integers(0, 2**31), st.integers(2, 24), st.integers(1, 24), st.booleans())


def sample(seed: int, n: int, rank: int, n_samples: int = 200, relu: bool = True):
    """Activations of n channels, of low rank before the ReLU; exactly of low rank without it."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_samples, rank, generator=generator, dtype=torch.float64)
    a = z @ torch.randn(rank, n, generator=generator, dtype=torch.float64)
    v = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    metric = v.T @ (torch.rand(2 * n, 1, generator=generator, dtype=torch.float64) * v)
    return (a.relu() if relu else a), metric


def moments(a, constant: bool):
    return a.T @ a / len(a), a.mean(0) if constant else None


def regression_residual(a, keep, constant: bool):
    """Second moment of what least squares on the samples leaves, computed from the samples."""
    ones = torch.ones(len(a), 1, dtype=a.dtype)
    x = torch.cat([a[:, keep], ones], 1) if constant else a[:, keep]
    residual = a - x @ torch.linalg.lstsq(x, a, driver="gelsd").solution
    return residual.T @ residual / len(a)


def naive_order(second, mean, metric, k):
    s = second.clone() if mean is None else second - torch.outer(mean, mean)
    order = []
    for _ in range(k):
        score = s.diagonal() * metric.diagonal()
        score[order] = -1.0
        p = int(score.argmax())
        if s[p, p] <= 1e-10 * second[p, p]:  # from here on rounding decides
            break
        order.append(p)
        s = s - torch.outer(s[:, p], s[p]) / s[p, p]
    return order


@settings(max_examples=150)
@given(CASES, st.sampled_from([1, 3, 8, 64]))
def test_select_is_naive_pivoted_cholesky_and_its_error_that_of_regression(case, block):
    seed, n, rank, constant = case
    a, metric = sample(seed, n, rank)
    second, mean = moments(a, constant)
    selection = select(second, mean, metric, stop=0.0, block=block)
    k = len(selection.order)
    expected = naive_order(second, mean, metric, k)
    assert selection.order.tolist()[: len(expected)] == expected
    assert sorted(set(selection.order.tolist())) == sorted(selection.order.tolist())
    error = selection.error
    assert len(error) == k + 1
    assert bool((error >= 0).all())
    assert bool((error.diff() <= 0).all())
    for j in range(1, k + 1):
        expected = 0.5 * float((metric * regression_residual(a, selection.order[:j], constant)).sum())
        assert float(error[j]) == pytest.approx(expected, rel=1e-6, abs=1e-10 * float(error[0]))


@settings(max_examples=150)
@given(CASES, st.floats(0.05, 1.0))
def test_fold_is_the_regression(case, share):
    seed, n, rank, constant = case
    a, _ = sample(seed, n, rank)
    second, mean = moments(a, constant)
    keep = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, int(share * n))].sort().values
    result = fold(second, mean, keep)
    assert torch.equal(result.coeffs[keep], torch.eye(len(keep), dtype=torch.float64))
    assert (result.shift is None) == (not constant)
    rebuilt = a[:, keep] @ result.coeffs.T + (0.0 if result.shift is None else result.shift)
    if result.shift is not None:
        assert bool((result.shift[keep] == 0).all())
    actual = (a - rebuilt).T @ (a - rebuilt) / len(a)
    scale = float(second.diagonal().max())
    lost = others(keep, n)
    left = unexplained(second, mean, keep, result)
    torch.testing.assert_close(left, actual[lost][:, lost], rtol=1e-6, atol=1e-10 * scale)
    torch.testing.assert_close(actual, regression_residual(a, keep, constant), rtol=1e-5, atol=1e-7 * scale)


@settings(max_examples=50)
@given(CASES)
def test_unexplained_is_exact_for_any_fold(case):
    seed, n, rank, constant = case
    a, _ = sample(seed, n, rank)
    second, mean = moments(a, constant)
    keep = torch.arange(0, n, 2)
    made = fold(second, mean, keep)
    coeffs = made.coeffs + 0.1 * torch.rand(made.coeffs.shape, dtype=torch.float64)
    coeffs[keep] = made.coeffs[keep]
    worse = type(made)(coeffs, made.shift)
    rest = a - a[:, keep] @ coeffs.T - (0.0 if made.shift is None else made.shift)
    expected, lost = rest.T @ rest / len(a), others(keep, n)
    left = unexplained(second, mean, keep, worse)
    torch.testing.assert_close(left, expected[lost][:, lost], rtol=1e-8, atol=1e-9)
    assert expected[keep].abs().max() < 1e-9


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 10), st.booleans())
def test_rank_deficient(seed, n, rank, constant):
    rank = min(rank, n)
    a, metric = sample(seed, n, rank, relu=False)
    second, mean = moments(a, constant)
    selection = select(second, mean, metric, stop=0.0)
    assert len(selection.order) == rank
    assert float(selection.error[-1]) <= 1e-10 * float(selection.error[0])
    keep = selection.order.sort().values
    left = unexplained(second, mean, keep, fold(second, mean, keep)).diagonal()
    assert bool((left <= 1e-9 * second.diagonal()[others(keep, n)]).all())


@pytest.mark.parametrize("power", [-20, -10, 10, 20])
@pytest.mark.parametrize("constant", [True, False])
def test_units_of_a_channel_do_not_matter(power, constant):
    a, metric = sample(3, 12, 30)
    scale = torch.ones(12, dtype=torch.float64)
    scale[::3] = 10.0**power
    plain = select(*moments(a, constant), metric, stop=0.0)
    scaled = select(*moments(a * scale, constant), metric / torch.outer(scale, scale), stop=0.0)
    assert scaled.order.tolist() == plain.order.tolist()
    torch.testing.assert_close(scaled.error, plain.error, rtol=1e-6, atol=1e-12 * float(plain.error[0]))
    keep = torch.tensor([0, 1, 4, 6, 7])
    before, after = fold(*moments(a, constant), keep), fold(*moments(a * scale, constant), keep)
    torch.testing.assert_close(after.coeffs / scale[:, None] * scale[keep], before.coeffs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [1e20, 1e-20])
def test_planted_duplicates_parallels_and_constants_are_all_found(factor):
    a, _ = sample(5, 10, 40)
    planted = torch.cat([a, a[:, :4], factor * a[:, 4:8], torch.full((len(a), 2), 3.0, dtype=a.dtype)], 1)
    planted = torch.cat([planted, torch.zeros(len(a), 2, dtype=a.dtype)], 1)
    second, mean = moments(planted, True)
    weight = 1.0 / second.diagonal().clamp(min=1e-60)
    selection = select(second, mean, torch.diag(weight), stop=0.0)
    assert len(selection.order) == 10
    assert not set(selection.order.tolist()) & {18, 19, 20, 21}
    assert float(selection.error[-1]) <= 1e-10 * float(selection.error[0])
    keep = selection.order.sort().values
    result = fold(second, mean, keep)
    rest = planted - planted[:, keep] @ result.coeffs.T - result.shift
    assert bool((rest.abs().amax(0) <= 1e-8 * planted.abs().amax(0)).all())


def test_stop_floor_and_multiple():
    a, metric = sample(1, 20, 40)
    second, mean = moments(a, True)
    whole = select(second, mean, metric, stop=0.0)
    stop = float(whole.error[5]) * 1.0001
    assert len(select(second, mean, metric, stop=stop).order) == 5
    assert len(select(second, mean, metric, stop=stop, multiple=8).order) == 8
    assert len(select(second, mean, metric, stop=stop, floor=9, multiple=8).order) == 16
    assert len(select(second, mean, metric, stop=math.inf, floor=3).order) == 3
    assert len(select(second, mean, metric, stop=0.0, multiple=8).order) == 20
    curve = select(second, mean, metric, stop=stop).curve(20, floor=2)
    assert curve[:2].isinf().all()
    assert curve[20] == 0
    assert torch.equal(curve[6:20], curve[5].expand(14))


def test_a_multiple_beyond_the_rank_is_filled_up():
    a, metric = sample(1, 20, 3, relu=False)
    second, mean = moments(a, True)
    selection = select(second, mean, metric, stop=0.0, multiple=8)
    assert len(set(selection.order.tolist())) == 8
    keep = selection.order.sort().values  # singular: the ridge must cope
    left = unexplained(second, mean, keep, fold(second, mean, keep)).diagonal()
    assert bool((left <= 1e-8 * second.diagonal()[others(keep, 20)]).all())


def test_what_the_loss_does_not_see_is_free():
    a, metric = sample(2, 8, 20)
    metric[5:], metric[:, 5:] = 0.0, 0.0
    selection = select(*moments(a, False), metric, stop=0.0)
    assert sorted(selection.order.tolist()) == [0, 1, 2, 3, 4]
    blind = select(*moments(a, False), torch.zeros_like(metric), stop=0.0, floor=2)
    assert len(blind.order) == 2


@given(CASES, st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=60, deadline=None)
def test_directions_are_the_effective_rank_of_the_kronecker_product(case, factor):
    """Statement 22, against the eigenvalues of the whole product."""
    seed, n, rank, constant = case
    n = min(n, 10)
    a, gradient = sample(seed, n, rank)
    second, mean = moments(a, constant)
    covariance = second if mean is None else torch.cov(a.T, correction=0)
    found = directions(second, mean, factor * gradient)
    values = torch.linalg.eigvalsh(torch.kron(gradient, covariance.reshape(n, n))).clamp(min=0)
    expected = float(values.sum() ** 2 / values.square().sum()) if values.any() else 0.0
    assert found == pytest.approx(expected, rel=1e-6)
    assert found <= 1e-6 + n * torch.linalg.matrix_rank(covariance.reshape(n, n), hermitian=True)


def test_directions_of_equal_eigenvalues_count_them_and_of_nothing_are_none():
    eye, none = torch.eye(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    some = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert directions(eye, None, some) == pytest.approx(18)
    assert directions(none, None, eye) == directions(eye, None, none) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["second", "mean", "metric"])
def test_not_finite_is_refused(bad, which):
    a, metric = sample(0, 4, 4)
    second, mean = moments(a, True)
    tensors = {"second": second, "mean": mean, "metric": metric}
    tensors[which].view(-1)[1] = bad
    with pytest.raises(ArgumentError, match=f"`{which}` must be finite"):
        select(second, mean, metric, stop=0.0)


def test_float32_input_is_factored_in_float64():
    a, metric = sample(0, 16, 40)
    second, mean = moments(a.float(), True)
    single = select(second, mean, metric.float(), stop=0.0)
    assert single.error.dtype == torch.float64
    assert single.order.tolist()[:8] == select(*moments(a, True), metric, stop=0.0).order.tolist()[:8]


@pytest.mark.parametrize("constant", [True, False])
def test_first_order_is_the_derivative_along_the_fold(constant):
    """With gradients u, the linear loss E[u.a] changes by E[u.(B a_K + s - a)]; the curve has it for every width."""
    torch.manual_seed(0)
    a = torch.randn(300, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 1
    a = torch.cat([a, a[:, :2] - a[:, 2:4]], 1)  # of rank 7
    u = 0.3 * a.tanh() + torch.randn(300, 9, dtype=torch.float64)
    second, mean, cross, slope = a.T @ a / 300, a.mean(0) if constant else None, u.T @ a / 300, u.mean(0)
    order = select(second, mean, torch.eye(9, dtype=torch.float64), stop=0.0, floor=6).order
    curve = first_order_curve(second, mean, cross, slope, order)
    assert len(curve) == len(order) + 1
    for k in range(1, len(order) + 1):
        keep = order[:k].sort().values
        found = fold(second, mean, keep)
        change = a[:, keep] @ found.coeffs.T - a + (0.0 if found.shift is None else found.shift)
        expected = float((u * change).sum(1).mean())
        assert first_order(cross, slope, keep, found) == pytest.approx(expected, abs=1e-9)
        assert float(curve[k]) == pytest.approx(expected, abs=1e-7)
    if constant:
        assert float(curve[0]) == pytest.approx(float((u * (a.mean(0) - a)).sum(1).mean()))


@pytest.mark.parametrize("constant", [False, True])
def test_blocks_are_searched_and_folded_each_by_itself(constant):
    """Against one `select` and one `fold` a block, put together by hand."""
    blocks, size = 3, 8
    a, metric = sample(3, blocks * size, 5, relu=False)
    second, mean = moments(a, constant)
    parts = [slice(i * size, (i + 1) * size) for i in range(blocks)]
    own = [(second[p][:, p], mean[p] if constant else None, metric[p][:, p]) for p in parts]
    found = select_blocks(second, mean, metric, blocks, stop=0.0)
    single = [select(*each, stop=0.0) for each in own]
    for kept in range(1, size + 1):
        total = sum(float(each.error[min(kept, len(each.error) - 1)]) for each in single)
        if kept * blocks < len(found.error):
            assert float(found.error[kept * blocks]) == pytest.approx(total, rel=1e-9, abs=1e-9)
        chosen = found.order[: kept * blocks].sort().values
        if len(chosen) < kept * blocks:
            break
        assert [sum(c // size == i for c in chosen.tolist()) for i in range(blocks)] == [kept] * blocks
        whole = fold_blocks(second, mean, chosen, blocks)
        expected = torch.zeros(blocks * size, blocks * kept, dtype=torch.float64)
        shifts = torch.zeros(blocks * size, dtype=torch.float64)
        for i, (each, part) in enumerate(zip(own, parts, strict=True)):
            alone = fold(each[0], each[1], chosen[i * kept : (i + 1) * kept] - i * size)
            expected[part, i * kept : (i + 1) * kept] = alone.coeffs
            shifts[part] = 0.0 if alone.shift is None else alone.shift
        torch.testing.assert_close(whole.coeffs, expected, rtol=0, atol=0)
        torch.testing.assert_close(shifts if whole.shift is None else whole.shift, shifts, rtol=0, atol=0)
    assert found.error[-1] <= 1e-6 * found.error[0]  # 8 channels of rank 5 in every block: something was redundant
    assert len(found.order) <= blocks * size
