"""The transformers callback in real runs of Trainer: accumulation, bf16, resume, and loading what was saved."""

import pytest
import torch
from trainers import POLICY, prepare_torchvision, run_example, same

from apoptorch import ArgumentError

prepare_torchvision()
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

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


def fit(folder, callback, resume=None, **settings):
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG)
    arguments = TrainingArguments(
        str(folder), max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3, use_cpu=True, report_to=[],
        disable_tqdm=True, seed=0, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=DATA, callbacks=[callback]).train(resume_from_checkpoint=resume)
    return model


def hidden(model):
    return model.bert.encoder.layer[0].intermediate.dense.out_features


def cross_entropy(output, labels):
    return torch.nn.functional.cross_entropy(output["logits"].float(), labels)


@pytest.mark.parametrize(
    ("loss_fn", "settings"),
    [(None, {}), (cross_entropy, {}), (None, {"bf16": True, "gradient_accumulation_steps": 2})],
    ids=str,
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


def test_the_example_runs(capsys):
    shown = run_example("with_transformers.py", capsys)
    assert " channels, last at step " in shown
