"""Whole experts as channels. The reference is the model of full size with a logit of -inf for those that went."""

import copy
import math

import pytest
import ranks
import torch
import torch.nn.functional as F
from test_distributed import assert_same, train
from test_experts import HALVING
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from trainers import prepare_torchvision

from apoptorch import Apoptosis, Policy, load, save
from apoptorch.batches import Batch
from apoptorch.calibrate import measure, of_experts
from apoptorch.graph import trace
from apoptorch.plan import ChannelGroup, Event, FoldPlan
from apoptorch.surgery import Surgery

EXPERTS, WIDTH, HIDDEN, USELESS = 5, 8, 6, 2
SOFT, SPARSE = ["einsum", "bmm", "sum"], ["mask", "scatter", "in place", "one_hot", "dispatch"]
POLICY = Policy(multiple=1, floor=1, rebalance=False)


class Mixture(nn.Module):
    """Experts in stacked parameters; `form`: how they are weighed, of all (SOFT) or the `top` largest (SPARSE)."""

    def __init__(self, form: str, top: int = 2) -> None:
        super().__init__()
        self.form, self.top, self.n_routed_experts = form, top, EXPERTS
        self.embed, self.router, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH) / 3)

    def weights(self, logits: Tensor) -> Tensor:
        """Of every expert for every token."""
        if self.form == "mask":
            shares = logits.softmax(-1)
            shares = shares * (shares >= shares.topk(self.top).values[:, -1:])
            return shares / shares.sum(-1, keepdim=True)
        if self.form in ("scatter", "in place"):
            values, chosen = logits.topk(self.top)
            if self.form == "in place":
                return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1))
            return torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1))
        if self.form in ("one_hot", "dispatch"):
            values, chosen = logits.softmax(-1).topk(self.top)
            return (F.one_hot(chosen, self.n_routed_experts) * values[..., None]).sum(1)
        return logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = self.weights(self.router(x))
        if self.form == "bmm":
            hidden = torch.bmm(x.expand(len(self.up), -1, -1), self.up).tanh()
            made = torch.bmm(hidden, self.down) + self.bias[:, None]
        else:
            taken = torch.einsum("td,te->etd", x, (weights > 0).to(x)) if self.form == "dispatch" else None
            hidden = torch.einsum("td,edh->eth", x, self.up) if taken is None else torch.bmm(taken, self.up)
            made = torch.einsum("eth,ehd->etd", hidden.tanh(), self.down) + self.bias[:, None]
        if self.form == "sum":
            return self.head(x + (made * weights.T[:, :, None]).sum(0))
        return self.head(x + torch.einsum("etd,te->td", made, weights))


def built(form: str, top: int = 2) -> tuple[Mixture, Tensor]:
    torch.manual_seed(0)
    return Mixture(form, top).double(), torch.randn(96, 6, dtype=torch.float64)


class Without(TorchFunctionMode):
    """Within, the router that has this weight gives these experts logits of -inf."""

    def __init__(self, weight: Tensor, gone: list[int]) -> None:
        super().__init__()
        self.weight, self.gone = weight, gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self.weight:
            return result.index_fill(-1, torch.tensor(self.gone), -math.inf)
        return result


def of_whole_experts(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    return [group for group in groups if group.gate is not None and group.prunable]


def test_the_group_of_a_mixture():
    model, x = built("scatter")
    apoptosis = Apoptosis(model, example_inputs=x)
    (group,) = of_whole_experts(apoptosis.groups)
    assert (group.name, group.neuron, group.width, group.gate) == ("experts", "experts", EXPERTS, 2)
    assert {slot.tensor for slot in group.slots} == {"router.weight", "router.bias", "up", "down", "bias"}
    assert [size.name for size in group.sizes] == ["n_routed_experts"]
    assert "experts: 5 -> 5 experts" in apoptosis.explain()
    protected = Apoptosis(Wrapped(model), example_inputs=x, protect=("inner.router",)).groups
    assert [group.reason for group in protected if group.neuron == "experts"] == [
        "protected by protect=('inner.router',)"
    ]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


@pytest.mark.parametrize("form", [*SOFT, *SPARSE])
@pytest.mark.parametrize("gone", [[USELESS], [0, 4]])
def test_without_experts_it_is_the_full_model_with_their_logits_at_minus_infinity(form, gone):
    """Outputs, and the gradients of all that is left."""
    model, x = built(form)
    full, keep = copy.deepcopy(model), [e for e in range(EXPERTS) if e not in gone]
    groups = Apoptosis(model, example_inputs=x).groups
    (group,) = of_whole_experts(groups)
    with Surgery(model) as surgery:
        after = surgery.fold_all_(groups, [FoldPlan(group.name, torch.tensor(keep), ())])
    with Without(full.router.weight, gone):
        expected = full(x)
        expected.square().sum().backward()
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        whole = full.get_parameter(name).grad
        expected = whole if name.startswith(("embed", "head")) else whole[keep]
        torch.testing.assert_close(parameter.grad, expected)
    assert model.n_routed_experts == len(keep)
    found = {(g.name, g.width, g.blocks, g.slots) for g in trace(model, (x,), {})[0]}
    assert {(g.name, g.width, g.blocks, g.slots) for g in after} == found


@pytest.mark.parametrize("form", ["einsum", "scatter"])
def test_a_useless_expert_goes_and_all_others_stay(form, tmp_path):
    """Optimizer state follows; the model comes back from disk, and the run from its state."""
    model, x = built(form)
    with torch.no_grad():
        model.router.bias[USELESS] = -60.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    names = ("router.weight", "router.bias", "up", "down", "bias")
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    moments = {name: optimizer.state[model.get_parameter(name)]["exp_avg_sq"].clone() for name in names}
    output, full = model(x), copy.deepcopy(model)
    apoptosis = Apoptosis(model, optimizer, example_inputs=x, policy=POLICY)
    event = apoptosis.apoptose(x, budget=1e-12)
    assert not event.rolled_back
    assert event.widths_after["experts"] == EXPERTS - 1
    assert Event.from_json(event.to_json()) == event
    torch.testing.assert_close(model(x), output)
    assert event.flops_after == pytest.approx(sum_of_flops(model, x))
    keep = [e for e in range(EXPERTS) if e != USELESS]
    if event.widths_after == event.widths_before | {"experts": EXPERTS - 1, "up": (EXPERTS - 1) * HIDDEN}:
        for name in names:
            assert torch.equal(model.get_parameter(name), before[name][keep])
            assert torch.equal(optimizer.state[model.get_parameter(name)]["exp_avg_sq"], moments[name][keep])
    save(model, tmp_path, apoptosis)
    fresh, anew = built(form)[0], full
    load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    resumed = Apoptosis(anew, example_inputs=x, policy=POLICY)
    resumed.load_state_dict(apoptosis.state_dict())
    anew.load_state_dict(model.state_dict())
    assert torch.equal(anew(x), model(x))
    assert resumed.groups == apoptosis.groups
    assert (anew.n_routed_experts, fresh.n_routed_experts) == (EXPERTS - 1, EXPERTS - 1)
    assert resumed.apoptose(x, budget=0.0).flops_after == pytest.approx(event.flops_after)
    model(x).square().mean().backward()
    optimizer.step()


def sum_of_flops(model: nn.Module, x: Tensor) -> float:
    groups, costs = trace(model, (x,), {})
    widths = {group.name: group.width for group in groups}
    return sum(c.flops * math.prod(widths[name] for name in (c.out_group, c.in_group) if name) for c in costs)


def test_hidden_units_and_experts_go_in_one_event():
    """And another one after it, in the groups that are left."""
    model, x = built("scatter")
    apoptosis = Apoptosis(model, example_inputs=x, policy=HALVING)
    event = apoptosis.apoptose(x)
    assert not event.rolled_back
    assert (event.widths_after["experts"], event.widths_after["up"]) == (3, 9)
    assert (model.up.shape, model.down.shape) == ((3, 4, 3), (3, 3, 4))
    assert "up: 6 -> 3 channels in each of 3 experts" in apoptosis.explain()
    assert "experts: 5 -> 3 experts" in apoptosis.explain()
    again = apoptosis.apoptose(x)
    assert not again.rolled_back
    assert again.widths_after["experts"] == 2  # as many as a token takes
    assert Apoptosis(model, example_inputs=x, policy=HALVING).apoptose(x).widths_after["experts"] == 2


def test_an_event_that_is_undone_leaves_experts_and_their_number():
    model, x = built("mask")
    before = copy.deepcopy(model.state_dict())
    apoptosis = Apoptosis(model, example_inputs=x, policy=Policy(multiple=1, floor=1, max_loss_increase=1e-9))
    assert apoptosis.apoptose(x, budget=1e9).rolled_back
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.n_routed_experts == EXPERTS
    assert {group.width for group in apoptosis.groups if group.neuron == "experts"} == {EXPERTS}


@pytest.mark.parametrize("form", ["einsum", "scatter"])
def test_a_loss_that_is_linear_changes_as_its_gradient_at_the_router_says(form):
    """Statement 21, with weights from next to nothing to nearly all. Tokens are left to the others that they took."""
    model, x = built(form)
    model.router.weight.data *= 4
    direction = torch.randn(3, dtype=torch.float64)

    def loss(output: Tensor, _: Tensor) -> Tensor:
        return (output @ direction).mean()

    groups = [group for group in trace(model, (x,), {})[0] if group.neuron == "experts"]
    found = measure(model, groups, [Batch((x,), {}, torch.zeros(96))], loss, 1.0)["experts"]
    before, weights = loss(model(x), x).detach(), model.weights
    for expert in range(EXPERTS):

        def without(logits: Tensor, gone: int = expert) -> Tensor:
            shares = weights(logits)
            return shares.index_fill(-1, torch.tensor([gone]), 0.0) / (1 - shares[:, [gone]])

        model.weights = without
        with torch.no_grad():
            change = loss(model(x), x) - before
        assert float(change) == pytest.approx(-float(found.cross[expert, expert]), rel=1e-9)
    assert bool((found.metric.diagonal() > 0).all())


def test_where_a_token_has_one_expert_it_counts_as_a_loss_of_one():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 200.0, 0.0]])
    gradient = torch.zeros(2, 3)
    assert of_experts(logits, gradient, 1).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert of_experts(logits, gradient, 0).tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("used", [True, False])
def test_of_tokens_that_take_one_expert_each_an_expert_that_none_takes_goes(used):
    model, x = built("scatter", top=1)  # a weight of 1: no gradient reaches the router
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([0.0, 0, 0 if used else -60, 0, 0]))
        model.router.weight *= 3
    event = Apoptosis(model, example_inputs=x, policy=POLICY, protect=("embed",)).apoptose(x, budget=1e-6)
    assert not event.rolled_back
    assert event.widths_after["experts"] == (EXPERTS if used else EXPERTS - 1)


def leaks(kind: str) -> nn.Module:
    class Leaks(Mixture):
        """Has another use for the shares of its experts."""

        def __init__(self) -> None:
            super().__init__("einsum")
            self.scale, self.second = torch.arange(1.0, EXPERTS + 1).double(), nn.Linear(WIDTH, EXPERTS)
            self.offset = nn.Parameter(torch.rand(EXPERTS))
            self.read = nn.Linear(EXPERTS, WIDTH)

        def weights(self, logits: Tensor) -> Tensor:
            shares = logits.softmax(-1)
            if kind == "temperature":
                return (logits / 2).softmax(-1)
            if kind == "sigmoid":
                return logits.sigmoid()
            if kind == "shift":
                return shares + 0.1
            if kind == "in place":
                shares.view(-1).add_(0.1)
                return shares
            if kind == "tensor":
                return shares * self.scale
            if kind == "norm":
                return F.layer_norm(shares.T, (len(shares),)).T
            if kind == "least":
                values, chosen = shares.topk(2, largest=False)
                return torch.zeros_like(shares).scatter(-1, chosen, values)
            if kind == "numbers":
                values, chosen = shares.topk(2)
                return torch.zeros_like(shares).scatter(-1, (chosen + 1) % EXPERTS, values)
            if kind == "vector":
                return (logits + self.offset).softmax(-1)
            if kind == "base":
                values, chosen = shares.topk(2)
                base = torch.zeros_like(shares)
                base.add_(1.0)
                return base.scatter(-1, chosen, values)
            if kind == "noise":
                values, chosen = (shares * self.scale).topk(2)
                return torch.zeros_like(shares).scatter(-1, chosen, values)
            if kind == "ones":
                values, chosen = shares.topk(2)
                return torch.ones_like(shares).scatter(-1, chosen, values)
            return shares

        def forward(self, x: Tensor) -> Tensor:
            y, hidden = super().forward(x), self.embed(x)
            shares = self.weights(self.router(hidden))
            if kind == "entropy":
                return y - (shares * shares.log()).sum(-1, keepdim=True) - shares.log().sum(-1, keepdim=True)
            if kind == "mean":
                return y + shares.mean(-1, keepdim=True)
            if kind == "read":
                return y + self.head(self.read(shares))
            if kind == "output":
                return torch.cat([y, shares], -1)
            if kind == "loop":
                parts = [shares[:, [e]] * (hidden @ self.up[e]).tanh() @ self.down[e] for e in range(EXPERTS)]
                return y + self.head(torch.stack(parts).sum(0))
            if kind == "number":
                return y + EXPERTS * shares.square().sum(-1, keepdim=True)
            return y

    return Leaks().double()


@pytest.mark.parametrize("kind", [
    "temperature", "sigmoid", "shift", "in place", "tensor", "norm", "least", "numbers", "ones", "vector", "base",
    "noise", "entropy", "mean", "read", "output", "loop", "number",
])  # fmt: skip
def test_experts_stay_where_something_else_depends_on_their_shares(kind):
    torch.manual_seed(0)
    model, x = leaks(kind), torch.randn(96, 6, dtype=torch.float64)
    groups = Apoptosis(model, example_inputs=x).groups
    assert of_whole_experts(groups) == []
    pinned = [group for group in groups if "up" in [slot.tensor for slot in group.slots if slot.dim == 0]]
    assert all(group.reason for group in pinned)


def mixtral(family: str = "Mixtral") -> nn.Module:
    prepare_torchvision()
    import transformers

    torch.manual_seed(0)
    number = {"num_local_experts": 4} if family == "Mixtral" else {"num_experts": 4, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=20, moe_intermediate_size=20, num_hidden_layers=1,
        shared_expert_intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        use_cache=False, num_experts_per_tok=2, eos_token_id=1, bos_token_id=2, **number,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


TOKENS = {"input_ids": torch.randint(4, 40, (24, 6), generator=torch.Generator().manual_seed(1))}
BLOCK = "model.layers.0.mlp"


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Olmoe"])
def test_an_expert_of_transformers_that_no_token_takes_goes(family, tmp_path):
    model = mixtral(family)
    mlp = model.get_submodule(BLOCK)
    with torch.no_grad():  # a number that is large in all tokens keeps them from one expert
        model.model.embed_tokens.weight[:, 0] += 20.0
        mlp.gate.weight.normal_()
        mlp.gate.weight[:, 0] = torch.tensor([0.0, -20.0, 0.0, 0.0])
        mlp.experts.gate_up_proj *= 20
        mlp.experts.down_proj *= 20
    full, before = copy.deepcopy(model), model(**TOKENS).logits
    apoptosis = Apoptosis(model, example_inputs=TOKENS, policy=POLICY)
    event = apoptosis.apoptose(**TOKENS, budget=1e-9)
    assert not event.rolled_back
    assert event.widths_after[f"{BLOCK}.experts"] == 3
    assert (len(mlp.gate.weight), len(mlp.experts.gate_up_proj), len(mlp.experts.down_proj)) == (3, 3, 3)
    assert (mlp.gate.num_experts, mlp.experts.num_experts, mlp.gate.top_k) == (3, 3, 2)
    torch.testing.assert_close(model(**TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    with Without(full.get_submodule(BLOCK).gate.weight, [1]):
        torch.testing.assert_close(full(**TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    save(model, tmp_path, apoptosis)
    fresh = mixtral(family)
    load(fresh, tmp_path)
    assert torch.equal(fresh(**TOKENS).logits, model(**TOKENS).logits)


def test_experts_of_transformers_that_tokens_take_go_as_if_their_logits_were_minus_infinity():
    model = mixtral()
    full, groups = copy.deepcopy(model), Apoptosis(model, example_inputs=TOKENS).groups
    with Surgery(model) as surgery:
        surgery.fold_all_(groups, [FoldPlan(f"{BLOCK}.experts", torch.tensor([0, 2, 3]), ())])
    with Without(full.get_submodule(BLOCK).gate.weight, [1]):
        torch.testing.assert_close(full(**TOKENS).logits, model(**TOKENS).logits)
    assert not torch.allclose(full(**TOKENS).logits, model(**TOKENS).logits)


class Routed(Mixture):
    """For the data of test_distributed; one expert is useless."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__("scatter")
        self.embed = nn.Linear(10, WIDTH)
        with torch.no_grad():
            self.router.bias[USELESS] = -60.0


@pytest.mark.parametrize("parallel", [DistributedDataParallel, fully_shard])
def test_ranks_remove_the_experts_that_one_process_does(parallel):
    alone = train(0, 1, Routed)
    for found in ranks.run(2, train, 2, Routed, torch.optim.SGD, 0.1, 1, parallel):
        assert_same(found, alone)
    assert len(alone["weights"]["down"]) < EXPERTS
