"""Whole heads as channels: found, folded and removed; what can't follow is pinned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from planted import planted
from torch import nn

from apoptorch import load, save
from apoptorch.discovery import discovered
from apoptorch.multihead import NarrowMultiheadAttention, multi_head_attention
from apoptorch.plan import Fold, FoldPlan
from apoptorch.redundancy import fold, others, select_whole, unexplained
from apoptorch.surgery import Surgery
from benchmarks.zoo.families import GPT


def heads_of(model, x):
    return [group for group in discovered(model, (x,), {})[0] if group.entries > 1 and group.prunable]


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double()


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_loses_its_copied_heads_and_comes_back_from_disk(batch_first, tmp_path):
    model, x = encoder(batch_first), torch.randn(24, 5, 16, dtype=torch.float64)
    outcome, _ = planted(model, (x,), most=8)
    assert outcome.problems == []
    assert outcome.left["layers.0.self_attn.heads"] == 2
    assert model.layers[0].self_attn.num_heads == 2
    with torch.no_grad():
        expected = model.eval()(x)  # as deployed: where torch has fused kernels
    save(model, tmp_path)
    fresh = encoder(batch_first)
    load(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), expected, rtol=0, atol=0)


def test_heads_that_go_and_come_back():
    """The fold leaves the full model with those heads masked; undone, the layer is torch's own again."""
    model, x = encoder(True), torch.randn(3, 5, 16, dtype=torch.float64)
    (group,) = heads_of(model, x)
    masked, keep = copy.deepcopy(model), torch.tensor([0, 3])
    with torch.no_grad():
        masked.layers[0].self_attn.out_proj.weight.unflatten(1, (4, 4))[:, [1, 2]] = 0.0
    before = model(x)
    coeffs = torch.eye(16, dtype=torch.float64)[:, group.entries_of(keep)]
    with Surgery(model) as surgery:
        surgery.fold_(group, FoldPlan(group.name, keep, (Fold(coeffs),)))
        assert type(model.layers[0].self_attn) is NarrowMultiheadAttention
        torch.testing.assert_close(model(x), masked(x))
        torch.testing.assert_close(copy.deepcopy(model)(x), masked(x))
        surgery.undo_()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", [(None, None), ("bool", "bool"), ("float", None), ("heads", "bool")])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 4}])
def test_attention_step_by_step_is_torchs_own(options, masks, need_weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).double()
    query, key = torch.randn(3, 4, 8).double(), torch.randn(3, 5, options.get("kdim", 8)).double()
    value = torch.randn(3, 5, options.get("vdim", 8)).double()
    seen = torch.rand(4, 5) < 0.7
    seen[:, 0] = True
    known = {None: None, "bool": ~seen, "float": torch.randn(4, 5).double(), "heads": torch.randn(6, 4, 5).double()}
    padding = None if masks[1] is None else torch.arange(5).expand(3, 5) > 3
    given = {"need_weights": need_weights, "attn_mask": known[masks[0]], "key_padding_mask": padding}
    expected = layer(query, key, value, **given)
    layer.__class__ = NarrowMultiheadAttention
    found = layer(query, key, value, **given)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_it_takes_the_arguments_of_torchs_function():
    torch.manual_seed(0)
    x = torch.randn(4, 8).double()  # without a batch
    weights = torch.randn(24, 8).double(), torch.randn(24).double()
    out = torch.randn(8, 8).double(), torch.randn(8).double()
    args = (x, x, x, 8, 2, *weights, None, None, False, 0.0, *out)
    for found, expected in zip(multi_head_attention(*args), F.multi_head_attention_forward(*args), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_number_of_heads_that_must_follow_is_found_where_forward_does_not_fail():
    """24 channels cut into 4 heads as before would be other heads, of 6 channels each."""
    torch.manual_seed(0)
    groups = heads_of(GPT(width=32, heads=4), torch.randint(40, (4, 6)))
    assert [[size.name for size in group.sizes] for group in groups] == [["heads"], ["heads"]]


class Fixed(nn.Module):
    """The number of heads is written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_number_of_heads_in_the_code_pins():
    torch.manual_seed(0)
    assert heads_of(Fixed(), torch.randn(4, 6, 16)) == []


def test_whole_channels_are_chosen_greedily_and_their_error_is_what_the_fold_leaves():
    torch.manual_seed(0)
    entries, count = 3, 5
    a = torch.randn(200, count * entries, dtype=torch.float64)
    a[:, 3:6] = a[:, 9:12] @ torch.randn(3, 3, dtype=torch.float64)  # channel 1 follows from channel 3
    root = torch.randn(15, 15, dtype=torch.float64)
    second, metric = a.T @ a / len(a), root @ root.T
    found = select_whole(second, None, metric, entries, stop=0.0)
    assert len({1, 3} & set(found.order[:4].tolist())) == 1
    for kept in range(1, count):
        keep = (found.order[:kept, None] * entries + torch.arange(entries)).flatten().sort().values
        rest, lost = unexplained(second, None, keep, fold(second, None, keep)), others(keep, len(second))
        left = 0.5 * float((metric[lost][:, lost] * rest).sum())
        assert float(found.error[kept]) == pytest.approx(left, abs=1e-7)
    assert float(found.error[4]) == pytest.approx(0.0, abs=1e-7)
