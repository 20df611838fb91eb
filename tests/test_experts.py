"""Experts whose weights lie in one parameter, used one after the other or in one product by groups."""

import copy

import pytest
import torch
import torch.nn.functional as F
from planted import planted
from torch import Tensor, nn
from trainers import prepare_torchvision

from apoptorch import Apoptosis
from apoptorch.batches import Batch
from apoptorch.calibrate import measure
from apoptorch.graph import trace
from benchmarks.zoo.examine import HALVING, halved

EXPERTS, WIDTH, HIDDEN = 3, 8, 12
FORMS = ["linear", "bias", "matmul", "transposed", "unbind"]


class Looped(nn.Module):
    """A mixture as in Mixtral: gated experts in a loop, each of which takes some tokens."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed, self.router, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 4)
        up, down = torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / 3, torch.randn(EXPERTS, WIDTH, HIDDEN) / 3
        self.up, self.down = (nn.Parameter(w.mT.contiguous() if form == "matmul" else w) for w in (up, down))
        self.bias = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN)) if form == "bias" else None

    def layer(self, x: Tensor, weights: nn.Parameter, expert: int, bias: Tensor | None = None) -> Tensor:
        if self.form == "matmul":
            return x @ weights[expert]
        if self.form == "transposed":
            return x @ weights[expert].T
        weight = weights.unbind()[expert] if self.form == "unbind" else weights[expert]
        return F.linear(x, weight, None if bias is None else bias[expert])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        shares, taken = self.router(x).softmax(-1).T.topk(len(x) // 2)
        result = torch.zeros_like(x)
        for expert in range(EXPERTS):
            gate, up = self.layer(x[taken[expert]], self.up, expert, self.bias).chunk(2, -1)
            made = self.layer(F.silu(gate) * up, self.down, expert)
            result.index_add_(0, taken[expert], made * shares[expert][:, None])
        return self.head((x + result).tanh())


def built(form: str, dtype: torch.dtype = torch.float64) -> tuple[Looped, Tensor]:
    torch.manual_seed(0)
    return Looped(form).to(dtype), torch.randn(96, 6, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_hidden_units_of_all_experts_are_a_group(form):
    """Copies go, the outputs stay, and a step is that of the tied model of full size."""
    model, x = built(form)
    outcome, apoptosis = planted(model, (x,), most=8)
    assert outcome.problems == []
    assert outcome.step is not None
    (hidden,) = [group for group in apoptosis.groups if group.full_width == HIDDEN]
    assert hidden.width == HIDDEN // 2
    assert [consumer.weight.tensor for consumer in hidden.consumers] == ["down"]
    up, down = (model.up.mT, model.down.mT) if form == "matmul" else (model.up, model.down)
    assert (up.shape[:2], down.shape[::2]) == ((EXPERTS, HIDDEN), (EXPERTS, HIDDEN // 2))


def test_halved_it_trains_and_comes_back_from_disk():
    _, x = built("linear", torch.float32)
    assert halved(lambda: built("linear", torch.float32)[0], (x,), {})["halved_problems"] == []


@pytest.mark.parametrize("form", FORMS)
def test_what_all_experts_read_adds_up(form):
    """Second moment and gradients, against those of each expert's own hidden units."""
    model, x = built(form)
    seen: list[Tensor] = []
    layer = model.layer

    def noting(x: Tensor, weights: nn.Parameter, *rest) -> Tensor:
        if weights is model.down:
            x.retain_grad()
            seen.append(x)
        return layer(x, weights, *rest)

    (group,) = [group for group in Apoptosis(model, example_inputs=x).groups if group.full_width == HIDDEN]
    targets = torch.randint(4, (96,))
    moments = measure(model, [group], [Batch((x,), {}, targets)], F.cross_entropy, 0.0)[group.name]
    model.layer = noting
    F.cross_entropy(model(x), targets).backward()
    a, u = torch.cat(seen).detach(), torch.cat([each.grad for each in seen])
    assert moments.samples == EXPERTS * 48
    torch.testing.assert_close(moments.second, a.T @ a / len(a))
    torch.testing.assert_close(moments.slope, u.sum(0))
    torch.testing.assert_close(moments.cross, u.T @ a)


class Sliced(Looped):
    """Reads with a slice of an expert, besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.embed(x), self.down[0, :4, :WIDTH])


def test_a_slice_of_an_expert_is_computed_in_forward():
    torch.manual_seed(0)
    groups = Apoptosis(Sliced("linear"), example_inputs=torch.randn(96, 6)).groups
    assert not [group for group in groups if group.prunable and "down" in str(group.consumers)]


class Grouped(nn.Module):
    """Every token is taken by one expert; F.grouped_mm multiplies those of all experts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, 16), nn.Linear(16, EXPERTS), nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, 48, 16) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, 24, 16) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        chosen, order = self.router(x).argmax(-1).sort()
        ends = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[order], self.up.mT, offs=ends).chunk(2, -1)
        return self.head(F.grouped_mm(F.silu(gate) * up, self.down, offs=ends).tanh())

    def hidden(self, x: Tensor) -> Tensor:
        """The same in a loop: hidden units of the tokens of one expert after the other."""
        x, parts = self.embed(x), []
        chosen = self.router(x).argmax(-1)
        for expert in range(EXPERTS):
            gate, up = (x[chosen == expert] @ self.up[expert].T).chunk(2, -1)
            parts.append(F.silu(gate) * up)
        return torch.cat(parts)


def test_a_product_by_groups_has_the_channels_of_one_expert_and_costs_what_a_token_costs():
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(40, 6)
    groups, costs = trace(copy.deepcopy(model).bfloat16(), (x.bfloat16(),), {})  # all that torch exports it with
    (hidden,) = [group for group in groups if group.full_width == 24]
    assert (hidden.prunable, hidden.multiple) == (True, 8)
    assert [(c.weight.tensor, c.weight.dim) for c in hidden.consumers] == [("down", 1)]
    made = [(term.flops * 24 * 16, term.parameters * 24 * 16) for term in costs if term.out_group == hidden.name]
    assert made == [pytest.approx((2 * 40 * 48 * 16, EXPERTS * 48 * 16))]
    read = [(term.flops * 24 * 16, term.parameters * 24 * 16) for term in costs if term.in_group == hidden.name]
    assert read == [pytest.approx((2 * 40 * 24 * 16, EXPERTS * 24 * 16))]
    moments = measure(model, [hidden], [Batch((x,), {}, torch.randint(4, (40,)))], F.cross_entropy, 0.0)[hidden.name]
    a = model.hidden(x).detach()
    torch.testing.assert_close(moments.second, a.T @ a / len(a))
    assert bool(moments.cross.any())


def mixtral() -> nn.Module:
    prepare_torchvision()
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_the_experts_of_transformers_shrink_in_widths_that_their_kernel_takes():
    """In float32, which is as precise as torch's kernel gets: multiples of four numbers."""
    torch.manual_seed(1)
    tokens = {"input_ids": torch.randint(4, 40, (24, 6))}
    model = mixtral()
    outcome, apoptosis = planted(model, (), tokens, most=6)
    assert outcome.problems == []
    assert outcome.step is not None
    (hidden,) = [group for group in apoptosis.groups if group.full_width == 20]
    assert (hidden.width, hidden.multiple) == (8, 4)
    apoptosis = Apoptosis(mixtral(), example_inputs=tokens, policy=HALVING)
    assert not apoptosis.apoptose(**tokens).rolled_back
    assert [group.width for group in apoptosis.groups if group.full_width == 20] == [12]  # ten is none
