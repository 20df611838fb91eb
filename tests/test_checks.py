"""What is refused at the door: data that the model or the loss doesn't take."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from trainers import POLICY, data, loss_fn, network

from apoptorch import Apoptosis, ArgumentError, shrink

Outputs = namedtuple("Outputs", ["logits", "aux"])


class WithAuxiliaryHead(nn.Module):
    """Returns a pair in training and a tensor in eval mode, as GoogLeNet and Inception do."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(10, 48), nn.Linear(48, 2), nn.Linear(48, 2)

    def forward(self, x):
        h = self.body(x).relu()
        return Outputs(self.head(h), self.aux(h)) if self.training else self.head(h)


def train(model, loss_fn, batches, **wrong):
    """One epoch; `wrong[n]` replaces what step number n is given."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    apoptosis = Apoptosis(
        model, optimizer, example_inputs=batches[0][0], loss_fn=loss_fn, total_steps=len(batches), policy=POLICY
    )
    for number, (x, y) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        inputs, targets = wrong.get(f"step{number}", (x, y))
        apoptosis.step(inputs, targets=targets)
    return apoptosis


def batches(n=10):
    x, y = data(32 * n)
    return list(zip(x.split(32), y.split(32), strict=True))


def test_a_loss_that_knows_the_training_output_only_is_told_what_it_gets_in_eval_mode():
    def training_loss(output, targets):
        return loss_fn(output.logits, targets) + 0.3 * loss_fn(output.aux, targets)

    with pytest.raises(ArgumentError, match=r"`loss_fn` must take .* Tensor \(32, 2\), in training Outputs, .*getattr"):
        train(WithAuxiliaryHead(), training_loss, batches())


def test_a_loss_for_both_outputs_shrinks_a_network_with_an_auxiliary_head():
    def either(output, targets):
        both = loss_fn(output.aux, targets) if isinstance(output, Outputs) else 0.0
        return loss_fn(getattr(output, "logits", output), targets) + 0.3 * both

    model = WithAuxiliaryHead()
    apoptosis = train(model, either, batches(30))
    assert apoptosis.history
    assert model(torch.zeros(2, 10)).aux.shape == (2, 2)
    assert model.body.out_features == apoptosis.history[-1].widths_after["body"]


@pytest.mark.parametrize("number", [1, 5])  # the first step, and one that gathers data
@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (
            torch.zeros(32, 11),
            torch.zeros(32).long(),
            r"`inputs` must fit model\.forward, got \(32, 11\): RuntimeError",
        ),
        (
            torch.zeros(32, 10),
            torch.zeros(31).long(),
            r"`loss_fn` must take .* \(32, 2\) and Tensor \(31,\): ValueError",
        ),
        (torch.zeros(32, 10), None, "`loss_fn` must take .* NoneType without tensors: TypeError.*Pass the targets"),
    ],
    ids=["inputs", "targets", "no targets"],
)
def test_a_batch_that_does_not_fit_is_refused_with_its_shapes_and_leaves_the_model_alone(
    number, inputs, targets, words
):
    model = network()
    with pytest.raises(ArgumentError, match=words):
        train(model, loss_fn, batches(), **{f"step{number}": (inputs, targets)})
    assert [layer.out_features for layer in model[::2]] == [48, 48, 2]
    assert model.training


def test_one_removal_names_what_does_not_fit():
    model, (x, y) = network(), data(64)
    with pytest.raises(ArgumentError, match=r"`inputs` must fit model\.forward, got \(64, 9\)"):
        Apoptosis(model, example_inputs=x, loss_fn=loss_fn).apoptose(x[:, :9], targets=y)
    with pytest.raises(ArgumentError, match=r"`calibration` must fit model\.forward, got \(64, 9\)"):
        shrink(model, [(x, y), (x[:, :9], y)], example_inputs=x, loss_fn=loss_fn)
    with pytest.raises(ArgumentError, match="`loss_fn` must take"):
        shrink(model, [(x, y[:63])], example_inputs=x, loss_fn=loss_fn)
