"""Random and adversarial cases against the closed-form bounds: python -m benchmarks.fuzz --cases 1000000.

A case is one neuron (its replacement by another, or by a constant) or one fold of a whole layer, with inputs that are
as bad for it as its weights suggest, in float64, float32 or bfloat16. Results go to results/fuzz.json and docs/fuzz.md.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from apoptorch.bounds import activation_rounding, dot_rounding
from apoptorch.neurons import NEURONS, activation, neuron, range_error, reach
from apoptorch.redundancy import search_weights
from apoptorch.redundancy.weights import GatedPairs, Pairs

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "fuzz.json", ROOT / "docs" / "fuzz.md"
MORE = [
    "leaky_relu(0.2)", "leaky_relu(-3.0)", "prelu(0.25)", "rrelu(0.1, 0.5)", "threshold(0.0, 0.0)",
    "threshold(1.0, 1.0)", "hardtanh(0.0, 6.0)", "hardtanh(-2.0, 2.0)", "softplus(3.0, 20.0)", "elu(0.5)", "elu(2.0)",
    "elu(1.0, 2.0, 3.0)", "celu(0.3)", "gelu(tanh)", "softshrink(0.2)", "clamp_min(0.0)", "clamp_min(1.0)",
    "clamp_max(0.0)", "clamp(-1.0, 1.0)",
]  # fmt: skip
SPECS = [name for name, known in NEURONS.items() if known.function] + MORE
JUMP = {"softplus": math.log1p(math.exp(-20)), "softplus(3.0, 20.0)": math.log1p(math.exp(-20)) / 3}  # see statement 2
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Rows = Float[Tensor, "n d+1"]


class Result(NamedTuple):
    """How many cases, and the largest measured change as a share of the bound and of what rounding may add."""

    spec: str
    statement: str
    cases: int
    worst: float


def layer(n: int, d: int, generator: torch.Generator) -> Rows:
    """Neurons of which many are nearly copies, multiples or opposites of others, dead or constant."""
    random = {"generator": generator, "dtype": torch.float64}
    rows = torch.randn(n, d + 1, **random) / d**0.5
    parent, kind = (torch.randint(most, (n,), generator=generator) for most in (n, 8))
    jitter = 10.0 ** -torch.randint(1, 14, (n, 1), generator=generator).double() * torch.randn(n, d + 1, **random)
    factor = torch.tensor([1.0, 0.0, 1.0, -1.0], dtype=torch.float64)[kind % 4][:, None]  # kind 0: an exact copy
    factor = torch.where((kind == 1)[:, None], 3 * torch.rand(n, 1, **random), factor)
    planted = factor * rows[parent] + torch.where((kind == 0)[:, None], 0.0, jitter)
    rows = torch.where((kind <= 3)[:, None], planted, rows)
    rows[kind == 4, :-1] *= 10.0 ** -torch.randint(1, 14, (int((kind == 4).sum()), 1), generator=generator).double()
    rows[kind == 5, -1] -= 30.0
    return rows


def _inputs(directions: Float[Tensor, "c b d"], input_norm: float) -> Float[Tensor, "c b d"]:
    """Inputs of norm up to input_norm along c directions for each of b cases, both ways, and shorter ones."""
    unit = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    size = 1 - 1e-12  # so that their own norm does not round above input_norm
    return torch.cat([share * size * input_norm * unit for share in (1.0, -1.0, 0.3, -0.3, 0.01)])


def _active(rows: Rows, x: Float[Tensor, "c b d"], spec: str, dtype: torch.dtype) -> Float[Tensor, "c b"]:
    """Activations of b neurons, each at its own c inputs, computed in `dtype`."""
    weight, bias, x = rows[:, :-1].to(dtype), rows[:, -1].to(dtype), x.to(dtype)
    return activation(spec)((x * weight).sum(-1) + bias).double()


def _result(spec: str, statement: str, found: Tensor, bound: Tensor, rounding: Tensor) -> Result:
    """Inputs or neurons for which rounding has no limit (beside a jump) are no cases."""
    limit = (bound + rounding + 2 * JUMP.get(spec, 0.0)).clamp(min=1e-300)
    bounded = limit.isfinite()
    worst = (found / limit)[..., bounded]
    return Result(spec, statement, int(bounded.sum()), float(worst.max()) if worst.numel() else 0.0)


def replacements(spec: str, rows: Rows, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> Result:
    """Statements 4, 5 and 6: every neuron by the best other one."""
    known, index = neuron(spec), torch.arange(len(rows))
    pairs = Pairs(rows, known, input_norm, constant=True, max_pooled=False)
    bound, onto, turn = pairs.nearest(index, torch.ones_like(index, dtype=torch.bool))
    i = bound.isfinite().nonzero()[:, 0]
    bound, j, turn = bound[i], onto[i], turn[i]
    coeff, shift = pairs.replacement(turn)
    one, other = rows[i, :-1], rows[j, :-1]
    noise = torch.randn(one.shape, generator=generator, dtype=one.dtype)
    x = _inputs(torch.stack([one - turn[:, None] * other, one + turn[:, None] * other, one, other, noise]), input_norm)
    found = _active(rows[i], x, spec, dtype) - coeff * _active(rows[j], x, spec, dtype) - shift
    rounding = activation_rounding(known, reach(rows, input_norm), rows.shape[1] - 1, dtype)
    rounding = rounding[i] + coeff.abs() * rounding[j]
    rounding = torch.where((bound == 0) & rounding.isinf(), 0.0, rounding)  # copies round alike, also beside a jump
    return _result(spec, "4-6", found.abs(), bound * (1 + 1e-12), rounding)


def constants(spec: str, rows: Rows, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> Result:
    """Statement 3: every neuron by a constant."""
    known = neuron(spec)
    error, value = range_error(known, rows, input_norm, True)
    noise = torch.randn(rows[:, :-1].shape, generator=generator, dtype=rows.dtype)
    found = _active(rows, _inputs(torch.stack([rows[:, :-1], noise]), input_norm), spec, dtype) - value
    rounding = activation_rounding(known, reach(rows, input_norm), rows.shape[1] - 1, dtype)
    return _result(spec, "3", found.abs(), error, rounding)


def folds(spec: str, rows: Rows, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Result]:
    """Statement 7: a consumer of the whole layer, with every number of neurons removed."""
    known, n = neuron(spec), len(rows)
    columns = torch.randn(3, n, generator=generator, dtype=torch.float64)
    search = search_weights(rows, known, columns.norm(dim=0), input_norm=input_norm)
    w = rows[:, :-1]
    x = _inputs(torch.cat([w, w - w.roll(1, 0), w + w.roll(1, 0)])[None], input_norm).flatten(0, 1)
    a = activation(spec)(x.to(dtype) @ w.to(dtype).T + rows[:, -1].to(dtype)).double()
    rounding, jump = activation_rounding(known, reach(rows, input_norm), w.shape[1], dtype), 2 * JUMP.get(spec, 0.0)
    for width in range(n - len(search.removed), n):
        fold = search.fold(width)
        change = (a - a[:, fold.keep] @ fold.coeffs.T - fold.shift) @ columns.T
        slack = columns.norm(dim=0) @ (rounding + fold.coeffs.abs() @ rounding[fold.keep] + jump)
        bound = torch.tensor([fold.bound * (1 + 1e-12)], dtype=torch.float64)
        yield _result(spec, "7", change.norm(dim=1).max()[None], bound, slack)


def gated(spec: str, n: int, d: int, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> list[Result]:
    """Statement 9: every unit w~.x~ f(u~.x~) by the best other one, and by a constant."""
    known, index, both = neuron(spec), torch.arange(n), layer(n, 2 * d + 1, generator)
    factor = torch.where(torch.rand(n, 1, generator=generator) < 0.5, 1.0, 3 * torch.randn(n, 1, generator=generator))
    rows, gates = (factor * both[:, : d + 1]).to(dtype).double(), both[:, d + 1 :].to(dtype).double()
    pairs = GatedPairs(rows, gates, known, input_norm, max_pooled=False)
    bound, onto, turn = pairs.nearest(index, torch.ones_like(index, dtype=torch.bool))
    error, value = pairs.range_error(True)
    turn = torch.where(bound.isfinite(), turn, 0.0)
    w, u, noise = rows[:, :-1], gates[:, :-1], torch.randn(n, d, generator=generator, dtype=torch.float64)
    ways = [w - turn[:, None] * w[onto], w, u - u[onto], u, noise]
    unit = [way / way.norm(dim=1, keepdim=True).clamp(min=1e-300) for way in ways]
    x = _inputs(torch.stack([*unit, unit[1] + unit[2], unit[1] - unit[2], unit[1] + unit[3]]), input_norm)
    a, other = (_active(rows[i], x, "linear", dtype) * _active(gates[i], x, spec, dtype) for i in (index, onto))
    size, most = reach(rows, input_norm), range_error(known, gates, input_norm, False)[0]
    wrong = activation_rounding(known, reach(gates, input_norm), d, dtype) + JUMP.get(spec, 0.0)
    linear = dot_rounding(d + 2, dtype) * size  # of the other factor, w~.x~
    rounding = size * wrong + linear * (most + wrong)
    of_pair, of_copy = (each + turn.abs() * each[onto] for each in (rounding, linear * most))
    of_pair = torch.where((bound == 0) & of_pair.isinf(), of_copy, of_pair)  # equal gates jump alike
    return [
        _result(spec, "9", (a - turn * other).abs(), bound * (1 + 1e-12), of_pair),
        _result(spec, "9", (a - value).abs(), error * (1 + 1e-12), rounding),
    ]


def cases(specs: list[str], rounds: int, n: int, seed: int) -> Iterator[Result]:
    """`rounds` layers of n neurons, of 1 to 63 inputs with norms of 0.01 to 100, and as many of 24 for each type."""
    generator = torch.Generator().manual_seed(seed)
    for spec in specs:
        for index in range(rounds):
            dtype = DTYPES[index % len(DTYPES)]
            size, norm = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            d, input_norm = int(2 ** (6 * size)), 10 ** (4 * norm - 2)
            rows = layer(n, d, generator).to(dtype).double()
            yield replacements(spec, rows, input_norm, dtype, generator)
            yield constants(spec, rows, input_norm, dtype, generator)
            yield from folds(spec, rows[:24], input_norm, dtype, generator)
            yield from gated(spec, n // 4, d, input_norm, dtype, generator)


def summary(results: Iterator[Result]) -> dict[str, dict]:
    """Per type: number of cases, and of each statement the largest share of its bound that was seen."""
    table: dict[str, dict] = {}
    for result in (result for result in results if result.cases):
        row = table.setdefault(result.spec, {"cases": 0, "worst": {}})
        row["cases"] += result.cases
        row["worst"][result.statement] = max(row["worst"].get(result.statement, 0.0), result.worst)
    return table


def page(found: dict) -> str:
    statements = ("3", "4-6", "7", "9")
    lines = [
        "# Bounds under random and adversarial inputs\n",
        "Generated by `make fuzz` (`benchmarks/fuzz.py`) from `benchmarks/results/fuzz.json`: do not edit. The largest",
        "measured change as a share of the bound and of what rounding may add ([theory](theory.md), statement 11): a",
        "bound is violated where it is above 1.\n",
        f"{found['cases']:,} cases, {found['violations']} violations. Seed {found['seed']}, torch {found['torch']}.\n",
        "| neuron type | cases | constants (3) | replacements (4-6) | folds of a layer (7) | gated units (9) |",
        "|---|---|---|---|---|---|",
    ]
    for spec, row in found["types"].items():
        shares = " | ".join(f"{row['worst'][name]:.6f}" if name in row["worst"] else "none" for name in statements)
        lines.append(f"| {spec} | {row['cases']:,} | {shares} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = 256
    types = summary(cases(SPECS, math.ceil(args.cases / (2 * n * len(SPECS))), n, args.seed))
    found = {
        "cases": sum(row["cases"] for row in types.values()), "seed": args.seed, "torch": torch.__version__,
        "violations": sum(worst > 1 for row in types.values() for worst in row["worst"].values()), "types": types,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(f"{found['cases']:,} cases, {found['violations']} violations")


if __name__ == "__main__":
    main()
