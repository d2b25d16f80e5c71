"""Padding-free and packed rows have the loss of padded rows, and no row sees another."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from arpo_trl.training.trainer import ArpoTrainer

# Flex attention compiles itself, with flags and decorators that torch 2.13 has deprecated; on a CPU that takes a minute.
FLEX = pytest.param(
    "flex_attention", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
)


def make_rows(seed: int, count: int = 24) -> Dataset:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        ids = [rng.randrange(300, 330) for _ in range(rng.randrange(4, 50))]
        labels = [token if i >= 2 else -100 for i, token in enumerate(ids)]
        made.append({"input_ids": ids, "labels": labels, "source": f"rows.jsonl:{number + 1}"})
    return Dataset.from_list(made)


def make_trainer(folder: Path, model: Path, rows: Dataset, attention: str = "sdpa", **changes: Any) -> ArpoTrainer:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return ArpoTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention),
        args=SFTConfig(**values | changes),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def row_losses(trainer: ArpoTrainer, batch: list[dict[str, Any]]) -> torch.Tensor:
    """Log-probabilities of all labelled tokens of a batch, in row order."""
    inputs = trainer.data_collator(batch)
    with torch.no_grad():
        output = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
    return output.log_probs[output.label_mask]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_loss_equals_the_loss_of_padded_rows(attention: str, tmp_path: Path, tiny_model: Path) -> None:
    rows, found = make_rows(0), {}
    for padding_free in (False, True):
        trainer = make_trainer(tmp_path, tiny_model, rows, attention, padding_free=padding_free)
        trainer.train()
        found[padding_free] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[True] == pytest.approx(found[False], abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLEX])
def test_no_row_sees_another(attention: str, tmp_path: Path, tiny_model: Path) -> None:
    rows = make_rows(1)
    trainer = make_trainer(tmp_path, tiny_model, rows, attention, padding_free=True)
    batch = [rows[i] for i in range(4)]
    together = row_losses(trainer, batch)
    alone = torch.cat([row_losses(trainer, [row]) for row in batch])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    changed = [dict(batch[0], input_ids=batch[0]["input_ids"][::-1]), *batch[1:]]
    first = sum(label != -100 for label in batch[0]["labels"][1:])
    assert not torch.allclose(row_losses(trainer, changed)[:first], together[:first], atol=1e-3)
    torch.testing.assert_close(row_losses(trainer, changed)[first:], together[first:], atol=1e-6, rtol=0)


def test_packing_separates_rows_and_loses_none(tmp_path: Path, tiny_model: Path) -> None:
    rows = make_rows(2)
    trainer = make_trainer(tmp_path, tiny_model, rows, packing=True, max_length=64, dataset_kwargs=None)
    packed = trainer.train_dataset
    assert len(packed) < len(rows)
    assert max(len(ids) for ids in packed["input_ids"]) <= 64
    pieces = []
    for bin_ in packed:
        position = 0
        for length in bin_["seq_lengths"]:
            pieces.append(tuple(bin_["input_ids"][position : position + length]))
            position += length
    assert sorted(pieces) == sorted(tuple(ids) for ids in rows["input_ids"])
    alone = make_trainer(tmp_path, tiny_model, rows, padding_free=True)
    by_ids = {tuple(row["input_ids"]): row for row in rows}
    together = row_losses(trainer, [packed[0]])
    position, expected = 0, []
    for length in packed[0]["seq_lengths"]:
        expected.append(row_losses(alone, [by_ids[tuple(packed[0]["input_ids"][position : position + length])]]))
        position += length
    assert len(expected) > 1
    torch.testing.assert_close(together, torch.cat(expected), atol=1e-5, rtol=0)
