"""docs/theory.md and the code name each other; and those of its statements that no function embodies."""

import ast
import importlib
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apoptorch.neurons import _RULES, NEURONS, neuron
from apoptorch.redundancy import select

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "theory.md").read_text()
PARTS = re.split(r"^### Statement (\d+)\. ", TEXT, flags=re.MULTILINE)
STATEMENTS = {int(number): body for number, body in zip(PARTS[1::2], PARTS[2::2], strict=True)}


def named(number, kind):
    return [
        name
        for line in re.findall(rf"^{kind}: (.*)$", STATEMENTS[number], re.MULTILINE)
        for name in line.split("`")[1::2]
    ]


def documented(path):
    """Public functions and classes of a file with their docstrings; rules of the neuron table aside."""
    for node in ast.parse(path.read_text()).body:
        rule = any(isinstance(mark, ast.Name) and mark.id == "_rule" for mark in getattr(node, "decorator_list", []))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not rule:
            yield node.name, ast.get_docstring(node) or ""


def test_statements_are_numbered_in_order():
    assert list(STATEMENTS) == list(range(1, len(STATEMENTS) + 1))


@pytest.mark.parametrize("number", STATEMENTS)
def test_what_a_statement_names_exists(number):
    for name in named(number, "Code"):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"apoptorch.{module}"), attribute), name
    tests = named(number, "Tests")
    assert tests, "no test"
    for name in tests:
        file, _, function = name.partition("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), name


def test_every_bound_has_a_test_that_attains_it():
    rows = re.findall(r"^\| ([\d, to]+).*\| (`test_.*`) \|$", PARTS[0], re.MULTILINE)
    ends = [[int(number) for number in re.findall(r"\d+", numbers)] for numbers, _ in rows]
    assert {n for first, *last in ends for n in range(first, (last or [first])[0] + 1)} == {*range(1, 11), 16}
    for name in (name for _, names in rows for name in names.split("`")[1::2]):
        file, _, function = name.partition("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), name


@pytest.mark.parametrize("module", ["bounds", "neurons"])
def test_every_function_names_its_statement_and_is_named_by_it(module):
    for name, text in documented(ROOT / "src" / "apoptorch" / f"{module}.py"):
        numbers = [int(number) for number in re.findall(r"Statement (\d+)", text)]
        assert numbers, f"{name} names no statement"
        for number in numbers:
            assert f"{module}.{name}" in named(number, "Code"), f"statement {number} doesn't name {name}"


def test_what_statements_name_in_bounds_and_neurons_names_them():
    found = {
        f"{m}.{n}": text
        for m in ("bounds", "neurons")
        for n, text in documented(ROOT / "src" / "apoptorch" / f"{m}.py")
    }
    for number in STATEMENTS:
        for name in named(number, "Code"):
            assert name not in found or f"Statement {number})" in found[name], f"{name} doesn't name statement {number}"


ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in STATEMENTS[2].splitlines() if line.startswith("| ")
]


def test_table_of_neuron_types_is_that_of_the_code():
    assert {row[0].split("(")[0] for row in ROWS[1:]} == set(_RULES)
    assert set(NEURONS) <= {row[0].split("(")[0] for row in ROWS[1:]}
    for spec, lipschitz, homogeneous, reflection, why in ROWS[1:]:
        known = neuron(spec)
        assert float(lipschitz) == known.lipschitz, spec
        assert (homogeneous == "yes") == known.homogeneous, spec
        assert (tuple(map(float, reflection.strip("()").split(", "))) if reflection else None) == known.reflection, spec
        assert why


def test_every_activation_of_torch_is_in_the_table():
    ops = {
        "ReLU": "relu", "RReLU": "rrelu", "Hardtanh": "hardtanh", "ReLU6": "relu6", "Sigmoid": "sigmoid",
        "Tanh": "tanh", "Hardsigmoid": "hardsigmoid", "SiLU": "silu", "Mish": "mish", "Hardswish": "hardswish",
        "ELU": "elu", "CELU": "celu", "SELU": "selu", "GELU": "gelu", "Hardshrink": "hardshrink",
        "LeakyReLU": "leaky_relu", "LogSigmoid": "log_sigmoid", "Softplus": "softplus", "Softshrink": "softshrink",
        "PReLU": "prelu", "Softsign": "softsign", "Tanhshrink": "tanhshrink", "Threshold": "threshold",
    }  # fmt: skip
    elsewhere = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}  # not elementwise
    assert set(nn.modules.activation.__all__) == set(ops) | elsewhere
    assert set(ops.values()) <= {row[0].split("(")[0] for row in ROWS[1:]}


@pytest.mark.parametrize("gate", [torch.sigmoid, F.silu, F.gelu])
def test_gated_units(gate):
    """Statement 9: never violated, exact for parallel halves behind one gate, and attained."""
    lipschitz = {torch.sigmoid: 0.25, F.silu: 1.0998394, F.gelu: 1.1289042}[gate]
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4000, 3, dtype=torch.float64), torch.ones(4000, 1, dtype=torch.float64)], 1)
    for index in range(300):
        w, u, dw, du = torch.randn(4, 4, dtype=torch.float64)
        t, size = torch.randn(2, dtype=torch.float64).tolist()
        dw, du = (10**size * d if index % 3 else 0 * d for d in (dw, du))
        first, gates = x @ (t * w + dw), x @ (u + du)
        change = (first * gate(gates) - t * (x @ w) * gate(x @ u)).abs().max()
        most = gate(gates).abs().max()  # at the inputs that are looked at
        bound = (x @ dw).abs().max() * most + abs(t) * (x @ w).abs().max() * lipschitz * (x @ du).abs().max()
        assert change <= bound * (1 + 1e-12) + 1e-12
        if index % 3 == 0:
            assert change <= 1e-12 * (1 + first.abs().max() * most)
    # one input, equal gates: the first term alone; equal first halves, gates near the steepest point: the second
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert float((x[0, 0] * 1.5 - x[0, 0]) * gate(x[0, 0])) == pytest.approx(0.5 * float(gate(x[0, 0])))
    steep = {torch.sigmoid: 0.0, F.silu: 2.39935728, F.gelu: 2**0.5}[gate]
    y = torch.tensor([steep - 1e-4, steep + 1e-4], dtype=torch.float64)
    assert float((gate(y[1]) - gate(y[0])) / 2e-4) >= 0.99 * lipschitz


def test_greedy_pivots_against_the_best_subset():
    """Statement 14: the factors hold; and on random matrices greedy pivots are nearly the best ones."""
    torch.manual_seed(0)
    ratios = []
    for index in range(60):
        n, k = 8, 1 + index % 4
        data = torch.randn(40, n, dtype=torch.float64) @ (
            torch.randn(n, n, dtype=torch.float64) * 2.0 ** -torch.arange(n)
        )
        second = data.T @ data / 40
        values = torch.linalg.eigvalsh(second).flip(0)
        greedy = float(2 * select(second, None, torch.eye(n, dtype=torch.float64), stop=0.0, floor=k).error[k])

        def left(keep, second=second):
            rest = second - second[:, keep] @ torch.linalg.solve(second[keep][:, keep], second[keep])
            return float(rest.trace())

        best = min(left(list(keep)) for keep in itertools.combinations(range(n), k))
        assert best <= (k + 1) * float(values[k:].sum()) * (1 + 1e-9)
        assert best * (1 - 1e-9) <= greedy <= 4**k * (n - k) * float(values[k]) * (1 + 1e-9)
        ratios.append(greedy / best)
    assert sorted(ratios)[len(ratios) // 2] < 1.2


def test_errors_of_several_groups():
    """Statement 15: root mean squares of one removal after the other add up at most, and do for equal changes."""
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64)
    for _ in range(50):
        layers = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
        order, nets = torch.randperm(3).tolist(), [list(layers)]
        for layer in order:
            nets.append([w + 0.3 * torch.randn_like(w) if i == layer else w for i, w in enumerate(nets[-1])])
        outputs = [torch.tanh(torch.tanh(x @ a) @ b) @ c for a, b, c in nets]
        steps = [(b - a).square().sum(1).mean().sqrt() for a, b in itertools.pairwise(outputs)]
        total = (outputs[-1] - outputs[0]).square().sum(1).mean()
        assert total <= sum(steps) ** 2 * (1 + 1e-12)
        assert sum(steps) ** 2 <= 3 * sum(step**2 for step in steps) * (1 + 1e-12)
    assert math.isclose(float((2 * x).square().mean()), 4 * float(x.square().mean()))  # two equal changes: attained
