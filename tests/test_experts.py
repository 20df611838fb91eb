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
from apoptorch.errors import ArgumentError
from apoptorch.graph import experts, trace
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
            rows = taken[expert, : len(x) // (2 + expert)]
            gate, up = self.layer(x[rows], self.up, expert, self.bias).chunk(2, -1)
            made = self.layer(F.silu(gate) * up, self.down, expert)
            result.index_add_(0, rows, made * shares[expert, : len(rows), None])
        return self.head((x + result).tanh())


def built(form: str, dtype: torch.dtype = torch.float64) -> tuple[Looped, Tensor]:
    torch.manual_seed(0)
    return Looped(form).to(dtype), torch.randn(96, 6, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_loses_its_own_copies(form):
    """Other copies in each; they go, the outputs stay, and a step is that of the tied model of full size."""
    model, x = built(form)
    outcome, apoptosis = planted(model, (x,), most=24)
    assert outcome.problems == []
    assert outcome.step is not None
    (hidden,) = [group for group in apoptosis.groups if group.full_width == EXPERTS * HIDDEN]
    assert (hidden.width, hidden.blocks, hidden.experts) == (EXPERTS * HIDDEN // 2, EXPERTS, EXPERTS)
    assert [consumer.weight.tensor for consumer in hidden.consumers] == ["down"]
    up, down = (model.up.mT, model.down.mT) if form == "matmul" else (model.up, model.down)
    assert (up.shape[:2], down.shape[::2]) == ((EXPERTS, HIDDEN), (EXPERTS, HIDDEN // 2))


def test_halved_it_trains_and_comes_back_from_disk():
    _, x = built("linear", torch.float32)
    assert halved(lambda: built("linear", torch.float32)[0], (x,), {})["halved_problems"] == []


class Listed(Looped):
    """The same with a module for each expert, as no other rule is needed for them."""

    def __init__(self, other: Looped) -> None:
        super().__init__(other.form)
        self.load_state_dict(other.state_dict())
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * HIDDEN, bias=other.bias is not None) for _ in range(EXPERTS))
        self.downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(EXPERTS))
        up, down = (other.up.mT, other.down.mT) if other.form == "matmul" else (other.up, other.down)
        self.double()
        for expert in range(EXPERTS):
            self.ups[expert].weight.data = up[expert].detach()
            self.downs[expert].weight.data = down[expert].detach()
            if other.bias is not None:
                self.ups[expert].bias.data = other.bias[expert].detach()

    def layer(self, x: Tensor, weights: nn.Parameter, expert: int, bias: Tensor | None = None) -> Tensor:
        return (self.downs if weights is self.down else self.ups)[expert](x)


def blocks(matrix: Tensor) -> Tensor:
    """Those of the experts; nothing lies between them."""
    size = len(matrix) // EXPERTS
    parts = [matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(EXPERTS)]
    assert torch.equal(torch.block_diag(*parts), matrix)
    return torch.stack(parts)


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_is_measured_as_if_it_were_a_module_of_its_own(form):
    """Frequent and rarer ones: what a residual costs is the same, as the loss over all tokens sees it."""
    model, x = built(form)
    targets = torch.randint(4, (96,))
    batches = [Batch((part,), {}, labels) for part, labels in ((x[:64], targets[:64]), (x[64:], targets[64:]))]
    listed = Listed(model)
    (hidden,) = [group for group in trace(model, (x,), {})[0] if group.experts == EXPERTS]
    own = [group for group in trace(listed, (x,), {})[0] if group.name.startswith("ups")]
    found = measure(model, [hidden], batches, F.cross_entropy, 0.01, backward=0.5)[hidden.name]
    expected = measure(listed, own, batches, F.cross_entropy, 0.0, backward=0.5)
    parts = [expected[f"ups.{expert}"] for expert in range(EXPERTS)]
    assert found.shares == tuple(part.samples for part in parts) == (32 + 16, 21 + 10, 16 + 8)
    assert found.samples == 103
    torch.testing.assert_close(blocks(found.second), torch.stack([part.second for part in parts]))
    torch.testing.assert_close(blocks(found.cross), torch.stack([part.cross for part in parts]))
    torch.testing.assert_close(blocks(found.energy), torch.stack([part.energy * part.samples / 103 for part in parts]))
    torch.testing.assert_close(found.slope, torch.cat([part.slope for part in parts]))
    undamped = found.metric - found.damping * found.energy
    torch.testing.assert_close(blocks(undamped), torch.stack([part.metric for part in parts]))


class Sliced(Looped):
    """Reads with a slice of an expert, besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.embed(x), self.down[0, :4, :WIDTH])


def test_a_slice_of_an_expert_is_computed_in_forward():
    torch.manual_seed(0)
    groups = Apoptosis(Sliced("linear"), example_inputs=torch.randn(96, 6)).groups
    assert not [group for group in groups if group.prunable and "down" in str(group.consumers)]


class Dense(nn.Module):
    """All experts see all tokens, in one product; `form`: how."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed, self.router, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        shares = self.router(x).softmax(-1)
        if self.form == "einsum":  # "thk": experts needn't come first
            made = torch.einsum("teh,ehd->etd", torch.einsum("td,edh->teh", x, self.up).tanh(), self.down)
        elif self.form == "bmm":
            made = torch.bmm(torch.bmm(x.expand(EXPERTS, -1, -1), self.up).tanh(), self.down)
        else:
            made = (x @ self.up).tanh()[:, None].flatten(0, 1).tanh() @ self.down
        return self.head(torch.einsum("etd,te->td", made, shares))


@pytest.mark.parametrize("form", ["einsum", "bmm", "matmul"])
def test_experts_in_one_product_lose_their_own_copies(form):
    torch.manual_seed(0)
    model, x = Dense(form).double(), torch.randn(96, 6, dtype=torch.float64)
    outcome, apoptosis = planted(model, (x,), most=24)
    assert outcome.problems == []
    assert outcome.step is not None
    (hidden,) = [group for group in apoptosis.groups if group.full_width == EXPERTS * HIDDEN]
    assert (hidden.width, hidden.experts) == (EXPERTS * HIDDEN // 2, EXPERTS)
    assert (model.up.shape[2], model.down.shape[1]) == (HIDDEN // 2, HIDDEN // 2)


class Unlike(Looped):
    """Something that ties the experts' hidden units to each other; `how`: what."""

    def __init__(self, how: str) -> None:
        super().__init__("linear")
        self.how = how
        self.scale, self.shift = nn.Parameter(torch.rand(HIDDEN)), nn.Parameter(torch.rand(2 * HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x, last = self.embed(x), None
        result = torch.zeros_like(x)
        for expert in range(EXPERTS):
            bias = self.shift if self.how == "shared bias" else None
            gate, up = F.linear(x, self.up[expert], bias).chunk(2, -1)
            made = F.silu(gate) * up
            if self.how == "shared scale":
                made = made * self.scale
            if self.how == "sum" and last is not None:
                made = made + last
            if self.how == "in place" and last is not None:
                made[:4] += last[:4]
            read_by = (expert + 1) % EXPERTS if self.how == "next" else expert
            result = result + self.router(x).softmax(-1)[:, [expert]] * F.linear(made, self.down[read_by])
            last = made
        return self.head((x + result).tanh())


class UnlikeAtOnce(Dense):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        hidden = torch.einsum("td,edh->eth", x, self.up).tanh()
        hidden = {"flip": hidden.roll(1, 0), "mixed": hidden.unflatten(1, (EXPERTS, -1)).transpose(0, 1).flatten(1, 2)}[
            self.form
        ]
        return self.head(torch.einsum("eth,ehd->td", hidden, self.down))


@pytest.mark.parametrize("how", ["next", "shared bias", "shared scale", "sum", "in place", "flip", "mixed"])
def test_units_of_experts_that_depend_on_each_other_are_one_channel(how):
    """What one expert makes is read by another, or all have a parameter in common."""
    torch.manual_seed(0)
    model = (UnlikeAtOnce(how) if how in ("flip", "mixed") else Unlike(how)).double()
    x = torch.randn(96, 6, dtype=torch.float64)
    groups = Apoptosis(model, example_inputs=x).groups
    assert [group.blocks for group in groups] == [1] * len(groups)
    assert [group.width for group in groups if "down" in [c.weight.tensor for c in group.consumers]] == [HIDDEN]
    assert planted(model, (x,), most=8)[0].problems == []


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


def test_a_product_by_groups_has_the_channels_of_each_expert_and_costs_what_a_token_costs():
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(400, 6)
    groups, costs = trace(copy.deepcopy(model).bfloat16(), (x.bfloat16(),), {})  # all that torch exports it with
    (hidden,) = [group for group in groups if group.full_width == EXPERTS * 24]
    assert (hidden.prunable, hidden.multiple, hidden.experts) == (True, 8, EXPERTS)
    assert [(c.weight.tensor, c.weight.dim, c.weight.split) for c in hidden.consumers] == [("down", 1, (0, EXPERTS))]
    size = hidden.width * 16
    made = [(term.flops * size, term.parameters * size) for term in costs if term.out_group == hidden.name]
    assert made == [pytest.approx((2 * 400 * 48 * 16, EXPERTS * 48 * 16))]
    read = [(term.flops * size, term.parameters * size) for term in costs if term.in_group == hidden.name]
    assert read == [pytest.approx((2 * 400 * 24 * 16, EXPERTS * 24 * 16))]
    moments = measure(model, [hidden], [Batch((x,), {}, torch.randint(4, (400,)))], F.cross_entropy, 0.0)[hidden.name]
    numbers = model.router(model.embed(x)).argmax(-1).bincount(minlength=EXPERTS).tolist()
    assert moments.shares == tuple(numbers)
    expected = [a.T @ a / len(a) for a in model.hidden(x).detach().split(numbers)]
    torch.testing.assert_close(blocks(moments.second), torch.stack(expected))
    assert bool(blocks(moments.cross).any())


class GroupedApart(Grouped):
    """Reads with the experts of other rows than it was made with."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        ends = torch.histc(self.router(x).argmax(-1).float(), EXPERTS, 0, EXPERTS - 1)
        made = F.grouped_mm(x, self.up.mT, offs=ends.cumsum(0, dtype=torch.int32))
        gate, up = made.chunk(2, -1)
        return self.head(F.grouped_mm(F.silu(gate) * up, self.down, offs=ends.flip(0).cumsum(0, dtype=torch.int32)))


def test_products_by_other_groups_have_one_channel_for_all_experts():
    groups, _ = trace(GroupedApart().bfloat16(), (torch.randn(40, 6, dtype=torch.bfloat16),), {})
    assert [(group.width, group.blocks) for group in groups if "down" in str(group.consumers)] == [(24, 1)]


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
    outcome, apoptosis = planted(model, (), tokens, most=18)
    assert outcome.problems == []
    assert outcome.step is not None
    (hidden,) = [group for group in apoptosis.groups if group.full_width == 3 * 20]
    assert (hidden.width, hidden.multiple, hidden.experts) == (3 * 8, 4, 3)
    apoptosis = Apoptosis(mixtral(), example_inputs=tokens, policy=HALVING, protect=("model.layers.0.mlp.gate",))
    assert not apoptosis.apoptose(**tokens).rolled_back
    assert [group.width for group in apoptosis.groups if group.full_width == 3 * 20] == [3 * 12]  # ten is none


class Routed(Looped):
    """Expert e sees the inputs whose first number is in its range, and zeros for the others."""

    def __init__(self, ends: list[float]) -> None:
        super().__init__("linear")
        self.register_buffer("ends", torch.tensor(ends))

    def forward(self, x: Tensor) -> Tensor:
        chosen, x = torch.bucketize(x[:, 0].contiguous(), self.ends), self.embed(x)
        result = torch.zeros_like(x)
        for expert in range(EXPERTS):
            mine = (chosen == expert)[:, None]
            gate, up = self.layer(x * mine, self.up, expert).chunk(2, -1)
            result = result + self.layer(F.silu(gate) * up, self.down, expert)
        return self.head((x + result).tanh())


@pytest.mark.parametrize("numbers", [(96, 0, 0), (50, 40, 6), (32, 32, 32)])
def test_an_expert_that_too_few_tokens_reach_keeps_its_hidden_units(numbers):
    """Nothing tells what they share; and as many stay in the others, since they lie in one parameter."""
    torch.manual_seed(0)
    x, rank = torch.randn(96, 6, dtype=torch.float64), [sum(numbers[:i]) for i in (1, 2)]
    x[:, 0] = torch.linspace(0, 1, 96)
    ends = [(end - 0.5) / 95 for end in rank]
    model = Routed(ends).double()
    hidden = next(group for group in trace(model, (x,), {})[0] if group.experts == EXPERTS)
    assert measure(model, [hidden], [Batch((x,), {})], None, 0.0)[hidden.name].shares == numbers
    shuffled = x[torch.randperm(96)]
    apoptosis = Apoptosis(model, example_inputs=x, policy=HALVING)
    assert not apoptosis.apoptose(shuffled).rolled_back
    (after,) = [group.width for group in apoptosis.groups if group.experts == EXPERTS]
    assert after == EXPERTS * (HIDDEN // 2 if min(numbers) >= HIDDEN else HIDDEN)


def test_optimizer_state_follows_the_hidden_units_of_each_expert():
    model, x = built("linear")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    before, state = model.up.detach().clone(), optimizer.state[model.up]["exp_avg"].clone()
    apoptosis = Apoptosis(model, optimizer, example_inputs=x, policy=HALVING, protect=("embed",))
    assert not apoptosis.apoptose(x).rolled_back
    kept = [[before[e].tolist().index(row.tolist()) for row in model.up[e]] for e in range(EXPERTS)]
    assert len({tuple(rows) for rows in kept}) > 1
    for expert, rows in enumerate(kept):
        assert rows[: HIDDEN // 2] == [row - HIDDEN for row in rows[HIDDEN // 2 :]]  # gate and value of one unit
        assert torch.equal(optimizer.state[model.up]["exp_avg"][expert], state[expert][rows])


def test_moments_that_would_take_too_much_memory_are_those_of_all_experts_at_once(monkeypatch):
    """Also where they are few enough once the model is narrower."""
    monkeypatch.setattr(experts, "WIDEST", EXPERTS * HIDDEN - 1)
    model, x = built("linear")
    outcome, apoptosis = planted(model, (x,), most=8)
    assert outcome.problems == []
    (hidden,) = [group for group in apoptosis.groups if "down" in str(group.consumers) and group.full_width == HIDDEN]
    assert (hidden.width, hidden.experts, hidden.prunable) == (HIDDEN // 2, 1, True)


def test_a_state_with_one_channel_for_all_experts_resumes_in_the_model_of_full_size_only(monkeypatch):
    """Built anew from what it shrank to, each expert would have its own: refused, and nothing is changed."""
    monkeypatch.setattr(experts, "WIDEST", EXPERTS * HIDDEN - 1)
    model, x = built("linear")
    apoptosis = Apoptosis(model, example_inputs=x, policy=HALVING, protect=("embed",))
    assert apoptosis.apoptose(x).changes
    state = apoptosis.state_dict()
    narrow = copy.deepcopy(model)
    anew = Apoptosis(narrow, example_inputs=x, policy=HALVING, protect=("embed",))
    before = anew.state_dict()
    with pytest.raises(ArgumentError, match=r"`experts` of `state`.*full size"):
        anew.load_state_dict(state)
    assert anew.state_dict() == before
    full = built("linear")[0]
    resumed = Apoptosis(full, example_inputs=x, policy=HALVING, protect=("embed",))
    resumed.load_state_dict(state)
    full.load_state_dict(model.state_dict())
    assert torch.equal(full(x), model(x))
    assert [group.width for group in resumed.groups] == [group.width for group in apoptosis.groups]
