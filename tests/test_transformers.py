"""The transformers callback in real runs of Trainer: accumulation, bf16, averaged weights, resume, two processes."""

import os
import sys

import pytest
import torch
from ranks import run
from torch.optim.swa_utils import AveragedModel
from trainers import POLICY, prepare_torchvision, run_example, same

from apoptorch import ArgumentError
from apoptorch.surgery import Surgery, following

prepare_torchvision()
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)  # fmt: skip

from apoptorch.integrations.transformers import ApoptosisCallback, load_pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = BertConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
WORDS = torch.randint(2, 32, (320, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "attention_mask": torch.ones(6).long(), "labels": row[0] % 2} for row in WORDS]


@pytest.fixture(autouse=True)
def without_datasets(monkeypatch):
    """The tests can import examples/datasets, which Trainer would take for the package datasets."""
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)


def build():
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG)


def fit(folder, callback, resume=None, model=None, **settings):
    model = model or build()
    settings = {"save_strategy": "no", "max_steps": 20, **settings}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=16, learning_rate=3e-3, use_cpu=True, report_to=[],
        disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    trainer = callback.bind(Trainer(model, arguments, train_dataset=DATA, callbacks=[callback]))
    trainer.train(resume_from_checkpoint=resume)
    return model


def hidden(model):
    return model.bert.encoder.layer[0].intermediate.dense.out_features


def cross_entropy(output, labels):
    return torch.nn.functional.cross_entropy(output["logits"].float(), labels)


@pytest.mark.parametrize(
    ("loss_fn", "settings"),
    [(None, {}), (cross_entropy, {}), (None, {"bf16": True, "gradient_accumulation_steps": 2})],
    ids=["own-loss", "loss-fn", "bf16-accumulated"],
)
def test_a_run_shrinks_the_model(tmp_path, loss_fn, settings):
    callback = ApoptosisCallback(loss_fn, policy=POLICY)
    model = fit(tmp_path, callback, **settings)
    assert callback.apoptosis.total_steps == callback.apoptosis.state_dict()["step"] == 20
    assert hidden(model) < 48
    assert callback.apoptosis.history[0].measured is not None


def test_resuming_and_loading(tmp_path):
    whole = fit(tmp_path, ApoptosisCallback(policy=POLICY), save_strategy="steps", save_steps=10)
    callback = ApoptosisCallback(policy=POLICY)
    resumed = fit(tmp_path / "again", callback, resume=str(tmp_path / "checkpoint-10"))
    assert callback.apoptosis.history[0].step <= 10
    assert callback.apoptosis.state_dict()["step"] == 20
    assert hidden(resumed) < 48
    loaded = load_pretrained(BertForSequenceClassification, tmp_path / "checkpoint-20")
    assert hidden(loaded) == hidden(whole)
    assert same(loaded, whole)
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        load_pretrained(BertForSequenceClassification, tmp_path)


def test_sizes_that_no_tensor_tells_are_in_the_configuration(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG).eval()
    before = model(WORDS[:8])["logits"]
    with Surgery(model) as surgery:
        surgery.resize_({"bert.encoder.layer.0.attention.self": {"attention_head_size": 4}})  # four heads, not two
    model.config.apoptosis_sizes = following(model)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(BertForSequenceClassification, tmp_path)
    assert loaded.bert.encoder.layer[0].attention.self.attention_head_size == 4
    assert torch.equal(loaded(WORDS[:8])["logits"], model(WORDS[:8])["logits"])
    assert not torch.equal(loaded(WORDS[:8])["logits"], before)


def test_an_average_of_the_weights_shrinks_alike(tmp_path):
    model = build()
    average = AveragedModel(model)

    class Averaging(ApoptosisCallback):
        def on_step_end(self, *args, **kwargs):
            average.update_parameters(kwargs["model"])
            super().on_step_end(*args, **kwargs)

    averaging = Averaging(policy=POLICY, followers=[average.module])
    fit(tmp_path, averaging, model=model, max_steps=8, save_strategy="steps", save_steps=6)
    assert hidden(average.module) == hidden(model) < 48
    resumed, average = build(), AveragedModel(build())
    averaging = Averaging(policy=POLICY, followers=[average.module])
    fit(tmp_path, averaging, str(tmp_path / "checkpoint-6"), resumed, max_steps=8)
    assert hidden(average.module) == hidden(resumed) == hidden(model)


def in_ddp(rank, folder):
    """Ten steps with a checkpoint after the sixth and its event, and the last four once more from there."""
    sys.modules["transformers.trainer"].is_datasets_available = lambda: False
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found = []
    for resume in (None, f"{folder}/checkpoint-6"):
        callback = ApoptosisCallback(policy=POLICY)
        model = fit(folder, callback, resume, max_steps=10, save_strategy="steps", save_steps=6)
        trainer, steps = callback._trainer, [event.step for event in callback.apoptosis.history]
        wrapper = type(trainer.model_wrapped).__name__
        found.append((wrapper, hidden(model), steps, [p.detach() for p in model.parameters()]))
    with pytest.raises(ArgumentError, match=r"got 2 of them\. Write trainer = callback\.bind"):
        ApoptosisCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    return found


def test_two_processes_end_with_one_narrow_network_also_when_they_resume(tmp_path):
    (first, *others), second = run(2, in_ddp, str(tmp_path))
    wrapper, width, steps, parameters = first
    assert wrapper == "DistributedDataParallel"
    assert width < 48
    assert steps[0] == 6
    for other in (*others, *second):
        assert other[:3] == first[:3]
        assert all(torch.equal(a, b) for a, b in zip(other[3], parameters, strict=True))


def test_the_example_runs(capsys):
    shown = run_example("with_transformers.py", capsys)
    assert " channels, last at step " in shown
