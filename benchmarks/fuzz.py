"""Random and adversarial cases against the closed-form bounds: python -m benchmarks.fuzz --cases 1000000.

A case is one neuron (its replacement by another, or by a constant) or one fold of a whole layer, with inputs that are
as bad for it as its weights suggest, in float32 or float64. Results go to results/fuzz.json and docs/fuzz.md.
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

from apoptorch.bounds import activation_rounding
from apoptorch.neurons import NEURONS, activation, neuron, range_error, reach
from apoptorch.redundancy import WeightSearch, search_weights

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
    parent, kind = (torch.randint(most, (n,), generator=generator) for most in (n, 7))
    jitter = 10.0 ** -torch.randint(1, 14, (n, 1), generator=generator).double() * torch.randn(n, d + 1, **random)
    factor = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64)[kind][:, None]
    factor = torch.where((kind == 2)[:, None], 3 * torch.rand(n, 1, **random), factor)
    planted = (kind >= 1) & (kind <= 3)
    rows = torch.where(planted[:, None], factor * rows[parent] + jitter, rows)
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


def _worst(spec: str, found: Tensor, bound: Tensor, rounding: Tensor) -> float:
    limit = bound + rounding + 2 * JUMP.get(spec, 0.0)
    return float((found / limit.clamp(min=1e-300)).max()) if len(bound) else 0.0


def replacements(spec: str, rows: Rows, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> Result:
    """Statements 4, 5 and 6: every neuron by the best other one."""
    known, n = neuron(spec), len(rows)
    search = search_weights(rows, known, torch.ones(n).double(), input_norm=input_norm)
    pairs = (search.onto >= 0).nonzero()[:, 0]
    i, j, coeff, shift = search.removed[pairs], search.onto[pairs], search.coeff[pairs], search.shift[pairs]
    bound = search.bound.diff()[pairs]
    turn = coeff if known.homogeneous and known.reflection is None else torch.where(shift != 0, -coeff.abs(), coeff)
    one, other = rows[i, :-1], rows[j, :-1]
    noise = torch.randn(one.shape, generator=generator, dtype=one.dtype)
    x = _inputs(torch.stack([one - turn[:, None] * other, one + turn[:, None] * other, one, other, noise]), input_norm)
    found = _active(rows[i], x, spec, dtype) - coeff * _active(rows[j], x, spec, dtype) - shift
    rounding = activation_rounding(known, reach(rows, input_norm), rows.shape[1] - 1, dtype)
    slack = 1e-12 * bound  # the running sum of bounds that `diff` took apart
    slack = slack + torch.finfo(torch.float64).eps * search.bound[-1] * n
    return Result(
        spec, "4-6", len(pairs), _worst(spec, found.abs(), bound + slack, rounding[i] + coeff.abs() * rounding[j])
    )


def constants(spec: str, rows: Rows, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> Result:
    """Statement 3: every neuron by a constant."""
    known = neuron(spec)
    error, value = range_error(known, rows, input_norm, True)
    noise = torch.randn(rows[:, :-1].shape, generator=generator, dtype=rows.dtype)
    found = _active(rows, _inputs(torch.stack([rows[:, :-1], noise]), input_norm), spec, dtype) - value
    rounding = activation_rounding(known, reach(rows, input_norm), rows.shape[1] - 1, dtype)
    return Result(spec, "3", len(rows), _worst(spec, found.abs(), error, rounding))


def folds(spec: str, rows: Rows, input_norm: float, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Result]:
    """Statement 7: a consumer of the whole layer, with every number of neurons removed."""
    known, n = neuron(spec), len(rows)
    columns = torch.randn(3, n, generator=generator, dtype=torch.float64)
    search: WeightSearch = search_weights(rows, known, columns.norm(dim=0), input_norm=input_norm)
    w = rows[:, :-1]
    x = _inputs(torch.cat([w, w - w.roll(1, 0), w + w.roll(1, 0)])[None], input_norm).flatten(0, 1)
    a = activation(spec)(x.to(dtype) @ w.to(dtype).T + rows[:, -1].to(dtype)).double()
    rounding = activation_rounding(known, reach(rows, input_norm), w.shape[1], dtype)
    worst = 0.0
    for width in range(n - len(search.removed), n):
        fold = search.fold(width)
        rest = a - a[:, fold.keep] @ fold.coeffs.T - fold.shift
        slack = columns.norm(dim=0) @ (rounding + fold.coeffs.abs() @ rounding[fold.keep])
        slack += 2 * JUMP.get(spec, 0.0) * columns.norm(dim=0).sum() + 1e-12 * fold.bound
        worst = max(worst, float((rest @ columns.T).norm(dim=1).max() / (fold.bound + slack).clamp(min=1e-300)))
    yield Result(spec, "7", len(search.removed), worst)


def cases(specs: list[str], rounds: int, n: int, seed: int) -> Iterator[Result]:
    """`rounds` layers of n neurons and as many small ones for each type and precision."""
    generator = torch.Generator().manual_seed(seed)
    for spec in specs:
        for index in range(rounds):
            dtype = (torch.float32, torch.float64)[index % 2]
            d = int(torch.randint(1, 17, (), generator=generator))
            input_norm = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64).item() - 2)
            rows = layer(n, d, generator).to(dtype).double()
            yield replacements(spec, rows, input_norm, dtype, generator)
            yield constants(spec, rows, input_norm, dtype, generator)
            yield from folds(spec, rows[: min(n, 12)], input_norm, dtype, generator)


def summary(results: Iterator[Result]) -> dict[str, dict]:
    """Per type: number of cases, and of each statement the largest share of its bound that was seen."""
    table: dict[str, dict] = {}
    for result in results:
        row = table.setdefault(result.spec, {"cases": 0, "worst": {}})
        row["cases"] += result.cases
        row["worst"][result.statement] = max(row["worst"].get(result.statement, 0.0), result.worst)
    return table


def page(found: dict) -> str:
    statements = ("3", "4-6", "7")
    lines = [
        "# Bounds under random and adversarial inputs\n",
        "Generated by `make fuzz` (`benchmarks/fuzz.py`) from `benchmarks/results/fuzz.json`: do not edit. The largest",
        "measured change as a share of the bound and of what rounding may add ([theory](theory.md), statement 11): a",
        "bound is violated where it is above 1.\n",
        f"{found['cases']:,} cases, {found['violations']} violations. Seed {found['seed']}, torch {found['torch']}.\n",
        "| neuron type | cases | constants (3) | replacements (4-6) | folds of a layer (7) |",
        "|---|---|---|---|---|",
    ]
    for spec, row in found["types"].items():
        shares = " | ".join(f"{row['worst'].get(name, 0.0):.6f}" for name in statements)
        lines.append(f"| {spec} | {row['cases']:,} | {shares} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = 1024
    types = summary(cases(SPECS, math.ceil(args.cases / (1.5 * n * len(SPECS))), n, args.seed))
    found = {
        "cases": sum(row["cases"] for row in types.values()), "seed": args.seed, "torch": torch.__version__,
        "violations": sum(worst > 1 for row in types.values() for worst in row["worst"].values()), "types": types,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(f"{found['cases']:,} cases, {found['violations']} violations")


if __name__ == "__main__":
    main()
