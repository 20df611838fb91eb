"""One small model per family of graph rules enters the same table of checks as every model of `make zoo`."""

import planted as check
import pytest
import torch
from planted import planted
from torch import nn

from apoptorch import planning
from apoptorch.discovery import discovered
from apoptorch.plan import Fold
from benchmarks.zoo.examine import coverage, halved
from benchmarks.zoo.families import FAMILIES

# Share of the parameters in prunable groups that the rules must reach, at least.
COVERED = {
    "mlp": 0.99,
    "lenet": 0.99,
    "plain-cnn": 0.99, "residual-cnn": 0.99, "concatenation": 0.99, "inverted-residual": 0.99,
    "grouped-convolution": 0.99, "unet": 0.98, "vision-transformer": 0.85, "hand-written-attention": 0.99, "gpt": 0.85,
    "llama-like": 0.8, "lstm": 0.99, "gru": 0.99, "experts": 0.99, "graph-network": 0.99,
}  # fmt: skip


def built(name: str, batch: int = 32, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model, inputs = FAMILIES[name](batch)
    return model.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def test_every_family_has_its_share():
    assert COVERED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("parallel", [False, True], ids=["copies", "parallels"])
@pytest.mark.parametrize("name", FAMILIES)
def test_planted_redundancy_goes_and_nothing_else_changes(name, parallel):
    model, inputs = built(name, dtype=torch.float64)
    outcome, _ = planted(model, inputs, parallel=parallel, most=8)
    assert outcome.problems == []
    assert outcome.planted or not COVERED[name]
    assert parallel or (outcome.step is not None) == bool(outcome.planted)


@pytest.mark.parametrize("name", FAMILIES)
def test_halved_it_trains_and_comes_back_from_disk(name):
    _, inputs = built(name)
    assert halved(lambda: built(name)[0], inputs, {})["halved_problems"] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rules_cover_their_family_and_say_why_not_more(name):
    model, inputs = built(name)
    groups, _ = discovered(model, inputs, {})
    assert coverage(model, [group for group in groups if group.prunable]) >= COVERED[name]
    assert all(group.prunable == (group.reason is None) for group in groups)


class Hidden(nn.Module):
    """Eight inputs, twelve hidden neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def test_the_check_notices_an_output_that_changes(monkeypatch):
    """Folds that forget what the removed channels gave are found out."""

    def selected(second, mean, keep, blocks):
        return Fold(torch.eye(len(second), dtype=second.dtype)[:, keep])

    monkeypatch.setattr(planning, "fold_blocks", selected)
    torch.manual_seed(0)
    outcome, _ = planted(Hidden().double(), (torch.randn(64, 8, dtype=torch.float64),))
    assert any("undone" in problem for problem in outcome.problems)


def test_the_check_notices_a_step_that_is_not_the_tied_one(monkeypatch):
    monkeypatch.setattr(check, "tie_gradients_", lambda *_: None)
    torch.manual_seed(0)
    outcome, _ = planted(Hidden().double(), (torch.randn(64, 8, dtype=torch.float64),))
    assert [problem for problem in outcome.problems if "tied" in problem]
