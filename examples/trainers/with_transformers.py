"""Neuron apoptosis in Hugging Face transformers: one callback."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from apoptorch import Policy
from apoptorch.integrations.transformers import ApoptosisCallback, load_pretrained

CONFIG = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, num_labels=2
)


def sentences(n: int) -> list[dict[str, torch.Tensor]]:
    """Random words; the label is whether the first word's number is even."""
    words = torch.randint(2, 64, (n, 12))
    return [{"input_ids": row, "attention_mask": torch.ones(12).long(), "labels": row[0] % 2} for row in words]


def main() -> None:
    set_seed(0)
    callback = ApoptosisCallback(
        policy=Policy(payback=0, full_run=1, first_step=30)
    )  # else so short a run is left alone
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=100, per_device_train_batch_size=32, learning_rate=1e-3, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=50,
        )  # fmt: skip
        model = BertForSequenceClassification(CONFIG)
        trainer = Trainer(model, settings, train_dataset=sentences(3200), callbacks=[callback])
        trainer.train()
        print(callback.apoptosis.explain())
        trainer.save_model(folder)
        small = load_pretrained(BertForSequenceClassification, folder)
        print(f"saved and loaded with {small.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
