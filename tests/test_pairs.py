"""Channels of queries and keys, that meet in products of two: a pair goes, and what it gave goes into other pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from planted import planted
from torch import Tensor, nn

from apoptorch.batches import Batch
from apoptorch.calibrate import measure
from apoptorch.discovery import discovered
from benchmarks.zoo.examine import halved

WIDTH, HEADS, SIZE = 16, 2, 6
FORMS = ["matmul", "attribute", "einsum", "scale", "shared", "one key head"]


class Attention(nn.Module):
    """Queries and keys of `size` channels a head, values of others; `form`: how the code says it."""

    def __init__(self, form: str = "matmul", size: int = SIZE):
        super().__init__()
        self.form, self.size = form, size
        self.groups = HEADS if form in ("shared", "one key head") else 1
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(8, 5)
        self.query, self.key = nn.Linear(WIDTH, HEADS * size), nn.Linear(WIDTH, HEADS * size // self.groups)
        self.value = nn.Linear(WIDTH, 8)
        self.scale = size**-0.5

    def heads(self, x: Tensor, count: int = HEADS) -> Tensor:
        return x.unflatten(-1, (count, self.size if self.form == "attribute" else -1)).transpose(1, 2)

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.query(x)), self.heads(self.key(x), HEADS // self.groups)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.form in ("scale", "shared"):
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=self.form == "shared")
        if self.form == "einsum":
            return (self.scale * torch.einsum("bhid,bhjd->bhij", q, k)).softmax(-1) @ v
        return ((q * self.scale) @ k.mT).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k = self.queries_and_keys(x)
        v = self.value(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.out(self.attended(q, k, v).transpose(1, 2).flatten(2))


def built(make=Attention, form: str = "matmul", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make(form).to(dtype), torch.randn(32, 7, 8, dtype=dtype)


def pairs(model: nn.Module, x: Tensor) -> list:
    return [group for group in discovered(model, (x,), {})[0] if group.paired]


@pytest.mark.parametrize("form", FORMS)
def test_copied_queries_go_and_their_keys_add_up(form):
    model, x = built(form=form)
    outcome, apoptosis = planted(model, (x,), most=8)
    assert outcome.problems == []
    assert outcome.step is not None
    (group,) = [group for group in apoptosis.groups if group.paired]
    assert [slot.tensor for slot in group.producers] == ["query.weight", "query.bias"]
    assert [consumer.weight.tensor for consumer in group.consumers] == ["key.weight", "key.bias"]
    assert (model.query.out_features, model.key.out_features) == (HEADS * 3, HEADS * 3 // model.groups)
    assert model.size == (3 if form == "attribute" else SIZE)


@pytest.mark.parametrize("form", ["attribute", "shared"])
def test_halved_it_trains_and_comes_back_from_disk(form):
    _, x = built(dtype=torch.float32)
    assert halved(lambda: built(form=form, dtype=torch.float32)[0], (x,), {})["halved_problems"] == []


def test_the_removed_scores_are_what_the_plan_predicts_of_them():
    """The metric is the loss's curvature in the queries: against their own gradients, and a removal by hand."""
    model, x = built()
    (group,) = pairs(model, x)
    q = model.query(model.embed(x).tanh()).detach().requires_grad_()
    model.query.register_forward_hook(lambda *_: q)
    targets = torch.randint(5, (32, 7))

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    (u,) = torch.autograd.grad(loss(model(x), targets), q)
    model.query._forward_hooks.clear()
    found = measure(model, [group], [Batch((x,), {}, targets)], loss, 0.0)[group.name]
    a, u = q.detach().flatten(0, 1), u.flatten(0, 1)
    assert (found.samples, found.mean) == (32 * 7, None)
    torch.testing.assert_close(found.second, a.T @ a / len(a))
    torch.testing.assert_close(found.cross, u.T @ a)
    torch.testing.assert_close(found.metric / found.metric.trace(), u.T @ u / u.square().sum())


class Pictures(nn.Module):
    """As in generators of images: 1 x 1 convolutions, products of positions, with what changes in place."""

    def __init__(self, _: str):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 3)
        self.query, self.key = nn.Conv2d(12, 6, 1, bias=False), nn.Conv2d(12, 6, 1)
        self.value, self.out = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        q *= 0.5
        return self.out((v @ torch.bmm(q.mT, k).softmax(-1).mT).view(len(x), -1, *x.shape[2:]))


def test_queries_of_convolutions_go_too():
    torch.manual_seed(0)
    model, x = Pictures("").double(), torch.randn(32, 3, 5, 5, dtype=torch.float64)
    outcome, apoptosis = planted(model, (x,), most=8)
    assert outcome.problems == []
    assert [group.width for group in apoptosis.groups if group.paired] == [3]
    assert model.key.weight.shape[0] == model.query.weight.shape[0] == 3


class Rotated(Attention):
    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(x)
        angles = torch.arange(7, dtype=x.dtype)[:, None] * torch.ones(SIZE // 2, dtype=x.dtype)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return tuple(x * cos + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * sin for x in (q, k))


class Normalised(Attention):
    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(x)
        return q, F.normalize(k, dim=-1)


class Bent(Attention):
    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(x)
        return q, k.relu()


class ChangedInPlace(Attention):
    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(x)
        k.view_as(k).relu_()
        return q, k


class DefaultScale(Attention):
    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class ScaledBySize(Attention):
    """The scale follows the number of channels where it is computed."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


class KeysReadTwice(Attention):
    def __init__(self, form: str):
        super().__init__(form)
        self.more = nn.Linear(HEADS * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more(self.key(self.embed(x).tanh()))


class KeysOfAll(Attention):
    """Two layers make queries of the same keys."""

    def __init__(self, form: str):
        super().__init__(form)
        self.other = nn.Linear(WIDTH, HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k = self.queries_and_keys(x)
        v = self.value(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        other = self.attended(self.heads(self.other(x)), k, v)
        return self.out((self.attended(q, k, v) + other).transpose(1, 2).flatten(2))


class KeysAreQueries(Attention):
    def __init__(self, form: str):
        super().__init__(form)
        self.key = self.query


class OneLayer(Attention):
    """Queries and keys are rows of one parameter."""

    def __init__(self, form: str):
        super().__init__(form)
        self.both = nn.Linear(WIDTH, 2 * HEADS * SIZE)
        del self.query, self.key

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.heads(part) for part in self.both(x).chunk(2, -1))


class OneSize(Attention):
    """Values have the size of queries and keys, by one attribute."""

    def __init__(self, form: str):
        super().__init__("attribute", 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        q, k = self.queries_and_keys(x)
        return self.out(self.attended(q, k, self.heads(self.value(x))).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Rotated, "aten.mul"), (Normalised, "aten.linalg_vector_norm"), (Bent, "queries and keys"),
        (ChangedInPlace, "queries and keys"),
        (DefaultScale, "by a scale that follows their number"), (ScaledBySize, "computes with a number that follows"),
        (KeysReadTwice, "made or read by others too"), (KeysOfAll, "made or read by others too"),
        (KeysAreQueries, "made or read by others too"), (OneLayer, "made or read by others too"),
        (OneSize, "forward() fails with fewer of them"),
    ],
)  # fmt: skip
def test_what_more_than_a_product_depends_on_stays_and_says_why(make, why):
    model, x = built(make)
    found, _ = discovered(model, (x,), {})
    names = ("both.weight",) if make is OneLayer else ("query.weight", "key.weight")
    own = [group for group in found if any(slot.tensor in names for slot in group.makers)]
    reasons = [group.reason or "" for group in own if group.entries == 1]
    assert all(reasons)
    assert any(why in reason for reason in reasons)
